"""The verb: one training loop for every method, a generator that yields a record a step.

    for record in train(method, teacher, net, source, batch=256, steps=1000):
        ...                      # log, draw pictures, save: ordinary code, no callbacks

The loop knows turns and nothing else of a method. It owns what every run needs: gradient
accumulation, learning rates, the moving average, precision, a guard against non-finite numbers,
and the averaging of gradients over the processes of `fewstep.parallel`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep import parallel
from fewstep.core import Batch, Denoiser, Loss, Method, Nets, Source, Turn
from fewstep.draws import Draws
from fewstep.ema import EMA
from fewstep.optim import Optim
from fewstep.precision import Precision, Scale, lowered


class Diverged(FloatingPointError):
    """Losses or gradients stayed non-finite for too many updates in a row."""


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

    @classmethod
    def init(cls, method: Method, teacher: Denoiser | None, net: nn.Module) -> State:
        """The state at step 0."""
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False).eval()
        nets = method.init(teacher, net)
        average = deepcopy(nets[method.output]).requires_grad_(False).eval()
        return cls(nets, average)


class Record(NamedTuple):
    """What one step did."""

    step: int
    """Steps done, this one included."""
    images: int
    logs: dict[str, float]
    """"<net>/loss", "<net>/grad_norm", "<net>/lr", "skipped", and what the method logs."""
    state: State


@contextmanager
def only(nets: Nets, name: str) -> Iterator[nn.Module]:
    """Within the block `nets[name]` alone is trainable and in training mode."""
    for key, net in nets.items():
        net.requires_grad_(key == name).train(key == name)
    try:
        yield nets[name]
    finally:
        for net in nets.values():
            net.requires_grad_(False).eval()


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
    """Train `method` to step `steps`, yielding a `Record` after each step.

    Main arguments: `net` is what the student (and the fake score) start from, usually a copy of
    the teacher; `source` turns draws into batches; `batch` is the number of samples an update
    sees, shared among the processes and computed by each in `accumulate` equal parts; `optim` is
    for all nets or by name.

    Other: `seed` keys all randomness; `patience` is how many non-finite updates, without a clean
    step between them, are skipped before `Diverged` is raised; `precision` is that of the
    networks' products; `state` continues an earlier run.
    """
    divisible(batch, accumulate)
    state = state or State.init(method, teacher, net)
    device = next(state.average.parameters()).device
    task = Task(method, teacher, source, accumulate, precision, seed, device)
    while state.step < steps:
        logs: dict[str, float] = {}
        skipped = state.skipped
        for turn in _turns(method, state.nets, state.step):
            config = optim if isinstance(optim, Optim) else _named(optim, turn.net)
            rate = config.rate(state.step, steps)
            with only(state.nets, turn.net) as trained:
                if turn.net not in state.optimizers:
                    state.optimizers[turn.net] = config.build(trained.parameters())
                optimizer = state.optimizers[turn.net]
                values = _gradient(turn, state, task, batch)
                if _guard(state, turn.net, values, patience):
                    _descend(trained, optimizer, config, rate)
                    if turn.net == method.output:
                        ema.update(state.average, trained, batch, state.images)
                        state.images += batch
                optimizer.zero_grad(set_to_none=True)
            logs |= {f"{turn.net}/{key}": value for key, value in values.items()}
            logs[f"{turn.net}/lr"] = rate
        method.after_step(state.nets, state.step)
        state.step += 1
        if state.skipped == skipped:
            state.streak = 0
        logs["skipped"] = float(state.skipped)
        yield Record(state.step, state.images, logs, state)


def divisible(batch: int, accumulate: int) -> None:
    """A ValueError unless every process can compute its share in `accumulate` equal parts."""
    if batch < 1 or accumulate < 1 or batch % (accumulate * parallel.size()):
        several = f" x {parallel.size()} processes" if parallel.size() > 1 else ""
        raise ValueError(
            f"batch {batch} must be a positive multiple of accumulate {accumulate}{several}"
        )


class Task(NamedTuple):
    """What the gradient of every turn depends on beside the state."""

    method: Method
    teacher: Denoiser | None
    source: Source
    parts: int
    """Equal parts this process computes its share of a batch in."""
    precision: Precision
    seed: int
    device: torch.device


def _gradient(turn: Turn, state: State, task: Task, batch: int) -> dict[str, float]:
    """Leave the gradient over the next `batch` samples in the net; what is logged of it.

    Each process takes its own samples; afterwards all hold the same gradient and numbers.
    """
    net, first = state.nets[turn.net], state.drawn
    state.drawn += batch
    if task.precision == "fp16":
        state.scales.setdefault(turn.net, Scale())
    scale = state.scales[turn.net].value if turn.net in state.scales else 1.0
    logs = _backward(turn, state.nets, task, parallel.share(range(first, first + batch)), scale)
    parallel.average_gradients(net)
    means = parallel.mean(torch.stack([value.float() for value in logs.values()]))
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    if scale != 1:
        torch._foreach_div_(gradients, scale)
    norm = parallel.full(nn.utils.get_total_norm(gradients))
    *numbers, size = torch.cat([means, norm.float()[None]]).tolist()  # one wait for the device
    values = {**dict(zip(logs, numbers, strict=True)), "grad_norm": size}
    return values | ({"scale": scale} if turn.net in state.scales else {})


def _descend(net: nn.Module, optimizer: torch.optim.Optimizer, config: Optim, rate: float) -> None:
    """One optimiser step along the gradient, clipped by element and then by norm."""
    if config.clip_value < math.inf:
        nn.utils.clip_grad_value_(net.parameters(), config.clip_value)
    if config.clip < math.inf:
        norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
        nn.utils.clip_grads_with_norm_(net.parameters(), config.clip, parallel.full(norm))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _named(optim: Mapping[str, Optim], net: str) -> Optim:
    if net not in optim:
        raise ValueError(f"no optimiser for net {net!r}; optim has {', '.join(optim)}")
    return optim[net]


def _backward(turn: Turn, nets: Nets, task: Task, share: range, scale: float) -> dict[str, Tensor]:
    """Accumulate the turn's gradient, times `scale`, over equal parts; the mean of its logs."""
    logs: dict[str, Tensor] = {}
    count = len(share) // task.parts
    for start in share[::count]:
        with _seeded(task.seed, start, task.device):
            piece: Batch = task.source(Draws.range(start, count, task.seed, task.device))
            _wanted(piece, task)
            with lowered(task.precision, task.device):
                loss = turn.loss(nets, task.teacher, piece)  # type: ignore[arg-type]
            _well_formed(loss, turn)
            (loss.total * scale / task.parts).backward()
        for key, value in {"loss": loss.total, **loss.logs}.items():
            logs[key] = logs.get(key, 0) + value.detach() / task.parts
    return logs


@contextmanager
def _seeded(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """Start torch's generators from the first sample's number, then put them back.

    Nothing here draws from them, but dropout in a network does, and has to resume too.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        key = hashlib.blake2b(f"{seed}:torch:{number}".encode(), digest_size=7).digest()
        torch.default_generator.manual_seed(int.from_bytes(key, "little"))
        if cuda:
            torch.cuda.manual_seed(int.from_bytes(key, "little"))
        yield


def _wanted(batch: Batch, task: Task) -> None:
    """Refuse data that a method would silently ignore."""
    if batch.x0 is not None and not task.method.needs_data:
        raise ValueError(
            f"{type(task.method).__name__} learns without data, but the source gives some, which "
            "would not be used; take a source of noise and labels (Latents), or a method that "
            "learns from data, such as SiDA"
        )


def _well_formed(loss: Loss, turn: Turn) -> None:
    """Say in a sentence what a method's author forgot."""
    if not isinstance(loss, Loss):
        came = type(loss).__name__
        raise ValueError(f"the loss of {turn.net!r} returned a {came}; return Loss(total, logs)")
    for name, value in {"total": loss.total, **loss.logs}.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss of {turn.net!r}: {name} must be a scalar, got {shape}")
    if not loss.total.requires_grad:
        raise ValueError(
            f"the loss of {turn.net!r} does not depend on its parameters: no gradient reaches them"
        )


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
    return turns


def _guard(state: State, net: str, values: Mapping[str, float], patience: int) -> bool:
    """Whether the update is finite; counts, and raises at `patience` refusals on end.

    A gradient that a smaller loss scale can mend is skipped without using up patience.
    """
    bad = [key for key in ("loss", "grad_norm") if not math.isfinite(values[key])]
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
