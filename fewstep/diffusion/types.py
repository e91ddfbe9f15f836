"""Types that all rooms share: `Denoiser`, `Batch`, `Source`, `Sampler` and its `State`s.

Symbols: x0 data, xt noisy, eps noise, z generator input, t time (0 = data), alpha_t, sigma_t,
cond whatever the networks are conditioned on. In words: teacher, student, fake score. The noise
paths are in `fewstep.diffusion.noise_path`, methods in `fewstep.distillation.method`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import NoisePath, x0_to_eps
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


def device_of(net: nn.Module) -> torch.device:
    """The device of the network's first parameter or buffer; the CPU if it has none."""
    first = next(chain(net.parameters(), net.buffers()), None)
    return torch.device("cpu") if first is None else first.device


class Denoiser(Protocol):
    """(x_t, t, cond) -> E[x_0 | x_t, cond]: teacher, student and fake score alike.

    Arguments of a call:
        xt: (B, *), noisy samples on `path`.
        t: (B,) or (), their time in the path's units.
        cond: None, (B,) int64 labels, or a mapping of (B, ...) tensors.

    It returns the x_0-prediction, (B, *). Networks of other parameterisations are adapted once, at
    the edge, by `fewstep.diffusion.denoisers`.

    A flow map is a denoiser that also takes, by name, `s`: (B,) or (), the time that is jumped to,
    and possibly more (a guidance scale, a number of steps). Its prediction is the x_0 with which
    `path.ddim(xt, x0, t, s)` is x_s.
    """

    path: NoisePath

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond = None) -> Tensor: ...


class Batch(NamedTuple):
    """The samples that a loss is computed on.

    z: (B, *), the student's standard normal input; cond: their conditions, or None; x0: (B, *)
    real data, or None where training needs no data; draws: all further random numbers of these
    samples; more: whatever else a source gives and a method asks for, by name, (B, ...) each.
    """

    z: Tensor
    """(B, *) standard normal, the student's input."""
    cond: Cond = None
    x0: Tensor | None = None
    """(B, *) real data, or None: data-free."""
    draws: Draws | None = None
    """Every further random number of these samples."""
    more: Mapping[str, Tensor] = {}
    """Further tensors (B, ...) by name: pairs, low-resolution conditions, other prompts."""


class Source(Protocol):
    """Where batches come from: a pure function of the draws, hence exactly resumable."""

    def __call__(self, draws: Draws) -> Batch: ...


@dataclass(frozen=True, eq=False)
class State:
    """One call of a sampler: what the denoiser was given, what it said, and where that leads.

    The states of a sample are a chain: the `xs` and `s` of one are the `xt` and `t` of the next.
    The last one leads to the data: its s is 0 and its xs is x0, on every path.
    """

    path: NoisePath
    t: Tensor
    """(B,), the time of the call."""
    s: Tensor
    """(B,), the time that it leads to; t itself where a call only corrects x_t."""
    xt: Tensor
    """(B, *), the input of the call."""
    x0: Tensor
    """(B, *), the prediction."""
    step: Callable[[State], Tensor]
    """How x_s follows from the state."""

    @cached_property
    def eps(self) -> Tensor:
        """(B, *), the noise that xt and x0 imply."""
        return x0_to_eps(self.path, self.xt, self.x0, self.t)

    @cached_property
    def xs(self) -> Tensor:
        """(B, *), the next input: computed when it is first read, or when the sampler goes on."""
        return self.step(self)


class Sampler(ABC):
    """Noise to samples with a denoiser: a sequence of states, one for each call.

    A frozen dataclass, so that its repr is its setting. A subclass defines `calls` and `states`.
    """

    @property
    @abstractmethod
    def calls(self) -> int:
        """Network calls a sample."""

    @property
    def trainable(self) -> bool:
        """Whether students can be trained through `part`."""
        return True

    @abstractmethod
    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """Generate samples, one state for each call of the denoiser.

        Args:
            denoiser: the network to call; its `path` gives the noise levels.
            z: (B, *), standard normal noise.
            cond: the conditions of the samples, passed on to the denoiser.
            draws: random numbers of the samples, for samplers that add noise again.

        Gradients are as where the states are asked for. Errors are raised at the first one.
        """

    def __call__(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        """Samples x_0, (B, *): the last state's prediction; arguments as of `states`.

        Gradients are not disabled: they flow through all calls.
        """
        return deque(self.states(denoiser, z, cond, draws), maxlen=1).pop().x0

    def state(
        self, k: int, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> State:
        """The state of call k, with a gradient through that call alone: for training.

        Args: k from 1 to `calls`; the others as of `states`. The input of call k carries no
        gradient. Raises ValueError for another k, and where a sampler cannot be trained through.
        """
        if not self.trainable:
            raise ValueError(f"a student cannot be trained through {self}; use FewStep")
        if not 1 <= k <= self.calls:
            raise ValueError(f"{self} has steps 1 to {self.calls}, got {k}")
        states = self.states(denoiser, z.detach(), cond, draws)
        with torch.no_grad():
            for _ in islice(states, k - 1):
                pass
        return next(states)

    def part(
        self, k: int, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Tensor:
        """x_0 after the first k calls, (B, *): the prediction of `state`, with its gradient."""
        return self.state(k, denoiser, z, cond, draws).x0
