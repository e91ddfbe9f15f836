"""The model card tells the origin, the licence, the method and what was measured, and no more."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.guidance_scales import (
    LSG,
    AntiCFG,
    Guidance,
    Kappas,
    RandomLSG,
    Unguided,
    ZeroCFG,
)
from fewstep.export.model_card import card, licences, teacher_name
from fewstep.methods.sid import SiD
from fewstep.report.formatting import NONE
from fewstep.storage.files import digest
from fewstep.storage.model_folder import load_student


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of digits."""
    return Path(shutil.copytree(finished / "runs" / "sid", tmp_path / "sid"))


def test_a_run_that_was_not_measured(run: Path) -> None:
    text = card(load_student(run), run, "x = 1", {})
    assert text.startswith("---\nbase_model_relation: finetune\ntags: [few-step, distillation]\n")
    assert "# a teacher trained by fewstep in 1 step\n" in text
    assert "license" not in text
    assert "| licence | unknown: the teacher's, see there |" in text
    assert "| data | none: noise and conditions alone |" in text
    assert "| training | 160 samples in 20 steps |" in text
    assert "| classes | 0 to 9; 10 for none |" in text
    assert "```python\nx = 1\n```" in text
    assert (
        "Score identity Distillation (Zhou et al. 2024), https://arxiv.org/abs/2404.04057" in text
    )
    assert "## Measured" not in text


def test_every_fact_of_a_file_is_a_row(run: Path) -> None:
    """In the order that they come in; not those that the card tells in its own words, nor None."""
    facts = {"what": "x", "sampler": "s", "tensors": 7, "sigmas": [2.5], "caution": None}
    text = card(load_student(run), run, "", facts | {"card": {}, "classes": 3, "layout": "of x"})
    assert "\n| tensors | `7` |\n| sigmas | `[2.5]` |\n| layout | of x |\n| licence | " in text
    assert not any(f"| {name} |" in text for name in ("what", "caution", "card"))
    assert "| sampler | s |" not in text


def test_what_was_measured(run: Path) -> None:
    scores = {"fd_digits": 0.125, "fd_digits_std": 0.01, "draws": 3.0}
    metrics = {"real": {"fd_digits": 0.01}, "teacher": {}, "student": scores}
    metrics["protocol"] = {"samples": 500, "draws": 3}
    (run / "metrics.json").write_text(json.dumps(metrics))
    evaluation = {
        "features": "digits",
        "samples": 100,
        "reference": {"file": "real.npz"},
        "model": digest(run / "student" / "manifest.json"),
        "runs": [{"FD(digits, 100)": 0.5}] * 3,
        **{key: {"FD(digits, 100)": 0.5} for key in ("best", "mean", "std")},
    }
    (run / "evaluation").mkdir()
    (run / "evaluation" / "digits-100.json").write_text(json.dumps(evaluation))
    stale = {**evaluation, "samples": 777, "model": "of another model"}
    (run / "evaluation" / "digits-777.json").write_text(json.dumps(stale))
    text = card(load_student(run), run, "", {})
    assert "| | real | teacher | student |" in text.replace("|  |", "| |")
    assert f"| fd_digits | 0.0100 | {NONE} | 0.125 |" in text
    assert "(samples 500, draws 3)" in text
    assert "| 100 samples in digits, against real.npz, mean of 3 runs |" in text
    assert "| FD(digits, 100) | 0.500 |" in text
    assert "777" not in text


def test_an_evaluation_of_prompts(run: Path) -> None:
    """It has prompts, and no reference."""
    scores = {"CLIP(clip-0a1b2c3d, 24)": 0.25}
    evaluation = {
        **{"features": "clip-0a1b2c3d", "samples": 24, "reference": {}},
        "labels": "prompts of few.txt, SHA-256 243f57c57f2906b5",
        "model": digest(run / "student" / "manifest.json"),
        **{"runs": [scores] * 2, "best": scores, "mean": scores, "std": scores},
    }
    (run / "evaluation").mkdir()
    (run / "evaluation" / "prompts.json").write_text(json.dumps(evaluation))
    assert "## Measured" not in card(load_student(run), run / "best", "", {})
    text = card(load_student(run), run, "", {})
    assert "| 24 prompts of few.txt in clip-0a1b2c3d, mean of 2 runs |  |\n" in text


def test_prompts_are_named_and_counted(run: Path, tmp_path: Path) -> None:
    """A file that is another by now is not counted."""
    file, path = tmp_path / "mine.txt", run / "run.json"
    file.write_text("a cube\n\na ball\na dog\n")
    facts = json.loads(path.read_text())
    facts["run"]["domain"] = {"type": "Prompts", "file": str(file), "sha256": digest(file)}
    path.write_text(json.dumps(facts))
    student = load_student(run)
    for home in (run, run / "best"):
        assert "| data | none: noise and 3 prompts of mine.txt |" in card(student, home, "", {})
    file.write_text("a cat\n")
    assert "| data | none: noise and the prompts of mine.txt |" in card(student, run, "", {})
    file.unlink()
    assert "| data | none: noise and the prompts of mine.txt |" in card(student, run, "", {})
    alone = card(student, tmp_path / "else" / "where", "", {})
    assert "| data | none: noise and conditions alone |" in alone


GUIDED = {
    LSG(4.5): "2406.01561",
    RandomLSG(): "2406.01561",
    ZeroCFG(): "2505.12674",
    AntiCFG(-1.0): "2505.12674",
    Kappas(real=2.0): "",
    Unguided(): "",
}


@pytest.mark.parametrize("guidance", GUIDED, ids=repr)
def test_the_paper_of_the_guidance(run: Path, guidance: Guidance) -> None:
    method = repr(SiD(FewStep(2.5), guidance=guidance))
    student = replace(load_student(run), card={"method": method})
    cited = card(student, run, "", {}).split("## Method")[1]
    assert "Score identity Distillation" in cited
    papers = {part for part in ("2406.01561", "2505.12674") if part in cited}
    assert papers == ({GUIDED[guidance]} - {""})


def told(origin: dict[str, object]) -> Generator:
    return Generator(None, None, (1,), card={"teacher": origin})  # type: ignore[arg-type]


LICENCES = {
    "---\nlicense: openrail++\nlicense_link: LICENSE.md\n---\nlicense: mit": {
        "license": "openrail++",
        "license_link": "LICENSE.md",
    },
    "# No front matter\nlicense: mit": {},
    "---\ntags: [a]\n---\n": {},
    "": {},
}


@pytest.mark.parametrize("text", LICENCES)
def test_the_licence_is_that_of_the_first_teacher(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    origin = {"folder": str(tmp_path), "pipeline": "StableDiffusionPipeline"}
    assert licences(told(origin)) == LICENCES[text]
    assert licences(told({"teacher": origin})) == LICENCES[text]
    assert teacher_name(told({"teacher": origin})) == tmp_path.name


def test_the_licence_of_a_snapshot() -> None:
    origin = {"source": {"file": "edm.pkl"}, "licence": "CC BY-NC-SA 4.0"}
    assert licences(told({"method": "SiD()", "teacher": origin})) == {"licence": "CC BY-NC-SA 4.0"}
    assert teacher_name(told(origin)) == "edm.pkl"
    assert licences(told({"folder": "/no/such/folder"})) == {}
