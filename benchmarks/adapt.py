"""A fine-tune carried over to a one-step student of the digits: python benchmarks/adapt.py

The base is the digits' teacher, the fine-tune is of inverted digits (white paper), the student is
the base's in one call. Ways to bring the fine-tune to the student, all of the same settings:

    adapt       score distillation, the fake score starts as the base (`fewstep adapt`)
    new         the same, the fake score starts as the fine-tune
    denoising   a denoising loss on the fine-tune's own pictures, from the student's weights
    arithmetic  weights: student + fine-tune - base; nothing is trained

`fd_digits` of 5,000 inverted samples to the training digits, after so many updates, three seeds.
Writes benchmarks/results/adapt.json; about ten minutes of one core. What is trained first is kept
in runs/adapt-benchmark.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.data import digits as data
from fewstep.data.batches import Images, Latents
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.domains.digits import Digits
from fewstep.eval.domain_scores import score
from fewstep.methods.sid import SiD
from fewstep.recipes.digits import digits, digits_teacher
from fewstep.runs.environment import environment
from fewstep.runs.runner import execute
from fewstep.storage.files import write_json
from fewstep.storage.model_folder import load_student
from fewstep.training.loop import State, train

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "runs" / "adapt-benchmark"
OUT = ROOT / "benchmarks" / "results" / "adapt.json"
LOOKS = (0, 30, 100, 300)
SEEDS = (0, 1, 2)
SAMPLES = 5000
SAMPLER = FewStep(t_init=2.5)


def made(name: str, run: Any, **more: str) -> Path:
    """The finished run `name` in HOME."""
    for _ in execute(run, HOME / name, recipe=name, **more):
        pass
    return HOME / name


def fine_tune(base: Path) -> nn.Module:
    """The base trained on inverted digits: 300 updates."""
    train_set, _ = data.load_digits()
    run, net = digits_teacher(), load_student(base).denoiser
    source = Images(-train_set.x0, train_set.labels)
    *_, last = train(
        run.method, None, net, source, batch=run.batch, steps=300, optim=run.optim, ema=run.ema
    )
    return last.state.average


def measured(net: Any) -> dict[str, float]:
    """Scores of inverted samples, in one call."""
    generator = Generator(net, SAMPLER, (1, 8, 8), 10)
    return of(generator)


def of(generator: Generator) -> dict[str, float]:
    x = -generator.sample(range(SAMPLES))
    found = score(x, torch.arange(SAMPLES) % 10, Digits().sample_metrics())
    return {name: found[name] for name in ("fd_digits", "precision", "recall", "accuracy")}


def trained(way: str, seed: int, student: Any, base: Any, tuned: Any) -> Iterator[tuple[int, Any]]:
    """(updates, network) at each look."""
    run, train_set = digits(), data.load_digits()[0]
    method: Any = SiD(sampler=SAMPLER)
    source: Any = Latents((1, 8, 8), 10)
    if way == "denoising":
        method, source = digits_teacher().method, Images(-train_set.x0, train_set.labels)
    fake = base if way == "adapt" else None
    teacher = None if way == "denoising" else deepcopy(tuned)
    state = State.init(method, teacher, deepcopy(student), fake)
    yield 0, student
    settings: dict[str, Any] = {"batch": run.batch, "optim": run.optim, "ema": run.ema}
    for record in train(
        method, teacher, student, source, steps=LOOKS[-1], seed=seed, state=state, **settings
    ):
        if record.step in LOOKS:
            yield record.step, record.state.average


def main() -> None:
    base_at = made("digits_teacher", digits_teacher())
    run = replace(digits(), method=SiD(sampler=SAMPLER), steps=600)
    student_at = made("digits", run, teacher=str(base_at))
    base, student = (load_student(path).denoiser for path in (base_at, student_at))
    torch.manual_seed(0)
    tuned = fine_tune(base_at)
    sums = {
        name: t + tuned.state_dict()[name] - base.state_dict()[name]
        for name, t in student.state_dict().items()
    }
    arithmetic = deepcopy(student)
    arithmetic.load_state_dict(sums)
    results: dict[str, Any] = {
        "environment": environment(),
        "samples": SAMPLES,
        "teacher": {
            str(calls): of(Generator(tuned, sampler, (1, 8, 8), 10))
            for calls, sampler in ((35, Heun()), (1, SAMPLER))
        },
        "arithmetic": measured(arithmetic),
        "ways": {},
    }
    for way in ("adapt", "new", "denoising"):
        for seed in SEEDS:
            for step, net in trained(way, seed, student, base, tuned):
                scores = measured(net)
                results["ways"].setdefault(way, {}).setdefault(str(step), []).append(scores)
                print(way, seed, step, scores, file=sys.stderr, flush=True)
    for way, looks in results["ways"].items():
        results["ways"][way] = {step: summary(runs) for step, runs in looks.items()}
    write_json(OUT, results)


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Each score's mean and standard deviation over the seeds, and its values."""
    found: dict[str, Any] = {}
    for name in runs[0]:
        values = torch.tensor([run[name] for run in runs], dtype=torch.float64)
        found[name] = {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "seeds": values.tolist(),
        }
    return found


if __name__ == "__main__":
    main()
