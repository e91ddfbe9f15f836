"""Features of handwritten digits: small classifiers, trained by tools/train_features.py.

Their features carry `fd_digits` and `fd_mnist`, precision and recall; their decisions carry the
label accuracy. Each was trained on the training pictures of its set alone. A distance in these
features is not an FID and must not be called one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Architecture of a classifier: picture side, convolutions (channels, stride), features."""

    side: int
    convs: Sequence[tuple[int, int]]
    features: int


LAYOUTS: Mapping[str, Layout] = {
    "digits": Layout(8, ((32, 1), (48, 2), (64, 1)), 64),
    "mnist": Layout(16, ((24, 1), (48, 2), (64, 1), (96, 2)), 32),
}


class Classifier(nn.Module):
    """(B, 1, S, S) in [-1, 1] -> features (B, F); `classify` gives logits (B, 10)."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        width, side = 1, layout.side
        for number, (channels, stride) in enumerate(layout.convs, 1):
            conv = nn.Conv2d(width, channels, 3, padding=1, stride=stride)
            self.add_module(f"conv{number}", conv)
            width, side = channels, side // stride
        self.hidden = nn.Linear(width * side**2, layout.features)
        self.head = nn.Linear(layout.features, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 1, S, S) in [-1, 1] -> features (B, F)."""
        return self.layers(x)[-1]

    def layers(self, x: Tensor) -> list[Tensor]:
        """Pictures (B, 1, S, S) -> the outputs of all convolutions, and the features (B, F)."""
        out = [x]
        for name, layer in self.named_children():
            if name.startswith("conv"):
                out.append(F.silu(layer(out[-1])))
        return [*out[1:], F.silu(self.hidden(out[-1].flatten(1)))]

    def classify(self, features: Tensor) -> Tensor:
        """Logits of the ten digits from features (B, F)."""
        out: Tensor = self.head(features)
        return out


@lru_cache
def shipped(name: str) -> Classifier:
    """The classifier whose weights come with fewstep (stored as float16), in evaluation mode."""
    net = Classifier(LAYOUTS[name])
    with as_file(files("fewstep.eval") / "assets" / f"{name}_features.safetensors") as path:
        state = load_file(path)
    net.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return net.requires_grad_(False).eval()


@torch.no_grad()
def features_and_labels(name: str, x: Tensor, batch: int = 1024) -> tuple[Tensor, Tensor]:
    """Features (N, F) and predicted labels (N,) of pictures (N, 1, S, S), by a shipped network."""
    net = shipped(name).to(x.device)
    features = torch.cat([net(part) for part in x.split(batch)])
    return features, net.classify(features).argmax(1)
