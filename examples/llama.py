"""Hugging Face's Llama (grouped queries, rotary embedding, SwiGLU, RMSNorm), two layers and 32 wide, trained briefly.

Run it with ``noetherflow analyze examples/llama.py``; it needs ``pip install transformers``, and downloads nothing.

Expected: 15 symmetries, all converged. Rotary embedding leaves queries and keys a scaling of each pair of rows; SwiGLU
has the rescalings of its linear branch.
"""

import torch
from text import ALPHABET, LENGTH, loss, train, windows
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import noetherflow as nf

EXAMPLES, EPOCHS, BATCH_SIZE, LR, WEIGHT_DECAY = 384, 8, 16, 3e-3, 1e-3


def network() -> nn.Module:
    """Llama with random weights, in float64: four heads of queries share two heads of keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).double()


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The model after 192 steps of AdamW, its loss, its data, and settings of SGD with which training could go on."""
    generator = torch.Generator().manual_seed(0)
    dataset = windows(EXAMPLES, generator)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    train(model, loss, dataset, optimizer, epochs=EPOCHS, batch_size=BATCH_SIZE, generator=generator)
    sgd = nf.SGD(lr=0.05, batch_size=BATCH_SIZE, weight_decay=WEIGHT_DECAY, momentum=0.9)
    return model, loss, DataLoader(dataset, batch_size=64), sgd
