"""What a student has to beat: solvers of its teacher, and a student that nothing was taught.

They are tuned as everybody is, by three trials: the time of the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.arena.records import Record, code_version, concise, sealed
from benchmarks.arena.scenes import TEST, VALIDATION, Scene
from benchmarks.arena.trials import rounded
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import NotFinite
from fewstep.diffusion.samplers import FewStep, Heun, MultiStep
from fewstep.diffusion.time_distributions import Karras
from fewstep.diffusion.types import Sampler

STARTS = (80.0, 10.0, 2.5)
CALLS = (1, 2, 4, 8, 16, 35)
SOLVERS: Mapping[str, Callable[[int, float], Sampler]] = {
    "Heun": lambda calls, start: Heun(Karras(hi=start), (calls + 1) // 2),
    "DDIM": lambda calls, start: Heun(Karras(hi=start), calls, 1),
    "DPM-Solver++": lambda calls, start: MultiStep(Karras(hi=start), calls, "dpm++"),
    "UniPC": lambda calls, start: MultiStep(Karras(hi=start), calls, "unipc"),
    "undistilled": lambda calls, start: FewStep(start, calls, rho=2.0 if start < 5 else 3.0),
}
"""Of Heun's 2 n - 1 calls, the most that are not above the number asked for."""


def sampler_of(solver: str, calls: int, trial: int) -> Sampler:
    """The sampler of a trial."""
    return SOLVERS[solver](calls, STARTS[trial])


def settings_of_solver(on: Scene, solver: str, calls: int, trial: int) -> dict[str, Any]:
    """What such a trial is, in words."""
    sampler = sampler_of(solver, calls, trial)
    return {"scene": on.name, "sampler": concise(sampler), "samples": on.samples}


def asked() -> Iterator[tuple[str, int]]:
    """Solvers and the calls that they are asked for."""
    for solver in SOLVERS:
        for calls in (1, 2, 4, 8) if solver == "undistilled" else CALLS:
            yield solver, calls


def conduct(on: Scene, solver: str, calls: int, trial: int) -> Record:
    """The record of a trial."""
    sampler = sampler_of(solver, calls, trial)
    model = on.model
    generator = Generator(on.teacher.denoiser, sampler, model.shape, model.classes)
    out: dict[str, Any] = {"validation": {}, "test": {}, "failure": ""}
    try:
        out["test"] = rounded(on.scores(generator, TEST))
        out["validation"] = rounded(on.scores(generator, VALIDATION))
    except NotFinite as error:
        out["failure"] = str(error)[:200]
    return sealed(
        {
            "name": "baselines",
            "solver": solver,
            "calls": calls,
            "made": sampler.calls,
            "trial": trial,
            "seed": 0,
            "settings": settings_of_solver(on, solver, calls, trial),
            "teacher": on.teacher_digest,
            "code": code_version(),
            **out,
        }
    )
