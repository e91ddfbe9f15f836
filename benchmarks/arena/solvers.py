"""The solvers that a student has to beat, and the trials that each of them is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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


def asked() -> Iterator[tuple[str, int]]:
    """Solvers and the calls that they are asked for."""
    for solver in SOLVERS:
        for calls in (1, 2, 4, 8) if solver == "undistilled" else CALLS:
            yield solver, calls
