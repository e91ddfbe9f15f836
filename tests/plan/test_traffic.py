"""Bytes, rates and times of messages, by hand; and those of a ring that is gone around."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fewstep.plan.gathers import Message, Size
from fewstep.plan.meta_step import StepCost
from fewstep.plan.traffic import (
    HOST,
    Exchange,
    Links,
    Saving,
    exchanges,
    saving,
    step_seconds,
    traffic,
)

UNIT = (Size(10, 3, 4),)
MESSAGES = (
    (Message("gather", "student", UNIT), 5),
    (Message("scatter", "student", UNIT), 2),
    (Message("average", "student", UNIT), 1),
    (Message("mask", "student", (Size(7, 1, 1),)), 1),
    (Message("norm", "student", (Size(7, 1, 4),)), 1),
    (Message("logs", "student", (Size(2, 1, 4),)), 1),
)


def ring(members: int, kind: str) -> tuple[list[int], int]:
    """Pieces that each member sends by going around a ring, and its hops; a piece is 1 / members.

    Every piece starts in its place and is passed on until all have it, or added up on its way.
    """
    sent, hops = [0] * members, 0
    for _ in range(2 if kind == "all-reduce" else 1):
        has, rounds = [{i} for i in range(members)], 0
        while any(len(pieces) < members for pieces in has):
            for i, piece in [(i, (i - rounds) % members) for i in range(members)]:
                sent[i] += 1
                has[(i + 1) % members].add(piece)
            rounds += 1
        hops += rounds
    return sent, hops


@pytest.mark.parametrize("members", [2, 3, 8])
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce"])
def test_bytes_are_those_of_a_ring(members: int, kind: Any) -> None:
    sent, rounds = ring(members, kind)
    one = Exchange(kind, 120.0, 1, members)
    assert sent == [rounds] * members
    assert one.sent == pytest.approx(sent[0] * 120 / members)
    if kind != "all-reduce":
        assert one.hops(Links(hop=1.0)) == rounds


@pytest.mark.parametrize(
    ("members", "stride", "rate"),
    [
        (8, 1, 450e9),  # NVLink
        (2, 4, 450e9),
        (64, 1, 400e9),  # eight GPUs of a node, each with its link to others
        (16, 1, 400e9),
        (8, 8, 50e9),  # copies of parts: one GPU of each node
        (128, 8, 50e9),
        (32, 2, 200e9),
        (4, 16, 50e9),
    ],
)
def test_rates(members: int, stride: int, rate: float) -> None:
    assert Exchange("all-gather", 1.0, 1, members, stride).rate(Links()) == rate


def test_seconds_by_hand() -> None:
    """8 GB between 8 of a node: 7 GB at 450 GB/s and 7 hops; reduced, twice, and 6 of a tree."""
    links = Links(hop=1e-3)
    assert Exchange("all-gather", 8e9, 3, 8).seconds(links) == pytest.approx(3 * (7 / 450 + 7e-3))
    assert Exchange("all-reduce", 8e9, 1, 8).seconds(links) == pytest.approx(14 / 450 + 6e-3)
    assert Exchange("all-reduce", 0.0, 1, 1024).hops(links) == pytest.approx(2 * 10e-3)
    assert Exchange("all-gather", 0.0, 1, 1024).hops(links) == pytest.approx(1.023)


def found(count: int, parts: int, times: int) -> dict[str, list[tuple[float, int, int, int]]]:
    table: dict[str, list[tuple[float, int, int, int]]] = {}
    for e in exchanges(MESSAGES, count, parts, times):
        table.setdefault(e.kind, []).append((e.bytes, e.times, e.members, e.stride))
    return table


def test_whole_nets_send_gradients_once() -> None:
    """However many microbatches there are; 120 bytes, 7 of the mask, 8 of logs."""
    assert found(16, 1, 3) == {"all-reduce": [(120, 1, 16, 1), (7, 1, 16, 1), (8, 1, 16, 1)]}


def test_parts_send_at_every_call() -> None:
    """Ten rows in 16 parts are 16 rows: 192 bytes; three microbatches."""
    assert found(16, 16, 3) == {
        "all-gather": [(192, 15, 16, 1)],
        "reduce-scatter": [(192, 6, 16, 1)],
        "all-reduce": [(28, 1, 16, 1), (8, 1, 16, 1)],
    }


def test_copies_of_parts_average_their_part() -> None:
    """Ten rows in four parts are 12: 144 bytes, of which 36 are averaged between four copies."""
    assert found(16, 4, 1) == {
        "all-gather": [(144, 5, 4, 1)],
        "reduce-scatter": [(144, 2, 4, 1)],
        "all-reduce": [(36, 2, 4, 4), (28, 1, 4, 1), (8, 1, 16, 1)],
    }


def test_traffic_is_their_sum() -> None:
    cost, links = StepCost(0, 0, 0, 0, 0.0, messages=MESSAGES), Links(hop=1.0)
    whole = traffic(cost, 16, 1, 1, links)
    assert (whole.sent, whole.messages) == (135 * 2 * 15 / 16, 3)
    assert whole.hops == 3 * 2 * 4
    assert whole.seconds == pytest.approx(whole.hops + whole.sent / 400e9)
    alone = traffic(cost, 1, 1, 1, links)
    assert (alone.sent, alone.messages, alone.seconds) == (0, 0, 0)


def test_whole_nets_wait_for_what_is_sent() -> None:
    assert step_seconds(3.0, 2.0, 1) == 5.0
    assert step_seconds(3.0, 2.0, 8) == 3.0
    assert step_seconds(3.0, 4.0, 8) == 4.0


def test_checkpoints_by_hand() -> None:
    """100 GB: copied while training stands still, and before that gathered, where in parts."""
    cost, links = StepCost(0, 0, 0, 0, 0.0, checkpoint=100 * 10**9), Links()
    whole = saving(cost, 1, links)
    assert whole == Saving(100e9, 100e9 / HOST, 50.0)
    gathered = saving(cost, 8, links).still - whole.still
    assert gathered == pytest.approx(87.5 / 450, rel=1e-3)
    assert whole.a_step(500, 1.0) == pytest.approx(10 / 500)
    assert whole.a_step(10, 1.0) == pytest.approx((10 + 40) / 10)  # the last is not written yet


@pytest.mark.parametrize("wrong", [{"per_node": 0}, {"hop": -1.0}, {"disk": math.nan}])
def test_links_are_positive(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="links have positive rates and times"):
        Links(**wrong)
