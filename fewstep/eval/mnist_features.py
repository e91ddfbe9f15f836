"""Features of MNIST at 16x16: a small classifier, trained by tools/train_mnist_features.py.

Its 32-dimensional features carry `fd_mnist`, precision and recall; its decisions carry the label
accuracy. It was trained on the training digits alone. The distance in its features is not an FID
and must not be called one.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import as_file, files

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class MnistFeatures(nn.Module):
    """(B, 1, 16, 16) in [-1, 1] -> features (B, 32); `classify` gives logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 96, 3, padding=1, stride=2)
        self.hidden = nn.Linear(96 * 16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.conv1(x))
        h = F.silu(self.conv2(h))
        h = F.silu(self.conv3(h))
        h = F.silu(self.conv4(h))
        return F.silu(self.hidden(h.flatten(1)))

    def classify(self, features: Tensor) -> Tensor:
        """Logits of the ten digits from features (B, 32)."""
        return self.head(features)


@lru_cache(maxsize=1)
def pretrained() -> MnistFeatures:
    """The shipped weights (stored as float16), in evaluation mode."""
    net = MnistFeatures()
    with as_file(files("fewstep.eval") / "assets" / "mnist_features.safetensors") as path:
        state = load_file(path)
    net.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return net.requires_grad_(False).eval()


@torch.no_grad()
def features_and_labels(x: Tensor, batch: int = 1024) -> tuple[Tensor, Tensor]:
    """Features (N, 32) and predicted labels (N,) of pictures (N, 1, 16, 16)."""
    net = pretrained().to(x.device)
    features = torch.cat([net(part) for part in x.split(batch)])
    return features, net.classify(features).argmax(1)
