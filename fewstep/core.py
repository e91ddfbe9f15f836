"""The five nouns (NoisePath lives in `path`): Denoiser, Batch, Method, Turn, and what they share.

Symbols: x0 data, xt noisy, eps noise, z generator input, t time (0 = data), alpha_t, sigma_t,
cond whatever the networks are conditioned on. In words: teacher, student, fake score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fewstep.draws import Draws
from fewstep.path import NoisePath

Cond = Any
"""What a denoiser is conditioned on: None, (B,) int64 labels, or a mapping of (B, ...) tensors."""


def rows_of(cond: Cond, rows: Tensor, device: torch.device | str | None = None) -> Cond:
    """The conditions of some samples of a batch, moved to `device`; rows: (N,) int64."""
    if cond is None:
        return None
    if isinstance(cond, Mapping):
        return {name: value[rows].to(device) for name, value in cond.items()}
    return cond[rows].to(device)


Nets = nn.ModuleDict
"""Exactly what a method trains or tracks, and exactly what is checkpointed."""


class Denoiser(Protocol):
    """(x_t, t, cond) -> E[x_0 | x_t, cond]: teacher, student and fake score alike.

    xt: (B, *), t: (B,) or (), result: (B, *). Networks of other parameterisations are adapted
    once, at the edge, by `fewstep.denoisers`.
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


class Loss(NamedTuple):
    """What a turn minimises, and what it wants logged (scalars)."""

    total: Tensor
    logs: Mapping[str, Tensor] = {}


class Turn(NamedTuple):
    """One optimiser update of `nets[net]` on `loss(nets, teacher, batch)`."""

    net: str
    loss: Callable[[Nets, Denoiser, Batch], Loss]


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


@dataclass(frozen=True)
class Method(ABC):
    """One algorithm: a frozen dataclass whose fields are its whole configuration.

    A method owns no loop and no network. `init` makes the networks, `turns` says who is updated
    on which loss at a step, `after_step` moves targets and phases. Losses take every random
    number from `batch.draws`.
    """

    needs_data: ClassVar[bool] = False
    """Whether the losses read `batch.x0`."""
    output: ClassVar[str] = "student"
    """The net that is the result: the one that is averaged, sampled and shipped."""

    sampler: Sampler
    """How the finished net generates."""

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The nets at step 0. `net` is a copy of the teacher, or another starting point.

        Default: a student that starts as `net`, and a fake score that starts as the teacher, or
        as `net` too where the teacher is another kind of network.
        """
        fake = teacher if isinstance(teacher, nn.Module) and _alike(teacher, net) else net
        return Nets({"student": deepcopy(net), "fake": deepcopy(fake)})

    @abstractmethod
    def turns(self, step: int) -> Sequence[Turn]:
        """The updates of this step, in order."""

    def after_step(self, nets: Nets, step: int) -> None:  # noqa: B027
        """Called after every step; does nothing by default."""


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks are of one class and have parameters of the same names and shapes."""
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in (a, b)]
    return type(a) is type(b) and shapes[0] == shapes[1] and bool(shapes[0])


def need_data(method: object, batch: Batch) -> Tensor:
    """batch.x0, or a clear refusal where there is none."""
    if batch.x0 is None:
        name = type(method).__name__
        raise ValueError(f"{name} needs data but Batch.x0 is None; give it a source with images")
    return batch.x0


def need_draws(batch: Batch) -> Draws:
    """batch.draws, or a clear refusal where there is none."""
    if batch.draws is None:
        raise ValueError("Batch.draws is None; make it with Draws.range(start, count, seed)")
    return batch.draws
