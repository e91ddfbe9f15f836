"""The students: what is asked of `fewstep distill t2i` for each, from captions alone."""

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


def sid(sampler: str, guidance: str) -> str:
    """SiD in the recipe's setting but for these."""
    return (
        f"SiD({sampler}, 1.0, {TIMES}, fake=FakeScore({TIMES}, Power(2, -2)), guidance={guidance})"
    )


RATE = 3e-4
FOUR = "FewStep(999, 4, unit=True)"
STUDENTS = {
    "lsg": Student("SiD with LSG(2), 4 steps", 4, sid(FOUR, "LSG(2.0)"), 900),
    "one": Student("SiD with LSG(2), 1 step", 1, sid("FewStep(625)", "LSG(2.0)"), 900),
}
"""Name of the run's folder -> settings, in the order in which they are trained."""


def flags(student: Student, sizes: Sizes) -> Sequence[str]:
    """Of the command, but for teacher, prompts and folder."""
    return (
        *("--method", student.method, "--steps", str(sizes.student_steps or student.steps)),
        *("--batch", str(sizes.student_batch), "--accumulate", "1"),
        *("--optim", f"Optim({RATE}, (0.0, 0.99), warmup=20, decay='linear')"),
        *("--ema.halflife", str(20 * sizes.student_batch)),
        *("--sample-every", "100000", "--save-every", "150"),
    )
