"""A model sampled in another way than its own, as the flags of `sampling_flags` say it."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.cli.parser import require_finite
from fewstep.cli.sampling_flags import NAMES, Schedule, Solver
from fewstep.config import configuration
from fewstep.diffusion.assisted import Assisted, Corrected, Gated, Handover
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG, AtScale
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.sampler_changes import in_steps
from fewstep.diffusion.samplers import PURE_NOISE, FewStep, Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete, NoiseLevels, TimeLaw
from fewstep.diffusion.types import Sampler, select_rows
from fewstep.domains.domain import Domain
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.teacher import load_teacher, teacher_of
from fewstep.storage.user_code import decoded

CAP = 80.0
"""The largest noise level sigma / alpha of a schedule that starts at pure noise."""
MOST = 10_000
"""Steps that can be asked for."""
CALIBRATION = range(2**40, 2**40 + 256)
"""Samples that a gate's threshold is found on, and that nobody asks for."""


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled where that is not its own way.

    Raises ValueError, in `applied`, for guidance of a model without conditions, for another
    solver or schedule of a student, for steps that do not fit the times, and for help of a teacher
    that is not there.
    """

    guidance: float = 1.0
    solver: Solver | None = None
    steps: int | None = None
    schedule: Schedule | None = None
    guide_between: tuple[float, float] | None = None
    assist: str | None = None
    assist_share: float | None = None

    @classmethod
    def asked(cls, flags: argparse.Namespace) -> Sampling:
        """Of the flags of a command; ValueError for a scale or steps that are out of range."""
        given = {name: getattr(flags, name) for name in NAMES}
        if given["guide_between"] is not None:
            given["guide_between"] = tuple(given["guide_between"])
        given = {name: value for name, value in given.items() if value is not None}
        require_finite("--guidance", given.get("guidance", 1.0))
        if not 1 <= given.get("steps", 1) <= MOST:
            raise ValueError(f"--steps is from 1 to {MOST:,}, got {given['steps']}")
        return cls(**given)

    @property
    def suffix(self) -> str:
        """What the names of files of such samples end in; "" for the model's own way."""
        parts = [self.solver, None if self.steps is None else f"{self.steps}steps", self.schedule]
        if self.guidance != 1:
            between = (
                "" if self.guide_between is None else "@{:g}-{:g}".format(*self.guide_between)
            )
            parts.insert(0, f"cfg{self.guidance:g}{between}")
        if self.assist is not None:
            parts.append(re.sub(r"\W+", "", self.assist) + f"{self.assist_share or ''}")
        return "".join(f"-{part}" for part in parts if part is not None)

    def record(self, generator: Generator) -> dict[str, Any]:
        """What a result says of it: "guidance", and "sampler" where it is not the model's own."""
        own = self.solver is None and self.steps is None and self.schedule is None
        helped: dict[str, Any] = {"assist": self.assist} if self.assist else {}
        if self.assist_share is not None:
            helped["assist_share"] = self.assist_share
        between = {"guide_between": list(self.guide_between)} if self.guide_between else {}
        return {
            "guidance": self.guidance,
            **between,
            **({} if own else {"sampler": repr(self._sampler(generator))}),
            **helped,
        }

    def applied(self, generator: Generator, home: Path | None = None) -> Generator:
        """The same generator, sampled like this.

        home: the run folder of a student, whose teacher may help it.
        """
        sampler = self._sampler(generator)
        if self.guide_between is not None and self.guidance == 1:
            raise ValueError("--guide-between says where --guidance guides: give a scale, too")
        if self.guidance != 1:
            if not generator.classes and generator.text is None:
                raise ValueError("--guidance needs prompts or labels, and this model takes none")
            sampler = CFG(sampler, self.guidance, *(self.guide_between or ()))
        if self.assist is None:
            if self.assist_share is not None:
                raise ValueError("--assist-share needs --assist 'Gated()'")
            return replace(generator, sampler=sampler)
        return self._assisted(replace(generator, sampler=sampler), home)

    def _assisted(self, generator: Generator, home: Path | None) -> Generator:
        """The student with its teacher beside it."""
        assert self.assist is not None
        kinds = (Corrected, Handover, Gated)
        help_by: Any = configuration(self.assist, Sampler)
        if not isinstance(help_by, kinds):
            raise ValueError(
                f"--assist is one of {', '.join(kind.__name__ for kind in kinds)}, got "
                f"{type(help_by).__name__}"
            )
        gate = isinstance(help_by, Gated) and help_by.threshold is None
        if self.assist_share is not None and not gate:
            raise ValueError("--assist-share needs --assist 'Gated()', without a threshold")
        teacher = None if home is None else _teacher(home, generator)
        if teacher is None:
            raise ValueError("--assist needs the run folder of a student, which names its teacher")
        both = Assisted(generator.denoiser, teacher)
        helped = replace(help_by, sampler=generator.sampler)
        if isinstance(helped, Gated) and helped.threshold is None:
            index = torch.tensor(CALIBRATION)
            draws = Draws(index.to(generator.device), 0, "sample/")
            every = torch.arange(len(index))
            cond = select_rows(generator.conditions(index), every, generator.device)
            share = 0.5 if self.assist_share is None else self.assist_share
            with torch.no_grad():
                z = draws.normal("z", generator.shape)
                helped = helped.calibrated(both, z, cond, draws, share)
        return replace(generator, denoiser=both, sampler=helped)

    def _sampler(self, generator: Generator) -> Sampler:
        """Without guidance; on the times of the generator's own sampler."""
        own = generator.sampler
        if self.solver is None and self.schedule is None:
            return own if self.steps is None else in_steps(own, self.steps)
        learnt = isinstance(own, FewStep) and (own.noise != "ddim" or "method" in generator.card)
        if learnt or not isinstance(own, FewStep | Heun | MultiStep):
            raise ValueError(
                "--solver and --schedule are for teachers; this student is sampled by "
                f"{own}, as it was trained to be"
            )
        path, before = generator.denoiser.path, own
        own = replace(own, steps=own.steps if self.steps is None else self.steps)
        if self.schedule is None and isinstance(own, FewStep) and self.solver == "ddim":
            return own
        times: TimeLaw
        if isinstance(own, FewStep):
            times = Discrete(tuple(reversed(own.ladder(path))))
        else:
            times = own.times
        if self.schedule is not None:
            times = spaced(self.schedule, before, path)
        solver = self.solver or _solver_of(own)
        if solver == "dpm++" or solver == "unipc":
            return MultiStep(times, own.steps, solver)
        return Heun(times, own.steps, 1 if solver == "ddim" else 2)


def _solver_of(own: FewStep | Heun | MultiStep) -> Solver:
    """The name of a teacher's own solver."""
    if isinstance(own, MultiStep):
        return own.kind
    return "ddim" if isinstance(own, FewStep) or own.order == 1 else "heun"


def spaced(schedule: str, own: FewStep | Heun | MultiStep, path: NoisePath) -> NoiseLevels:
    """Noise levels between those of a sampler's first and last times, as `--schedule` says."""
    if isinstance(own, FewStep):
        ladder = torch.tensor(own.ladder(path), dtype=torch.float64)
        ends = torch.stack([ladder[-1], ladder[0]])
    else:
        ends = own.times.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
    low, high = (path.sigma(ends) / path.alpha(ends)).tolist()
    high = high if high < 1 / PURE_NOISE else CAP
    rho = 7.0 if schedule == "karras" else math.inf
    return NoiseLevels(path, float(f"{low:.9g}"), float(f"{high:.9g}"), rho)


def _teacher(home: Path, student: Generator) -> Any:
    """The denoiser of a student's teacher, where its run folder names one that is still there."""
    folder = RunFolder(home)
    if not (home / "run.json").is_file():
        return None
    facts = folder.facts()
    domain: Domain = decoded(facts["run"].get("domain"), Domain, home)
    teacher = load_teacher(domain, teacher_of(folder), student.device, student.model)
    if teacher is not None and isinstance(teacher.sampler, CFG):
        return AtScale(teacher.denoiser, teacher.sampler.kappa)
    return None if teacher is None else teacher.denoiser
