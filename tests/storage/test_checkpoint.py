"""Checkpoints and finished models: bits survive, damage is seen, nothing is lost half-way."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.storage import checkpoint, files
from fewstep.storage.files import Damaged, pack, write, write_json
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.ema import EMA
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim

STEPS = 12
METHOD = SiD(alpha=1.0)
MODEL = Model(MLP(width=16, blocks=1), (2,), sigma_data=0.7)
TEACHER = GaussianMixture.ring(3)
OPTIM = Optim(1e-2, (0.5, 0.99), warmup=3, decay="linear")
OPTIMS = {"student": OPTIM, "fake": OPTIM}


def fresh(seed: int = 0) -> State:
    return State.init(METHOD, TEACHER, MODEL.build(seed))


def advance(state: State, until: int = STEPS) -> State:
    """Train `state` in place up to step `until` of STEPS."""
    settings: Any = {"batch": 8, "optim": OPTIM, "ema": EMA(100), "state": state}
    steps = train(METHOD, TEACHER, MODEL.build(), Latents((2,)), steps=STEPS, **settings)
    for _ in itertools.islice(steps, until - state.step):
        pass
    return state


def weights(state: State) -> str:
    """A digest of the networks and their average."""
    data = pack(state.nets.state_dict()) + pack(state.average.state_dict())
    return hashlib.sha256(data).hexdigest()


def everything(state: State) -> tuple[object, ...]:
    """Weights, counters, and all that the optimisers remember."""
    moments = {
        (net, index, key): value.tolist()
        for net, optimizer in state.optimizers.items()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    return weights(state), moments, [getattr(state, key) for key in checkpoint.COUNTERS]


def saved(folder: Path, *steps: int) -> State:
    """A run that saved at `steps`."""
    state = fresh()
    for step in steps:
        checkpoint.save(folder, advance(state, step), METHOD)
    return state


def damage(path: Path, place: int, flip: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= flip
    path.write_bytes(data)


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_loading_gives_the_bits_that_were_saved(tmp_path: Path) -> None:
    state, again = saved(tmp_path, 5), fresh(seed=1)
    state.skipped, state.streak = 3, 2
    path = checkpoint.save(tmp_path, state, METHOD)
    assert everything(again) != everything(state)
    checkpoint.load_checkpoint(path, again, METHOD, OPTIMS)
    assert everything(again) == everything(state)
    _, moments, counters = everything(state)
    assert counters == [5, 40, 80, 3, 2]
    assert len(moments) == 3 * sum(1 for _ in state.nets.parameters())  # type: ignore[arg-type]
    kept = {"nets", "average", "optim-student", "optim-fake"}
    assert {p.name for p in path.iterdir()} == {f"{k}.safetensors" for k in kept} | {
        "manifest.json"
    }


@pytest.fixture(scope="module")
def undisturbed() -> tuple[object, ...]:
    return everything(advance(fresh()))


@pytest.mark.parametrize("stops", [(1,), (6,), (11,), (12,), (2, 3, 9)])
def test_a_continued_run_has_the_bits_of_an_undisturbed_one(
    stops: tuple[int, ...], undisturbed: object, tmp_path: Path
) -> None:
    state = fresh()
    for stop in stops:
        checkpoint.save(tmp_path, advance(state, stop), METHOD)
        state = fresh(seed=stop)  # everything must come from the file
        path, notes = checkpoint.resume_newest(tmp_path, state, METHOD, OPTIMS)
        assert (path, notes) == (tmp_path / f"step-{stop:08d}", [])
    assert everything(advance(state)) == undisturbed


def _forget_average(state: State) -> None:
    state.average.load_state_dict(state.nets["student"].state_dict())


FORGETTING = {
    "nothing": lambda state: None,
    "optimisers": lambda state: state.optimizers.clear(),
    "one optimiser": lambda state: state.optimizers.pop("fake"),
    "drawn": lambda state: setattr(state, "drawn", 0),
    "images": lambda state: setattr(state, "images", 0),
    "step": lambda state: setattr(state, "step", 5),
    "average": _forget_average,
    "fake score": lambda state: state.nets["fake"].load_state_dict(TEACHERLESS),
}
TEACHERLESS = MODEL.build().state_dict()


@pytest.mark.parametrize("lost", FORGETTING)
def test_whatever_is_forgotten_changes_the_result(
    lost: str, undisturbed: tuple[object, ...], tmp_path: Path
) -> None:
    """The negative controls of the test above: each part of a checkpoint is needed."""
    saved(tmp_path, 6)
    state = fresh()
    checkpoint.resume_newest(tmp_path, state, METHOD, OPTIMS)
    FORGETTING[lost](state)
    assert (weights(advance(state)) == undisturbed[0]) == (lost == "nothing")


def test_two_are_kept(tmp_path: Path) -> None:
    state = saved(tmp_path, 1, 2, 3, 4)
    names = ["step-00000003", "step-00000004"]
    assert [p.name for p in checkpoint.find_checkpoints(tmp_path)] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    checkpoint.save(tmp_path, advance(state, 5), METHOD, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("call", [1, 2, 4, 5])
@pytest.mark.parametrize("step", [5, 6])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_while_writing_leaves_the_old_intact(
    call: int, step: int, error: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills, or Ctrl-C comes, at the n-th file: over an old checkpoint, or a new one."""
    state = saved(tmp_path, 4, 5)
    before = content(tmp_path)
    advance(state, step)
    calls = itertools.count(1)

    def failing(handle: int) -> None:
        if next(calls) == call:
            raise error("no space left")

    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(error, match="no space left"):
        checkpoint.save(tmp_path, state, METHOD)
    monkeypatch.undo()
    assert content(tmp_path) == before
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000005"]
    checkpoint.save(tmp_path, state, METHOD)
    assert checkpoint.find_checkpoints(tmp_path)[-1].name == f"step-0000000{step}"


def test_a_failure_between_two_renames_puts_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = saved(tmp_path, 5)
    before, rename = content(tmp_path), Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".step") and "partial" in self.name:
            raise OSError("no rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    state.images += 1
    with pytest.raises(OSError, match="no rename"):
        checkpoint.save(tmp_path, state, METHOD)
    assert content(tmp_path) == before
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_what_a_killed_process_left_is_ignored_and_cleared(tmp_path: Path) -> None:
    state = saved(tmp_path, 5)
    half = tmp_path / ".step-00000006.partial-123"
    shutil.copytree(tmp_path / "step-00000005", half)
    assert (
        checkpoint.resume_newest(tmp_path, fresh(), METHOD, OPTIMS)[0]
        == tmp_path / "step-00000005"
    )
    checkpoint.save(tmp_path, advance(state, 6), METHOD)
    assert not half.exists()


def test_write_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", "old")

    def failing(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "a", "new and longer")
    monkeypatch.undo()
    assert content(tmp_path) == {"a": b"old"}
    write(tmp_path / "a", b"new")
    assert content(tmp_path) == {"a": b"new"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a", {"x": float("nan")})
    assert content(tmp_path) == {"a": b"new"}


def _cases() -> list[tuple[str, str, int]]:
    """(file, what happens, seed): 12 flips, 2 cuts, a byte more, and loss, for each file."""
    names = ("nets", "average", "optim-student", "optim-fake")
    kinds = ["flip"] * 12 + ["cut"] * 2 + ["longer", "missing"]
    every = [f"{n}.safetensors" for n in names] + ["manifest.json"]
    return [(name, kind, seed) for name in every for seed, kind in enumerate(kinds)]


def test_any_damage_is_seen_before_a_weight_is_loaded(tmp_path: Path) -> None:
    """80 cases; the message names the file, and the state is what it was."""
    good = tmp_path / "good" / "step-00000005"
    saved(good.parent, 5)
    state = fresh(seed=1)
    before = everything(state)
    for name, kind, seed in _cases():
        rng = random.Random(f"{name}{kind}{seed}")
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        size = (bad / name).stat().st_size
        if kind == "flip":
            damage(bad / name, rng.randrange(size), rng.randrange(1, 256))
        elif kind == "cut":
            os.truncate(bad / name, rng.randrange(size))
        elif kind == "longer":
            (bad / name).write_bytes((bad / name).read_bytes() + b"\n")
        else:
            (bad / name).unlink()
        with pytest.raises(Damaged, match=re.escape(str(bad / name))):
            checkpoint.load_checkpoint(bad, state, METHOD, OPTIMS)
        shutil.rmtree(bad)
    assert everything(state) == before
    assert len(_cases()) == 80
    checkpoint.load_checkpoint(good, state, METHOD, OPTIMS)  # nothing but the damage was refused


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    """Counters too: one image more or less would be another run."""
    saved(tmp_path, 5)
    path = tmp_path / "step-00000005" / "manifest.json"
    whole, rng = path.read_bytes(), random.Random(0)
    assert json.loads(whole)["drawn"] == 80
    for place, byte in enumerate(whole):
        flip = ord("\n") ^ ord("\r") if byte == ord("\n") else rng.randrange(1, 256)
        damage(path, place, flip)
        with pytest.raises(Damaged, match=r"manifest\.json"):
            files.read_folder(path.parent)
        path.write_bytes(whole)
