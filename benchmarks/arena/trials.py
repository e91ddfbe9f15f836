"""One trial: train, look on the way, score on two draws of noise.

Settings are chosen on one draw (`validation`); what is reported is read from the other (`test`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from benchmarks.arena.budget import Cost
from benchmarks.arena.entries import SPACES, Ask, entry, points
from benchmarks.arena.records import (
    EMA_OF_ALL,
    Record,
    code_version,
    optim,
    sealed,
    settings_of,
)
from benchmarks.arena.scenes import LOOKS, TEST, VALIDATION, Scene, Scores
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import NotFinite
from fewstep.diffusion.types import Source
from fewstep.distillation.method import Method
from fewstep.distillation.pairs import make_pairs
from fewstep.training.loop import Diverged, State, train
from fewstep.training.optim import Optim

SHARES = (0.125, 0.25, 0.5)
"""Parts of the steps at which a student is looked at, before its end."""


def rounded(scores: Mapping[str, float]) -> Scores:
    """To four digits."""
    return {name: float(f"{value:.4g}") for name, value in scores.items()}


def source_of(method: Method, on: Scene) -> Source:
    """Batches for a method, with pairs of the teacher where it needs them."""
    source, pairs = on.source(method.needs_data), method.needs_pairs()
    return source if pairs is None else make_pairs(pairs, on.teacher, source)


def product_of(method: Method, state: State, on: Scene) -> Generator:
    """What would be shipped now."""
    net, sampler = method.product(state.nets, state.average, on.teacher.denoiser)
    return Generator(net, sampler, on.model.shape, on.model.classes)


def conduct(on: Scene, name: str, calls: int, trial: int, seed: int, cost: Cost) -> Record:
    """The record of a trial; `cost` says how many steps the budget pays for."""
    one = entry(name)
    point = points(one)[trial]
    ask = Ask(calls, point.start, cost.steps, on.labels)
    adam = optim(point, SPACES[one.family].beta)
    found = run(on, one.method(ask, point), calls, adam, seed, cost)
    return sealed(
        {
            "name": name,
            "calls": calls,
            "trial": trial,
            "seed": seed,
            "settings": settings_of(on, name, calls, trial, seed, cost.steps),
            "teacher": on.teacher_digest,
            "code": code_version(),
            "forwards": round(cost.at(cost.steps)),
            "peak": cost.peak,
            "kept": cost.kept,
            **found,
        }
    )


def run(
    on: Scene, method: Method, calls: int, adam: Optim, seed: int, cost: Cost
) -> dict[str, Any]:
    """Train; the curve, both scores, and why it failed if it did.

    Settings are chosen with seed 0, which is scored on validation noise too. While a student has
    other calls, in an early stage, it is not looked at.
    """
    looks = {max(1, round(share * cost.steps)) for share in SHARES} - {cost.steps}
    curve: list[dict[str, float]] = []
    out: dict[str, Any] = {"curve": curve, "validation": {}, "test": {}, "failure": ""}
    began, paused = time.process_time(), 0.0
    try:
        teacher = on.teacher.denoiser
        for record in train(
            method,
            teacher,
            teacher,
            source_of(method, on),
            batch=on.batch,
            steps=cost.steps,
            optim=adam,
            ema=EMA_OF_ALL,
            seed=seed,
        ):
            if record.step in looks:
                now = time.process_time()
                student = product_of(method, record.state, on)
                if student.sampler.calls == calls:
                    distance = on.scores(student, LOOKS, on.looked)[on.distance]
                    look = {"forwards": cost.at(record.step), on.distance: distance}
                    curve.append(rounded(look))
                paused += time.process_time() - now
        out["seconds"] = round(time.process_time() - began - paused, 2)
        student = product_of(method, record.state, on)
        out["test"] = rounded(on.scores(student, TEST))
        if seed == 0:
            out["validation"] = rounded(on.scores(student, VALIDATION))
    except (Diverged, NotFinite) as error:
        out["failure"] = str(error)[:200]
        out.setdefault("seconds", round(time.process_time() - began - paused, 2))
    return out
