"""What a run rests on: digests decide which run it is, paths are for people."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest

from fewstep.data import mnist
from fewstep.domains.mnist import Mnist
from fewstep.runs.monitor import Monitor
from fewstep.runs.run_folder import RunFolder
from fewstep.storage import checkpoint
from fewstep.storage.folder_lock import locked
from fewstep.storage.model_folder import load_student
from fewstep.training import distributed
from tests.cli.test_cli import WEIGHTS, interrupt
from tests.command import DISTIL, TEACH, Result, fewstep, tree
from tests.picture_files import as_folder, encoded, noise

OTHER = (*TEACH, "--steps", "1", "--seed", "9")
"""Another teacher, as soon as it is trained."""
INIT = ("--teacher", "t", "--init", "i")


@pytest.fixture
def home(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher t, a starting network i; we are there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs" / "teacher", "t")
    shutil.copytree(finished / "runs" / "sid", "i")
    return tmp_path


def stopped(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    """The run x, until step 5."""
    with monkeypatch.context() as patch:
        interrupt(patch, 5, 15)
        assert fewstep(*args, "--out", "x").code == 75


def refused(*args: str) -> str:
    """The sentence that refuses a command, which changes nothing in x."""
    before = tree(Path("x"))
    done = fewstep(*args)
    assert done.code == 2
    assert done.err.count("\n") == 1
    after = tree(Path("x"))
    after.pop("run.json.lock", None)
    assert after == before
    return done.err


@pytest.mark.parametrize("name", ["t", "i"])
def test_a_model_retrained_in_its_place_is_another_run(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher, and starting network: of the same shapes, by the same path."""
    stopped(monkeypatch, *DISTIL, *INIT)
    shutil.rmtree(name)
    assert fewstep(*OTHER, "--out", name).code == 0
    said = refused(*DISTIL, *INIT, "--out", "x")
    key = {"t": "teacher", "i": "init"}[name]
    assert f"{home / name} no longer holds what the run was started with: " in said
    assert f"digests.{key}.weights was " in said


def test_what_moved_is_named_by_its_new_place(
    finished: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on to the bits of one where nothing moved, and remembers the place."""
    assert fewstep(*DISTIL, *INIT, "--out", "y").code == 0
    stopped(monkeypatch, *DISTIL, *INIT)
    Path("t").rename("t2")
    Path("i").rename("i2")
    assert "there is no file or folder t" in refused(*DISTIL, *INIT, "--out", "x")
    done = fewstep(*DISTIL, "--teacher", "t2", "--init", "i2", "--out", "x")
    assert done.code == 0
    assert done.err.splitlines()[:3] == [
        "continuing from step 5 of 20",
        f"teacher was at {home / 't'}, is at {home / 't2'}",
        f"init was at {home / 'i'}, is at {home / 'i2'}",
    ]
    assert Path("x", WEIGHTS).read_bytes() == Path("y", WEIGHTS).read_bytes()
    facts = RunFolder(Path("x")).facts()
    assert (facts["teacher"], facts["init"]) == (str(home / "t2"), str(home / "i2"))
    shutil.move("t2", "t3")
    shutil.move("i2", "i3")
    again = fewstep(*DISTIL, "--teacher", "t3", "--init", "i3", "--out", "x")
    assert (again.code, "x is finished already" in again.err) == (0, True)
    assert RunFolder(Path("x")).facts()["teacher"] == str(home / "t3")
    shutil.rmtree("t3")  # a finished run needs it no more, but for its measurements
    again = fewstep(*DISTIL, "--teacher", "t3", "--init", "i3", "--out", "x")
    assert (again.code, "x is finished already" in again.err) == (0, True)
    assert "there is no file or folder t4" in refused(
        *DISTIL, "--teacher", "t4", "--init", "i3", "--out", "x"
    )


MEASURE = ("evaluate", "x", "--samples", "100", "--draws", "1")


@pytest.mark.slow
def test_a_finished_run_is_measured_beside_its_own_teacher(home: Path) -> None:
    """Moved: a flag says where; retrained: refused; and the flag takes no other."""
    assert fewstep(*DISTIL, "--teacher", "t", "--out", "x").code == 0
    assert fewstep(*OTHER, "--out", "wrong").code == 0
    Path("t").rename("moved")
    shutil.copytree("wrong", "t")
    for args in (MEASURE, (*MEASURE, "--teacher", "wrong")):
        said = refused(*args)
        assert "no longer holds the teacher of x (digests.weights was " in said
        assert "say where it is with --teacher" in said
    done = fewstep("report", "x")
    assert done.code == 0
    assert "no longer holds the teacher of x" in Path("x/report.html").read_text(encoding="utf-8")
    assert fewstep(*MEASURE, "--teacher", "moved").code == 0
    assert RunFolder(Path("x")).facts()["teacher"] == str(home / "moved")
    assert fewstep("report", "x").code == 0
    assert "no longer holds" not in Path("x/report.html").read_text(encoding="utf-8")


def test_data_by_another_path_are_the_same_data(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, absolute, moved; other pictures there are another run."""
    as_folder(Path("set"), {f"{i}.png": encoded(x) for i, x in enumerate(noise(8, 8, 1))})
    small = ("--model.net.width", "16", "--model.net.blocks", "1", "--model.classes", "0")
    steps = ("--batch", "8", "--steps", "6", "--sample-every", "6")
    train = ("train", "digits_teacher", *small, *steps)

    def at(place: str, out: str = "x") -> tuple[str, ...]:
        return (*train, "--domain", f"Pictures('{place}')", "--out", out)

    assert fewstep(*at("set", "y")).code == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 3, 15)
        assert fewstep(*at("set")).code == 75
    shutil.copytree("set", "elsewhere")
    Path("set/3.png").write_bytes(encoded(noise(8, 9, 3)[0]))
    assert "run.domain.sha256 was " in refused(*at("set"))
    done = fewstep(*at(str(home / "elsewhere")))
    assert done.code == 0
    assert done.err.splitlines()[1] == f"path was at set, is at {home / 'elsewhere'}"
    assert Path("x", WEIGHTS).read_bytes() == Path("y", WEIGHTS).read_bytes()


def test_every_domain_with_files_names_its_places() -> None:
    """A field that holds a path is one; a domain that is not digested has none."""
    from fewstep.config import known
    from fewstep.domains.domain import Domain

    domains = [cls for cls in known().values() if issubclass(cls, Domain) and not isabstract(cls)]
    paths = {"path", "file", "folder", "cache", "clip"}
    for cls in domains:
        names = set(cls.__dataclass_fields__)  # type: ignore[attr-defined]
        assert set(cls.places) == names & paths, cls
        assert not cls.places or "sha256" in names
    assert len([cls for cls in domains if cls.places]) == 6


def test_without_a_digest_a_path_is_a_setting(home: Path) -> None:
    """Data-free, of a file that is not there: nothing tells it from another."""
    assert Mnist("a.npz").settled() == Mnist("a.npz")
    assert mnist.SHAPE == (1, 16, 16)


@pytest.mark.slow
def test_a_copy_goes_on_by_itself(
    finished: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same run in two places: both end in its bits, and neither touches the other."""
    args = (*DISTIL, "--teacher", "t")
    stopped(monkeypatch, *args)
    shutil.copytree("x", "copy")
    before = tree(Path("x"))
    assert fewstep(*args, "--out", "copy").code == 0
    assert tree(Path("x")) == before
    assert fewstep(*args, "--out", "x").code == 0
    expected = (finished / "runs" / "sid" / WEIGHTS).read_bytes()
    assert [Path(name, WEIGHTS).read_bytes() for name in ("x", "copy")] == [expected] * 2


def test_lost_checkpoints_stop_a_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same answer; the log stays as it is; put back, they continue."""
    args = (*DISTIL, "--teacher", "t", "--out", "x")
    stopped(monkeypatch, *args[:-2])
    for emptied in (False, True):
        Path("x/checkpoints").rename("kept")
        if emptied:
            Path("x/checkpoints").mkdir()
        for _ in range(2):
            assert refused(*args) == (
                "fewstep: x/checkpoints holds no checkpoint, though one of step 5 was written "
                "there (the log ends at step 5); put it back, or choose another --out folder to "
                "start anew\n"
            )
        shutil.rmtree("x/checkpoints", ignore_errors=True)
        Path("kept").rename("x/checkpoints")
    Path("x/log.jsonl").unlink()  # what was written does not hang on the log
    Path("x/checkpoints").rename("kept")
    assert "though one of step 5 was written" in refused(*args)
    Path("kept").rename("x/checkpoints")
    assert "continuing from step 5 of 20" in fewstep(*args).err


def test_a_death_before_the_first_checkpoint_is_told(
    finished: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (*DISTIL, "--teacher", "t", "--out", "x")

    def dies(self: Monitor, record: Any) -> None:
        log(self, record)
        if record.step == 3:
            raise MemoryError

    log = Monitor.log
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log", dies)
        assert fewstep(*args).code == 1
    done = fewstep(*args)
    assert done.err.splitlines()[0] == (
        "no checkpoint was written yet, though the log ends at step 3: starting at step 1 again"
    )
    assert Path("x", WEIGHTS).read_bytes() == (finished / "runs/sid" / WEIGHTS).read_bytes()


def test_steps_that_are_done_again_are_told(
    finished: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older backup was put back: from its step on, to the same bits."""
    args = (*DISTIL, "--teacher", "t", "--out", "x")
    with monkeypatch.context() as patch:
        interrupt(patch, 17, 15)
        assert fewstep(*args).code == 75
    shutil.rmtree("x/checkpoints/step-00000017")
    done = fewstep(*args)
    assert done.err.splitlines()[:2] == [
        "continuing from step 16 of 20",
        "steps 17 to 17 of the log are done again",
    ]
    assert Path("x", WEIGHTS).read_bytes() == (finished / "runs/sid" / WEIGHTS).read_bytes()


def _edit(change: Callable[[dict[str, Any]], Any]) -> None:
    facts = json.loads(Path("x/run.json").read_text())
    change(facts)
    Path("x/run.json").write_text(json.dumps(facts))


def test_run_json_cannot_be_talked_into_another_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edited to fit another command, it does not fit its checkpoints."""
    stopped(monkeypatch, *DISTIL, "--teacher", "t")
    whole = Path("x/run.json").read_text()
    _edit(lambda facts: facts["run"].update(seed=3))
    said = refused(*DISTIL, "--teacher", "t", "--seed", "3", "--out", "x")
    assert "checkpoints/step-00000005 was written with another seed than run.json names" in said
    Path("x/run.json").write_text(whole)
    assert fewstep(*OTHER, "--out", "new").code == 0
    digest = json.loads(Path("new/student/manifest.json").read_text())["sha256"]
    _edit(lambda f: f["digests"]["teacher"].update(weights=digest["model.safetensors"]))
    said = refused(*DISTIL, "--teacher", "new", "--out", "x")
    assert "was written with another digests than run.json names" in said
    Path("x/run.json").write_text(whole)
    _edit(lambda facts: facts.update(format=1))
    assert "run.json has format 1, or no id; this version" in refused(
        *DISTIL, "--teacher", "t", "--out", "x"
    )
    assert checkpoint.find_checkpoints(Path("x/checkpoints"))


def test_another_runs_student_is_not_sampled(home: Path) -> None:
    """In a run's folder; by itself, or where no run says anything, it is a model like any."""
    assert fewstep(*DISTIL, "--teacher", "t", "--out", "x").code == 0
    shutil.rmtree("x/student")
    shutil.copytree("i/student", "x/student")
    for args in (("sample", "x"), ("evaluate", "x"), ("distill", "digits", "--teacher", "x")):
        assert "x/student was written by another run (id " in refused(*args)
    assert load_student("x/student").card["steps"] == 20


def test_a_student_without_its_weights_is_made_again(finished: Path, home: Path) -> None:
    """It is not finished, for whoever asks."""
    args = (*DISTIL, "--teacher", "t", "--out", "x")
    assert fewstep(*args).code == 0
    weights = Path("x", WEIGHTS).read_bytes()
    Path("x", WEIGHTS).unlink()
    assert "x is not finished; continue it with: fewstep distill digits" in refused(*MEASURE)
    assert not RunFolder(Path("x")).finished
    done = fewstep(*args)
    assert done.err.splitlines()[0] == (
        "x/student is damaged or not whole; set aside as student.damaged, and made again from the "
        "last checkpoint"
    )
    assert Path("x", WEIGHTS).read_bytes() == weights


def test_the_folder_is_locked_whatever_is_deleted_in_it(
    finished: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without .lock, a second process is refused as before, and the first ends as if alone."""
    args = (*DISTIL, "--teacher", "t", "--out", "x")
    alive, steps, second = distributed.heartbeat, iter(range(1, 99)), list[Result]()

    def acting() -> None:
        alive()
        if next(steps) == 5:
            Path("x/.lock").unlink()
            second.append(fewstep(*args))

    monkeypatch.setattr(distributed, "heartbeat", acting)
    assert fewstep(*args).code == 0
    sentence = "x is in use by another process; wait for it, or choose another --out"
    assert second == [(2, "", f"fewstep: {sentence}\n")]
    assert Path("x", WEIGHTS).read_bytes() == (finished / "runs/sid" / WEIGHTS).read_bytes()


def test_a_lock_is_of_the_folder_that_is_there(home: Path) -> None:
    """Not of one that was moved away: its place is free, and its lock goes with it."""
    with locked(Path("a")) as hold:
        assert hold.elsewhere() is None
        Path("a").rename("b")
        assert hold.elsewhere() == str(home / "b")
        with locked(Path("a")) as other:
            assert other.elsewhere() is None
        with pytest.raises(ValueError, match="b is in use by another"), locked(Path("b")):
            pass
        shutil.rmtree("b")
        assert hold.elsewhere() == ""
