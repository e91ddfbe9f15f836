"""Several processes as one: what the ranks of a `torchrun` exchange.

    with process_group("cuda") as device:        # "cuda:3" on the fourth process of a machine
        for record in train(...):                # the same call on every rank

Every rank runs the same program on its own contiguous share of each batch, and the gradients of
the net that is trained are averaged once an update, in flat buckets, while the backward pass of
the last part of a batch still makes others (`fewstep.training.averaging`).
Nothing wraps a network, so frozen networks never communicate, whatever a method calls them for.
One process is the case where every function here does nothing.

What is agreed on by the host (flags, numbers, checks) goes over gloo and never waits for an
accelerator; gradients go over NCCL between accelerators.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

TIMEOUT = 120.0
"""Seconds without a step after which a rank counts as hanging."""
START = 600.0
"""The same before the first step: for loading, building, compiling, and each part of the data."""
BUCKET = 1 << 23
"""Numbers averaged in one message."""


class ProcessLost(RuntimeError):
    """Another rank has died or does not answer."""


class RanksDiffer(FloatingPointError):
    """The ranks hold different numbers where they must hold the same."""


def rank() -> int:
    """The number of this process, from 0; 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def under_torchrun() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def process_group(device: str = "cpu", timeout: float = TIMEOUT) -> Iterator[str]:
    """Within the block torchrun's processes are one group; yields the rank's device.

    "cuda" becomes the device of the local rank. A rank that does not call `heartbeat` for
    `timeout` seconds writes the stack of each of its threads to standard error and exits; a rank
    whose partner died or hangs raises `ProcessLost`. Does nothing in a process that was started
    alone.
    """
    if not under_torchrun() or dist.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    backend = "gloo"
    if device.startswith("cuda") and torch.cuda.device_count() > (torch.device(device).index or 0):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    _watch(START)
    with talking():  # messages wait longer than a step may take: the stacks are written first
        patience = timedelta(seconds=START + timeout)
        dist.init_process_group(backend, timeout=patience, **_meeting(patience))
    _limits["step"] = timeout
    try:
        yield device
        dist.destroy_process_group()
    finally:
        _limits.clear()
        _groups.clear()
        faulthandler.cancel_dump_traceback_later()


def _meeting(patience: timedelta) -> dict[str, Any]:
    """Arguments of init_process_group that keep processes apart from earlier ones that died.

    When torchrun restarts its workers, its static rendezvous gives all lives one store (torch
    2.13), in which gloo finds addresses of the dead and waits for them. On one machine all
    processes count the same lives.
    """
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if life == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, size = next(rendezvous("env://", timeout=patience))
    exported: Any = dist  # whose types leave PrefixStore out
    return {"store": exported.PrefixStore(f"life-{life}", store), "rank": rank, "world_size": size}


_limits: dict[str, float] = {}
"""Seconds a step may take, while a group is joined."""
_groups: dict[str, Any] = {}
"""Further groups of all ranks, by name."""


def heartbeat() -> None:
    """Report that this rank has finished a step: the next one has `timeout` seconds from now."""
    if "step" in _limits:
        _watch(_limits["step"])


def heartbeat_while_preparing() -> None:
    """Report that this rank is preparing data: it has `START` seconds again."""
    if "step" in _limits:
        _watch(START)


def _watch(seconds: float) -> None:
    """Unless called again in time, write all stacks to standard error and exit with code 1."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)


@contextmanager
def talking() -> Iterator[None]:
    """Turn torch's connection errors into a `ProcessLost` of one sentence."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one
        if isinstance(error, (ProcessLost, NotImplementedError)):
            raise
        first = str(error).strip().splitlines()[0]
        raise ProcessLost(
            f"process {os.environ.get('RANK', rank())} lost another one ({first}); its own "
            "message says why; run the same command again to continue from the last checkpoint"
        ) from error


def lane() -> Any:
    """A group of all ranks for gradients alone, whose order no other message has to fit into.

    To be asked for on all ranks first at the same place.
    """
    if "lane" not in _groups:
        patience = timedelta(seconds=START + _limits.get("step", TIMEOUT))
        _groups["lane"] = dist.new_group(timeout=patience)
    return _groups["lane"]


def full_tensor(t: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; to be called on all ranks."""
    whole: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return whole


def local_tensor(t: Tensor) -> Tensor:
    """This rank's shard of a tensor; the tensor itself if it is not sharded."""
    part: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return part


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of `whole`, sharded as `like` is; `whole` itself if `like` is not."""
    if local_tensor(like) is like:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def share_of_rank(samples: range) -> range:
    """This rank's contiguous share of the sample numbers.

    Their count should be a multiple of `world_size()`.
    """
    count = len(samples) // world_size()
    return samples[rank() * count : (rank() + 1) * count]


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over ranks, element by element; not finite where one rank's is not."""
    if world_size() > 1:
        values = values.clone()
        with talking():
            dist.all_reduce(values)
        values /= world_size()
    return values


def sum_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums over ranks of tensors that have the same names and shapes on all."""
    if world_size() == 1 or not values:
        return dict(values)
    with talking():
        summed = {name: value.clone() for name, value in sorted(values.items())}
        for value in summed.values():
            dist.all_reduce(value)
    return summed


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of about `BUCKET` numbers together."""
    bucket: list[Tensor] = []
    for t in tensors:
        bucket.append(t)
        if sum(b.numel() for b in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def max_over_ranks(number: int) -> int:
    """The largest of the ranks' numbers, on every rank: all-reduce with max."""
    if world_size() == 1:
        return number
    value = torch.tensor(number)
    with talking():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def on_rank_zero(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 alone and return its result, of JSON values, on all ranks.

    A ValueError or OSError of it is raised on every rank, so that none waits for the others.
    """
    if world_size() == 1:
        return function()
    answer: dict[str, Any] = {}
    raised: Exception | None = None
    if rank() == 0:
        try:
            answer["result"] = function()
        except (ValueError, OSError) as error:
            answer["error"], raised = str(error), error
            answer["system"] = [error.errno, error.strerror] if isinstance(error, OSError) else []
    answer = _broadcast(answer)
    if raised is not None:
        raise raised
    if answer.get("system"):
        raise OSError(*answer["system"])
    if "error" in answer:
        raise ValueError(answer["error"])
    result: T = answer["result"]
    return result


def _broadcast(value: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's value, as JSON text."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor(len(data))
    with talking():
        dist.broadcast(length, 0)
        data = data if rank() == 0 else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
    received: dict[str, Any] = json.loads(bytes(data.tolist()))
    return received


def fingerprint(tensors: Mapping[str, Tensor]) -> Tensor:
    """(len(tensors),) int64 sums of bit patterns, which one flipped bit changes."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        t.detach().contiguous().view(words[t.element_size()]).sum(dtype=torch.int64)
        for t in tensors.values()
    ]
    return torch.stack([s.cpu() for s in sums]) if sums else torch.zeros(0, dtype=torch.int64)


def require_equal_ranks(tensors: Mapping[str, Tensor], when: str) -> None:
    """Raise `RanksDiffer` on all ranks unless they hold the same bits in all `tensors`.

    Of a sharded tensor, those ranks are compared that hold the same shard
    (`fewstep.training.sharding`). `when` ends the message.
    """
    for parts in sorted({_parts(t) for t in tensors.values()} - {world_size()}):
        some = {name: local_tensor(t) for name, t in tensors.items() if _parts(t) == parts}
        mine = fingerprint(some)
        every = [torch.empty_like(mine) for _ in range(world_size())]
        with talking():
            dist.all_gather(every, mine)
        table = torch.stack(every).unflatten(0, (-1, parts))  # copy, part, tensor
        wrong = (table != table.mode(0).values).nonzero().tolist()
        for copy, part, column in sorted(wrong, key=lambda place: place[2])[:1]:
            ranks = range(part, world_size(), parts)
            both = f"processes {ranks[0]} and {ranks[-1]} differ"
            odd = f"process {ranks[copy]} differs from the others" if len(ranks) > 2 else both
            raise RanksDiffer(
                f"the processes hold different numbers in {list(some)[column]} {when}: {odd}; "
                "memory or the network altered them, or a method draws random numbers of its "
                "own; run the same command again to continue from the last checkpoint"
            )


def _parts(t: Tensor) -> int:
    """The number of ranks that share one copy of `t`."""
    parts: int = t.device_mesh.shape[-1] if hasattr(t, "device_mesh") else 1
    return parts
