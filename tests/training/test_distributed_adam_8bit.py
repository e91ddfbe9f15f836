"""Moments of eight bits on several processes: the same on all, and those of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.nets.mlp import MLP
from tests.processes import results
from tests.training import test_distributed
from tests.training.test_distributed import MODEL, SMOOTH, STEPS, apart

pytestmark = pytest.mark.slow

pytest.importorskip("bitsandbytes")


def run(until: int = STEPS, accumulate: int = 1, *more: Any) -> Any:
    """`test_training.run` of a network whose weights are large enough to be quantised."""
    test_distributed.MODEL = replace(MODEL, net=MLP(64, 1))
    try:
        return test_distributed.run(until, accumulate, replace(SMOOTH, bits=8), None, *more)
    finally:
        test_distributed.MODEL = MODEL


def test_two_processes_have_the_bits_of_one_and_continue(tmp_path: Path) -> None:
    one, logs = run(accumulate=2)
    assert any(t.dtype == torch.uint8 for t in one.values())
    for found, told in results(2, tmp_path, run):
        assert apart(found, one) == 0.0
        assert told == logs
    results(2, tmp_path, run, 4, 1, None, tmp_path / "c")
    again, told = results(2, tmp_path, run, STEPS, 1, tmp_path / "c")[0]
    assert apart(again, one) == 0.0
    assert told == logs[4:]
