"""Pairs in a run folder: made once, in parts that survive a stop, and never another run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.data.batches import Latents
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Heun
from fewstep.distillation.pairs import Pairs, make_pairs
from fewstep.runs import teacher_pairs
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.teacher_pairs import stored_pairs
from fewstep.storage.files import Damaged
from fewstep.teachers.gaussian import Gaussian
from fewstep.training.progress import listen

PAIRS = Pairs(10)
SOURCE = Latents((2,))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_pairs, "PART", 4)


def teacher() -> Generator:
    net = Gaussian(torch.tensor([0.4, -0.7]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]), VE())
    return Generator(net, Heun(steps=6), (2,))


def folder(path: Path, run: str = "a") -> RunFolder:
    path.mkdir(exist_ok=True)
    return RunFolder(path, origin={"run": run})


def parts(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*.safetensors"))}


def test_they_are_the_pairs_made_in_one_go(tmp_path: Path) -> None:
    """Whatever the parts and the batch, to the rounding of a batch of another size."""
    stored = stored_pairs(PAIRS, teacher(), SOURCE, folder(tmp_path), batch=3)
    whole = make_pairs(PAIRS, teacher(), SOURCE)
    torch.testing.assert_close(stored.table, whole.table, rtol=1e-5, atol=1e-6)
    assert len(parts(tmp_path)) == 3
    draws = Draws.range(0, 50)
    assert torch.equal(stored(draws).more["pair_z"], whole(draws).more["pair_z"])


def test_a_stop_keeps_the_parts_that_are_done(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        assert (what, total) == ("sampling the teacher", 10)
        if done > 5:
            raise Enough

    with pytest.raises(Enough), listen(stop):
        stored_pairs(PAIRS, teacher(), SOURCE, folder(tmp_path / "run"), batch=1)
    first = parts(tmp_path / "run")
    assert len(first) == 1
    then = stored_pairs(PAIRS, another_teacher(), SOURCE, folder(tmp_path / "run"), batch=4)
    again = parts(tmp_path / "run")
    assert {name: again[name] for name in first} == first
    whole = make_pairs(PAIRS, teacher(), SOURCE)
    torch.testing.assert_close(then.table[:4], whole.table[:4], rtol=1e-5, atol=1e-6)
    assert bool((then.table[4:] == 7).all())  # the rest is what the teacher said this time


def another_teacher() -> Generator:
    """A generator whose samples are all 7."""

    class Seven(Gaussian):
        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return torch.full_like(xt, 7.0)

    net = Seven(torch.zeros(2), torch.eye(2), VE())
    return Generator(net, Heun(steps=1), (2,))


def test_an_altered_part_is_refused(tmp_path: Path) -> None:
    stored_pairs(PAIRS, teacher(), SOURCE, folder(tmp_path), batch=4)
    file = sorted(tmp_path.rglob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged):
        stored_pairs(PAIRS, teacher(), SOURCE, folder(tmp_path), batch=4)


def test_parts_of_another_run_are_refused(tmp_path: Path) -> None:
    stored_pairs(PAIRS, teacher(), SOURCE, folder(tmp_path), batch=4)
    with pytest.raises(ValueError, match="another run"):
        stored_pairs(PAIRS, teacher(), SOURCE, folder(tmp_path, "b"), batch=4)


def test_another_number_of_pairs_is_refused(tmp_path: Path) -> None:
    stored_pairs(PAIRS, teacher(), SOURCE, folder(tmp_path), batch=4)
    with pytest.raises(Damaged, match="does not hold 3 samples"):
        stored_pairs(Pairs(11), teacher(), SOURCE, folder(tmp_path), batch=4)
