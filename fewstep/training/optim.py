"""Optimisers as configuration: Adam, its schedule, and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fewstep.training.adam import Adam
from fewstep.training.adam_8bit import Adam8, refuse_missing
from fewstep.training.offload import offload_moments


@dataclass(frozen=True)
class Optim:
    """Adam or AdamW, whose learning rate is a pure function of the step.

    The defaults are SiD's: beta_1 = 0, no weight decay, no clipping. After `warmup` linear steps
    the rate stays constant or decays to zero at the last step, linearly or as a half cosine.
    ValueError for values out of range. Adam: Kingma & Ba 2014, https://arxiv.org/abs/1412.6980;
    AdamW: Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101.
    """

    lr: float = 1e-3
    """Learning rate after the warm-up, above 0."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Decay of Adam's first and second moments in a step, each in [0, 1)."""
    eps: float = 1e-8
    """What Adam adds to the root of the second moment, above 0."""
    weight_decay: float = 0.0
    """Weights shrink by this times the rate in each step (AdamW), 0 or more."""
    warmup: int = 0
    """Steps from rate zero to `lr`."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """The rate after the warm-up: constant, or down to zero at the end, linearly or as a
    cosine."""
    clip: float = math.inf
    """Largest gradient norm; larger gradients are scaled down to it."""
    clip_value: float = math.inf
    """Largest element of a gradient: all are clamped to +- this, before the norm is looked at."""
    offload: bool = False
    """Keep the moments in main memory between updates, not on the accelerator."""
    bits: Literal[32, 8] = 32
    """Bits of a number in the moments; 8 take a quarter of the memory and are nearly the same."""

    def __post_init__(self) -> None:
        if not (0 < self.lr < math.inf and self.warmup >= 0):
            raise ValueError(f"Optim needs a finite lr > 0 and warmup >= 0, got {self}")
        if not (self.clip > 0 and self.clip_value > 0):
            raise ValueError(f"Optim needs clip > 0 and clip_value > 0, got {self}")
        if not (self.eps > 0 and self.weight_decay >= 0):
            raise ValueError(f"Optim needs eps > 0 and weight_decay >= 0, got {self}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Optim.betas are in [0, 1), got {self.betas}")
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"Optim.decay is 'constant', 'linear' or 'cosine', got {self.decay!r}"
            )
        if self.bits not in (32, 8):
            raise ValueError(f"Optim.bits is 32 or 8, got {self.bits!r}")

    def refuse_missing(self) -> None:
        """A ValueError where `build` needs a library that is not installed."""
        if self.bits == 8:
            refuse_missing()

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of `parameters`: Adam, or AdamW where there is weight decay.

        It is `fewstep.training.adam.Adam`, which keeps no first moment where beta_1 = 0; with
        `bits` 8 `fewstep.training.adam_8bit.Adam8`, a ValueError where bitsandbytes is not
        installed. With `offload` its moments leave the accelerator between updates.
        """
        betas = float(self.betas[0]), float(self.betas[1])
        settings: dict[str, Any] = {"lr": self.lr, "betas": betas, "eps": self.eps}
        optimizer: torch.optim.Optimizer
        if self.bits == 8:
            optimizer = Adam8(parameters, weight_decay=self.weight_decay, **settings)
        else:
            optimizer = Adam(parameters, weight_decay=self.weight_decay, **settings)
        if self.offload:
            offload_moments(optimizer)
        return optimizer

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at step `step` (from 0) of `steps`, with warm-up and decay."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        left = max(0.0, 1 - step / steps)
        if self.decay == "linear":
            warm *= left
        elif self.decay == "cosine":
            warm *= 0.5 * (1 - math.cos(math.pi * left))
        return self.lr * warm
