"""LoRA adapters (peft) on the GPT-2 of gpt2.py, which learn new words. Only the adapters are trained.

Run it with ``noetherflow analyze examples/lora.py``; it needs ``pip install transformers peft``, and downloads nothing.

An adapter adds B A x to a frozen layer, and B starts at zero. Multiply A by an invertible matrix from the left and B by
its inverse from the right: the function stays. While B = 0, no member of this family balances the two factors, since
nothing can be moved from A to B; the status is `degenerate`, and the message says so. After a few steps there is an
equilibrium. ``adapted(steps=0)`` is the model at its start.

Expected: 4 symmetries, all converged.
"""

import warnings

import gpt2
import torch
from peft import LoraConfig, get_peft_model
from text import NEW_OBJECTS, loss, train, windows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import noetherflow as nf

EXAMPLES, BATCH_SIZE, LR, WEIGHT_DECAY, RANK = 256, 16, 0.3, 1e-3, 3


def adapted(steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.SGD, TensorDataset]:
    """The model with adapters after some steps of fine-tuning, its optimizer, and its data."""
    model, _, _, _ = gpt2.trained(seed)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft and transformers about each other
        model = get_peft_model(model, config).double()
    generator = torch.Generator().manual_seed(seed + 1)
    dataset = windows(EXAMPLES, generator, NEW_OBJECTS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR, weight_decay=WEIGHT_DECAY)
    data = TensorDataset(*dataset[: steps * BATCH_SIZE])
    train(model, loss, data, optimizer, epochs=int(steps > 0), batch_size=BATCH_SIZE, generator=generator)
    return model, optimizer, dataset


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The model after 16 steps of fine-tuning, its loss, its data, and the settings it trains with."""
    model, optimizer, dataset = adapted(EXAMPLES // BATCH_SIZE)
    sgd = nf.SGD.from_optimizer(optimizer, batch_size=BATCH_SIZE, replacement=False, dataset_size=len(dataset))
    return model, loss, DataLoader(dataset, batch_size=64), sgd
