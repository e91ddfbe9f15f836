"""The training loop: one for every method, a generator that yields a record a step.

    for record in train(method, teacher, net, source, batch=256, steps=1000):
        ...                      # log, sample, save: ordinary code, no callbacks

The loop knows turns and nothing else of a method. It does what every run needs: learning rates,
the moving average, loss scales, and a guard against non-finite numbers. The gradient of a turn,
over microbatches and processes, is computed by `fewstep.training.gradient`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.types import Denoiser, Source, device_of
from fewstep.distillation.method import Method, Nets, Step, Turn
from fewstep.training import distributed
from fewstep.training.ema import EMA, copy_weights
from fewstep.training.feed import Feed
from fewstep.training.gradient import Gradient, Task, gradient, total_norm
from fewstep.training.modes import Switches
from fewstep.training.optim import Optim
from fewstep.training.precision import Precision, Scale


class Diverged(FloatingPointError):
    """Losses or gradients were not finite in too many updates in a row."""


@dataclass
class State:
    """Everything that changes while training: what a checkpoint holds."""

    nets: Nets
    average: nn.Module
    """The moving average of the method's output net, in evaluation mode."""
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    step: int = 0
    images: int = 0
    """Samples the output net has been updated on."""
    drawn: int = 0
    """Samples drawn so far, over all turns: the key of all future randomness."""
    skipped: int = 0
    """Updates skipped because something was not finite."""
    streak: int = 0
    """How many of them since the last step without any."""
    scales: dict[str, Scale] = field(default_factory=dict)
    """The loss scale of each net, in float16."""
    restarts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Step and images at which the present stage of a net began, if it was restarted."""
    memory: dict[str, list[float]] = field(default_factory=dict)
    """What the rules beside the loop remember (`fewstep.runs.early_stopping`)."""

    @classmethod
    def init(
        cls, method: Method, teacher: Denoiser | None, net: nn.Module, fake: Any = None
    ) -> State:
        """The state at step 0: the method's nets, and a copy of its output net as the average.

        fake: the network that the fake score starts as, where that is neither the teacher nor
        `net`. Freezes the teacher and puts it in evaluation mode. ValueError where the method has
        no fake score to start as `fake`.
        """
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False).eval()
        nets = method.init(teacher, net)
        if fake is not None:
            if "fake" not in nets:
                name = type(method).__name__
                raise ValueError(f"{name} has no fake score: leave out --fake-init")
            nets["fake"] = method.init(fake, fake)["fake"]
        average = deepcopy(nets[method.output]).requires_grad_(False).eval()
        return cls(nets, average)

    def began(self, net: str) -> tuple[int, int]:
        """Step and images at which the present stage of `nets[net]` began."""
        return self.restarts.get(net, (0, 0))

    def scale(self, net: str) -> float:
        """The loss scale of `nets[net]`."""
        return self.scales.setdefault(net, Scale()).value

    def restart(self, net: str, output: str) -> None:
        """Begin a new stage of `nets[net]`; `output` is the net that is averaged."""
        self.optimizers.pop(net, None)
        self.scales.pop(net, None)
        self.restarts[net] = (self.step, self.images)
        if net == output:
            copy_weights(self.average, self.nets[net])


class Record(NamedTuple):
    """The result of one step.

    step: steps done, this one included; images: samples the output net has been updated on; logs:
    scalars by name; state: the live `State`, which the next step changes; restarted: nets that a
    new stage has begun for.
    """

    step: int
    """Steps done, this one included."""
    images: int
    logs: dict[str, float]
    """"<net>/loss", "<net>/grad_norm", "<net>/lr", "skipped", and what the method logs.

    Of a skipped update also "skipped.<net>": the number of its first sample.
    """
    state: State
    restarted: tuple[str, ...] = ()


def train(
    method: Method,
    teacher: Denoiser | None,
    net: nn.Module,
    source: Source,
    *,
    batch: int,
    steps: int,
    optim: Optim | Mapping[str, Optim] = Optim(),
    accumulate: int = 1,
    ema: EMA = EMA(),
    seed: int = 0,
    patience: int = 10,
    precision: Precision = "fp32",
    state: State | None = None,
) -> Iterator[Record]:
    """Train `method` to step `steps`, yielding a `Record` a step; nothing runs before the first.

    Args: `teacher` is frozen; `net` is copied: student and fake score start from it; `source`
    turns draws into batches; `batch` samples an update over all processes, each computing its
    share in `accumulate` equal microbatches; `steps` counts from the start of the run; `optim`
    for all nets or by name; `ema` averages the output net into `state.average`; `seed` keys all
    randomness; `patience` non-finite updates without a clean step between raise `Diverged`;
    `precision` is that of matrix products; `state` (changed in place) continues a run.

    Raises `Diverged`, and ValueError where `batch` does not split equally, a net has no
    optimiser, or the source's batches or a loss's result do not fit the method.
    """
    require_divisible(batch, accumulate)
    state = state or State.init(method, teacher, net)
    device = device_of(state.average)
    feed = Feed(source, seed, device)
    task = Task(method, teacher, feed, accumulate, precision, seed, device)
    while state.step < steps:
        logs: dict[str, float] = {}
        sums: dict[str, Tensor] = {}
        skipped, switches = state.skipped, Switches(state.nets)
        for turn in _turns(method, state.nets, state.step):
            if turn.when is not None and not turn.when(state.nets):
                continue
            config = optim if isinstance(optim, Optim) else _named(optim, turn.net)
            step, images = state.began(turn.net)
            rate = turn.rate * config.rate(state.step - step, steps - step)
            with switches.training(turn.net, *turn.beside) as trained:
                state.drawn += 0 if turn.same else batch
                samples = range(state.drawn - batch, state.drawn)
                scale = state.scale(turn.net) if precision == "fp16" else None
                found = gradient(turn, state.nets, task, samples, scale)
                if _guard(state, turn.net, found, patience):
                    for name, value in found.sums.items():
                        sums[name] = sums[name] + value if name in sums else value
                    if found.norm is not None:
                        _descend(trained, _optimizer(state, turn.net, config), config, rate, found)
                    if turn.net == method.output:
                        if found.norm is not None:
                            ema.update(state.average, trained, batch, state.images - images)
                        state.images += batch
                else:
                    logs[f"skipped.{turn.net}"] = float(state.drawn - batch)
                trained.zero_grad(set_to_none=True)
            logs |= {f"{turn.net}/{key}": value for key, value in found.logs.items()}
            if found.norm is not None:
                logs[f"{turn.net}/lr"] = rate
        done = Step(state.nets, state.average, state.step, state.images, batch, sums)
        method.after_step(done)
        state.step += 1
        for name in done.restarted:
            state.restart(name, method.output)
        if state.skipped == skipped:
            state.streak = 0
        logs["skipped"] = float(state.skipped)
        yield Record(state.step, state.images, logs, state, tuple(done.restarted))


def _optimizer(state: State, net: str, config: Optim) -> torch.optim.Optimizer:
    """The optimiser of `nets[net]`, made at its first update."""
    if net not in state.optimizers:
        state.optimizers[net] = config.build(state.nets[net].parameters())
    return state.optimizers[net]


def require_divisible(batch: int, accumulate: int) -> None:
    """ValueError unless `batch` splits into `accumulate` equal microbatches on every process."""
    if batch < 1 or accumulate < 1 or batch % (accumulate * distributed.world_size()):
        several = (
            f" x {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        )
        raise ValueError(
            f"batch {batch} must be a positive multiple of accumulate {accumulate}{several}"
        )


def _descend(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Optim,
    rate: float,
    found: Gradient,
) -> None:
    """One optimiser step along the gradient, clipped by element, then by norm."""
    norm = found.norm
    assert norm is not None
    if config.clip_value < math.inf:
        nn.utils.clip_grad_value_(net.parameters(), config.clip_value)
        norm = total_norm(net)
    if config.clip < math.inf:
        nn.utils.clip_grads_with_norm_(net.parameters(), config.clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _named(optim: Mapping[str, Optim], net: str) -> Optim:
    if net not in optim:
        raise ValueError(f"no optimiser for net {net!r}; optim has {', '.join(optim)}")
    return optim[net]


def _turns(method: Method, nets: Nets, step: int) -> Sequence[Turn]:
    """The turns of this step, of nets that exist."""
    turns = method.turns(step)
    for turn in turns:
        if not isinstance(turn, Turn):
            raise ValueError(f"{type(method).__name__}.turns must return Turns, got {turn!r}")
        if turn.net not in nets:
            raise ValueError(
                f"{type(method).__name__} has a turn of {turn.net!r}, but its nets are "
                f"{', '.join(nets)}"
            )
    if turns and turns[0].same:
        raise ValueError(
            f"{type(method).__name__}: no turn is before the first, to be the same as"
        )
    return turns


def _guard(state: State, net: str, found: Gradient, patience: int) -> bool:
    """Whether the update is finite; counts, and raises at `patience` refusals on end.

    A gradient that a smaller loss scale can mend is skipped without using up patience.
    """
    bad = [key for key in ("loss", "grad_norm") if not math.isfinite(found.logs.get(key, 0.0))]
    bad += found.broken
    absorbed = False
    if net in state.scales and "loss" not in bad:
        absorbed = state.scales[net].absorbs(finite=not bad)
    if not bad:
        return True
    state.skipped += 1
    state.streak += not absorbed
    if state.streak >= patience:
        raise Diverged(
            f"{net}: {' and '.join(bad)} not finite in {state.streak} updates in a row, up to "
            f"step {state.step + 1}; lower the learning rate, or look at the data and the teacher"
        )
    return False
