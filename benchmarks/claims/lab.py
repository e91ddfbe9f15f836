"""Trials of a claim: train, score on the way, keep each finished trial as one JSON file.

A trial that was stopped starts again; finished ones are never repeated. Everything is a function
of the trial's settings, so the folder of results can be made again from nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewstep.core import Method
from fewstep.ema import EMA
from fewstep.eval.evaluate import Yardstick, score
from fewstep.files import read_json, write_json
from fewstep.generator import Generator
from fewstep.optim import Optim
from fewstep.recipes.run import Domain
from fewstep.training import Diverged, train

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "claims"
WORK = ROOT / "runs" / "claims"


@dataclass(frozen=True)
class Setting:
    """What the trials of one data set share."""

    name: str
    domain: Domain
    teacher: Callable[[], Generator]
    optim: Optim
    ema: EMA
    batch: int = 256
    steps: int = 900
    samples: int = 5000


@dataclass(frozen=True)
class Trial:
    """One student: `label` names it among the trials of its claim."""

    label: str
    method: Method
    seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the setting."""


def scored(generator: Generator, yardstick: Yardstick, samples: int) -> dict[str, float]:
    """All scores of the samples of seeds 0, 1, ..."""
    labels = torch.arange(samples) % generator.classes if generator.classes else None
    return score(generator.sample(range(samples)), labels, yardstick)


def conduct(
    trial: Trial, setting: Setting, teacher: Generator, yardstick: Yardstick
) -> dict[str, Any]:
    """Train; the scores at ten steps evenly spaced on a log scale."""
    at = lambda name: trial.changes.get(name, getattr(setting, name))  # noqa: E731
    steps, batch, domain = at("steps"), at("batch"), at("domain")
    looks = sorted({round(steps * 30 ** (i / 9 - 1)) for i in range(10)})
    model = teacher.model
    assert model is not None
    curve, failure, began = [], "", time.process_time()
    try:
        for record in train(
            trial.method,
            teacher.denoiser,
            teacher.denoiser,
            domain.source(model, data_free=not trial.method.needs_data),
            batch=batch,
            steps=steps,
            optim=at("optim"),
            ema=at("ema"),
            seed=trial.seed,
        ):
            if record.step in looks:
                average = record.state.average
                student = Generator(average, trial.method.sampler, model.shape, model.classes)
                scores = scored(student, yardstick, setting.samples)
                curve.append({"step": record.step, "images": record.images, **scores})
                print(f"  {record.step:6} {json.dumps(rounded(scores))}", flush=True)
    except Diverged as error:
        failure = str(error)
    seconds = time.process_time() - began
    result = {"label": trial.label, "seed": trial.seed, "method": repr(trial.method)}
    result |= {"changes": {k: repr(v) for k, v in trial.changes.items()}, "batch": batch}
    return result | {"curve": curve, "failure": failure, "cpu_seconds": round(seconds)}


def rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in scores.items()}


def investigate(claim: str, trials: Iterable[Trial], setting: Setting) -> None:
    """Conduct what is missing of a claim; all so far is gathered in one file after each trial."""
    torch.set_num_threads(1)
    folder = WORK / setting.name / claim
    for made in (folder, RESULTS):
        made.mkdir(parents=True, exist_ok=True)
    teacher, yardstick = setting.teacher(), setting.domain.yardstick()
    anchor = folder.parent / "teacher.json"
    if not anchor.is_file():
        write_json(anchor, rounded(scored(teacher, yardstick, setting.samples)))
    found = []
    for trial in trials:
        path = folder / f"{trial.label.replace(' ', '-')}-{trial.seed}.json"
        if not path.is_file():
            print(f"{claim}: {trial.label}, seed {trial.seed}", flush=True)
            write_json(path, conduct(trial, setting, teacher, yardstick))
        result = read_json(path)
        found.append(result | {"curve": [rounded(point) for point in result["curve"]]})
        write_json(
            RESULTS / f"{setting.name}-{claim}.json",
            {"claim": claim, "teacher": read_json(anchor), "trials": found},
        )


def main(claims: Mapping[str, Callable[[], Iterable[Trial]]], setting: Setting, text: str) -> None:
    """The command line of a data set's claims."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("claims", nargs="*", default=[*claims], help=", ".join(claims))
    for name in parser.parse_args().claims:
        if name not in claims:
            parser.error(f"there is no claim {name!r}; choose from {', '.join(claims)}")
        investigate(name, claims[name](), setting)
