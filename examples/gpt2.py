"""Hugging Face's GPT-2, two layers and 32 wide, trained for seconds on text from a small grammar.

Run it with ``noetherflow analyze examples/gpt2.py``; it needs ``pip install transformers``, and downloads nothing.

Expected: 12 symmetries, all converged. They are the gains of the norms in front of linear layers, and for each head
a group of matrices of queries and keys and a group of values and outputs. GELU leaves none inside the MLP.
"""

import torch
from text import ALPHABET, LENGTH, loss, train, windows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import noetherflow as nf

EXAMPLES, EPOCHS, BATCH_SIZE, LR, WEIGHT_DECAY = 512, 10, 16, 3e-3, 1e-3


def network(seed: int = 0) -> nn.Module:
    """GPT-2 with random weights and without dropout, in float64."""
    torch.manual_seed(seed)
    rest = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=len(ALPHABET), n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, **rest)
    return GPT2LMHeadModel(config).double()


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW, TensorDataset, torch.Generator]:
    """The model after 320 steps of AdamW, the optimizer, the data, and the generator that orders the data."""
    generator = torch.Generator().manual_seed(seed)
    dataset = windows(EXAMPLES, generator)
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    train(model, loss, dataset, optimizer, epochs=EPOCHS, batch_size=BATCH_SIZE, generator=generator)
    return model, optimizer, dataset, generator


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The trained model, its loss, its data, and the settings of SGD with which its training could go on."""
    model, _, dataset, _ = trained()
    sgd = nf.SGD(
        lr=0.05,
        batch_size=BATCH_SIZE,
        weight_decay=WEIGHT_DECAY,
        momentum=0.9,
        replacement=False,
        dataset_size=len(dataset),
    )
    return model, loss, DataLoader(dataset, batch_size=64), sgd
