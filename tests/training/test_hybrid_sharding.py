"""Copies of nets in parts (HSDP), and parts that rest in main memory: the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.runs.monitor import Monitor
from fewstep.storage.files import unpack
from fewstep.storage.model_folder import load_student
from fewstep.training import distributed
from fewstep.training.loop import State
from fewstep.training.sharding import shard
from tests.command import Result
from tests.processes import results, together
from tests.training.test_distributed import SMOOTH, STEPS, apart, run
from tests.training.test_distributed_faults import codes, command

pytestmark = pytest.mark.slow


def whole(until: int = STEPS, resume: Any = None, save: Any = None) -> Any:
    return run(until, 1, SMOOTH, None, resume, save)


def copies(until: int = STEPS, resume: Any = None, save: Any = None) -> Any:
    return run(until, 1, SMOOTH, None, resume, save, parts=2)


def resting(until: int = STEPS, resume: Any = None, save: Any = None) -> Any:
    return run(until, 1, SMOOTH, None, resume, save, parts=0, offload=True)


def single(until: int = STEPS, resume: Any = None, save: Any = None) -> Any:
    return run(until, 1, SMOOTH, None, resume, save, parts=1)


@pytest.mark.parametrize(
    ("size", "function"), [(2, copies), (2, single), (2, resting), (4, copies)]
)
def test_copies_of_parts_have_the_bits_of_whole_nets(
    size: int, function: Any, tmp_path: Path
) -> None:
    """Meshes of 1 x 2, 2 x 1 and 2 x 2 (HSDP), and parts that rest in main memory.

    Of four numbers two and two are added: in another order than by four whole nets.
    """
    nets, logs = results(size, tmp_path, whole)[0]
    for found, told in results(size, tmp_path, function):
        assert apart(found, nets) <= (0.0 if size == 2 else 1e-6)
        for ours, theirs in zip(told, logs, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_copies_of_parts_continue(tmp_path: Path) -> None:
    """Saved at step 4 of 10 by two copies in two parts: to the bit, and as two whole nets."""
    undisturbed, _ = results(4, tmp_path, copies)[0]
    results(4, tmp_path, copies, 4, None, tmp_path / "c")
    again, _ = results(4, tmp_path, copies, STEPS, tmp_path / "c")[0]
    assert apart(again, undisturbed) == 0.0
    other, _ = results(2, tmp_path, whole, STEPS, tmp_path / "c")[0]
    assert 0 < apart(other, undisturbed) < 1e-6


def altered() -> list[str]:
    """What is said of four ranks, two copies in two parts, as weights change on rank 3."""
    with distributed.process_group():
        net, told = nn.Linear(4, 4), []
        nn.init.ones_(net.weight)
        shard(net, 2)
        tensors = dict(net.named_parameters())
        for _ in range(2):
            try:
                distributed.require_equal_ranks({"weight": tensors["weight"]}, "now")
                told.append("")
            except distributed.RanksDiffer as error:
                told.append(str(error).partition(";")[0])
            if distributed.rank() == 3:
                distributed.local_tensor(tensors["weight"]).data.view(torch.int32)[1, 1] ^= 1
        return told


def test_copies_of_a_part_are_compared(tmp_path: Path) -> None:
    sentence = "the processes hold different numbers in weight now: processes 1 and 3 differ"
    assert results(4, tmp_path, altered) == [["", sentence]] * 4


def uneven() -> str:
    with distributed.process_group():
        try:
            shard(nn.Linear(2, 2), 3)
        except ValueError as error:
            return str(error)
    return ""


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    sentence = "2 processes do not make whole copies of nets in 3 parts; give --shard a number"
    assert results(2, tmp_path, uneven) == [f"{sentence} that divides them"] * 2


def test_wrong_flags_are_refused_before_work(tmp_path: Path) -> None:
    moments = ("--out", "moments", "--optim.offload", "--shard")
    eight = ("--out", "eight", "--optim.bits", "8", "--shard")
    for more, sentence in (
        (("--out", "three", "--shard", "3"), "2 processes do not make whole copies of nets in 3"),
        (moments, "the moments of nets in parts stay where these are; leave out --shard, or"),
        (eight, "moments of 8 bits are of whole weights, not of parts; leave out --shard, or"),
    ):
        ended = together(2, tmp_path, command, tmp_path, None, *more)
        assert codes(ended) == [2, 2]
        assert all(f"fewstep: {sentence}" in end.err for end in ended)
        assert not (tmp_path / more[1]).exists()


def impatient(home: Path) -> Result:
    """Rank 0 alone sees anything, and that gets worse after the second look."""

    def look(self: Monitor, state: State) -> dict[str, Any] | None:
        return {"diversity": float(state.step == 4)} if self.writes else None

    flags = ("--best.metric", "diversity", "--best.mode", "max", "--best.patience", "2")
    return command(home, None, *flags, "--sample-every", "2", "--shard", looking=look)


def test_all_end_when_no_look_is_better(tmp_path: Path) -> None:
    """Sharded, at the same step; the best model is whole."""
    results(2, tmp_path, impatient, tmp_path)
    kept = [load_student(tmp_path / "run" / name).card["steps"] for name in ("best", "student")]
    assert kept == [4, 8]
    best = unpack(tmp_path / "run/best/model.safetensors")
    then = unpack(tmp_path / "run/checkpoints/step-00000004/average.safetensors")
    assert all(torch.equal(best[name], then[name]) for name in then)
