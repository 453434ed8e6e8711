"""Hugging Face's BERT, two layers and 32 wide, which learns to fill in hidden characters of text.

Run it with ``noetherflow analyze examples/bert.py``; it needs ``pip install transformers``, and downloads nothing.

Expected: 9 symmetries, all converged. The norms stand behind the sums of the residual stream, so that only the norm in
front of the head of the language model has a free gain.
"""

import torch
from text import ALPHABET, LENGTH, MASK, train, windows
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForMaskedLM

import noetherflow as nf

EXAMPLES, EPOCHS, BATCH_SIZE, LR, WEIGHT_DECAY = 384, 12, 16, 1e-2, 1e-3
HIDDEN_SHARE = 0.15


def data(generator: torch.Generator) -> TensorDataset:
    """Windows of text with hidden characters, and the complete text."""
    # The characters are chosen once, for all epochs: every measurement has to see the same data.
    (text,) = windows(EXAMPLES, generator).tensors
    hidden = torch.rand(text.shape, generator=generator) < HIDDEN_SHARE
    hidden[:, 0] |= ~hidden.any(1)
    return TensorDataset(text.masked_fill(hidden, MASK), text)


def network() -> nn.Module:
    """BERT with random weights and without dropout, in float64."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(ALPHABET) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config).double()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the hidden characters, averaged over a window: a number for each window."""
    tokens, text = batch
    hidden = tokens == MASK
    losses = nn.functional.cross_entropy(model(input_ids=tokens).logits.mT, text, reduction="none")
    return (losses * hidden).sum(1) / hidden.sum(1)


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The model after 288 steps of AdamW, its loss, its data, and settings of SGD with which training could go on."""
    generator = torch.Generator().manual_seed(0)
    dataset = data(generator)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    train(model, loss, dataset, optimizer, epochs=EPOCHS, batch_size=BATCH_SIZE, generator=generator)
    sgd = nf.SGD(lr=0.05, batch_size=BATCH_SIZE, weight_decay=WEIGHT_DECAY, momentum=0.9)
    return model, loss, DataLoader(dataset, batch_size=64), sgd
