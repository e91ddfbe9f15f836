"""Alignment while a run trains: its value, what follows it, and how it is asked for wrongly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import Folders

pytest.importorskip("diffusers")

from fewstep.diffusion.pixels import to_uint8
from fewstep.eval.clip import load_clip
from fewstep.eval.clip_monitor import PromptMetrics
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.load import with_text_and_vae
from tests.command import fewstep
from tests.tiny_text import save_clip

pytestmark = pytest.mark.slow

TEXTS = ["a red cube", "a blue ball", "the small ball"]
RUN = (
    *("distill", "t2i", "--teacher", "pipe", "--batch", "4", "--accumulate", "2"),
    *("--steps", "6", "--sample-every", "1", "--optim.lr", "0.02", "--ema.halflife", "0"),
)


@pytest.fixture
def place(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where we are: a pipeline, prompts, a CLIP."""
    shutil.copytree(folders("sd"), tmp_path / "pipe")
    save_clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def domain(more: str) -> tuple[str, str]:
    return "--domain", f"Prompts('prompts.txt', check=False, {more})"


def test_a_run_ends_at_the_peak_of_alignment(place: Path) -> None:
    """The best look is the largest one, its model is kept, and scores what the look said."""
    flags = ("--best.metric", "quick.clip", "--best.patience", "2")
    done = fewstep(*RUN, *domain("clip='clip', judged=25"), *flags, "--out", "run")
    assert done.code == 0, done.err
    looks = [json.loads(line) for line in Path("run/gauges.jsonl").read_text().splitlines()]
    values = {look["step"]: look["quick"]["clip"] for look in looks}
    assert all(look["quick"]["samples"] == 25 for look in looks)
    best = load_student("run/best")
    after = {step: value for step, value in values.items() if step}
    peak = max(after, key=lambda step: after[step])
    assert (best.card["steps"], best.card["quick.clip"]) == (peak, after[peak])
    assert max(after) == min(6, peak + 2)

    clip, student = load_clip(Path("clip")), with_text_and_vae(best)
    assert student.text is not None
    texts = [TEXTS[i % 3] for i in range(25)]
    pictures = to_uint8(student.sample(range(25), cond=student.text(texts)))
    cosines = clip(pictures)[0].double() @ clip.text(texts).double().T
    assert values[peak] == pytest.approx(float(cosines.diag().mean()), abs=2e-4)
    assert abs(values[peak] - float(cosines.diag(1).mean())) > 1e-3  # of other prompts
    assert fewstep("report", "run").code == 0
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert "CLIP score (higher is better)" in page
    assert "(lower is better)" not in page


def test_a_picture_that_is_no_number_has_no_alignment(place: Path) -> None:
    pictures = torch.zeros(3, 3, 8, 8)
    judge = PromptMetrics("clip", TEXTS)
    value = judge(pictures)["clip"]
    assert -1 < value < 1
    pictures[1, 0, 0, 0] = math.inf
    assert math.isnan(judge(pictures)["clip"])
    with pytest.raises(ValueError, match="2 pictures of"):
        judge(torch.zeros(2, 3, 8, 8))


def test_wrong_judges_are_refused_before_anything_is_loaded(place: Path) -> None:
    for more, words in {
        "clip='pipe'": "pipe is no folder of a CLIP of transformers: no config.json in it",
        "clip='pipe/unet'": "pipe/unet/config.json does not describe a CLIP",
        "clip='clip', judged=0": "Prompts.judged must be at least 1, got 0",
        "clip='mine.py:Eyes'": "there is no file mine.py with Eyes in it",
    }.items():
        done = fewstep(*RUN, *domain(more), "--out", "run")
        assert (done.code, done.out) == (2, ""), done.err
        assert words in done.err
        assert len(done.err.splitlines()) <= 2
    flags = ("--best.metric", "quick.clip")
    done = fewstep(*RUN, *domain("judged=25"), *flags, "--out", "run")
    assert done.code == 2
    assert fewstep(*RUN, *domain("clip='clip'"), *flags, "--out", "run").code == 0  # no step yet
    assert "Run.best.metric is 'quick.clip', but what this run looks at is diversity" in done.err
