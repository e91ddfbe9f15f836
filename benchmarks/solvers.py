"""Errors of solvers of few calls against the exact flow: python benchmarks/solvers.py TEACHER

Of an exact ring of Gaussians, and of the digits teacher in the run folder TEACHER (`fewstep train
digits_teacher`). Published solvers have the best of four schedules, found on the noise they are
measured on, which favours them: Karras's ladder, even log-SNR, even noise share (`LinearSolver`)
and Align Your Steps. Fitted ones start from the even noise share, learn on other noise, and are
measured as they ship. Errors are root mean squares over samples and dimensions, of 512 samples.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batches import Images, Latents
from fewstep.data.digits import load_digits
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete, NoiseLevels, TimeLaw
from fewstep.diffusion.types import Sampler, Source
from fewstep.distillation.method import Method
from fewstep.distillation.pairs import Pairs, make_pairs
from fewstep.losses.distance import SquaredL2
from fewstep.methods.align_your_steps import AlignYourSteps
from fewstep.methods.dode import DODE
from fewstep.methods.gas import GAS
from fewstep.storage.files import write_json
from fewstep.storage.model_folder import load_student
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim

RESULT = Path(__file__).parent / "results" / "solvers.json"
CALLS = (4, 6, 8, 10)
SAMPLES = 512
EXACT = LinearSolver(150, order=2)


def fitted(method: Method, net: Any, source: Source, batch: int = 256) -> tuple[Sampler, float]:
    """What a method ships, and the seconds of processor time that it took."""
    began = time.process_time()
    optim = Optim(2e-3, (0.9, 0.99), decay="cosine")
    steps = method.length or 1
    *_, last = train(
        method, net, net, source, batch=batch, steps=steps, optim=optim, ema=EMA(2000)
    )
    product = method.product(last.state.nets, last.state.average, net)
    return product.sampler, time.process_time() - began


def schedules(net: Any, calls: int, data: Source) -> dict[str, TimeLaw]:
    """The ladders that published solvers are given."""
    path = net.path
    level = {"Karras": 7.0, "log-SNR": float("inf")}
    found: dict[str, TimeLaw] = {
        name: NoiseLevels(path, 0.02, 80.0, rho) for name, rho in level.items()
    }
    for name, ladder in (
        ("noise share", LinearSolver(calls).ladder(path)),
        ("AYS", list(fitted(AlignYourSteps(LinearSolver(calls), low=0.002), net, data)[0].times)),  # type: ignore[attr-defined]
    ):
        found[name] = Discrete(tuple(reversed(ladder)))
    return found


def measured(net: Any, shape: tuple[int, ...], classes: int, data: Source) -> dict[str, Any]:
    """The table of one teacher: calls -> solver -> error, and what else is known."""
    noise: Source = Latents(shape, classes)
    held_out = noise(Draws.range(10**9, SAMPLES))
    pairs = make_pairs(Pairs(2048), Generator(net, EXACT, shape, classes), noise)

    def error(sampler: Sampler) -> float:
        with torch.no_grad():
            return float(((sampler(net, held_out.z, held_out.cond) - goal) ** 2).mean().sqrt())

    with torch.no_grad():
        goal: Tensor = EXACT(net, held_out.z, held_out.cond)
    table: dict[str, Any] = {}
    for calls in CALLS:
        row: dict[str, Any] = {}
        laws = schedules(net, calls, data)
        published = {
            "ddim": lambda law, n=calls: Heun(law, n, 1),
            "dpm++": lambda law, n=calls: MultiStep(law, n, "dpm++"),
            "unipc": lambda law, n=calls: MultiStep(law, n, "unipc"),
        }
        for name, make in published.items():
            errors = {schedule: error(make(law)) for schedule, law in laws.items()}
            best = min(errors, key=errors.__getitem__)
            row[name] = {"error": errors[best], "schedule": best, "errors": errors}
        start = LinearSolver(calls, order=3)
        learned = {
            "dode": (DODE(LinearSolver(calls)), noise, 256),
            "gs": (GAS(start, distance=SquaredL2(), gan=0, updates=300), pairs, 128),
        }
        for name, (method, source, batch) in learned.items():
            sampler, seconds = fitted(method, net, source, batch)
            row[name] = {"error": error(sampler), "seconds": seconds}
        table[str(calls)] = row
        print(calls, {name: round(cell["error"], 4) for name, cell in row.items()}, flush=True)
    return table


def main(teacher: str) -> int:
    torch.set_num_threads(1)
    ring = GaussianMixture.ring(6, 1.0, 0.2)
    points = ring.sample(20_000, torch.Generator().manual_seed(0))
    digits, (known, _) = load_student(teacher), load_digits()
    results = {
        "ring": measured(ring, (2,), 0, Images(points)),
        "digits": measured(
            digits.denoiser, digits.shape, digits.classes, Images(known.x0, known.labels)
        ),
    }
    write_json(RESULT, results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
