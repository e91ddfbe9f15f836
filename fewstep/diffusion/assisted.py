"""Help at inference: the teacher beside its student, for a few more calls.

    Corrected    the first predictions are drawn towards the teacher's
    Handover     the teacher makes the first step, and its variety is kept
    Gated        an oracle decides which samples the teacher works over again

A sampler here asks two networks, the student and its teacher: its denoiser is an `Assisted`. What
a sampler does to the student's law is known in closed form for Gaussians, and is said where it is
no improvement by itself: each is a remedy for a fault that a student has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.noise_path import NoisePath, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, ladder_of
from fewstep.diffusion.types import Cond, Denoiser, Sampler, State, select_rows


class Assisted(nn.Module):
    """A student that is called as itself, with its teacher beside it.

    Args:
        student: a `Denoiser` and `nn.Module`.
        teacher: another on the same path, or guided (`fewstep.diffusion.guidance.AtScale`).

    Raises ValueError where their noise paths differ: what the one leaves would not be what the
    other takes.
    """

    student: Any
    teacher: Any

    def __init__(self, student: Any, teacher: Any) -> None:
        super().__init__()
        if student.path != teacher.path:
            raise ValueError(
                f"the teacher is on another noise path, {teacher.path}, than its student, "
                f"{student.path}: neither can go on from the other's states"
            )
        self.student, self.teacher, self.path = student, teacher, student.path

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None, **named: Tensor) -> Tensor:
        """The student's prediction: xt (B, *), t (B,) or () -> (B, *)."""
        out: Tensor = self.student(xt, t, cond, **named)
        return out


def teacher_of(sampler: Sampler, denoiser: Any) -> Denoiser:
    """The teacher beside a denoiser; ValueError where there is none."""
    if not isinstance(denoiser, Assisted):
        raise ValueError(
            f"{type(sampler).__name__} asks the student's teacher too: sample "
            "Assisted(student, teacher), or pass --teacher"
        )
    teacher: Denoiser = denoiser.teacher
    return teacher


class _Pulled:
    """A student whose first predictions are drawn towards the teacher's."""

    def __init__(
        self, both: Any, teacher: Denoiser, mine: Corrected, ladder: list[float], draws: Draws
    ) -> None:
        self.both, self.teacher, self.mine, self.path = both, teacher, mine, both.path
        self.ladder, self.draws, self.made = ladder, draws, 0

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond = None, **named: Tensor) -> Tensor:
        x: Tensor = self.both(xt, t, cond, **named)
        self.made += 1
        if self.made > self.mine.calls_corrected:
            return x
        s = x.new_full((len(x),), self.ladder[self.made])
        eps = self.draws.normal(f"corrected{self.made}", x.shape[1:]).to(x)
        told = self.teacher(perturb(self.path, x, eps, s), s, cond)
        return x + self.mine.strength * (told - x)


@dataclass(frozen=True)
class Corrected(Sampler):
    """Distillation++: x <- (1 - lam) x + lam f(alpha_s x + sigma_s eps, s) after the first calls.

    Attributes:
        strength: lam, how far predictions move to the teacher's: from 0, not at all, to 1.
        calls_corrected: how many of the calls, from the first on; each asks the teacher once.
        sampler: how the student samples.

    f is the teacher, s the time of the student's next call, eps fresh noise. On Gaussians of
    variance V, with k = alpha_s^2 V / (alpha_s^2 V + sigma_s^2), the error of the mean is
    multiplied by 1 - lam (1 - k), and a variance v becomes (1 - lam (1 - k))^2 v + (lam k sigma_s
    / alpha_s)^2. That of an exact student shrinks by 1 - lam (2 - lam)(1 - k): it sharpens, and is
    for students that are too coarse. Park et al. 2024, https://arxiv.org/abs/2412.08871.

    Raises ValueError for values out of range, for samplers without a ladder of times, and in a
    call without a teacher or draws.
    """

    strength: float = 0.4
    calls_corrected: int = 1
    sampler: Sampler = FewStep(steps=2)

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1 or not 1 <= self.calls_corrected < self.sampler.calls:
            raise ValueError(
                "Corrected needs a strength from 0 to 1, and corrects 1 or more calls but not the "
                f"last: the student makes {self.sampler.calls}; got {self.strength:g} and "
                f"{self.calls_corrected}"
            )

    @property
    def calls(self) -> int:
        """The student's, and one of the teacher for each that is corrected."""
        return self.sampler.calls + self.calls_corrected

    @property
    def trainable(self) -> bool:
        """False: it is a help at inference."""
        return False

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """The states of the student's sampler, with corrected predictions."""
        teacher = teacher_of(self, denoiser)
        ladder = ladder_of(self.sampler, denoiser.path)
        if ladder is None or draws is None:
            what = "draws" if ladder else f"a sampler with a ladder of times, not {self.sampler}"
            raise ValueError(f"Corrected needs {what}")
        pulled = _Pulled(denoiser, teacher, self, ladder, draws)
        return self.sampler.states(pulled, z, cond, draws)


@dataclass(frozen=True)
class Handover(Sampler):
    """The teacher from noise to the student's second time, and the student from there.

    Attributes:
        steps: of the teacher, by DPM-Solver++(2M) on times even in the noise share.
        at: which of the student's calls is its first, counted from 0.
        t_init: where the teacher starts; None: at the largest time of the path.
        sampler: how the student samples, a `FewStep` whose noise is not "fixed".

    Variety is lost in a student's first call, which answers noise with one guess: on Gaussians of
    variance V a guess that is the mean leaves V sigma_2^2 / (V + sigma_2^2) of it at the end, and
    the handover V. It is exact where the student is exact from its second time on. Gandikota & Bau
    2025, https://arxiv.org/abs/2503.10637, whose teacher goes to its own time nearest to the
    student's; here its last step ends there.

    Raises ValueError for values out of range, and in a call without a teacher.
    """

    steps: int = 5
    at: int = 1
    t_init: float | None = None
    sampler: Sampler = FewStep(steps=2)

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, FewStep) or self.sampler.noise == "fixed":
            raise ValueError(
                "Handover goes on with a FewStep of fresh or 'ddim' noise, which it can start in "
                f"its middle; the student is sampled by {self.sampler}"
            )
        if self.steps < 1 or not 1 <= self.at < self.sampler.steps:
            raise ValueError(
                "Handover needs steps of 1 or more, and at from 1 to the student's last call, "
                f"{self.sampler.steps - 1}; got {self.steps} and {self.at}"
            )

    @property
    def calls(self) -> int:
        """The teacher's steps and the student's remaining calls."""
        return self.steps + self.sampler.calls - self.at

    @property
    def trainable(self) -> bool:
        """False: it is a help at inference."""
        return False

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """The teacher's states, then the student's."""
        teacher, path = teacher_of(self, denoiser), denoiser.path
        assert isinstance(self.sampler, FewStep)
        ladder = self.sampler.ladder(path)
        solver = down_to(path, ladder[self.at], self.steps, self.t_init)
        x = z
        for state in islice(solver.states(teacher, z, cond), self.steps):
            yield state
            x = state.xs
        rest = replace(
            self.sampler, t_init=ladder[self.at], steps=1, rho=1.0, times=tuple(ladder[self.at :])
        )
        noise = x / path.sigma(x.new_tensor(ladder[self.at]))
        yield from replace(rest, unit=False).states(denoiser, noise, cond, draws)


def down_to(path: NoisePath, end: float, steps: int, t_init: float | None = None) -> LinearSolver:
    """DPM-Solver++(2M) whose first `steps` steps lead from t_init to `end`.

    On times even in the noise share sigma / (alpha + sigma). ValueError where t_init is below.
    """
    top = path.t_max if t_init is None else t_init
    if not top > end:
        raise ValueError(f"the teacher starts above the time it ends at, {end:g}; got {top:g}")
    shares = path.flow_time(torch.tensor([top, end], dtype=torch.float64))
    parts = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:-1]
    inner = path.time_of(shares[0] + (shares[1] - shares[0]) * parts).tolist()
    return LinearSolver(times=(top, *inner, end), order=2)


class Oracle(ABC):
    """What tells good samples from poor ones, without a person.

    A frozen dataclass; one of your own has a file of its own (`my_file.py:Name(...)`).
    """

    @property
    def calls(self) -> int:
        """Network calls a sample."""
        return 0

    @abstractmethod
    def __call__(self, both: Assisted, x: Tensor, cond: Cond, draws: Draws) -> Tensor:
        """Scores (B,) of samples x (B, *), higher for better ones; a sample's is its own."""


@dataclass(frozen=True)
class Agreement(Oracle):
    """How little the teacher would change: -|f(x_t, t) - x|^2, the mean over dimensions.

    Attributes:
        level: noise level sigma / alpha of the time t, which samples are noised to.

    Its mean over a law is smallest for samples that the teacher finds likely; it knows nothing of
    prompts. A reward model is the published oracle.
    """

    level: float = 0.5

    @property
    def calls(self) -> int:
        """One, of the teacher."""
        return 1

    def __call__(self, both: Assisted, x: Tensor, cond: Cond, draws: Draws) -> Tensor:
        """(B,): of the noise "agreement"."""
        share = torch.tensor(self.level / (1 + self.level), dtype=torch.float64)
        t = x.new_full((len(x),), float(both.path.time_of(share)))
        xt = perturb(both.path, x, draws.normal("agreement", x.shape[1:]).to(x), t)
        apart: Tensor = both.teacher(xt, t, cond) - x
        return -(apart**2).flatten(1).mean(1)


@dataclass(frozen=True)
class Gated(Sampler):
    """Adaptive teacher and student: samples that score below a threshold are worked over.

    Attributes:
        threshold: score below which a sample is worked over; None: `calibrated` is to find it for
            a share of samples.
        level: noise level sigma / alpha that poor samples are noised to, above 0.
        steps: of the teacher from there, by DPM-Solver++(2M).
        oracle: what scores the samples.
        sampler: how the student samples.

    On Gaussians of variance V, with v that of the student's samples and s = level, an exact
    teacher's work multiplies the error of the mean by (V / (V + s^2))^(1/2) and makes the variance
    V (v + s^2) / (V + s^2): it draws any law towards the teacher's and keeps that. Starodubcev et
    al. 2023, https://arxiv.org/abs/2312.10835, who refine half of the samples, from 0.4 of the
    noise.

    A gate changes the law of what comes out: evaluate with it. All samples of a batch are computed
    together, poor ones with the teacher. Raises ValueError for values out of range, and in a call
    without a teacher or draws.
    """

    threshold: float | None = None
    level: float = 0.7
    steps: int = 4
    oracle: Oracle = Agreement()
    sampler: Sampler = FewStep()

    def __post_init__(self) -> None:
        if self.level <= 0 or self.steps < 1:
            raise ValueError(
                "Gated needs a level above 0 and steps of 1 or more, got "
                f"{self.level:g} and {self.steps}"
            )

    @property
    def calls(self) -> int:
        """At most: the student's, the oracle's, and the teacher's for poor samples."""
        return self.sampler.calls + self.oracle.calls + self.steps

    @property
    def trainable(self) -> bool:
        """False: it is a help at inference."""
        return False

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """The student's states, and one more that holds what is kept and what is refined."""
        if self.threshold is None:
            raise ValueError("Gated needs a threshold: give one, or find it by Gated.calibrated")
        scores, states = self.scored(denoiser, z, cond, draws)
        yield from states[:-1]
        last = states[-1]
        poor = scores < self.threshold
        x, t = last.x0, self.time(denoiser.path)
        assert draws is not None
        noise = draws.normal("refined", x.shape[1:]).to(x)
        xt = perturb(denoiser.path, x, noise, x.new_tensor(t))
        out = x
        if bool(poor.any()):
            rows = poor.nonzero()[:, 0]
            made = self.refined(denoiser, xt[rows], select_rows(cond, rows))
            out = x.index_copy(0, rows, made)
        yield replace(last, step=lambda _: xt, s=torch.full_like(last.t, t))
        again = torch.full_like(last.t, t)
        yield State(last.path, again, torch.zeros_like(again), xt, out, lambda state: state.x0)

    def time(self, path: NoisePath) -> float:
        """The time that poor samples are noised to."""
        share = torch.tensor(self.level / (1 + self.level), dtype=torch.float64)
        return float(path.time_of(share))

    def refined(self, denoiser: Denoiser, xt: Tensor, cond: Cond) -> Tensor:
        """What the teacher makes of noised samples x_t (B, *)."""
        path, t = denoiser.path, self.time(denoiser.path)
        solver = LinearSolver(self.steps, t, shift=1.0, order=2)
        return solver(teacher_of(self, denoiser), xt / path.sigma(xt.new_tensor(t)), cond)

    def scored(
        self, denoiser: Any, z: Tensor, cond: Cond, draws: Draws | None
    ) -> tuple[Tensor, list[State]]:
        """The oracle's scores (B,) of the student's samples, and the states that made these."""
        teacher_of(self, denoiser)
        if draws is None:
            raise ValueError("Gated draws noise of its own: pass draws")
        states = list(self.sampler.states(denoiser, z, cond, draws))
        return self.oracle(denoiser, states[-1].x0, cond, draws), states

    def calibrated(
        self, denoiser: Any, z: Tensor, cond: Cond, draws: Draws, share: float = 0.5
    ) -> Gated:
        """The same with the threshold below which a share of these samples lies.

        z: (B, *), noise of samples for this alone. ValueError for a share outside of 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"the share of refined samples is from 0 to 1, got {share:g}")
        scores, _ = self.scored(denoiser, z, cond, draws)
        return replace(self, threshold=float(scores.double().quantile(share)))
