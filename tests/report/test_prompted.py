"""What the report says of a run that takes prompts: its own commands, its own words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fewstep.config import encode
from fewstep.diffusion.model import Model
from fewstep.domains.captions import Captions
from fewstep.domains.prompts import Prompts
from fewstep.domains.ring import Ring
from fewstep.report.headline import headline, kept, measuring
from fewstep.report.plots import gauges
from fewstep.report.reasons import no_gauges, no_quick
from fewstep.report.run_data import read_run
from fewstep.report.tables import evaluations
from fewstep.runs.early_stopping import Best
from fewstep.storage.files import digest, write_json
from fewstep.teachers.diffusers.network import DiffusersNet
from tests.report_folder import edit, invented


def change(path: Path, **fields: Any) -> None:
    """Other fields of the stored run."""
    edit(path / "run.json", lambda facts: facts["run"].update(fields))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run on prompts that nobody has measured; it never ran."""
    path = tmp_path / "run"
    invented(path)
    (path / "metrics.json").unlink()
    net = DiffusersNet("UNet2DConditionModel", "{}", 12, 32)
    change(path, model=encode(Model(net, (4, 8, 8))), domain=encode(Prompts(file="my.txt")))
    return path


def test_the_command_that_measures_it(run: Path) -> None:
    """With its own prompts and CLIP, else a word in their place; it can be pasted."""
    assert measuring(read_run(run)) == f"fewstep evaluate {run} --prompts my.txt --clip CLIP"
    change(run, domain=encode(Prompts(file="my own.txt", clip="../tiny-clip")))
    asked = f"fewstep evaluate {run} --prompts 'my own.txt' --clip ../tiny-clip"
    assert measuring(read_run(run)) == asked
    told = headline(read_run(run), [])
    assert told.title == "Finished, but not measured yet."
    assert told.text.endswith(f"Measure it with: {asked}")
    change(run, domain=encode(Captions(folder="pictures")))
    assert measuring(read_run(run)) == f"fewstep evaluate {run} --prompts FILE --clip CLIP"
    invented(run.parent / "labels")
    assert (
        measuring(read_run(run.parent / "labels")) == f"fewstep evaluate {run.parent / 'labels'}"
    )


def looks(path: Path, clips: Sequence[float]) -> None:
    """A look every ten steps, judged by CLIP."""
    levels = [{"t": 0.5, "fisher": 0.1, "fake_error": 0.2, "teacher_error": 0.2}]
    lines = []
    for i, clip in enumerate(clips):
        line = {"step": 10 * i, "images": 160 * i, "diversity": 1.0, "levels": levels}
        lines.append(json.dumps({**line, "quick": {"samples": 64, "clip": clip}}))
    (path / "gauges.jsonl").write_text("\n".join(lines))


def test_which_model_is_the_best(run: Path) -> None:
    """Its step and folder, that the student is another, and why the run ended."""
    assert kept(read_run(run)) == ""
    looks(run, (0.28, 0.31, 0.30, 0.29))
    change(run, steps=60, best=encode(Best("quick.clip", patience=2)))
    assert kept(read_run(run)) == ""  # nothing is in best/
    (run / "best").mkdir()
    (run / "best" / "manifest.json").write_text("{}")
    best = f"By quick.clip the best look was 0.310, at step 10: that model is in {run / 'best'}."
    last = f" {run / 'student'}, which this page shows, is the last one, of step 30."
    early = " The run ended early, 2 looks after its best (Run.best.patience)."
    assert kept(read_run(run)) == best + last + early
    change(run, best=encode(Best("quick.clip")))
    assert kept(read_run(run)) == best + last  # it had no patience to end it
    change(run, steps=30, best=encode(Best("quick.clip", patience=2)))
    assert kept(read_run(run)) == best + last  # it came to its end
    change(run, best=encode(Best("quick.clip", "min")))
    assert "the best look was 0.280, at step 0:" in kept(read_run(run))
    looks(run, (0.28, 0.30, 0.29, 0.31))
    change(run, best=encode(Best("quick.clip")))
    assert kept(read_run(run)).endswith("which this page shows, is the same.")
    (run / "student" / "manifest.json").unlink()
    assert kept(read_run(run)).endswith(f"that model is in {run / 'best'}.")
    change(run, best=encode(Best("quick.fd_digits")))
    assert kept(read_run(run)) == ""


def store(path: Path, name: str, scores: Sequence[float]) -> None:
    """An evaluation of the model that is there, of a run for each of the scores."""
    runs = [{"seeds": [0, 23], "SCORE": score} for score in scores]
    write_json(
        path / "evaluation" / f"{name}.json",
        {
            "model": digest(path / "student" / "manifest.json"),
            "labels": "prompts of my.txt",
            "runs": runs,
            "reference": {},
            "best run": 1,
            "best": {"SCORE": max(scores)},
            "mean": {"SCORE": sum(scores) / len(scores)},
            "std": {"SCORE": 0.0},
        },
    )


def test_a_clip_score_is_a_mean(run: Path) -> None:
    """Published distances are the best of their runs, under a heading of their own."""
    (run / "evaluation").mkdir()
    store(run, "prompts-clip-24", (0.25, 0.31))
    f = read_run(run)
    assert headline(f, []).text == "SCORE 0.280, the mean of 2 runs."
    assert [e.title for e in evaluations(f)] == ["On prompts: clip-24"]
    store(run, "prompts-clip-24", (0.31,))
    assert headline(read_run(run), []).text == "SCORE 0.310."
    (run / "evaluation" / "prompts-clip-24.json").unlink()
    store(run, "inception-50000", (0.25, 0.31))
    f = read_run(run)
    assert headline(f, []).text == "SCORE 0.310, the best of 2 runs; 0.280 on average."
    assert [e.title for e in evaluations(f)] == ["As papers report it: inception-50000"]


def test_words_of_latents_and_prompts(run: Path) -> None:
    looks(run, (0.28, 0.31))
    (shown,) = (c for c in gauges(read_run(run), {}) if c.title == "Diversity over time")
    assert "of whichever prompts, in units of the latents" in shown.caption
    assert "a label" not in shown.svg
    assert "difference of two samples" in shown.svg
    labelled = run.parent / "labels"
    invented(labelled)
    (shown,) = (c for c in gauges(read_run(labelled), {}) if c.title == "Diversity over time")
    assert "of the same label, in units of the pixels" in shown.caption
    assert "difference within a label" in shown.svg


def test_the_teacher_stands_beside(run: Path) -> None:
    """Its scores on the same prompts, guided and not; neither on others nor with fewer."""
    (run / "evaluation").mkdir()
    store(run, "prompts-clip-24", (0.25, 0.31))
    pipe = run.parent / "pipe"
    edit(run / "run.json", lambda facts: facts.update(teacher=str(pipe)))
    assert not read_run(run).beside
    stored = json.loads((run / "evaluation" / "prompts-clip-24.json").read_text())
    there = Path(f"{pipe}.evaluation")
    there.mkdir()
    for name, more in {
        "prompts-clip-24": {"best": {"SCORE": 0.27}},
        "prompts-clip-24-cfg7.5": {"guidance": 7.5},
        "prompts-other": {"labels": "prompts of yours.txt"},
        "prompts-clip-20": {"samples": 20},
    }.items():
        write_json(there / f"{name}.json", {**stored, "model": "teacher", **more})
    ours, plain, guided = evaluations(read_run(run))
    assert ours.title == "On prompts: clip-24"
    assert plain.title == "The teacher on the same prompts: clip-24"
    assert [cell.text for cell in plain.rows[0][1]] == ["0.250", "0.310", "0.270", "0.280"]
    assert guided.title == "The teacher on the same prompts: clip-24-cfg7.5"
    assert "Guided at scale 7.5" in guided.note
    assert "another model" not in plain.note
    assert headline(read_run(run), []).text == "SCORE 0.280, the mean of 2 runs."
    (there / "prompts-other.json").write_text("{")
    assert not read_run(run).beside


def test_why_there_are_no_quick_scores(run: Path) -> None:
    """The reason is the run's own: no look yet, too many calls, no CLIP, or no metrics."""
    looks(run, (0.28,))
    edited = [json.loads(line) for line in (run / "gauges.jsonl").read_text().splitlines()]
    edited[0].pop("quick")
    (run / "gauges.jsonl").write_text(json.dumps(edited[0]))
    assert "this run names no CLIP; --domain.clip FOLDER names one" in no_quick(read_run(run))
    assert "network call" not in no_quick(read_run(run))
    change(run, domain=encode(Captions(folder="pictures", clip="tiny")))
    assert no_quick(read_run(run)) == "No quick scores: tiny has not judged a look yet."
    change(run, domain=encode(Ring()))
    assert "nothing measures samples of the domain Ring" in no_quick(read_run(run))
    (run / "gauges.jsonl").unlink()
    dear = (
        "gauges are taken where a sample costs at most 4 network calls, and at no look of this run"
    )
    assert no_quick(read_run(run)) == f"No quick scores: {dear} it did."
    assert no_gauges(read_run(run)) == f"Not recorded: {dear} it did."
    (run / "log.jsonl").unlink()
    assert no_quick(read_run(run)) == "No quick scores: no look has been taken yet."


def test_prompts_are_not_called_labels(run: Path) -> None:
    (run / "evaluation").mkdir()
    store(run, "prompts-clip-24", (0.25,))
    (shown,) = evaluations(read_run(run))
    assert shown.note.startswith("Prompts: my.txt. ")
    assert "Labels" not in shown.note
    edit(run / "evaluation" / "prompts-clip-24.json", lambda e: e.update(labels="none"))
    (shown,) = evaluations(read_run(run))
    assert shown.note.startswith("Labels: none. ")
