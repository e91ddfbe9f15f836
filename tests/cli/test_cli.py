"""The verbs, from a teacher to numbers, with runs of a second; and stopping in the middle."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewstep as package
from fewstep.__main__ import main as entry_point
from fewstep.cli import VERBS
from fewstep.config import decode
from fewstep.data.image_grid import grid
from fewstep.diffusion.pixels import to_uint8
from fewstep.diffusion.time_distributions import LogNormal
from fewstep.eval.metric_table import METRICS
from fewstep.nets.mlp import MLP
from fewstep.recipes import digits as recipes
from fewstep.recipes.sid_edm import RECIPES
from fewstep.runs.monitor import Monitor
from fewstep.storage.model_folder import load_student
from tests.command import DISTIL, SMALL, fewstep, tree

NAMES = ("fd_digits", *(n for n, m in METRICS.items() if m.of), "calls", "ms_per_image")
WEIGHTS = "student/model.safetensors"


HELP = """
import contextlib, io, json, sys, types
from importlib.machinery import PathFinder

refused = []
allowed = {"fewstep", *sys.stdlib_module_names}

class StandardLibraryAlone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in allowed and PathFinder.find_spec(root):
            refused.append(root)
            raise ImportError(name)

sys.meta_path.insert(0, StandardLibraryAlone)
from fewstep import cli

def silly(args):
    with contextlib.suppress(ImportError):
        import numpy
    return 0

cli.VERBS["planted"] = "a verb that imports too much, and hides it"
sys.modules["fewstep.cli.planted"] = types.SimpleNamespace(run=silly)

def said(*args):
    out = io.StringIO()
    refused.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main([*args])
        except SystemExit as stop:
            return stop.code, out.getvalue(), refused[:]

asked = [["--help"], *([verb, "--help"] for verb in cli.VERBS), *json.loads(sys.argv[1])]
print(json.dumps([[" ".join(words), *said(*words)] for words in asked]))
"""
WRONG = {
    "sample": "fewstep sample needs: model; fewstep sample --help tells more",
    "distill": "distill needs a recipe, such as 'digits'; 'fewstep recipes' lists them",
    "adapt": "adapt needs a student, such as runs/sid; fewstep adapt --help tells more",
    "doctor --fix": "there is no flag --fix; fewstep doctor --help lists them",
    "evaluate nothing": "there is no file or folder nothing",
    "evaluate . --samples 9": "evaluate needs --samples of at least 100 and --draws of at least 1",
    "export nothing x": "there is no file or folder nothing",
    "export . x --to onxn": "there is no format 'onxn'; did you mean 'onnx'?",
    "plan x --gpus 1x24GB --tflops 0": "--tflops is a positive number, got 0",
    "plan x --gpus 1x24GB --tflops inf": "--tflops is a positive number, got inf",
    "plan x --gpus 1x24GB --at-once 0": "--at-once is from 1 to 100,000 samples",
    "plan x --gpus 1x24GB --at-once 99999999999999999999": "--at-once is from 1 to 100,000 "
    "samples",
    "train digits_teacher --timeout nan": "--timeout is a positive number of seconds, got nan",
    "adapt x --timeout=-1": "--timeout is a positive number of seconds, got -1",
    "adapt x --tuned y --tune-scale 2": "--tune-scale is that of --tune LORA.safetensors: give "
    "both, or leave it out",
    "plan x --gpus=": "--gpus is empty; give it a value",
}


def test_help_needs_the_standard_library_alone() -> None:
    """That of all verbs, and mistakes in flags, in a process that has nothing else."""
    command = [sys.executable, "-c", HELP, json.dumps([words.split() for words in WRONG])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {words: told for words, *told in json.loads(done.stdout)}
    assert found.pop("planted --help") == [0, "", ["numpy"]]
    for words, message in WRONG.items():
        assert found.pop(words) == [2, f"fewstep: {message}\n", []]
    code, overview, refused = found.pop("--help")
    assert (code, refused) == (0, [])
    assert all(f"\n  {verb} " in overview for verb in VERBS)
    assert fewstep("--help").out == fewstep("-h").out == fewstep().out
    assert found.keys() == {f"{verb} --help" for verb in VERBS}
    for words, (code, out, refused) in found.items():
        assert (code, refused) == (0, []), (words, out)
        assert "--json" in out


def test_the_end_of_a_process_searches_no_garbage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All objects are frozen by then; within a process that goes on, none is."""
    monkeypatch.setattr(sys, "argv", ["fewstep", "--version"])
    before = gc.get_freeze_count()
    assert fewstep("--version").code == 0
    assert gc.get_freeze_count() == before
    try:
        with pytest.raises(SystemExit, match="0"):
            entry_point()
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
    assert capsys.readouterr().out == f"fewstep {package.__version__}\n"


def test_version_and_recipes() -> None:
    assert fewstep("--version") == (0, f"fewstep {package.__version__}\n", "")
    code, out, err = fewstep("recipes")
    assert out.startswith("The embedded example: 8x8 handwritten digits")
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert len(set(names)) == len(names)
    assert (code, err) == (0, "")
    known = {"digits", "digits_teacher", "mixture", "mixture_teacher", "mnist", "t2i", "t2i_flow"}
    assert known | set(RECIPES) <= set(names)
    assert "Distil the digits teacher to one step with SiD" in out


def test_help_of_a_recipe_lists_its_fields() -> None:
    code, out, err = fewstep("distill", "digits", "--help")
    assert (code, err) == (0, "")
    flags = ("--teacher", "--dry-run", "--steps", "--method.alpha", "--optim.lr", "--ema.halflife")
    assert all(flag in out for flag in flags)
    assert "0.5 is half the exact Fisher gradient" in " ".join(out.split())
    assert "distill RECIPE --help" in fewstep("distill", "--help").out


def test_dry_run_prints_the_run_and_its_cost(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--steps", "3", "--optim.lr=0.5", "--method.times", "LogNormal(std=2)", "--dry-run")
    code, out, err = fewstep("train", "digits_teacher", *SMALL, *flags)
    assert (code, err, tree(tmp_path)) == (0, "", {})
    data, end = json.JSONDecoder().raw_decode(out)
    run = recipes.digits_teacher()
    run = replace(run, steps=3, batch=8, optim=replace(run.optim, lr=0.5))
    run = replace(run, model=replace(run.model, net=MLP(16, 1)))
    method: Any = run.method
    assert decode(data) == replace(run, method=replace(method, times=LogNormal(std=2.0)))
    count = sum(p.numel() for p in run.model.build().parameters())
    assert f"one step: denoiser\ntrained parameters: {count:,} (" in out[end:]
    assert "for 3 steps (24 images)" in out[end:]


def test_dry_run_without_a_teacher_prints_the_run_alone() -> None:
    code, out, err = fewstep("distill", "sida_ffhq64", "--dry-run", "--optim.lr", "2e-5")
    data, end = json.JSONDecoder().raw_decode(out)
    assert (code, err) == (0, "")
    assert out[end:].strip() == "what it costs is known with a teacher: pass --teacher too"
    run = RECIPES["sida_ffhq64"]()
    assert decode(data) == replace(run, optim=replace(run.optim, lr=2e-5))


def test_the_folder_of_a_run(finished: Path) -> None:
    folder = finished / "runs" / "sid"
    manifests = {p for p in tree(folder) if p.endswith("manifest.json")}
    steps = ("checkpoints/step-00000016", "checkpoints/step-00000020")
    assert manifests == {f"{p}/manifest.json" for p in (*steps, "student")}
    assert {p.name for p in (folder / "grids").iterdir()} == {
        f"step-000000{step}.png" for step in ("00", "10", "20")
    }
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["images"] for line in lines] == [8 * step for step in range(1, 21)]
    gauges = [json.loads(line) for line in (folder / "gauges.jsonl").read_text().splitlines()]
    assert [line["step"] for line in gauges] == [0, 10, 20]
    assert [len(line["levels"]) for line in gauges] == [9, 9, 9]
    assert all(line["levels"][0]["fisher"] >= 0 for line in gauges)
    assert gauges[0]["levels"][4]["fisher"] == 0.0  # the fake score starts as the teacher
    facts = json.loads((folder / "run.json").read_text())
    assert facts["command"] == f"fewstep {' '.join(DISTIL)} --teacher runs/teacher --out runs/sid"
    assert facts["teacher"] == str(finished / "runs" / "teacher")
    assert facts["environment"]["torch"] == version("torch")
    assert load_student(folder).card["images"] == 160
    assert not [p for p in tree(finished) if "partial" in p or ".old" in p]


def test_a_finished_run_is_not_run_again(finished: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(finished)
    before = tree(finished)
    code, out, err = fewstep(*DISTIL, "--teacher", "runs/teacher", "--out", "runs/sid")
    assert (code, out) == (0, "")
    assert err == "runs/sid is finished already\nfinished: runs/sid\n"
    assert tree(finished) == before


def test_sample(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The pixels in both kinds of file are those of load_student(...).sample."""
    monkeypatch.chdir(tmp_path)
    folder = finished / "runs" / "sid"
    student = load_student(folder)
    assert fewstep("sample", str(folder), "--out", "a.npz") == (
        0,
        "a.npz\n",
        "making pictures: 64/64\n",
    )
    with np.load("a.npz", allow_pickle=False) as stored:
        assert np.array_equal(stored["images"], to_uint8(student.sample(range(64))))
        assert stored["images"].shape == (64, 8, 8, 1)
        assert stored["seeds"].tolist() == list(range(64))
        assert stored["labels"].tolist() == [i % 10 for i in range(64)]
    some = ("--seeds", "5-6,90", "--out", "b.npz", "--labels")
    for text, labels in (("3", [3, 3, 3]), ("1,2,10", [1, 2, 10])):
        assert fewstep("sample", str(folder), *some, text).code == 0
        with np.load("b.npz", allow_pickle=False) as stored:
            assert np.array_equal(stored["images"], to_uint8(student.sample([5, 6, 90], labels)))
            assert (stored["seeds"].tolist(), stored["labels"].tolist()) == ([5, 6, 90], labels)
    assert fewstep("sample", str(folder / "student"), "--seeds", "0-19").out == "samples.png\n"
    expected = grid(student.sample(range(20)), columns=10)
    with Image.open("samples.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert np.asarray(expected).std() > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz", "samples.png"]


def test_evaluate(finished: Path, tmp_path: Path) -> None:
    """Every score of every role, finite, with its deviation; the table shows the same numbers."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "sid"
    code, out, err = fewstep("evaluate", str(folder), "--samples", "200", "--draws", "2")
    assert (code, err.splitlines()[0]) == (0, "measuring teacher: 2/2, 0 s left")
    metrics = json.loads((folder / "metrics.json").read_text())
    protocol = {"samples": 200, "draws": 2, "distance": "fd_digits"}
    assert metrics.pop("protocol") == protocol
    assert list(metrics) == ["real", "teacher", "student"]
    for role, scores in metrics.items():
        assert scores.keys() == {*NAMES, *(f"{name}_std" for name in NAMES), "draws"}
        assert all(math.isfinite(value) for value in scores.values())
        assert scores["calls"] == {"real": 0, "teacher": 35, "student": 1}[role]
        assert scores["draws"] == (1 if role == "real" else 2)
    assert metrics["real"]["accuracy"] == pytest.approx(363 / 364)
    assert metrics["student"]["fd_digits"] > 10 * metrics["real"]["fd_digits"]  # 20 steps of 8
    assert metrics["student"]["swd_std"] > 0
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert rows["real"] == ["real", "teacher", "student"]
    assert list(rows)[1:] == [*NAMES]
    assert rows["nn"][1:3] == ["2.135", f"{metrics['teacher']['nn']:.4g}"]
    alone = fewstep("evaluate", str(tmp_path / "runs" / "teacher"), "--samples", "100")
    assert alone.out.splitlines()[0].split() == ["real", "teacher"]


def interrupt(monkeypatch: Any, step: int, number: int, times: int = 1) -> None:
    """Signals as step `step` is logged; the handler is the command's own."""
    log = Monitor.log

    def logging(self: Monitor, record: Any) -> None:
        log(self, record)
        for _ in range(times if record.step == step else 0):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Monitor, "log", logging)


@pytest.mark.parametrize(
    ("number", "times", "code"),
    [
        (signal.SIGINT, 1, 130),
        pytest.param(signal.SIGTERM, 1, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 1, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 1, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, 2, 143),
    ],
)
def test_a_stopped_run_continues_to_the_same_bits(
    number: int, times: int, code: int, finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """One signal: saved at once. Two: not even that, and the last checkpoint serves."""
    monkeypatch.chdir(tmp_path)
    args = (*DISTIL, "--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    handlers = [signal.getsignal(n) for n in watched]
    with monkeypatch.context() as patch:
        interrupt(patch, 11, number, times)
        stopped = fewstep(*args)
    assert [signal.getsignal(n) for n in watched] == handlers
    command = f"fewstep {' '.join(args)}"
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    last = {
        1: f"stopped at step 11 of 20, saved in x; continue with: {command}",
        2: f"fewstep: stopped{by}; run the same command again to continue",
    }
    first = "stopping after this step; once more to stop at once"
    assert stopped.code == code
    told = [line for line in stopped.err.splitlines() if line and " s left" not in line]
    assert told == [first, last[times]]
    assert not (tmp_path / "x" / WEIGHTS).exists()
    refused = fewstep("evaluate", "x")
    assert refused == (2, "", f"fewstep: x is not finished; continue it with: {command}\n")
    rest = fewstep(*args)
    assert rest.code == 0
    step = 11 if times == 1 else 8
    assert rest.err.splitlines()[0] == f"continuing from step {step} of 20"
    undisturbed, here = finished / "runs" / "sid", tmp_path / "x"
    assert (here / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    assert (here / "gauges.jsonl").read_text() == (undisturbed / "gauges.jsonl").read_text()
    for ours, theirs in zip(lines(here), lines(undisturbed), strict=True):
        assert ours == theirs


def lines(folder: Path) -> list[dict[str, float]]:
    """The log without its clock."""
    out = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in out]
