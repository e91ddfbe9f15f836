"""The table of fewstep plan: numbers as people write them."""

from __future__ import annotations

import pytest

from fewstep.cli.plan_table import memory, span


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0000512, "0.051 ms"), (0.0032, "3.2 ms"), (0.37, "370 ms"), (41, "41 s"), (9000, "2.5 h")],
)
def test_spans_are_for_people(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_memory_is_in_gib_from_one_on() -> None:
    assert memory(2**30) == "1.00 GiB"
    assert memory(2**30 - 2**20) == "1023.0 MiB"
