"""Models of transformers in tiny configurations, with the symmetries that arithmetic gives them.

A norm of width d has d rescalings if linear maps read its result, untied and without a residual path. A head with keys
of size k has a matrix symmetry of Q and K, or k / 2 rescalings if the keys are rotated by position, and a matrix
symmetry of V and O. Gated layers have a rescaling per neuron.
"""

import logging
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from animals import Animal, Kinds, ids, language

TOKENS = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LAYER = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4}
SHARED = {**HEADS, "num_key_value_heads": 2}
POSITIONS = {"max_position_embeddings": 16}


def image(model: nn.Module, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).logits.square().mean(1)


def built(model: str, config: str, settings: dict[str, Any], *, pictures: bool = False, experts: str = "") -> Any:
    """A model off its special point, its loss and its batch."""
    logging.disable(logging.WARNING)
    made = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    if experts:
        made.config._experts_implementation = experts
    logging.disable(logging.NOTSET)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    if pictures:
        return made, image, torch.randn(4, 2, 8, 8, generator=generator)
    return made, language, ids(11, 4, 6)


def animal(
    title: str, family: str, expected: Kinds, *, experts: str = "", exact: bool = False, **settings: Any
) -> Animal:
    """A causal language model of a family."""
    build = partial(built, f"{family}ForCausalLM", f"{family}Config", {**TOKENS, **settings}, experts=experts)
    return Animal(title, build, expected, coarse=not exact, slow=True)


GATED_ROTARY: Kinds = {("diagonal", 16): 3, ("diagonal", 2): 2, ("matrix", 10): 2, ("diagonal", 12): 1}
PLAIN: Kinds = {("diagonal", 16): 2, ("matrix", 10): 8}
DEEPSEEK = {
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 4, "q_lora_rank": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "qk_nope_head_dim": 4, "n_routed_experts": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 6,
}  # fmt: skip
DINO = {
    "image_size": 8, "patch_size": 4, "num_channels": 2, "num_labels": 3, "hidden_size": 16, "mlp_ratio": 1,
    "num_hidden_layers": 1,
}  # fmt: skip
SWIN = {
    "image_size": 8, "patch_size": 2, "num_channels": 2, "embed_dim": 8, "depths": [2], "num_heads": [2],
    "window_size": 2, "num_labels": 3,
}  # fmt: skip
MODERN = {"attn_implementation": "sdpa", "cls_token_id": 0, "sep_token_id": 0}
MIXTRAL = {**LAYER, **SHARED, "num_experts_per_tok": 2}

TRANSFORMERS = [
    # Two norms, and Q-K and V-O of four heads of size 4. The last norm is read by the tied embedding.
    animal("BLOOM", "Bloom", PLAIN, hidden_size=16, n_layer=1, n_head=4, exact=True),
    animal("Falcon", "Falcon", {("diagonal", 16): 2, ("diagonal", 2): 2, ("matrix", 10): 2}, hidden_size=16,
           num_hidden_layers=1, new_decoder_architecture=True, num_kv_heads=2, alibi=False, **HEADS),
    # Three norms, the norms of the latent queries and keys, 12 neurons; one key of two frequencies for all heads, whose
    # rows are not adjacent.
    animal("DeepSeek-V3", "DeepseekV3", {("diagonal", 16): 3, ("diagonal", 6): 1, ("diagonal", 4): 1,
           ("diagonal", 12): 1, ("scalar", 1): 2, ("matrix", 10): 4}, **LAYER, **DEEPSEEK),
    animal("GPT-J", "GPTJ", {("diagonal", 16): 2, ("diagonal", 2): 2, ("matrix", 10): 2, ("matrix", 36): 2},
           n_embd=16, n_layer=1, n_head=2, n_positions=16, rotary_dim=4),
    animal("Mixtral, two experts", "Mixtral", {("diagonal", 16): 3, ("diagonal", 2): 2, ("matrix", 10): 2,
           ("diagonal", 6): 2}, num_local_experts=2, experts="batched_mm", **{**MIXTRAL, "intermediate_size": 6}),
    animal("Mixtral, two of four experts", "Mixtral", {**GATED_ROTARY, ("diagonal", 12): 4}, num_local_experts=4,
           **MIXTRAL),
    animal("OPT", "OPT", {**PLAIN, ("diagonal", 12): 1}, hidden_size=16, ffn_dim=12, num_hidden_layers=1,
           word_embed_proj_dim=16, dropout=0.0, **HEADS, **POSITIONS, exact=True),
    # Gains of the norms of queries and keys, by frequency.
    animal("Qwen3", "Qwen3", {**GATED_ROTARY, ("diagonal", 2): 1}, head_dim=4, tie_word_embeddings=False, **LAYER,
           **SHARED),
    # Its norms multiply by 1 + weight, which no scaling of the weight leaves alone.
    animal("Gemma 2", "Gemma2", {("diagonal", 2): 2, ("matrix", 10): 2, ("diagonal", 12): 1}, head_dim=4,
           query_pre_attn_scalar=4, **LAYER, **SHARED),
    # Its norms stand before the residual stream, but for the last norm.
    animal("OLMo 2", "Olmo2", {**GATED_ROTARY, ("diagonal", 16): 1}, **LAYER, **SHARED),
    animal("MPT", "Mpt", PLAIN, d_model=16, n_heads=4, n_layers=1, max_seq_len=16, expansion_ratio=1),
    # Half of each head is rotated: one frequency, and a matrix for the other half.
    animal("Phi", "Phi", {("diagonal", 16): 2, ("scalar", 1): 4, ("matrix", 3): 4, ("matrix", 10): 4}, **LAYER, **HEADS,
           **POSITIONS),
    animal("GPT-NeoX", "GPTNeoX", {("diagonal", 16): 3, ("scalar", 1): 4, ("matrix", 3): 4, ("matrix", 10): 4}, **LAYER,
           **HEADS, **POSITIONS),
    animal("Phi-3", "Phi3", GATED_ROTARY, original_max_position_embeddings=16, **LAYER, **SHARED, **POSITIONS),
    animal("Qwen2", "Qwen2", GATED_ROTARY, tie_word_embeddings=False, **LAYER, **SHARED),
    # The first norm of attention is an identity; the head has a dense layer before the tied embedding.
    Animal("ModernBERT", partial(built, "ModernBertForMaskedLM", "ModernBertConfig",
           {**TOKENS, **LAYER, **HEADS, **POSITIONS, **MODERN}),
           {("diagonal", 12): 1, ("diagonal", 16): 2, ("diagonal", 2): 4, ("matrix", 10): 4}, coarse=True, slow=True),
    # Scales of both branches stand in front of the residual stream.
    Animal("DINOv2", partial(built, "Dinov2ForImageClassification", "Dinov2Config", {**DINO, **HEADS}, pictures=True),
           {("diagonal", 16): 5, ("matrix", 10): 8}, slow=True),
    Animal("Swin", partial(built, "SwinForImageClassification", "SwinConfig", SWIN, pictures=True),
           {("diagonal", 8): 5, ("matrix", 10): 8}, slow=True),
]  # fmt: skip
