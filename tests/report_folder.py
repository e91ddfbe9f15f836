"""Run folders for the tests of the report: healthy ones, and ways to make them sick."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewstep.config import encode
from fewstep.recipes.digits import digits
from fewstep.storage.files import read_json, write_folder, write_json

STEPS, LOOKS = 20, 4
SCORES: dict[str, dict[str, float]] = {
    "real": {"fd_digits": 1.2618, "precision": 0.85, "recall": 0.9, "nn": 2.1347},
    "teacher": {"fd_digits": 0.5972, "precision": 0.89, "recall": 0.83, "nn": 1.9416},
    "student": {"fd_digits": 0.6713, "precision": 0.91, "recall": 0.81, "nn": 1.9123},
}
CALLS = {"real": 0.0, "teacher": 35.0, "student": 1.0}
SPREAD = 0.0312


def healthy(path: Path) -> None:
    """Measurements and gauges with nothing wrong."""
    stored: dict[str, Any] = {
        role: {
            **{k: v for name, value in s.items() for k, v in ((name, value), (f"{name}_std", 0))},
            "fd_digits_std": 0.0 if role == "real" else SPREAD,
            "accuracy": 0.9973,
            "calls": CALLS[role],
            "ms_per_image": CALLS[role] / 25,
            "draws": 1 if role == "real" else 3,
        }
        for role, s in SCORES.items()
    }
    stored["protocol"] = {"samples": 5000, "draws": 3, "distance": "fd_digits"}
    write_json(path / "metrics.json", stored)
    lines = []
    for i in range(LOOKS):
        levels = [
            {"t": t, "fisher": i and 5.0 / i / t, "teacher_error": 0.1 * t, "fake_error": 0.09 * t}
            for t in (0.1, 1.0, 10.0)
        ]
        quick = {"samples": 1000, "fd_digits": 9.0 - i, "precision": 0.8, "recall": 0.1 * i}
        line = {"step": 5 * i, "images": 80 * i, "diversity": 99.0, "levels": levels}
        lines.append(json.dumps({**line, "quick": quick}))
    (path / "gauges.jsonl").write_text("\n".join(lines))


def invented(path: Path) -> None:
    """A finished run that never ran: enough for the checks, without a model."""
    path.mkdir(parents=True)
    write_json(path / "run.json", {"format": 1, "recipe": "digits", "run": encode(digits())})
    write_folder(path / "student", {}, {})
    logs = {"fake/loss": 0.4, "student/loss": -0.01, "skipped": 0.0}
    line = {"step": STEPS, "images": 16 * STEPS, **logs}
    (path / "log.jsonl").write_text(json.dumps(line) + "\n")
    healthy(path)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file."""
    value = read_json(path)
    change(value)
    write_json(path, value)


def student(**scores: float) -> Callable[[Path], None]:
    """A change of the student's measurements."""
    return lambda path: edit(path / "metrics.json", lambda m: m["student"].update(scores))


def gauge(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A change of the last look."""

    def apply(path: Path) -> None:
        lines = [json.loads(x) for x in (path / "gauges.jsonl").read_text().splitlines()]
        change(lines[-1])
        (path / "gauges.jsonl").write_text("\n".join(map(json.dumps, lines)))

    return apply


def skip(path: Path) -> None:
    """Three updates that were skipped, with numbers that are none."""
    line = {"step": 20, "images": 300, "fake/loss": "nan", "fake/grad_norm": "inf", "skipped": 3.0}
    with (path / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


SICK = {
    "distance": (student(fd_digits=0.75), "fd_digits is 1.26 times the teacher's"),
    "precision": (student(precision=0.83), "Precision is 0.830, the teacher's is 0.890"),
    "recall": (student(recall=0.77), "Recall is 0.770, the teacher's is 0.830"),
    "accuracy": (student(accuracy=0.98), "Only 98.0% of the pictures"),
    "copies": (student(nn=1.74), "1.74 from the nearest training sample, real held-out ones 2.13"),
    "strangers": (student(nn=2.7), "many are unlike any training sample"),
    "collapse": (gauge(lambda x: x.update(diversity=0.24)), "Diversity is 0.240, less than half"),
    "fake score": (
        gauge(lambda x: x["levels"][2].update(fake_error=1.6)),
        "At noise level t = 10.0 the fake score's error is 1.60 times",
    ),
    "fisher": (
        gauge(lambda x: [level.update(fisher=4.0 / level["t"]) for level in x["levels"]]),
        "is 1.60 times its lowest",
    ),
    "skipped": (skip, "3 updates of 40 (7.50%)"),
}
