"""Hugging Face's Mixtral, a mixture of experts: a router sends every token to two of three experts.

Run it with ``noetherflow analyze examples/mixture.py``; it needs ``pip install transformers``, and downloads nothing.

Expected: 15 symmetries, all converged. The gain of the norm before the experts can be moved into the router and all
experts together, and every expert has neurons that can be rescaled. The grouped matrix products of the experts exist in
float32 only, so that the analysis is computed in float32, as a note says.
"""

import torch
from text import ALPHABET, LENGTH, loss, train, windows
from torch import nn
from torch.utils.data import DataLoader
from transformers import MixtralConfig, MixtralForCausalLM

import noetherflow as nf

EXAMPLES, EPOCHS, BATCH_SIZE, LR, WEIGHT_DECAY = 256, 6, 16, 3e-3, 1e-3


def network() -> nn.Module:
    """Mixtral with random weights: two layers, 16 wide, three experts in each."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(ALPHABET),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    return MixtralForCausalLM(config)


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The model after 96 steps of AdamW, its loss, its data, and settings of SGD with which training could go on."""
    generator = torch.Generator().manual_seed(0)
    dataset = windows(EXAMPLES, generator)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    train(model, loss, dataset, optimizer, epochs=EPOCHS, batch_size=BATCH_SIZE, generator=generator)
    sgd = nf.SGD(lr=0.05, batch_size=BATCH_SIZE, weight_decay=WEIGHT_DECAY, momentum=0.9)
    return model, loss, DataLoader(dataset, batch_size=64), sgd
