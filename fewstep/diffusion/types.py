"""Types that all rooms share: `Denoiser`, `FlowMap`, `Batch`, `Source` and `Sampler`.

Symbols: x0 data, xt noisy, eps noise, z generator input, t time (0 = data), alpha_t, sigma_t,
cond whatever the networks are conditioned on. In words: teacher, student, fake score. The noise
paths are in `fewstep.diffusion.noise_path`, methods in `fewstep.distillation.method`.
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

    Arguments of a call:
        xt: (B, *), noisy samples on `path`.
        t: (B,) or (), their time in the path's units.
        cond: None, (B,) int64 labels, or a mapping of (B, ...) tensors.

    It returns the x_0-prediction, (B, *). Networks of other parameterisations are adapted once, at
    the edge, by `fewstep.diffusion.denoisers`.
    """

    path: NoisePath

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor: ...


class FlowMap(Protocol):
    """(x_t, t, s, cond) -> x_s: students that jump between two times, s < t.

    xt: (B, *), t and s: (B,) or (); the result is (B, *).
    """

    path: NoisePath

    def __call__(self, xt: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor: ...


class Batch(NamedTuple):
    """The samples that a loss is computed on.

    z: (B, *), the student's standard normal input; cond: their conditions, or None; x0: (B, *)
    real data, or None where training needs no data; draws: all further random numbers of these
    samples.
    """

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
    """Noise to samples with a denoiser.

    A frozen dataclass, so that its repr is its setting. A subclass defines `calls` and `__call__`,
    and `part` if students can be trained through it.
    """

    @property
    @abstractmethod
    def calls(self) -> int:
        """Network calls a sample."""

    @abstractmethod
    def __call__(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        """Generate samples.

        Args:
            denoiser: the network to call; its `path` gives the noise levels.
            z: (B, *), standard normal noise.
            cond: the conditions of the samples, passed on to the denoiser.
            draws: random numbers of the samples, for samplers that add noise again.

        Returns: (B, *), samples x_0. Gradients are not disabled.
        """

    def part(
        self, k: int, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        """x_0 after the first k calls, with a gradient through call k alone: for training.

        Args: k from 1 to `calls`; the others as of `__call__`. Returns (B, *). Raises ValueError
        where a sampler cannot be trained through, as by default.
        """
        raise ValueError(f"a student cannot be trained through {self}; use FewStep")
