"""The sentence encoder of sentence_encoder.py, of which the last layer and the head are fine-tuned.

Run it with ``noetherflow forecast examples/sentence_layer.py``; it needs what sentence_encoder.py needs.
"""

from sentence_encoder import fine_tuned
from torch import nn
from torch.utils.data import DataLoader, Subset

import noetherflow as nf

# Of the docstrings: products with the Hessian, about three hundred, go through all of them.
EXAMPLES = 16


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The encoder after two epochs of fine-tuning of the last layer, its loss, a part of its data, and its settings."""
    model, loss, dataset, sgd = fine_tuned(layers=1)
    return model, loss, DataLoader(Subset(dataset, range(EXAMPLES)), batch_size=8), sgd
