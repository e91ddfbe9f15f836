"""What GPUs send each other in a step, and the time that takes on given links.

    nets           of n GPUs                              of g on a node, n / g nodes
    whole          all-reduce of the gradients, n         once an update
    in n parts     all-gather and reduce-scatter, n       at every call and gradient
    in p parts     the same between p, and all-reduce of a part between n / p copies

As a ring does it (Patarasuk and Yuan 2009), a GPU sends (m - 1) / m of the whole for an all-gather
or a reduce-scatter between m, and twice that for an all-reduce. The ring passes from node to node
once for each GPU that a node has in it, each with a link of its own, so that its rate is the least
of the link within a node and q links between nodes, q GPUs of a node being in it. Beside its bytes
a message takes m - 1 hops around the ring; an all-reduce takes a tree's, 2 log2(m).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fewstep.plan.gathers import Message
from fewstep.plan.links import Links
from fewstep.plan.meta_step import StepCost

HOST = 10e9
"""Bytes a second from a GPU to main memory, for the copy that a checkpoint is written from."""


Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]


@dataclass(frozen=True)
class Exchange:
    """A message that `members` GPUs send each other, each so many places from the next.

    bytes: of the whole tensor, which all have before or after.
    """

    kind: Kind
    bytes: float
    times: int
    members: int
    stride: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each member sends."""
        ways = 2 if self.kind == "all-reduce" else 1
        return self.times * self.bytes * ways * (self.members - 1) / self.members

    def hops(self, links: Links) -> float:
        """Seconds that the messages take, however short they are."""
        many = self.members - 1
        if self.kind == "all-reduce":
            many = 2 * math.ceil(math.log2(self.members))
        return self.times * many * links.hop

    def seconds(self, links: Links) -> float:
        """Seconds that the messages take."""
        return self.sent / self.rate(links) + self.hops(links)

    def rate(self, links: Links) -> float:
        """Bytes a second at which each member sends."""
        if self.members * self.stride <= links.per_node:
            return links.within
        return min(links.within, links.between * max(1, links.per_node // self.stride))


def exchanges(
    messages: Sequence[tuple[Message, int]], count: int, parts: int, microbatches: int
) -> Iterator[Exchange]:
    """What `count` GPUs send in a step, nets in `parts` each.

    messages: those of one microbatch; nets in parts send them for each, whole ones once.
    """
    for message, times in messages:
        if (message.kind in ("mask", "average") and parts == 1) or message.kind == "logs":
            yield Exchange("all-reduce", message.bytes(), times, count)
        elif message.kind == "norm" and parts > 1:
            yield Exchange("all-reduce", message.bytes(), times, parts)
        elif message.kind == "gather" and parts > 1:
            yield Exchange("all-gather", message.bytes(parts), times * microbatches, parts)
        elif message.kind == "scatter" and parts > 1:
            whole, times = message.bytes(parts), times * microbatches
            yield Exchange("reduce-scatter", whole, times, parts)
            if parts < count:
                yield Exchange("all-reduce", whole / parts, times, count // parts, parts)


@dataclass(frozen=True)
class Traffic:
    """What a GPU sends in a step."""

    sent: float
    """Bytes."""
    messages: int
    seconds: float
    hops: float
    """Those of the seconds that no wider link would save."""


def traffic(cost: StepCost, count: int, parts: int, microbatches: int, links: Links) -> Traffic:
    """What each of `count` GPUs sends in a step of so many microbatches."""
    found = [*exchanges(cost.messages, count, parts, microbatches)] if count > 1 else []
    return Traffic(
        sum(one.sent for one in found),
        sum(one.times for one in found),
        sum(one.seconds(links) for one in found),
        sum(one.hops(links) for one in found),
    )


def step_seconds(computing: float, sending: float, parts: int) -> float:
    """A step: nets in parts send meanwhile, whole ones are counted as if they did afterwards."""
    return computing + sending if parts == 1 else max(computing, sending)


@dataclass(frozen=True)
class Saving:
    """What a checkpoint takes."""

    bytes: float
    """Of its tensors, which process 0 has in main memory until they are written."""
    still: float
    """Seconds that training stands still while they are gathered and copied."""
    writing: float
    """Seconds that a thread writes them for while training goes on."""

    def a_step(self, every: int, step: float) -> float:
        """Seconds of a step that it costs, saved every so many steps.

        The next is not begun before the last is written.
        """
        return (self.still + max(0.0, self.writing - every * step)) / every


def saving(cost: StepCost, parts: int, links: Links) -> Saving:
    """What a checkpoint takes of nets in `parts` each."""
    gathered = Exchange("all-gather", cost.checkpoint, 1, parts).seconds(links) if parts > 1 else 0
    return Saving(cost.checkpoint, gathered + cost.checkpoint / HOST, cost.checkpoint / links.disk)
