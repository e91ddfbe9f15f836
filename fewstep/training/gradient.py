"""The gradient of one turn: of its loss, over its samples, the same on all processes.

A process computes its share of a batch in equal parts, in the run's precision, and adds up their
gradients; in the last one the processes average theirs. torch's generators are started for each
part from the number of its first sample, so that dropout resumes too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.types import Batch, Denoiser
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.training import distributed
from fewstep.training.averaging import averaging
from fewstep.training.feed import Feed
from fewstep.training.precision import Precision, autocast_products


class Task(NamedTuple):
    """What the gradients of all turns depend on, beside the state of training."""

    method: Method
    teacher: Denoiser | None
    feed: Feed
    parts: int
    """Equal parts this process computes its share of a batch in."""
    precision: Precision
    seed: int
    device: torch.device


class Gradient(NamedTuple):
    """The result of `gradient`: the same on all processes.

    logs: what was logged, with "loss" and "grad_norm"; norm: that of the gradient, (), or None of
    a turn that only measures; sums: `Loss.sums` over all samples; broken: those of them that are
    not finite.
    """

    logs: dict[str, float]
    norm: Tensor | None
    sums: dict[str, Tensor]
    broken: list[str]


def gradient(
    turn: Turn, nets: Nets, task: Task, samples: range, scale: float | None = None
) -> Gradient:
    """Leave the gradient of the turn's loss over `samples` in its net.

    Each process takes its own share, in equal parts; afterwards all hold the same gradient and
    numbers. In float16 the loss is multiplied by `scale` before, and the gradient divided by it
    after. A turn that only measures leaves none.
    """
    net, factor = nets[turn.net], 1.0 if scale is None else scale
    logs: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    share = distributed.share_of_rank(samples)
    count = len(share) // task.parts
    for start in share[::count]:
        with _seeded(task.seed, start, task.device):
            piece = task.feed.batch(start, count)
            _wanted(piece, task)
            task.feed.expect(_after(start, count, share, samples), count)
            with autocast_products(task.precision, task.device):
                loss = turn.loss(nets, task.teacher, piece)  # type: ignore[arg-type]
            _well_formed(loss, turn, net)
            total = {} if loss.total is None else {"loss": loss.total}
            for value in total.values():
                scaled = _shared(value if factor == 1 else value * factor, task.parts)
                last = start + count == share.stop
                with averaging(net, scaled) if last else nullcontext():
                    scaled.backward()
        for key, value in {**total, **loss.logs}.items():
            part = _shared(value.detach(), task.parts)
            logs[key] = logs[key] + part if key in logs else part
        for key, value in loss.sums.items():
            sums[key] = sums.get(key, 0) + value.detach()
    sums = distributed.sum_over_ranks(sums)
    known = {} if scale is None else {"scale": scale}
    norm = None
    if "loss" in logs:
        if factor != 1:
            torch._foreach_div_([p.grad for p in net.parameters() if p.grad is not None], factor)
        norm = total_norm(net)
    numbers, broken = _on_host(logs, norm, sums)
    return Gradient({**numbers, **known}, norm, sums, broken)


def _after(start: int, count: int, share: range, samples: range) -> int:
    """The first sample of the part after `start`: of this turn, or of as large a turn next."""
    if start + count < share.stop:
        return start + count
    return share.start + len(samples)


def _shared(value: Tensor, parts: int) -> Tensor:
    """value / parts; the tensor itself where that is the same."""
    return value if parts == 1 else value / parts


def _on_host(
    logs: dict[str, Tensor], norm: Tensor | None, sums: dict[str, Tensor]
) -> tuple[dict[str, float], list[str]]:
    """The logs averaged over processes with "grad_norm", and which sums are not finite.

    The host waits for the device once.
    """
    names, values = list(logs), [value.float().reshape(()) for value in logs.values()]
    if values:
        values = [*distributed.mean_over_ranks(torch.stack(values)).unbind()]
    if norm is not None:
        names, values = [*names, "grad_norm"], [*values, norm.float()]
    values += [value.isfinite().all().float() for value in sums.values()]
    place = values[0].device
    numbers = torch.stack([value.to(place) for value in values]).tolist()
    finite = zip(sums, numbers[len(names) :], strict=True)
    broken = [name for name, whether in finite if not whether]
    return dict(zip(names, numbers, strict=False)), broken


def total_norm(net: nn.Module) -> Tensor:
    """The Euclidean norm () of the gradient of `net`, on whichever ranks its parts are."""
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    return distributed.full_tensor(torch.linalg.vector_norm(torch.stack(norms)))


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
    """ValueError for data that a method would silently ignore."""
    if batch.x0 is not None and not task.method.needs_data:
        raise ValueError(
            f"{type(task.method).__name__} learns without data, but the source gives some, which "
            "would not be used; take a source of noise and labels (Latents), or a method that "
            "learns from data, such as SiDA"
        )


def _well_formed(loss: Loss, turn: Turn, net: nn.Module) -> None:
    """ValueError unless `loss` is a `Loss` of scalars with a gradient in `net`."""
    if not isinstance(loss, Loss):
        kind = type(loss).__name__
        raise ValueError(f"the loss of {turn.net!r} returned a {kind}; return Loss(total, logs)")
    numbers = dict(loss.logs) if loss.total is None else {"total": loss.total, **loss.logs}
    for name, value in numbers.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss of {turn.net!r}: {name} must be a scalar, got {shape}")
    if loss.total is None and not loss.sums:
        raise ValueError(
            f"the loss of {turn.net!r} has neither a total to minimise nor sums to measure"
        )
    if loss.total is None or loss.total.requires_grad:
        return
    if not any(True for _ in net.parameters()):
        raise ValueError(
            f"a network is missing: the net {turn.net!r} is a {type(net).__name__}, which has no "
            "weights to train; name one with --model, and what it starts from with --init, or "
            "pass one as `net` of `train`"
        )
    raise ValueError(
        f"the loss of {turn.net!r} does not depend on its parameters: no gradient reaches them"
    )
