"""What a student has to beat: solvers of its teacher, and a student that nothing was taught.

They are tuned as everybody is, by three trials: the time of the first call.
"""

from __future__ import annotations

from typing import Any

from benchmarks.arena.records import Record, code_version, sealed, settings_of_solver
from benchmarks.arena.scenes import TEST, VALIDATION, Scene
from benchmarks.arena.solvers import sampler_of
from benchmarks.arena.trials import rounded
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import NotFinite


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
