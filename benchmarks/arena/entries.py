"""Who takes part: one line a method, and one search space a family.

A line says what the number of calls, the start and the number of steps make of a method. All else
is the method's default, whether it suits the scene or not: the arena compares what a user gets
who names a method and no more. Trials differ in what a `Point` has, and every family has three.

A public method needs no line: without one, and without a reason in `ABSENT`, the arena's page says
that it was not measured yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import fewstep
from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.parallel_decoding import ParallelDecoding
from fewstep.diffusion.policies import FollowPolicy
from fewstep.diffusion.samplers import Ancestral, FewStep, Heun, Jumps, WithInput
from fewstep.diffusion.scale_wise import ScaleWise
from fewstep.diffusion.time_distributions import Karras, NoiseLevels, TimeLaw
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.method import Method
from fewstep.methods.add import ADD
from fewstep.methods.align_your_steps import AlignYourSteps
from fewstep.methods.asd import ASD
from fewstep.methods.ayf import AYF
from fewstep.methods.boot import BOOT
from fewstep.methods.cdm import CDM
from fewstep.methods.consistency_distillation import ConsistencyDistillation
from fewstep.methods.consistency_training import ConsistencyTraining
from fewstep.methods.ctm import CTM
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.diffusion2gan import Diffusion2GAN
from fewstep.methods.disback import DisBack
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.dode import DODE
from fewstep.methods.emd import EMD
from fewstep.methods.f_distill import FDistill
from fewstep.methods.flash_diffusion import FlashDiffusion
from fewstep.methods.flash_dmd import FlashDMD
from fewstep.methods.gas import GAS
from fewstep.methods.ibmd import IBMD
from fewstep.methods.imagine_flash import ImagineFlash
from fewstep.methods.invertible_consistency import InvertibleConsistency
from fewstep.methods.ladd import LADD
from fewstep.methods.lcm import LCM
from fewstep.methods.lightning import Lightning
from fewstep.methods.mean_flow import MeanFlow
from fewstep.methods.moment_matching import MomentMatching
from fewstep.methods.msd import MSD
from fewstep.methods.optimal_steps import OptimalSteps
from fewstep.methods.pair_regression import PairRegression
from fewstep.methods.pdd import PDD
from fewstep.methods.phased_consistency import PhasedConsistency
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.pi_flow import PiFlow
from fewstep.methods.progressive import ProgressiveDistillation
from fewstep.methods.reflow import Reflow
from fewstep.methods.scflow import SCFlow
from fewstep.methods.scfm import SCFM
from fewstep.methods.scm import SCM
from fewstep.methods.scott import SCott
from fewstep.methods.self_e import SelfE
from fewstep.methods.sfd import SFD
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.sim import SIM
from fewstep.methods.slam import SLAM
from fewstep.methods.slim_flow import SlimFlow
from fewstep.methods.swd import SwD
from fewstep.methods.tbcm import TBCM
from fewstep.methods.tdd import TDD
from fewstep.methods.tdm import TDM
from fewstep.methods.traflow import TraFlow
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.methods.velocity_matching import VelocityMatching
from fewstep.methods.vsd import VSD

CALLS = (1, 4)
"""Calls of students whose settings are tuned."""
BETWEEN = (2, 8)
"""Calls that take over the settings that did best in four."""
LEVELS = Karras(tmax=500.0)
"""Noise levels that end at sigma 2.5."""


@dataclass(frozen=True)
class Point:
    """What a trial may change: learning rate, time of the first call, noise levels of a score."""

    lr: float
    start: float
    times: TimeLaw | None = None
    """In place of a method's own field `times`; None: as they are."""


class Family(NamedTuple):
    """Methods of one kind: what is tuned, and beta_1 of Adam."""

    points: tuple[Point, Point, Point]
    beta: float


SCORES = (Point(1e-3, 2.5), Point(3e-3, 2.5), Point(1e-3, 2.5, LEVELS))
ODES = (Point(1e-3, 10.0), Point(3e-3, 10.0), Point(1e-3, 2.5))
SPACES: Mapping[str, Family] = {
    "score identity": Family(SCORES, 0.0),
    "divergences": Family(SCORES, 0.0),
    "adversaries": Family((Point(1e-3, 2.5), Point(3e-3, 2.5), Point(1e-3, 10.0)), 0.0),
    "trajectories": Family(ODES, 0.9),
    "schedules": Family((Point(1e-3, 80.0), Point(1e-3, 10.0), Point(1e-3, 2.5)), 0.9),
}
"""The search space of a family. Its first point is the default, where nothing is tuned."""


class Ask(NamedTuple):
    """What a student is to be: calls a sample, time of the first one, steps of training."""

    calls: int
    start: float
    steps: int
    labels: bool = False
    """Whether samples have labels, without which there is no guidance."""

    @property
    def rho(self) -> float:
        """Spacing of the calls: closer near the data where they begin high."""
        return 2.0 if self.start < 5 else 3.0

    def few(self, noise: Literal["fresh", "ddim"] = "fresh") -> FewStep:
        """A rollout."""
        return FewStep(self.start, self.calls, noise, self.rho)

    def jumps(self) -> Jumps:
        """Jumps of a flow map at the same times."""
        return Jumps(self.start, self.calls, self.rho)

    def solver(self) -> LinearSolver:
        """A solver of the teacher with as many calls."""
        return LinearSolver(self.calls, t_init=self.start, order=min(self.calls, 3))

    def part(self, of: int) -> int:
        """A stage of training that is one of `of`."""
        return max(1, self.steps // of)


@dataclass(frozen=True)
class Entry:
    """One method as it takes part."""

    cls: type[Method]
    family: str
    make: Callable[[Ask], Method]
    calls: tuple[int, ...] = CALLS
    scenes: tuple[str, ...] = ("mixture", "digits", "mnist")

    @property
    def name(self) -> str:
        """That of its class."""
        return self.cls.__name__

    @property
    def between(self) -> tuple[int, ...]:
        """`BETWEEN` of methods that are free in their calls."""
        return BETWEEN if self.calls == CALLS else ()

    def method(self, ask: Ask, point: Point) -> Method:
        """With the noise levels of a point, where it has such a field."""
        method = self.make(ask)
        if point.times is not None and hasattr(method, "times"):
            method = replace(method, times=point.times)  # type: ignore[call-arg]
        return method


def _few(cls: Any, noise: Literal["fresh", "ddim"] = "fresh") -> Callable[[Ask], Method]:
    """`cls` whose sampler is a rollout, everything else being default."""
    return lambda ask: cls(ask.few(noise))


def _jumps(cls: Any) -> Callable[[Ask], Method]:
    """`cls` whose sampler is jumps of a flow map, everything else being default."""
    return lambda ask: cls(ask.jumps())


def _warm(cls: Any, flow_map: bool = False) -> Callable[[Ask], Method]:
    """`cls`, whose warm-up is a fifth of the steps."""
    return lambda ask: cls(ask.jumps() if flow_map else ask.few(), warmup=ask.part(5))


def _lcm(ask: Ask) -> Method:
    sampler = WithInput(ask.few(), "w", 0.0)
    return LCM(sampler) if ask.labels else LCM(sampler, kappa=(1.0, 1.0))


def _progressive(ask: Ask) -> Method:
    stages = {1: 4, 2: 3, 4: 2, 8: 1}[ask.calls]
    return ProgressiveDistillation(ask.few("ddim"), start=8, stage_steps=ask.part(stages))


def _lightning(ask: Ask) -> Method:
    stages = tuple(calls for calls in (8, 4, 2, 1) if calls >= ask.calls)
    return Lightning(ask.few("ddim"), stages=stages, stage_steps=ask.part(len(stages)))


def _flash(ask: Ask) -> Method:
    whole = FlashDiffusion(stage_steps=ask.part(4))
    if ask.calls == 4:
        return replace(whole, sampler=ask.few())
    even = (1 / ask.calls,) * ask.calls
    return replace(whole, sampler=ask.few(), shares=(even,) * 4)


def _reflow(ask: Ask) -> Method:
    half = ask.part(2)
    if ask.calls == 1:
        return Reflow(ask.few(), reflow_steps=half, distil_steps=half)
    return Reflow(ask.few("ddim"), reflow_steps=ask.steps, distil_steps=0)


def _slim_flow(ask: Ask) -> Method:
    half = ask.part(2)
    return SlimFlow(ask.few(), reflow_steps=half, anneal_steps=ask.part(3), distil_steps=half)


def _disback(ask: Ask) -> Method:
    return DisBack(ask.few(), record_steps=ask.part(45), target_steps=ask.part(9))


def _swd(ask: Ask) -> Method:
    """All calls at one size: points have no other, and the digits' network takes no other."""
    times = ask.few().ladder(VE())
    return SwD(ScaleWise(tuple(times), (1,) * ask.calls))


def _schedule(ask: Ask) -> Method:
    law = NoiseLevels(hi=ask.start)
    return OptimalSteps(Heun(law, 32, 1), ask.calls)


ENTRIES: tuple[Entry, ...] = (
    Entry(SiD, "score identity", _few(SiD)),
    Entry(SiDA, "score identity", _few(SiDA)),
    Entry(SIM, "score identity", _few(SIM)),
    Entry(DiffInstruct, "divergences", _few(DiffInstruct)),
    Entry(DMD, "divergences", _few(DMD)),
    Entry(DMD2, "divergences", _few(DMD2)),
    Entry(FDistill, "divergences", _few(FDistill)),
    Entry(UniInstruct, "divergences", _few(UniInstruct)),
    Entry(VSD, "divergences", _few(VSD)),
    Entry(DecoupledDMD, "divergences", _few(DecoupledDMD)),
    Entry(CDM, "divergences", _few(CDM, "ddim")),
    Entry(TDM, "divergences", _few(TDM, "ddim")),
    Entry(
        MomentMatching, "divergences", lambda a: MomentMatching(Ancestral(a.start, a.calls, a.rho))
    ),
    Entry(
        PhasedDMD,
        "divergences",
        lambda a: PhasedDMD(a.few("ddim"), phase_steps=a.part(2)),
        calls=(4,),
    ),
    Entry(FlashDMD, "divergences", _few(FlashDMD), calls=(4,)),
    Entry(EMD, "divergences", _few(EMD), calls=(1,)),
    Entry(DisBack, "divergences", _disback),
    Entry(SelfE, "divergences", _jumps(SelfE)),
    Entry(
        MSD,
        "divergences",
        lambda a: MSD(a.few(), score_steps=a.part(3)),
        scenes=("digits", "mnist"),
    ),
    Entry(SwD, "divergences", _swd),
    Entry(IBMD, "divergences", lambda a: IBMD(a.few(), Karras(tmax=800.0), fake=FakeScore())),
    Entry(LADD, "adversaries", _few(LADD)),
    Entry(ADD, "adversaries", _few(ADD)),
    Entry(Lightning, "adversaries", _lightning),
    Entry(FlashDiffusion, "adversaries", _flash),
    Entry(Diffusion2GAN, "adversaries", _few(Diffusion2GAN), calls=(1,)),
    Entry(ASD, "adversaries", _few(ASD), calls=(4,)),
    Entry(ProgressiveDistillation, "trajectories", _progressive),
    Entry(ConsistencyDistillation, "trajectories", _few(ConsistencyDistillation)),
    Entry(
        ConsistencyTraining,
        "trajectories",
        lambda a: ConsistencyTraining(a.few(), stage_steps=a.part(8)),
    ),
    Entry(LCM, "trajectories", _lcm),
    Entry(
        PhasedConsistency,
        "trajectories",
        lambda a: PhasedConsistency(a.few("ddim"), stage_steps=a.steps),
    ),
    Entry(TDD, "trajectories", _few(TDD, "ddim")),
    Entry(CTM, "trajectories", _jumps(CTM)),
    Entry(SCM, "trajectories", _warm(SCM)),
    Entry(TBCM, "trajectories", _warm(TBCM)),
    Entry(SCott, "trajectories", _few(SCott)),
    Entry(SLAM, "trajectories", lambda a: SLAM(WithInput(a.few(), "gamma", 1.0))),
    Entry(MeanFlow, "trajectories", _jumps(MeanFlow)),
    Entry(AYF, "trajectories", _warm(AYF, flow_map=True)),
    Entry(SCFM, "trajectories", _few(SCFM, "ddim")),
    Entry(TraFlow, "trajectories", _jumps(TraFlow)),
    Entry(SCFlow, "trajectories", _few(SCFlow)),
    Entry(VelocityMatching, "trajectories", _few(VelocityMatching)),
    Entry(BOOT, "trajectories", _jumps(BOOT), calls=(1,)),
    Entry(SFD, "trajectories", _few(SFD, "ddim")),
    Entry(ImagineFlash, "trajectories", _few(ImagineFlash)),
    Entry(Reflow, "trajectories", _reflow),
    Entry(SlimFlow, "trajectories", _slim_flow, calls=(1,)),
    Entry(PairRegression, "trajectories", _few(PairRegression, "ddim")),
    Entry(PiFlow, "trajectories", lambda a: PiFlow(FollowPolicy(a.start, a.calls, a.rho))),
    Entry(
        PDD,
        "trajectories",
        lambda a: PDD(ParallelDecoding(a.start, a.calls, rho=a.rho)),
    ),
    Entry(InvertibleConsistency, "trajectories", _jumps(InvertibleConsistency)),
    Entry(OptimalSteps, "schedules", _schedule, calls=(4,)),
    Entry(DODE, "schedules", lambda a: DODE(a.solver()), calls=(4,)),
    Entry(GAS, "schedules", lambda a: GAS(a.solver(), updates=a.steps), calls=(4,)),
    Entry(AlignYourSteps, "schedules", lambda a: AlignYourSteps(a.solver()), calls=(4,)),
)

ABSENT: Mapping[str, str] = {
    "Pretrain": "makes teachers",
    "GuidanceDistillation": "makes a teacher with half the calls, which is distilled by others",
    "JDM": "learns conditions that its teacher is not told, which distances to it do not measure",
    "DistillationDPO": "follows preferences, which distances to the teacher do not measure",
    "DMDR": "adds a reward to distillation, which distances to the teacher do not measure",
    "NCT": "gives a finished student a control, which distances to a teacher do not measure",
    "PSO": "follows a reward away from the teacher's law, which distances to it do not measure",
    "Rewarded": "adds a reward to another method, which distances to the teacher do not measure",
}
"""Methods that take no part, and why."""


def public_methods() -> list[str]:
    """The methods that the package makes public, by name."""
    found = {name: getattr(fewstep, name) for name in dir(fewstep)}
    return [
        name
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, Method) and value is not Method
    ]


def unmeasured() -> list[str]:
    """Public methods that have neither an entry nor a reason for having none."""
    named = {one.name for one in ENTRIES} | ABSENT.keys()
    return [name for name in public_methods() if name not in named]


def entry(name: str) -> Entry:
    """The entry called `name`; ValueError where there is none."""
    found = [one for one in ENTRIES if one.name == name]
    if found:
        return found[0]
    if name in ABSENT:
        raise ValueError(f"{name} takes no part: it {ABSENT[name]}")
    if name in unmeasured():
        raise ValueError(f"{name} takes no part yet: add a line to ENTRIES in {__file__}")
    known = ", ".join(one.name for one in ENTRIES)
    raise ValueError(f"{name} takes no part; there are {known}")


def points(one: Entry) -> tuple[Point, Point, Point]:
    """The three trials of tuning of an entry."""
    return SPACES[one.family].points
