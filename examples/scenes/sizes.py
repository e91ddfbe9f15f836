"""How large everything is, and how long it trains: as published, and shrunken for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The defaults are what docs/scenes.md reports."""

    captions: int = 0
    """Of each kind so many at most; 0: all."""
    vae_channels: tuple[int, ...] = (24, 48)
    vae_steps: int = 6000
    unet_channels: tuple[int, ...] = (48, 64)
    pictures: int = 65_536
    """Drawn and encoded for the teacher; each has a caption, and is seen five times."""
    teacher_steps: int = 10_000
    judged: int = 24_576
    """Pictures that the judge learns from."""
    judge_steps: int = 1200
    student_steps: int = 0
    """Of each student; 0: what `students.STUDENTS` says."""
    student_batch: int = 16
    drawn: int = 4096
    """Pictures for the students that learn from data."""
    batch: int = 32
    samples: int = 800
    """Pictures behind a row of scores, half of captions with seen pairs, half with unseen ones."""
    reference: int = 8000
    """Real pictures that distances are taken to."""
    calls: int = 50
    """Steps of the teacher's best sampler."""


SMALL = Sizes(
    captions=16,
    vae_channels=(8, 16),
    vae_steps=4,
    pictures=64,
    unet_channels=(8, 16),
    teacher_steps=4,
    judged=64,
    judge_steps=4,
    student_steps=2,
    student_batch=4,
    drawn=16,
    batch=4,
    samples=16,
    reference=100,
    calls=6,
)
"""Seconds; learns nothing, but every step is taken."""
