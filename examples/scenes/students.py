"""The students: what is asked of `fewstep distill t2i` for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from examples.scenes.sizes import Sizes

TIMES = "Whole(20, 979)"


@dataclass(frozen=True)
class Student:
    """A method, and how the run differs from the recipe."""

    title: str
    calls: int
    method: str
    steps: int
    rate: float = 3e-4
    beta: float = 0.0
    """Adam's first."""
    pictures: bool = False
    """Whether it learns from drawn pictures with captions, and not from captions alone."""
    after: str = ""
    """The student whose network it starts with; "": the teacher's."""
    extra: bool = False
    """Trained by --only alone, for comparison."""


def sid(sampler: str, guidance: str) -> str:
    """SiD in the recipe's setting but for these."""
    return (
        f"SiD({sampler}, 1.0, {TIMES}, fake=FakeScore({TIMES}, Power(2, -2)), guidance={guidance})"
    )


FINE = "Discrete((2, 5, 9, 14, 20, 30, 45, 65, 90, 130, 180, 250, 340, 450, 600, 780))"
"""Denser near the data than `TIMES`: speckle is told from pictures there alone."""


def phased(calls: int, steps: int) -> str:
    """Phased consistency along the teacher's guided flow, `steps` of DDIM in a phase."""
    sampler = f"FewStep(999, {calls}, 'ddim', unit=True)"
    return f"PhasedConsistency({sampler}, steps={steps}, decay=0.9, kappa=2.0)"


def shorter(title: str, calls: int) -> Student:
    """Phased consistency in fewer calls, from the four-step student."""
    method = phased(calls, 32 // calls)
    return Student(title, calls, method, 250, 1e-3, 0.9, pictures=True, after="four", extra=True)


STUDENTS = {
    "four": Student("PhasedConsistency, 4 steps", 4, phased(4, 8), 800, 1e-3, 0.9, pictures=True),
    "one": Student("SiD with LSG(2), 1 step", 1, sid("FewStep(625)", "LSG(2.0)"), 900),
    "two": shorter("PhasedConsistency, 2 steps", 2),
    "jump": shorter("PhasedConsistency, 1 step", 1),
    "instruct": Student(
        "Diff-Instruct, 1 step",
        1,
        f"DiffInstruct(FewStep(999, unit=True), {FINE}, L1(), FakeScore({FINE}, Power(2, -2)), "
        "guidance=Kappas(real=2.0))",
        380,
        after="jump",
        extra=True,
    ),
    "lsg-four": Student(
        "SiD with LSG(2), 4 steps",
        4,
        sid("FewStep(999, 4, unit=True)", "LSG(2.0)"),
        900,
        extra=True,
    ),
}
"""Name of the run's folder -> settings, in the order in which they are trained."""


def flags(student: Student, sizes: Sizes) -> Sequence[str]:
    """Of the command, but for teacher, data and folder."""
    optim = f"Optim({student.rate}, ({student.beta}, 0.99), warmup=20, decay='linear')"
    return (
        *("--method", student.method, "--steps", str(sizes.student_steps or student.steps)),
        *("--batch", str(sizes.student_batch), "--accumulate", "1"),
        *("--optim", optim),
        *("--ema.halflife", str(20 * sizes.student_batch)),
        *("--sample-every", "100000", "--save-every", "150"),
    )
