"""Which prompt is made with which seed.

turn     seed i gets prompt i; the shorter of the two lists of prompts and seeds decides what
         happens: prompts are taken in turn, or those without a seed are left out
every    every prompt is made with every seed: a row of the grid a prompt, a column a seed
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fewstep.data.prompts import read_prompts

Pairing = Literal["turn", "every"]
PAIRINGS = get_args(Pairing)
FILES = (".txt", ".jsonl", ".csv", ".parquet")
"""What a file of prompts ends in."""
MOST = 1_000_000
"""Numbers of a flag, and pictures of a command."""
SHOWN = 3
"""Pairs that are told."""


def numbers(text: str, what: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    out: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"{what} are written like 0-63 or 3,7,9, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= 2**63:
            raise ValueError(f"{what} end at 2^63 - 1, got {last}")
        if len(out) + last - first >= MOST:
            raise ValueError(f"{what}: more than a million numbers in {text!r}")
        out += range(first, last + 1)
    return out


def texts_of(prompts: str) -> list[str]:
    """The prompts in a file of them, or the text itself."""
    return read_prompts(prompts) if Path(prompts).suffix in FILES else [prompts]


@dataclass(frozen=True)
class Pairs:
    """N pictures: the prompt and the seed of each."""

    texts: Sequence[str]
    seeds: Sequence[int]
    columns: int | None
    """Columns of their grid; None: as many as make it square."""
    told: str
    """Which prompt goes with which seed, and what is left out, as a sentence."""


def paired(prompts: str, seeds: Sequence[int], pairing: Pairing = "turn") -> Pairs:
    """Pair the prompts of a file, or one text, with seeds.

    ValueError where every prompt with every seed is too many pictures.
    """
    texts = texts_of(prompts)
    if pairing == "every":
        return _every(texts, seeds)
    chosen = [texts[i % len(texts)] for i in range(len(seeds))]
    pairs = [f"seed {seed}: {text[:40]!r}" for seed, text in zip(seeds, chosen, strict=True)]
    more = ", ..." if len(pairs) > SHOWN else ""
    told = f"prompts and seeds are paired in order ({', '.join(pairs[:SHOWN])}{more})"
    total = len(texts)
    if total > len(seeds):
        left = total - len(seeds)
        told += f"; the last {left:,} of {total:,} prompts have no seed and get no picture"
    elif 1 < total < len(seeds):
        told += f"; the {total:,} prompts are taken in turn for {len(seeds):,} seeds"
    if total > 1 and len(seeds) > 1:
        told += "; --pairing every makes every prompt with every seed"
    return Pairs(chosen, list(seeds), None, told)


def _every(texts: Sequence[str], seeds: Sequence[int]) -> Pairs:
    count = len(texts) * len(seeds)
    if count > MOST:
        raise ValueError(
            f"{len(texts):,} prompts with {len(seeds):,} seeds each are {count:,} pictures, more "
            "than a million; ask for fewer"
        )
    told = (
        f"each of {len(texts):,} prompts is made with each of {len(seeds):,} seeds: {count:,} "
        "pictures, a row of a grid for a prompt, a column for a seed"
    )
    both = [(text, seed) for text in texts for seed in seeds]
    return Pairs([text for text, _ in both], [seed for _, seed in both], len(seeds), told)
