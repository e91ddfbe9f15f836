"""A run folder after somebody's hands were in it: never another run's bits, never a silent start.

Every file and folder of a run that was stopped, and of one that is finished, is deleted, cut or
exchanged with that of a twin: a run of the same command in another folder. Each ends in one of
three ways: it continues to the bits of a run that nobody touched, it is refused in one sentence
that changes nothing, or it is finished already.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.domains.ring import Ring
from fewstep.runs.monitor import Monitor
from fewstep.runs.run_folder import RunFolder
from fewstep.storage import checkpoint, files
from fewstep.training import distributed
from tests.cli.test_cli import interrupt
from tests.command import Result, bits, fewstep, tree

SMALL = ("--model.net.width", "16", "--model.net.blocks", "1", "--batch", "16")
STEPS = ("--steps", "12", "--save-every", "3", "--sample-every", "6")
KEPT = ("--power.sigma-rel", "0.1", "--best.metric", "quick.swd")
RUN = ("distill", "mixture", *SMALL, *STEPS, *KEPT)
LAST = "checkpoints/step-00000012"


def look(self: Monitor, state: Any) -> dict[str, Any] | None:
    """Every look is better than the one before, and costs nothing."""
    line = {"step": state.step, "quick": {"swd": 1.0 / (1 + state.step)}}
    self.folder.append("gauges.jsonl", line)
    return line if distributed.rank() == 0 else None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    points = Ring.points
    monkeypatch.setattr(Ring, "points", lambda self, n, seed: points(self, min(n, 300), seed))
    monkeypatch.setattr(Monitor, "look", look)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """half and whole, of a run that was stopped at step 7; half-twin and whole-twin; untouched.

    All of one command.
    """
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(Monitor, "look", look)
        for name in ("whole", "whole-twin"):
            with pytest.MonkeyPatch.context() as stopping:
                interrupt(stopping, 7, 15)
                assert fewstep(*RUN, "--out", name).code == 75
            shutil.copytree(name, name.replace("whole", "half"))
            assert fewstep(*RUN, "--out", name).code == 0
        assert fewstep(*RUN, "--out", "untouched").code == 0
    return home


def results(folder: Path) -> dict[str, bytes | None]:
    """What a run is for: the finished model, the last checkpoint, the average beside it."""
    parts = ("student", LAST, "averages/step-00000012")
    return {f"{part}/{name}": data for part in parts for name, data in bits(folder / part).items()}


def one_sentence(done: Result) -> bool:
    """Whether a command was refused as a person should be, after what it had to tell before."""
    said = [line.startswith("fewstep: ") for line in done.err.splitlines()]
    return done.code == 2 and said[-1] and said.count(True) == 1


def stored(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, but for the lock; what was set aside under its good name."""
    return {k.replace(".damaged", ""): v for k, v in tree(folder).items() if k != ".lock"}


def outcome(runs: Path, out: str = "x") -> str:
    """How the command ends in `out`: "equal", "refused" or "finished"."""
    before = stored(Path(out))
    done = fewstep(*RUN, "--out", out)
    if done.code:
        assert one_sentence(done), done.err
        assert stored(Path(out)) == before
        return "refused"
    finished = "is finished already" in done.err
    student = Path(out, "student")
    assert bits(student) == bits(runs / "untouched" / "student")
    assert finished or results(Path(out)) == results(runs / "untouched")
    return "finished" if finished else "equal"


def deleted(path: Path, twin: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path: Path, twin: Path) -> None:
    """To its first half; a folder loses its last file, if it has any."""
    if path.is_dir():
        for last in sorted(path.iterdir())[-1:]:
            deleted(last, twin)
    else:
        os.truncate(path, path.stat().st_size // 2)


def exchanged(path: Path, twin: Path) -> None:
    deleted(path, twin)
    shutil.copytree(twin, path) if twin.is_dir() else shutil.copy(twin, path)


CHECKPOINTS = {"checkpoints", "checkpoints/step-00000007", "checkpoints/step-00000006"}
REFUSED: dict[tuple[str, Any], set[str]] = {
    ("half", deleted): {
        *("run.json", "checkpoints"),
        *("averages", "averages/step-00000007"),
        *(f"averages/step-00000007/{name}" for name in ("manifest.json", "sigma-0.1.safetensors")),
    },
    ("half", cut): {
        *("run.json", "averages", "averages/step-00000007"),
        *(f"averages/step-00000007/{name}" for name in ("manifest.json", "sigma-0.1.safetensors")),
    },
    ("half", exchanged): {
        *("run.json", "checkpoints", "checkpoints/step-00000007", "best", "best/manifest.json"),
        "checkpoints/step-00000007/manifest.json",
        *("averages", "averages/step-00000003", "averages/step-00000006"),
        *("averages/step-00000007", "averages/step-00000007/manifest.json"),
        *("averages/step-00000003/manifest.json", "averages/step-00000006/manifest.json"),
    },
    ("whole", deleted): {"run.json"},
    ("whole", cut): {"run.json"},
    ("whole", exchanged): {"run.json", "student", "student/manifest.json"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["half", "whole"])
@pytest.mark.parametrize("change", [deleted, cut, exchanged])
def test_whatever_is_done_to_a_run_folder(
    kind: str,
    change: Callable[[Path, Path], None],
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each file and folder in turn: some are refused, all others end as if nothing had been."""
    monkeypatch.chdir(tmp_path)
    names = [name for name in tree(runs / kind) if (runs / f"{kind}-twin" / name).exists()]
    assert len(names) > 20
    ends = {}
    for name in names:
        shutil.copytree(runs / kind, "x")
        change(Path("x", name), runs / f"{kind}-twin" / name)
        ends[name] = outcome(runs)
        shutil.rmtree("x")
    assert {name for name, end in ends.items() if end == "refused"} == REFUSED[kind, change]
    remade = {name for name, end in ends.items() if end == "equal"}
    if kind == "whole":
        lost = set() if change is exchanged else {n for n in names if n.startswith("student")}
        assert remade == lost


def waits(patch: pytest.MonkeyPatch) -> None:
    """Each checkpoint is whole on disk before training goes on."""
    save = checkpoint.Writer.save

    def saving(self: checkpoint.Writer, *args: Any) -> list[str]:
        notes = save(self, *args)
        self.finish()
        return notes

    patch.setattr(checkpoint.Writer, "save", saving)


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], Any], inside: bool) -> None:
    """Do something to the folder after a step, or `inside` what is written for it."""
    log, alive, steps = Monitor.log, distributed.heartbeat, iter(range(1, 99))

    def logging(self: Monitor, record: Any) -> None:
        log(self, record)
        if inside and record.step == step:
            act()

    def living() -> None:
        alive()
        if next(steps) == step and not inside:
            act()

    patch.setattr(Monitor, "log", logging)
    patch.setattr(distributed, "heartbeat", living)


def _turned(twin: Path) -> None:
    """The link home/x, which was to home/real, is to a twin now."""
    shutil.copytree(twin, "home/new")
    Path("home/x").unlink()
    Path("home/x").symlink_to("new")


def _replaced(twin: Path) -> None:
    shutil.rmtree("home/real")
    shutil.copytree(twin, "home/real")


def _exchanged(twin: Path) -> None:
    shutil.copytree(twin, "home/new")
    Path("home/real").rename("home/old")
    Path("home/new").rename("home/real")


MOVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "moved": (lambda twin: Path("home/real").rename("y"), "y"),
    "moved aside, a twin in its place": (_exchanged, "home/old"),
    "the folder above moved": (lambda twin: Path("home").rename("z"), "z/real"),
    "the link turned": (_turned, "home/real"),
    "removed": (lambda twin: shutil.rmtree("home/real"), ""),
    "removed, a twin in its place": (_replaced, ""),
    "another run's description": (
        lambda twin: shutil.copy(twin / "run.json", "home/real/run.json"),
        "",
    ),
    "no description": (lambda twin: Path("home/real/run.json").unlink(), ""),
}


@pytest.mark.parametrize("case", MOVES)
@pytest.mark.parametrize(
    ("step", "inside"),
    [
        pytest.param(5, False, marks=pytest.mark.slow),
        pytest.param(6, False, marks=pytest.mark.slow),
        pytest.param(6, True, marks=pytest.mark.slow),
        (12, False),
    ],
)
def test_a_folder_that_goes_away_while_its_run_trains(
    case: str,
    step: int,
    inside: bool,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is in its place now is not touched; what was moved is saved, and ends as if it had not.

    Before a regular checkpoint, after one, at the end, and while things are written for a step.
    """
    monkeypatch.chdir(tmp_path)
    Path("home/real").mkdir(parents=True)
    Path("home/x").symlink_to("real")
    act, now = MOVES[case]
    after: dict[str, bytes | None] = {}

    def acting() -> None:
        act(runs / "half-twin")
        after.update(tree(tmp_path / "home") if Path("home").exists() else {})

    with monkeypatch.context() as patch:
        waits(patch)
        at_step(patch, step, acting, inside)
        done = fewstep(*RUN, "--out", "home/x")
    assert done.code == 2
    (sentence,) = (line for line in done.err.splitlines() if line.startswith("fewstep: "))
    assert "stopped, and nothing " in sentence, done.err
    ours = Path(now).relative_to("home").as_posix() if now.startswith("home/") else "none"
    left = tree(tmp_path / "home") if Path("home").exists() else {}
    assert {k: v for k, v in left.items() if not k.startswith(ours)} == {
        k: v for k, v in after.items() if not k.startswith(ours)
    }
    if now:
        assert f"continues with --out {tmp_path / now}" in sentence
        again = fewstep(*RUN, "--out", now)
        assert again.code == 0
        saved = min(step + 1, 12)
        assert f"continuing from step {saved} of 12" in again.err.splitlines()
        assert results(Path(now)) == results(runs / "untouched")
        assert [line["step"] for line in RunFolder(Path(now)).lines("log.jsonl")] == [
            *range(1, 13)
        ]


@pytest.mark.parametrize(
    "operation", [pytest.param(n, marks=() if n == 3 else pytest.mark.slow) for n in range(1, 10)]
)
def test_a_folder_moved_in_the_middle_of_a_save(
    operation: int, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file of the checkpoint of step 6, with a twin in its place at once."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "half-twin", "twin")
    sync, write, now = os.fsync, checkpoint._write, {"step": 0, "operation": 0}

    def writing(folder: Path, parts: Any, facts: Any, *rest: Any) -> Path:
        now["step"] = facts["step"]
        return write(folder, parts, facts, *rest)

    def synced(handle: int) -> None:
        now["operation"] += now["step"] == 6
        if (now["step"], now["operation"]) == (6, operation) and Path("twin").exists():
            Path("x").rename("y")
            Path("twin").rename("x")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", writing)
        patch.setattr(files.os, "fsync", synced)
        done = fewstep(*RUN, "--out", "x")
    assert done.code == 2
    assert f"fewstep: x was moved to {tmp_path / 'y'} while its run trained; stopped" in done.err
    assert tree(Path("x")) == tree(runs / "half-twin")
    assert fewstep(*RUN, "--out", "y").code == 0
    assert results(Path("y")) == results(runs / "untouched")


@pytest.mark.slow
def test_a_folder_moved_under_a_real_process(runs: Path, tmp_path: Path) -> None:
    """With a twin in its place at once: `mv`, and a step later the process has stopped."""
    long = [*RUN, "--steps", "100000", "--save-every", "50000", "--sample-every", "50000"]
    run = subprocess.Popen(
        [sys.executable, "-m", "fewstep", *long, "--out", "x"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    log, twin = tmp_path / "x" / "log.jsonl", tmp_path / "twin"
    shutil.copytree(runs / "half-twin", twin)
    for _ in range(4000):
        time.sleep(0.02)
        if log.exists() and log.stat().st_size:
            break
    (tmp_path / "x").rename(tmp_path / "y")
    twin.rename(tmp_path / "x")
    _, told = run.communicate(timeout=120)
    assert run.returncode == 2, told
    assert f"x was moved to {tmp_path / 'y'} while its run trained; stopped" in told
    assert "Traceback" not in told
    assert tree(tmp_path / "x") == tree(runs / "half-twin")
    (saved,) = checkpoint.find_checkpoints(tmp_path / "y" / "checkpoints")
    last = max(line["step"] for line in RunFolder(tmp_path / "y").lines("log.jsonl"))
    assert checkpoint.step_of(saved) == last > 0
