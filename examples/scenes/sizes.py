"""How large everything is, and how long it trains: as published, and shrunken for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The defaults are what docs/scenes.md reports."""

    captions: int = 0
    """Of each kind so many at most; 0: all."""
    vae_channels: tuple[int, ...] = (24, 48)
    vae_steps: int = 2000
    unet_channels: tuple[int, ...] = (48, 64)
    pictures: int = 65_536
    """Drawn and encoded for the teacher; each has a caption and is seen four or five times."""
    teacher_steps: int = 9000
    judge_steps: int = 4000
    student_steps: int = 600
    batch: int = 32
    samples: int = 1000
    """Pictures behind a row of scores, half of captions with seen pairs, half with unseen ones."""
    reference: int = 8000
    """Real pictures that distances are taken to."""
    calls: int = 50
    """Steps of the teacher's best sampler."""
