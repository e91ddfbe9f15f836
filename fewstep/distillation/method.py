"""A method as the training loop sees it: `Method`, `Turn`, `Loss`, `Step`, `Nets`, `Product`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fewstep.diffusion.choices import require_choices
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.time_distributions import OfLevel, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler, device_of
from fewstep.distillation.pace import MOST, Pace, Updates, fewest
from fewstep.distillation.pairs import Pairs

Nets = nn.ModuleDict
"""Exactly what a method trains or tracks, and exactly what is checkpointed."""


class Loss(NamedTuple):
    """The result of a turn's loss function.

    total: the scalar that is minimised, a mean over samples; None: nothing is updated, the turn
    only measures. logs: further scalars to log, by name. sums: tensors of fixed shapes, sums over
    samples; they are added over microbatches and processes, and handed to `Method.after_step` if
    the update was accepted.
    """

    total: Tensor | None
    logs: Mapping[str, Tensor] = {}
    sums: Mapping[str, Tensor] = {}


class Turn(NamedTuple):
    """One optimiser update of `nets[net]` on `loss(nets, teacher, batch)`.

    net: the name of the network that is updated; loss: a function of the nets, the teacher and a
    batch that returns a `Loss`; rate: a factor on the learning rate; same: on the samples of the
    turn before, not on new ones; beside: further nets whose gradients are recorded, for a turn to
    come; when: whether it is taken, as the nets are before it, None: always. A step is a sequence
    of turns: DMD2 has five of the fake score and one of the student.
    """

    net: str
    loss: Callable[[Nets, Denoiser, Batch], Loss]
    rate: float = 1.0
    same: bool = False
    beside: tuple[str, ...] = ()
    when: Callable[[Nets], bool] | None = None


class Product(NamedTuple):
    """What a run ships: a network, which `Method.result` describes, and how it is sampled."""

    net: nn.Module
    sampler: Sampler


@dataclass
class Step:
    """A finished step, as `Method.after_step` is told of it.

    nets: the networks, which may be changed in place; average: the moving average of the output
    net; step: its number, from 0; images: samples that the output net has been updated on; batch:
    samples of an update; sums: the `Loss.sums` of all turns, over the global batch, by name.
    """

    nets: Nets
    average: nn.Module
    step: int
    images: int
    batch: int
    sums: Mapping[str, Tensor]
    restarted: list[str] = field(default_factory=list)
    """The nets that `restart` was called for."""

    def restart(self, net: str) -> None:
        """Begin a new stage of `nets[net]`, from its present weights.

        Its optimiser's moments and its loss scale are forgotten, warm-up and decay of its learning
        rate begin anew, and what counts as a spike of its losses is learned anew. The average of
        the output net becomes a copy of it. ValueError where there is no such net.
        """
        if net not in self.nets:
            raise ValueError(f"there is no net {net!r} to restart; there are {list(self.nets)}")
        self.restarted.append(net)


@dataclass(frozen=True)
class Method(ABC):
    """One algorithm: a frozen dataclass whose fields are its whole configuration.

    A method owns no loop and no network. `init` makes the networks, `turns` says which network is
    updated on which loss at a step, `after_step` may change networks between steps and begin
    stages, `result` and `product` say what the run ships. Losses take every random number from
    `batch.draws`.

    `sampler` is how the finished network generates.
    """

    output: ClassVar[str] = "student"
    """The net that is the result: the one that is averaged, sampled and shipped."""
    of_levels: ClassVar[frozenset[str]] = frozenset()
    """Fields whose laws are of noise levels sigma / alpha on every path, and of no times."""
    paths: ClassVar[tuple[type[NoisePath], ...]] = ()
    """The kinds of noise path that its defaults are for; (): any."""
    needs_signal: ClassVar[bool] = False
    """Whether it divides by alpha, so that its calls cannot start from pure noise."""
    sampler: Sampler
    """How the finished net generates."""

    def __post_init__(self) -> None:
        """Refuse values that a field's Literal does not name, and a ratio below 1."""
        require_choices(self)
        if fewest(self.ratio) < 1:
            raise ValueError(f"{type(self).__name__}.ratio is 1 or more, got {self.ratio}")

    @property
    def ratio(self) -> Updates:
        """Updates of the fake score for one of the student, if there is one; a field does as well.

        "auto": by whether it keeps up (`fewstep.distillation.pace`).
        """
        return 1

    @property
    def needs_data(self) -> bool:
        """Whether the losses read `batch.x0`; a class variable does as well."""
        return False

    @property
    def couples_samples(self) -> bool:
        """Whether a sample's loss depends on the rest of its batch.

        Then a batch in parts (accumulation, several processes) is another loss than the whole.
        """
        return False

    @property
    def frozen(self) -> frozenset[str]:
        """Nets that nothing changes after step 0; a class variable does as well."""
        return frozenset()

    @property
    def length(self) -> int | None:
        """The number of steps after which the method is finished; None: as many as one likes."""
        return None

    def noise_levels(self, path: NoisePath) -> TimeLaw | None:
        """The law of the times, in units of `path`, that it learns at: where gauges look, if any.

        By default that of the field `times`.
        """
        times: TimeLaw | None = getattr(self, "times", None)
        if times is not None and "times" in self.of_levels and not isinstance(path, VE):
            return OfLevel(times, path)
        return times

    def needs_pairs(self) -> Pairs | None:
        """The pairs of the teacher that batches must carry (`pair_of`), if any."""
        return None

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The networks at step 0.

        Args:
            teacher: the teacher's denoiser, or None.
            net: a copy of the teacher, or another starting point; it is copied, not changed.

        Returns: by default a "student" that starts as `net`, and a "fake" score that starts as the
        teacher; as `net` too where the teacher is no network with weights, or where `net` holds
        them and trains adapters on them.
        """
        nets = Nets({"student": deepcopy(net), "fake": deepcopy(_fake_start(teacher, net))})
        if self.ratio == "auto":
            nets["pace"] = Pace().to(device_of(net))
        return nets

    def fake_updates(self, *turns: Turn) -> tuple[Turn, ...]:
        """The updates of the fake score, `turns`, as often as `ratio` says.

        With "auto" the last of them measures whether the fake score keeps up, which the others do
        not see, and those before are taken as nets["pace"] has it (`fewstep.distillation.pace`).
        """
        if isinstance(self.ratio, int):
            return turns * self.ratio
        before = (
            turn._replace(loss=partial(_unwatched, turn), when=partial(_behind, count))
            for count in range(MOST, 1, -1)
            for turn in turns
        )
        return *before, *turns

    @abstractmethod
    def turns(self, step: int) -> Sequence[Turn]:
        """The updates of step `step` (from 0), in order."""

    def after_step(self, step: Step) -> None:
        """Called after the turns of each step; by default nets["pace"] takes in what it measures.

        Here targets follow their nets, stages begin (`Step.restart`), and statistics over the
        global batch (`Step.sums`) are taken in. All that it remembers is in nets, as buffers.
        """
        if "pace" in step.sums:
            pace: Any = step.nets["pace"]
            pace.follow(step.sums["pace"])

    def result(self, model: Model) -> Model:
        """The description of the network that is shipped, where training starts from `model`."""
        return model

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """What the run would ship now.

        Args:
            nets: the networks.
            average: the moving average of the output net.
            teacher: the teacher's denoiser, or None.

        Returns: by default the average, sampled by `sampler`.
        """
        return Product(average, self.sampler)


def _behind(count: int, nets: Nets) -> bool:
    """Whether the fake score gets `count` updates or more."""
    pace: Any = nets["pace"]
    return bool(pace.reaches(count))


def _unwatched(turn: Turn, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
    """The loss of a turn that does not measure whether the fake score keeps up."""
    return turn.loss(Nets({k: net for k, net in nets.items() if k != "pace"}), teacher, batch)


def _fake_start(teacher: Denoiser | None, net: nn.Module) -> nn.Module:
    """What a fake score starts as: the teacher if it has weights that `net` does not share."""
    if not isinstance(teacher, nn.Module) or not any(True for _ in teacher.parameters()):
        return net
    held = {t.untyped_storage()._cdata for t in chain(net.parameters(), net.buffers())}
    shared = any(p.untyped_storage()._cdata in held for p in teacher.parameters())
    return net if shared else teacher


def need_network(method: object, teacher: Denoiser | None) -> nn.Module:
    """The teacher, which is what is shipped; ValueError where it is no network."""
    if not isinstance(teacher, nn.Module):
        raise ValueError(f"{type(method).__name__} needs a teacher that is a network")
    return teacher


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
