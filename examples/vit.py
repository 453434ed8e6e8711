"""A vision transformer on handwritten digits: 16 patches of 2 x 2 pixels, two layers, 32 wide.

Run it with ``noetherflow analyze examples/vit.py``.

Expected: 15 symmetries, all converged.
"""

import torch
from digits_mlp import data, loss
from torch import Tensor, nn
from torch.utils.data import DataLoader

import noetherflow as nf

WIDTH, HEADS, LAYERS = 32, 2, 2
EXAMPLES, EPOCHS, BATCH_SIZE, LR, WEIGHT_DECAY = 512, 8, 32, 2e-3, 1e-3


class ViT(nn.Module):
    """Patches, positions, layers of attention and ReLU with the norms first, and the mean over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(16, WIDTH) / 5)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 64)."""
        x = self.patches(images.view(-1, 1, 8, 8)).flatten(2).mT + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def build() -> tuple[nn.Module, nf.Loss, DataLoader, nf.SGD]:
    """The model after 128 steps of AdamW, its loss, its data, and settings of SGD with which training could go on."""
    torch.manual_seed(0)
    dataset = torch.utils.data.TensorDataset(*data()[:EXAMPLES])
    model = ViT().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for _ in range(EPOCHS):
        for batch in DataLoader(dataset, BATCH_SIZE, shuffle=True):
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()
    sgd = nf.SGD(lr=0.05, batch_size=BATCH_SIZE, weight_decay=WEIGHT_DECAY, momentum=0.9)
    return model.eval(), loss, DataLoader(dataset, batch_size=128), sgd
