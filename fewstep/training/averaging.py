"""Gradients of several ranks, averaged while the backward pass still makes others.

    with averaging(net, loss):
        loss.backward()

The graph of the loss tells which parameters it reaches. Before the backward pass the ranks agree
on all that some rank has a gradient of, and lay them out in buckets in the order of the
parameters. A backward pass goes through a network from its end, so that the last bucket is sent
first, as soon as its gradients are there, and the others after it: on every rank in the same
order, in a group of its own. The buckets, and with them the sums, are those of sending everything
afterwards; what a rank still lacks at the end is zero.

Averages take the place of the gradients as views of the bucket that was sent. They are not
written into them: a gradient may share its memory with one that is still on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.training.distributed import buckets, lane, local_tensor, talking, world_size

FLYING = 4
"""Buckets under way at once: what is sent is in memory twice."""


@contextmanager
def averaging(net: nn.Module, loss: Tensor | None) -> Iterator[None]:
    """After the block every gradient of `net` is its mean over ranks; one that a rank lacks is 0.

    A parameter that no graph reaches on any rank stays without, as with one process; those of
    sharded parameters were averaged when they were made (`fewstep.training.sharding`). To be
    entered on all ranks.

    loss: what the backward pass in the block begins with; None: there is none.
    """
    parameters = [p for p in net.parameters() if local_tensor(p) is p]
    if world_size() == 1 or not parameters:
        yield
        return
    coming = set() if loss is None else reached(loss)
    known = [p.grad is not None or id(p) in coming for p in parameters]
    present = torch.tensor(known, dtype=torch.uint8)
    with talking():
        dist.all_reduce(present, dist.ReduceOp.MAX)
    some = [p for p, somewhere in zip(parameters, present.tolist(), strict=True) if somewhere]
    queue = _Queue([*buckets(some)][::-1], coming, lane())
    handles = [p.register_post_accumulate_grad_hook(queue.arrived) for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    queue.finish()


def reached(loss: Tensor) -> set[int]:
    """The ids of all leaves that a backward pass from `loss` gives a gradient."""
    found: set[int] = set()
    seen, ahead = set[Any](), [loss.grad_fn]
    while ahead:
        node: Any = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        ahead += [before for before, _ in node.next_functions]
    return found


class _Sent(NamedTuple):
    """A bucket under way."""

    parameters: Sequence[Tensor]
    flat: Tensor
    work: Any


class _Queue:
    """Buckets of parameters in the order in which they are sent.

    coming: ids of the parameters whose gradients are not there yet.
    """

    def __init__(self, parts: Sequence[Sequence[Tensor]], coming: set[int], group: Any) -> None:
        self.parts, self.sent, self.group = parts, 0, group
        self.coming = coming
        self.part_of = {id(p): i for i, part in enumerate(parts) for p in part}
        self.missing = [sum(id(p) in coming for p in part) for part in parts]
        self.flying: deque[_Sent] = deque()

    def arrived(self, p: Tensor) -> None:
        """Note that the gradient of `p` is there; send what is complete and next.

        RuntimeError if the graph of the loss did not show that it would come.
        """
        if id(p) not in self.coming:
            raise RuntimeError(
                "a gradient came that the graph of the loss does not show, so that it may have "
                "been sent without it; an operation of the network makes gradients by itself"
            )
        self.missing[self.part_of[id(p)]] -= 1
        while self.sent < len(self.parts) and self.missing[self.sent] == 0:
            self._send()
        while self.flying and (len(self.flying) > FLYING or self.flying[0].work.is_completed()):
            self._land()

    def finish(self) -> None:
        """Send the rest, and wait for all."""
        while self.sent < len(self.parts):
            self._send()
        while self.flying:
            self._land()

    @torch.no_grad()
    def _send(self) -> None:
        part = self.parts[self.sent]
        self.sent += 1
        for p in part:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in part if p.grad is not None])
        with talking():
            work = dist.all_reduce(flat, group=self.group, async_op=True)
        self.flying.append(_Sent(part, flat, work))

    @torch.no_grad()
    def _land(self) -> None:
        part, flat, work = self.flying.popleft()
        with talking():
            work.wait()
        flat /= world_size()
        for p, mean in zip(part, flat.split([p.numel() for p in part]), strict=True):
            assert p.grad is not None
            mean = mean.view_as(p)
            if mean.stride() != p.grad.stride() or mean.dtype != p.grad.dtype:
                mean = torch.empty_like(p.grad).copy_(mean)
            p.grad = mean
