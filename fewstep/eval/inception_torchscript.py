"""NVIDIA's Inception as a TorchScript file: the one place where a file's own code is run.

A TorchScript archive holds a program, and running it is as good as running a script of its
author. So none is opened but the one file whose SHA-256 several projects have recorded; the
bytes that were hashed are the bytes that are loaded.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import Any

import torch
from torch import Tensor

SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Of inception-2015-12-05.pt, 95,607,719 bytes, published with StyleGAN2-ADA."""


class ScriptedInception:
    """Pictures (B, 3, H, W), values 0 to 255 -> (features (B, 2048), logits without bias).

    The program resizes and scales by itself, by the rules of `fewstep.eval.inception`.
    """

    def __init__(self, data: bytes, device: torch.device | str = "cpu") -> None:
        """Load the content `data` of the file; ValueError unless its SHA-256 is the known one."""
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise ValueError(
                "a TorchScript file runs its own program, so only NVIDIA's "
                f"inception-2015-12-05.pt is opened (SHA-256 {SHA256[:8]}...), and this is not it"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.module: Any = torch.jit.load(io.BytesIO(data), map_location=device).eval()

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features: Tensor = self.module(x, return_features=True).float()
        return features, features @ self.module.output.weight.T
