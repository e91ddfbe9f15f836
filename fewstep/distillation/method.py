"""A distillation method as the training loop sees it: `Method`, `Turn`, `Loss`, `Nets`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch, Denoiser, Sampler

Nets = nn.ModuleDict
"""Exactly what a method trains or tracks, and exactly what is checkpointed."""


class Loss(NamedTuple):
    """The result of a turn's loss function.

    total: the scalar that is minimised; logs: further scalars to log, by name.
    """

    total: Tensor
    logs: Mapping[str, Tensor] = {}


class Turn(NamedTuple):
    """One optimiser update of `nets[net]` on `loss(nets, teacher, batch)`.

    net: the name of the network that is updated; loss: a function of the nets, the teacher and a
    batch that returns a `Loss`. A step is a sequence of turns: DMD2 has five of the fake score and
    one of the student.
    """

    net: str
    loss: Callable[[Nets, Denoiser, Batch], Loss]


@dataclass(frozen=True)
class Method(ABC):
    """One algorithm: a frozen dataclass whose fields are its whole configuration.

    A method owns no loop and no network. `init` makes the networks, `turns` says which network is
    updated on which loss at a step, `after_step` may change networks between steps. Losses take
    every random number from `batch.draws`.

    `needs_data` says whether the losses read `batch.x0`, `output` names the network that is
    averaged, sampled and shipped, `sampler` is how that network generates.
    """

    needs_data: ClassVar[bool] = False
    """Whether the losses read `batch.x0`."""
    output: ClassVar[str] = "student"
    """The net that is the result: the one that is averaged, sampled and shipped."""

    sampler: Sampler
    """How the finished net generates."""

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The networks at step 0.

        Args:
            teacher: the teacher's denoiser, or None.
            net: a copy of the teacher, or another starting point; it is copied, not changed.

        Returns: by default a "student" that starts as `net`, and a "fake" score that starts as the
        teacher, or as `net` too where the teacher is another kind of network.
        """
        fake = teacher if isinstance(teacher, nn.Module) and _alike(teacher, net) else net
        return Nets({"student": deepcopy(net), "fake": deepcopy(fake)})

    @abstractmethod
    def turns(self, step: int) -> Sequence[Turn]:
        """The updates of step `step` (from 0), in order."""

    def after_step(self, nets: Nets, step: int) -> None:  # noqa: B027
        """Called after the turns of step `step`; does nothing by default."""


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks are of one class and have parameters of the same names and shapes."""
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in (a, b)]
    return type(a) is type(b) and shapes[0] == shapes[1] and bool(shapes[0])


def need_data(method: object, batch: Batch) -> Tensor:
    """batch.x0: (B, *); ValueError where it is None."""
    if batch.x0 is None:
        name = type(method).__name__
        raise ValueError(f"{name} needs data but Batch.x0 is None; give it a source with images")
    return batch.x0


def need_draws(batch: Batch) -> Draws:
    """batch.draws; ValueError where it is None."""
    if batch.draws is None:
        raise ValueError("Batch.draws is None; make it with Draws.range(start, count, seed)")
    return batch.draws
