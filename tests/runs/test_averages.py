"""Averages of a run: a continued run stores the same, and the command makes a working model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.config import encode, parse
from fewstep.recipes.digits import digits_teacher
from fewstep.runs.averages import reconstruct
from fewstep.runs.run import Run
from fewstep.runs.runner import Step, execute
from fewstep.storage.model_folder import load_student
from fewstep.training.power_ema import PowerEMA, combination, gamma_of
from tests.command import TEACH, bits, fewstep
from tests.test_docs import ROOT, follow

KEEP = ("--power.sigma-rel", "0.05", "0.1", "--save-every", "5")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small(**fields: object) -> Run:
    """A teacher of seconds."""
    run = digits_teacher()
    net = replace(run.model.net, width=16, blocks=1)  # type: ignore[type-var]
    fields = {"steps": 30, "batch": 8, "sample_every": 30, "save_every": 5, **fields}
    return replace(run, model=replace(run.model, net=net), **fields)


def go(run: Run, out: Path, stops: tuple[int, ...] = ()) -> None:
    """Execute a run that is stopped and continued after some steps."""
    for stop in (*stops, run.steps):
        work = execute(run, out, recipe="digits_teacher")
        for progress in work:
            if isinstance(progress, Step) and progress.step == stop < run.steps:
                break
        work.close()


def test_a_continued_run_stores_the_same_averages() -> None:
    """Stopped between checkpoints, on one, and at once again: every file equal, nothing else.

    Other averages or none change neither the run nor its result.
    """
    kept = PowerEMA((0.05, 0.1))
    go(small(power=kept), Path("a"))
    go(small(power=kept), Path("b"), (7, 8, 15, 22))
    go(small(), Path("c"))
    for folder in ("a", "b"):
        names = [p.name for p in sorted(Path(folder, "averages").iterdir())]
        assert names == [f"step-{step:08d}" for step in range(5, 31, 5)]
    assert bits(Path("a/averages")) == bits(Path("b/averages"))
    student = Path("student/model.safetensors")
    assert (Path("a") / student).read_bytes() == (Path("b") / student).read_bytes()
    assert (Path("a") / student).read_bytes() == (Path("c") / student).read_bytes()
    assert not Path("c/averages").exists()


def test_a_run_that_has_lost_its_averages_does_not_continue() -> None:
    run = small(power=PowerEMA((0.05, 0.1)))
    work = execute(run, Path("c"), recipe="digits_teacher")
    for progress in work:
        if isinstance(progress, Step) and progress.step == 7:
            break
    work.close()
    names = [p.name for p in sorted(Path("c/averages").iterdir())]
    assert names == ["step-00000005", "step-00000007"]
    (Path("c/averages") / names[1] / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000007.manifest\.json is missing"):
        list(execute(run, Path("c"), recipe="digits_teacher"))


def test_the_command_makes_a_model() -> None:
    """Its weights are the combination of the stored ones, and its sampler the run's."""
    assert fewstep(*TEACH, *KEEP, "--out", "run").code == 0
    done = fewstep("ema", "run", "--sigma-rel", "0.13", "--out", "longer")
    assert (done.code, done.out) == (0, "longer\n")
    times = [40.0 * (i + 1) for i in range(6)]
    gammas = [gamma_of(0.05)] * 6 + [gamma_of(0.1)] * 6
    _, mismatch = combination(gammas, times * 2, gamma_of(0.13), 240.0)
    assert done.err == f"the profile is met to {100 * mismatch:.2g} %\n"
    far = fewstep("ema", "run", "--sigma-rel", "0.28", "--out", "far")
    assert "only, from 6 steps with averages of 0.05, 0.1: train with a smaller" in far.err
    made, run = load_student("longer"), load_student("run")
    assert (made.model, made.sampler) == (run.model, run.sampler)
    assert made.card["average"]["images"] == 240
    wanted = reconstruct(Path("run/averages"), 0.13).weights
    state = made.denoiser.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    other = run.denoiser.state_dict()
    assert not all(torch.equal(state[name], other[name]) for name in wanted)
    stored = fewstep("inspect", "run/averages/step-00000005").out
    assert stored.startswith("what    fewstep averages, digests correct\n")
    assert parse(repr(PowerEMA((0.05, 0.1)))) == PowerEMA((0.05, 0.1))
    assert encode(PowerEMA()) == {"type": "PowerEMA", "sigma_rel": []}


def test_wrong_input_is_one_sentence() -> None:
    assert fewstep(*TEACH, "--out", "bare").code == 0
    assert fewstep(*TEACH, *KEEP, "--out", "run").code == 0
    file = Path("run/averages/step-00000010/sigma-0.1.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    out = ("--out", "new")
    for args, words in {
        ("bare", "--sigma-rel", "0.1", *out): "bare has stored no averages; train with "
        "--power.sigma-rel 0.05 0.1",
        ("run", "--sigma-rel", "0.3", *out): "sigma_rel is between 0 and 0.2887, got 0.3",
        ("run", "--sigma-rel", "nan", *out): "sigma_rel is between 0 and 0.2887, got nan",
        ("run", "--sigma-rel", "0.1", "--out", "bare"): "bare exists already; choose a new or "
        "empty folder",
        ("run", "--sigma-rel", "0.1", *out): f"{file} is damaged: its SHA-256 is not the "
        "recorded one",
        ("none", "--sigma-rel", "0.1", *out): "there is no file or folder none",
    }.items():
        done = fewstep("ema", *args)
        assert (done.code, done.out, done.err) == (2, "", f"fewstep: {words}\n")
    assert not Path("new").exists()
    done = fewstep(*TEACH, "--power.sigma-rel", "0.5", "--out", "x")
    assert (done.code, done.err) == (2, "fewstep: sigma_rel is between 0 and 0.2887, got 0.5\n")


def test_the_page_about_averages() -> None:
    """Its commands, and its table to two digits."""
    page = ROOT / "docs" / "averages.md"
    follow(page)
    assert Path("longer.png").is_file()
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", page.read_text(encoding="utf-8"), re.M)
    assert len(rows) == 5
    for count, cells in rows:
        times = [(i + 1) / int(count) for i in range(int(count))] * 2
        gammas = [gamma_of(s) for s in (0.05, 0.1) for _ in range(int(count))]
        for sigma, cell in zip((0.03, 0.07, 0.13, 0.2, 0.25), cells.split("|"), strict=True):
            _, mismatch = combination(gammas, times, gamma_of(sigma), 1.0)
            assert abs(100 * mismatch / float(cell.strip(" %")) - 1) < 0.05
