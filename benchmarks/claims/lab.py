"""Trials of a claim: train, score on the way, keep each finished trial.

A trial that was stopped starts again; finished ones are never repeated, as long as the teacher
scores as it did. Everything is a function of the trial's settings, so the results can be made
again from nothing. A trial is known by its label and seed: one with other settings needs another
label.

Two draws of noise score a finished student. Settings are chosen on one of them (`validation`), and
what is reported is read from the other.
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

from fewstep.diffusion.generator import Generator
from fewstep.distillation.method import Method
from fewstep.domains.domain import Domain
from fewstep.eval.domain_scores import SampleMetrics, score
from fewstep.storage.files import read_json, write_json
from fewstep.training.ema import EMA
from fewstep.training.loop import Diverged, train
from fewstep.training.optim import Optim

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "claims"
WORK = ROOT / "runs" / "claims"
VALIDATION = 100_000
"""The first seed of the noise that settings are chosen on; what is reported starts at 0."""
MANY = 20_000
"""Pictures behind `alignment`, whose differences are of a few in a thousand."""


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
    validated: bool = False
    """Whether the finished student is scored on both draws of noise, with its `alignment`."""


def scored(
    generator: Generator, sample_metrics: SampleMetrics, samples: int, first: int = 0
) -> dict[str, float]:
    """All scores of the samples of seeds first, first + 1, ..."""
    seeds = torch.arange(first, first + samples)
    labels = seeds % generator.classes if generator.classes else None
    return score(generator.sample(seeds.tolist()), labels, sample_metrics)


def alignment(generator: Generator, sample_metrics: SampleMetrics, first: int = 0) -> float:
    """Share of `MANY` pictures, of seeds first, first + 1, ..., that show their label."""
    seeds = torch.arange(first, first + MANY)
    x = generator.sample(seeds.tolist()).clamp(-sample_metrics.limit, sample_metrics.limit)
    return float((sample_metrics.measure(x)[1] == seeds % generator.classes).double().mean())


def both_draws(student: Generator, sample_metrics: SampleMetrics, samples: int) -> dict[str, Any]:
    """`report` and `validation`: all scores and the alignment, each on noise of its own."""
    return {
        name: scored(student, sample_metrics, samples, first)
        | {"alignment": alignment(student, sample_metrics, first)}
        for name, first in (("report", 0), ("validation", VALIDATION))
    }


def conduct(
    trial: Trial, setting: Setting, teacher: Generator, sample_metrics: SampleMetrics
) -> dict[str, Any]:
    """Train; the scores at ten steps evenly spaced on a log scale."""
    at = lambda name: trial.changes.get(name, getattr(setting, name))  # noqa: E731
    steps, batch, domain = at("steps"), at("batch"), at("domain")
    looks = sorted({round(steps * 30 ** (i / 9 - 1)) for i in range(10)})
    model = teacher.model
    assert model is not None
    curve, failure, began = [], "", time.process_time()
    more: dict[str, Any] = {}
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
                scores = scored(student, sample_metrics, setting.samples)
                curve.append({"step": record.step, "images": record.images, **scores})
                print(f"  {record.step:6} {json.dumps(rounded(scores))}", flush=True)
                if trial.validated and record.step == steps:
                    more = both_draws(student, sample_metrics, setting.samples)
    except Diverged as error:
        failure = str(error)
    seconds = time.process_time() - began
    result = {"label": trial.label, "seed": trial.seed, "method": repr(trial.method)}
    result |= {"changes": {k: repr(v) for k, v in trial.changes.items()}, "batch": batch}
    result |= {"curve": curve, "failure": failure, "cpu_seconds": round(seconds)}
    return result | {name: rounded(scores) for name, scores in more.items()}


def rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in scores.items()}


def done(out: Path, teacher: Mapping[str, float]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """The finished trials in a file of results, by label and seed; none of another teacher."""
    if not out.is_file() or (found := read_json(out))["teacher"] != teacher:
        return {}
    return {(trial["label"], trial["seed"]): trial for trial in found["trials"]}


def investigate(claim: str, trials: Iterable[Trial], setting: Setting) -> None:
    """Conduct what is missing of a claim; all so far is in one file after each trial."""
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"{setting.name}-{claim}.json"
    teacher, sample_metrics = setting.teacher(), setting.domain.sample_metrics()
    anchor = rounded(scored(teacher, sample_metrics, setting.samples))
    known = done(out, anchor)
    for trial in trials:
        key = trial.label, trial.seed
        if key in known and not (trial.validated and "validation" not in known[key]):
            continue
        print(f"{claim}: {trial.label}, seed {trial.seed}", flush=True)
        result = conduct(trial, setting, teacher, sample_metrics)
        known[key] = result | {"curve": [rounded(point) for point in result["curve"]]}
        write_json(out, {"claim": claim, "teacher": anchor, "trials": [*known.values()]})


def main(claims: Mapping[str, Callable[[], Iterable[Trial]]], setting: Setting, text: str) -> None:
    """The command line of a data set's claims."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("claims", nargs="*", default=[*claims], help=", ".join(claims))
    for name in parser.parse_args().claims:
        if name not in claims:
            parser.error(f"there is no claim {name!r}; choose from {', '.join(claims)}")
        investigate(name, claims[name](), setting)
