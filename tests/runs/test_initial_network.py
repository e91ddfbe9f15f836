"""--init: a student that starts from another network than the teacher's; changed method files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep import load_student
from tests.command import DISTIL, SMALL, fewstep

FIT = ("train", "mixture_teacher", "--steps", "20", "--batch", "16", "--out", "fit")
RING = ("distill", "mixture", "--steps", "1", "--batch", "16", "--optim.lr", "1e-12")


def test_a_student_starts_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate of nothing the student is the network given, else a fresh one."""
    monkeypatch.chdir(tmp_path)
    assert fewstep(*FIT).code == 0
    assert fewstep(*RING, "--out", "a", "--init", "fit").code == 0
    assert fewstep(*RING, "--out", "b").code == 0
    fit, told, fresh = (load_student(name).sample(range(50)) for name in ("fit", "a", "b"))
    start = load_student("fit").denoiser.state_dict()
    same = load_student("a").denoiser.state_dict()
    other = load_student("b").denoiser.state_dict()
    assert all(torch.allclose(start[key], same[key], atol=1e-6) for key in start)
    assert not all(torch.allclose(start[key], other[key], atol=1e-2) for key in start)
    assert fit.shape == told.shape == fresh.shape
    refused = fewstep(*RING, "--out", "a")
    assert refused.code == 2
    assert "a is in use by a run with other settings (init was " in refused.err


def test_a_moved_run_finds_what_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A starting network inside the run's folder moves with it, like a teacher."""
    monkeypatch.chdir(tmp_path)
    assert fewstep(*FIT[:-1], "x/fit").code == 0
    assert fewstep(*RING, "--out", "x", "--init", "x/fit").code == 0
    Path("x").rename("y")
    again = fewstep(*RING, "--out", "y", "--init", "y/fit")
    assert (again.code, "finished already" in again.err) == (0, True)


def test_init_must_fit(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = fewstep(*RING, "--out", "a", "--init", str(finished / "runs" / "teacher"))
    assert refused.code == 2
    assert "but the run's network is Model(net=MLP(width=128" in refused.err
    assert not Path("a").exists()


@pytest.mark.usefixtures("known")
def test_a_changed_method_file_is_another_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of the user's own file is part of the run."""
    monkeypatch.chdir(tmp_path)
    text = "from dataclasses import dataclass\nfrom fewstep.methods.sid import SiD\n"
    text += "@dataclass(frozen=True)\nclass Mine(SiD):\n    factor: float = 1.0\n"
    Path("mine.py").write_text(text)
    args = (*DISTIL, "--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    args = (*args, "--method", "mine.py:Mine")
    assert fewstep(*args).code == 0
    again = fewstep(*args)
    assert (again.code, "finished already" in again.err) == (0, True)
    Path("mine.py").write_text(text + "# changed\n")
    refused = fewstep(*args)
    assert refused.code == 2
    assert "x is in use by a run with other settings (files" in refused.err


def test_sida_from_a_sid_student(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SiD2A: the student starts as the SiD student, the critic as the teacher.

    With a learning rate of nothing both are still there at the end; with one, and a schedule,
    the log shows who was trained when.
    """
    monkeypatch.chdir(tmp_path)
    runs = finished / "runs"
    args = ("distill", "digits", *SMALL, "--teacher", str(runs / "teacher"))
    args = (*args, "--init", str(runs / "sid"), "--steps", "6")
    still = ("--method", "SiDA()", "--optim.lr", "1e-12", "--out", "still")
    assert fewstep(*args, *still).code == 0
    nets = load_file(next(Path("still/checkpoints").glob("step-*6")) / "nets.safetensors")
    for net, origin, other in (("student", "sid", "teacher"), ("fake", "teacher", "sid")):
        start, wrong = (load_student(runs / n).denoiser.state_dict() for n in (origin, other))
        assert {f"{net}.{key}" for key in start} < set(nets)
        off = [float((nets[f"{net}.{key}"] - start[key]).abs().max()) for key in start]
        assert max(off) < 1e-6
        assert any(not torch.allclose(start[key], wrong[key], atol=1e-4) for key in start)
    method = "SiDA(student_from=2, adversarial_from=4, gan=0.01)"
    assert fewstep(*args, "--method", method, "--out", "moving").code == 0
    lines = [json.loads(line) for line in Path("moving/log.jsonl").read_text().splitlines()]
    assert ["student/loss" in line for line in lines] == [False, False, True, True, True, True]
    assert ["student/adversarial" in line for line in lines] == [False] * 4 + [True] * 2
    assert all(
        line["fake/discriminator"] > 0 and 0 <= line["fake/discriminator_accuracy"] <= 1
        for line in lines
    )
    assert [line["images"] for line in lines] == [0, 0, 8, 16, 24, 32]
    x, before = (load_student(name).sample(range(8)) for name in ("moving", runs / "sid"))
    assert x.isfinite().all()
    assert (x - before).abs().max() > 1e-4
    assert fewstep("report", "moving").code == 0
