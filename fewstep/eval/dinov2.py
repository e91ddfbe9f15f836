"""The features of FD-DINOv2, from a local folder of transformers' Dinov2Model.

Oquab et al. 2023, https://arxiv.org/abs/2304.07193; as a measure of generators Stein et al. 2023,
https://arxiv.org/abs/2306.04675, who use ViT-L/14 (1024 features): pictures resized to 224x224
by antialiased bicubic interpolation, ImageNet's mean and deviation, and the class token after
the last normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.eval.features import PublishedFeatures, channels_first
from fewstep.storage.files import digest, read_json

SIDE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def positions(table: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n^2, D) for side x side patches: (1, 1 + side^2, D).

    DINOv2's own code stretches the n x n table by (side + 0.1) / n, not by side / n as
    transformers does; the features of the published statistics have the former.
    """
    n = math.isqrt(table.shape[1] - 1)
    grid = table[:, 1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    if n != side:
        scale = (side + 0.1) / n
        grid = F.interpolate(grid.float(), scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], grid.to(table).flatten(2).mT], 1)


class Dinov2(PublishedFeatures):
    """Features (B, dim) of pictures; no logits."""

    family, label = "fd_dinov2", "dinov2"

    def __init__(self, model: Any, sha256: str, device: torch.device | str = "cpu") -> None:
        """`model` is a Dinov2Model; its position embeddings are set to those for 224x224."""
        super().__init__(sha256)
        self.dim: int = model.config.hidden_size
        table = positions(
            model.embeddings.position_embeddings.detach(), SIDE // model.config.patch_size
        )
        model.embeddings.position_embeddings = nn.Parameter(table)
        self.model = model.requires_grad_(False).eval().to(device)
        self.device = device
        self.mean, self.deviation = (
            torch.tensor(values, device=device)[:, None, None] for values in (MEAN, DEVIATION)
        )

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, None]:
        features: Tensor = self.model(
            self._input(channels_first(pictures, self.device))
        ).pooler_output
        return features, None

    def layers(self, x: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Tokens (B, dim, 1 + patches) after blocks `layers`, with their gradient.

        Args: x, pictures (B, 1 or 3, H, W) of values 0 to 255; layers, numbers of blocks from 0.
        ValueError where there is no such block.
        """
        blocks = self.model.config.num_hidden_layers
        if wrong := [k for k in layers if not 0 <= k < blocks]:
            raise ValueError(f"this DINOv2 has blocks 0 to {blocks - 1}, not {wrong[0]}")
        seen = self.model(self._input(x.expand(-1, 3, -1, -1)), output_hidden_states=True)
        return [seen.hidden_states[k + 1].mT for k in layers]

    def _input(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) of values 0 to 255, as the network takes them."""
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
        return (x / 255 - self.mean) / self.deviation


def load_dinov2(folder: Path, device: torch.device | str = "cpu") -> Dinov2:
    """The network in `folder`, which holds config.json and model.safetensors.

    ValueError where transformers is missing or the folder holds something else.
    """
    try:
        from transformers import Dinov2Model
    except ImportError:
        raise ValueError(
            f"{folder}: DINOv2 needs transformers; install it with: pip install transformers"
        ) from None
    weights = folder / "model.safetensors"
    facts = read_json(folder / "config.json")
    if not isinstance(facts, dict) or facts.get("model_type") != "dinov2":
        raise ValueError(f"{folder / 'config.json'} does not describe a DINOv2")
    if not weights.is_file():
        raise ValueError(f"{folder} holds no model.safetensors")
    read: Any = Dinov2Model.from_pretrained  # its declared type leaves out the second value
    try:
        model, loading = read(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is no usable DINOv2: {str(error).splitlines()[0]}") from None
    wrong = sorted(loading["missing_keys"]) + sorted(loading["unexpected_keys"])
    if wrong:
        raise ValueError(f"{weights} is not of its config.json: {len(wrong)} names, {wrong[0]}")
    if SIDE % model.config.patch_size:
        raise ValueError(f"{folder}: patches of {model.config.patch_size} do not tile {SIDE}")
    return Dinov2(model.float(), digest(weights), device)
