"""The five nouns (NoisePath lives in `path`): Denoiser, Batch, Method, Turn, and what they share.

Symbols: x0 data, xt noisy, eps noise, z generator input, t time (0 = data), alpha_t, sigma_t,
cond whatever the networks are conditioned on. In words: teacher, student, fake score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.rng import Draws

Cond = Any
"""What a denoiser is conditioned on: None, (B,) int64 labels, or a mapping of (B, ...) tensors."""


def select_rows(cond: Cond, rows: Tensor, device: torch.device | str | None = None) -> Cond:
    """The conditions of some samples of a batch, moved to `device`; rows: (N,) int64."""
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {name: value[rows].to(device) for name, value in cond.items()}
    return cond[rows].to(device)


class Denoiser(Protocol):
    """(x_t, t, cond) -> E[x_0 | x_t, cond]: teacher, student and fake score alike.

    xt: (B, *), t: (B,) or (), result: (B, *). Networks of other parameterisations are adapted
    once, at the edge, by `fewstep.diffusion.denoisers`.
    """

    path: NoisePath

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor: ...


class FlowMap(Protocol):
    """(x_t, t, s, cond) -> x_s: students that jump between two times, s < t."""

    path: NoisePath

    def __call__(self, xt: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor: ...


class Batch(NamedTuple):
    """What a loss is computed on; `x0` is None where training needs no data."""

    z: Tensor
    """(B, *) standard normal, the student's input."""
    cond: Cond = None
    x0: Tensor | None = None
    """(B, *) real data, or None: data-free."""
    draws: Draws | None = None
    """Every further random number of these samples."""


class Source(Protocol):
    """Where batches come from: a pure function of the draws, hence exactly resumable."""

    def __call__(self, draws: Draws) -> Batch: ...


class Sampler(ABC):
    """Noise to pictures with a denoiser; a frozen dataclass, so that its repr is its setting."""

    @property
    @abstractmethod
    def calls(self) -> int:
        """Network calls a picture."""

    @abstractmethod
    def __call__(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        """z: (B, *) standard normal -> (B, *) samples; `draws` serves samplers that renoise."""

    def part(
        self, k: int, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        """x after the first k calls, with a gradient through the k-th alone: for training."""
        raise ValueError(f"a student cannot be trained through {self}; use FewStep")
