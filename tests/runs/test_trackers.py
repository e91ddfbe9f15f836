"""Trackers: what they are given is what the run's files hold, once, whatever happens to the run.

The packages are stood in for by modules that write down how they are called.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fewstep.data.image_grid import png
from fewstep.runs.trackers import TRACKERS, Tracking, numbers, require_trackers
from fewstep.storage.files import read_json, read_lines, write
from tests.command import SMALL, fewstep

Points = list[tuple[str, int, float]]


class Recorded:
    """What a stand-in was told: points of curves, pictures, and how it was opened and closed."""

    def __init__(self) -> None:
        self.points: Points = []
        self.pictures: list[int] = []
        self.opened: list[Any] = []
        self.closed = 0
        self.broken = False


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(contents)
    return made


def tensorboard(told: Recorded) -> dict[str, ModuleType]:
    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int | None) -> None:
            told.opened.append((Path(log_dir).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if told.broken:
                raise RuntimeError("no space\nleft")
            told.points.append((name, step, value))

        def add_image(self, name: str, pixels: Any, step: int, dataformats: str) -> None:
            assert (name, dataformats, pixels.ndim, pixels.shape[2]) == ("samples", "HWC", 3, 3)
            told.pictures.append(step)

        def flush(self) -> None: ...

        def close(self) -> None:
            told.closed += 1

    writer = module("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    return {"tensorboard": module("tensorboard"), "torch.utils.tensorboard": writer}


def wandb(told: Recorded) -> dict[str, ModuleType]:
    def log(values: dict[str, Any]) -> None:
        if told.broken:
            raise RuntimeError("no space\nleft")
        step = values.pop("step")
        if isinstance(values.get("samples"), SimpleNamespace):
            told.pictures.append(step)
        else:
            told.points += [(name, step, value) for name, value in values.items()]

    def finish() -> None:
        told.closed += 1

    def init(**given: Any) -> Any:
        told.opened.append(given)
        return SimpleNamespace(log=log, finish=finish, define_metric=lambda *_, **__: None)

    contents = {"init": init, "Settings": SimpleNamespace}
    return {"wandb": module("wandb", **contents, Image=lambda path: SimpleNamespace(path=path))}


def mlflow(told: Recorded) -> dict[str, ModuleType]:
    class Client:
        def __init__(self, tracking_uri: str) -> None:
            told.opened.append(tracking_uri)

        def get_experiment_by_name(self, name: str) -> None: ...

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment: str, run_name: str) -> Any:
            assert experiment == "7"
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def update_run(self, run: str, status: str) -> None:
            told.opened.append((run, status))

        def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
            if told.broken:
                raise RuntimeError("no space\nleft")
            assert run == "r1"
            assert len(params) <= 100
            assert all(len(value) <= 500 for _, value in params)
            told.points += [(name, step, value) for name, value, _, step in metrics]

        def log_artifact(self, run: str, path: str, place: str = "") -> None:
            if place:
                told.pictures.append(int(Path(path).stem.removeprefix("step-")))

        def set_terminated(self, run: str) -> None:
            told.closed += 1

    entities = module("mlflow.entities", Metric=lambda *a: a, Param=lambda *a: a)
    client = module("mlflow.tracking", MlflowClient=Client)
    return {"mlflow": module("mlflow"), "mlflow.entities": entities, "mlflow.tracking": client}


STAND_INS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}


@pytest.fixture(params=STAND_INS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def told(name: str, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    for full, made in STAND_INS[name](recorded).items():
        monkeypatch.setitem(sys.modules, full, made)
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    return recorded


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a run leaves it after step 4, with looks at 0 and 4."""
    folder = tmp_path / "run"
    (folder / "grids").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": "a1", "run": {"steps": 9}, "recipe": "r"}))
    log(folder, 2, 4)
    looks(folder, 0, 4)
    return folder


def log(folder: Path, *steps: int, factor: float = 1.0) -> None:
    lines = [json.dumps({"step": s, "student/loss": factor * s, "bad": "nan"}) for s in steps]
    (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))


def looks(folder: Path, *steps: int) -> None:
    from PIL import Image

    lines = [json.dumps({"step": s, "levels": [{"t": 1}], "quick": {"fd": s}}) for s in steps]
    (folder / "gauges.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for step in steps:
        write(folder / f"grids/step-{step:08d}.png", png(Image.new("L", (2, 3))))


def expected(*steps: int, factor: float = 1.0) -> Points:
    return [("student/loss", step, factor * step) for step in steps]


def losses(told: Recorded) -> Points:
    return [point for point in told.points if point[0] == "student/loss"]


def test_a_tracker_has_what_the_files_have(run: Path, name: str, told: Recorded) -> None:
    tracking = Tracking(run, [name, name])
    assert tracking.follow() == []
    assert losses(told) == expected(2, 4)
    assert [p for p in told.points if p[0] == "look/quick/fd"] == [
        ("look/quick/fd", 0, 0.0),
        ("look/quick/fd", 4, 4.0),
    ]
    assert ("look/levels/0/t", 4, 1.0) in told.points
    assert [value != value for label, _, value in told.points if label == "bad"] == [True, True]
    assert told.pictures == [0, 4]
    assert tracking.follow() == []
    assert len(losses(told)) == 2
    log(run, 2, 4, 6)
    looks(run, 0, 4, 8)
    assert tracking.follow() == tracking.close() == []
    assert losses(told) == expected(2, 4, 6)
    assert told.pictures == [0, 4, 8]
    assert told.closed == 1


def test_a_continued_run_goes_on_in_the_same(run: Path, name: str, told: Recorded) -> None:
    """What is done again after a stop gives the same numbers, so that it is not sent twice."""
    first = Tracking(run, [name])
    first.follow()
    first.close()
    log(run, 2)
    again = Tracking(run, [name])
    again.follow()
    log(run, 2, 4, 6)
    again.follow()
    assert losses(told) == expected(2, 4, 6)
    assert told.pictures == [0, 4]
    if name == "tensorboard":
        assert told.opened == [("tensorboard", None), ("tensorboard", 5)]
    elif name == "wandb":
        assert [given["id"] for given in told.opened] == ["a1", "a1"]
        assert [given["mode"] for given in told.opened] == ["offline", "offline"]
        assert told.opened[0]["config"] == {"recipe": "r", "steps": 9}
    else:
        store = (run / "mlflow").as_uri()
        assert told.opened == [store, store, ("r1", "RUNNING")]
    (run / "run.json").write_text(json.dumps({"id": "b2", "run": {}}))  # another run in its place
    told.points.clear()
    Tracking(run, [name]).follow()
    assert losses(told) == expected(2, 4, 6)


def test_a_return_to_a_checkpoint(run: Path, name: str, told: Recorded) -> None:
    """After it the numbers are others: they are sent, and TensorBoard forgets the former ones."""
    tracking = Tracking(run, [name])
    log(run, 2, 4, 6, 8)
    tracking.follow()
    log(run, 2)
    looks(run, 0)
    tracking.follow()
    log(run, 2, 4, factor=3.0)
    looks(run, 0, 4)
    tracking.follow()
    assert losses(told) == [*expected(2, 4, 6, 8), *expected(4, factor=3.0)]
    assert told.pictures == [0, 4, 4]
    if name == "tensorboard":
        assert told.opened == [("tensorboard", None), ("tensorboard", 3)]


def test_one_that_fails_is_told_once(run: Path, name: str, told: Recorded) -> None:
    told.broken = True
    tracking = Tracking(run, [name])
    note = f"--track {name} failed and is left out, the run goes on: no space left"
    assert tracking.follow() == [note]
    log(run, 2, 4, 6)
    assert tracking.follow() == tracking.close() == []
    (run / "run.json").unlink()
    assert "run.json" in Tracking(run, [name]).follow()[0]


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    require_trackers([])
    for name, (package, _) in TRACKERS.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=f"install it with: pip install {package}$"):
            require_trackers([name])


def test_numbers_of_a_line() -> None:
    line = {"step": 3, "a": {"b": [1, {"c": 2.5}]}, "d": "-inf", "e": "text", "f": True, "g": None}
    assert numbers(line) == [("a/b/0", 1.0), ("a/b/1/c", 2.5), ("d", float("-inf"))]


def test_a_command_tracks_its_run(name: str, told: Recorded, tmp_path: Path) -> None:
    """Stopped by nothing but its end; and a tracker that comes later is brought up to date."""
    train = ("train", "digits_teacher", *SMALL, "--steps", "4", "--sample-every", "2")
    out = tmp_path / "t"
    made = fewstep(*train, "--out", str(out), "--track", name)
    assert made.code == 0, made.err
    assert [line["step"] for line in read_lines(out / "log.jsonl")] == [1, 2, 3, 4]
    stored = [
        (prefix + label, line["step"], value)
        for file, prefix in (("log.jsonl", ""), ("gauges.jsonl", "look/"))
        for line in read_lines(out / file)
        for label, value in numbers(line)
    ]
    assert sorted(told.points) == sorted(stored)
    assert told.pictures == [0, 2, 4]
    assert read_json(out / "tracking.json")[name]["log.jsonl"] == 4
    told.points.clear()
    (out / "tracking.json").unlink()
    assert fewstep(*train, "--out", str(out), "--track", name).code == 0
    assert sorted(told.points) == sorted(stored)
