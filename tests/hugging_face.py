"""Tiny models of Hugging Face Transformers with random weights: a list for a sweep over architectures."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import noetherflow as nf

# Tokens, width, width of the hidden layer, layers, heads.
VOCAB, WIDTH, HIDDEN, LAYERS, HEADS = 17, 32, 48, 2, 4
LENGTH, BATCH, BATCHES = 6, 8, 2
SEQUENCE = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    **SEQUENCE,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
IMAGE = {key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
DECODER = TEXT | {"max_position_embeddings": 16}
Subject = tuple[nn.Module, nf.Loss, list[Any]]


def next_token(model: nn.Module, batch: Tensor) -> Tensor:
    scores = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return cross_entropy(scores.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


def masked_token(model: nn.Module, batch: Tensor) -> Tensor:
    """The tokens themselves are the labels."""
    return cross_entropy(model(input_ids=batch).logits.transpose(1, 2), batch, reduction="none").mean(1)


def image_class(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    pixels, labels = batch
    return cross_entropy(model(pixel_values=pixels).logits, labels, reduction="none")


def translation(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    source, target = batch
    scores = model(input_ids=source, decoder_input_ids=target, use_cache=False).logits[:, :-1]
    return cross_entropy(scores.transpose(1, 2), target[:, 1:], reduction="none").mean(1)


def speech(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    sound, target = batch
    scores = model(input_features=sound, decoder_input_ids=target, use_cache=False).logits[:, :-1]
    return cross_entropy(scores.transpose(1, 2), target[:, 1:], reduction="none").mean(1)


def similarity(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """How far the cosine of a text and its image is from 1, so that examples do not depend on each other."""
    tokens, pixels = batch
    output = model(input_ids=tokens, pixel_values=pixels)
    return (1 - (output.text_embeds * output.image_embeds).sum(1)).square()


def sound_class(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    sound, labels = batch
    return cross_entropy(model(input_values=sound).logits, labels, reduction="none")


def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, LENGTH))


def pairs() -> tuple[Tensor, Tensor]:
    return tokens(), tokens()


def images(size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, 3, size, size), torch.randint(4, (BATCH,))


def _decoder(name: str, **sizes: Any) -> Callable[[], Subject]:
    def build() -> Subject:
        config = getattr(transformers, f"{name}Config")(**DECODER | sizes)
        return getattr(transformers, f"{name}ForCausalLM")(config), next_token, [tokens() for _ in range(BATCHES)]

    return build


def _encoder(name: str, **sizes: Any) -> Callable[[], Subject]:
    def build() -> Subject:
        config = getattr(transformers, f"{name}Config")(**DECODER | sizes)
        return getattr(transformers, f"{name}ForMaskedLM")(config), masked_token, [tokens() for _ in range(BATCHES)]

    return build


def _vision(name: str, pixels: int = 16, **sizes: Any) -> Callable[[], Subject]:
    def build() -> Subject:
        config = getattr(transformers, f"{name}Config")(num_labels=4, **sizes)
        model = getattr(transformers, f"{name}ForImageClassification")(config)
        return model, image_class, [images(pixels) for _ in range(BATCHES)]

    return build


def _gpt2() -> Subject:
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SEQUENCE | sizes))
    return model, next_token, [tokens() for _ in range(BATCHES)]


def _t5() -> Subject:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, vocab_size=VOCAB, decoder_start_token_id=0)
    )
    return model, translation, [pairs() for _ in range(BATCHES)]


def _whisper() -> Subject:
    sizes: dict[str, Any] = {"d_model": WIDTH, "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 8}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": LAYERS, f"{side}_attention_heads": HEADS, f"{side}_ffn_dim": HIDDEN}
    config = transformers.WhisperConfig(**SEQUENCE | sizes, decoder_start_token_id=1)
    batches = [(torch.randn(BATCH, 8, 12), tokens()) for _ in range(BATCHES)]
    return transformers.WhisperForConditionalGeneration(config), speech, batches


def _clip() -> Subject:
    text, image = DECODER | {"projection_dim": WIDTH}, IMAGE | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=WIDTH)
    return transformers.CLIPModel(config), similarity, [(tokens(), images()[0]) for _ in range(BATCHES)]


def _wav2vec2() -> Subject:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(
        **SEQUENCE | IMAGE | convolutions | positions, classifier_proj_size=16, num_labels=4, layerdrop=0.0
    )
    batches = [(torch.randn(BATCH, 200), torch.randint(4, (BATCH,))) for _ in range(BATCHES)]
    return transformers.Wav2Vec2ForSequenceClassification(config), sound_class, batches


STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
_MAKERS: dict[str, Callable[[], Subject]] = {
    "GPT-2": _gpt2,
    "Llama": _decoder("Llama", num_key_value_heads=2),
    "BERT": _encoder("Bert"),
    "DistilBERT": _encoder("DistilBert", dim=WIDTH, hidden_dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS),
    "ViT": _vision("ViT", **IMAGE, image_size=16, patch_size=8),
    "T5": _t5,
    "Whisper": _whisper,
    "GPT-NeoX": _decoder("GPTNeoX"),
    "OPT": _decoder("OPT", ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH),
    "Qwen3": _decoder("Qwen3", num_key_value_heads=2, head_dim=8),
    "Gemma-2": _decoder("Gemma2", num_key_value_heads=2, head_dim=8, sliding_window=4),
    "CLIP": _clip,
    "wav2vec2": _wav2vec2,
    "Mixtral": _decoder("Mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    "DeepSeek-V3": _decoder(
        "DeepseekV3",
        num_key_value_heads=HEADS,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "Mamba": _decoder("Mamba", state_size=4, expand=2, conv_kernel=4, time_step_rank=4),
    "Mamba-2": _decoder("Mamba2", state_size=4, expand=2, num_heads=4, head_dim=16, n_groups=1, chunk_size=4),
    "ResNet": _vision("ResNet", embedding_size=16, layer_type="basic", **STAGES),
    "ConvNeXt": _vision("ConvNext", patch_size=4, num_stages=2, **STAGES),
    "Swin": _vision("Swin", image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
    "RWKV": _decoder("Rwkv", attention_hidden_size=WIDTH, context_length=8),
}
NAMES = list(_MAKERS)


def subject(name: str) -> Subject:
    """A model in eval mode, its loss and two batches, made anew from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, loss, batches = _MAKERS[name]()
        return model.eval(), loss, batches
