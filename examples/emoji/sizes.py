"""How large everything is, and how long it trains: as published, and shrunken for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The defaults are what docs/emoji.md reports, about an hour of one core."""

    groups: tuple[str, ...] = ("Animals & Nature", "Food & Drink")
    """Unicode's groups of emoji that are learnt."""
    pictures: int = 1000
    """At most so many of them."""
    vocabulary: int = 700
    """Tokens, the bytes included."""
    tokens: int = 12
    """Length of a prompt, in tokens."""
    width: int = 64
    """Of the text encoders, and of a prompt's embedding."""
    vae_channels: tuple[int, ...] = (16, 32, 64)
    unet_channels: tuple[int, ...] = (48, 64)
    views: int = 16
    """Of each picture, flipped and shifted, that the teacher learns from."""
    contrast_steps: int = 500
    vae_steps: int = 2000
    teacher_steps: int = 14_000
    one_steps: int = 400
    four_steps: int = 1000
    study_steps: int = 80
    batch: int = 32
    repeats: int = 3
    """Pictures of each caption that are measured."""
    calls: int = 50
    """Steps of the teacher's sampler, each of two network calls."""


SMALL = Sizes(
    pictures=12,
    vocabulary=540,
    tokens=8,
    width=16,
    vae_channels=(8, 8, 8),
    unet_channels=(16, 16),
    views=2,
    contrast_steps=4,
    vae_steps=4,
    teacher_steps=4,
    one_steps=2,
    four_steps=2,
    study_steps=1,
    batch=4,
    repeats=2,
    calls=2,
)
"""Seconds; learns nothing, but every step is taken."""
