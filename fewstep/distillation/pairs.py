"""Pairs (noise, the teacher's sample from it), as further tensors of a batch.

A deterministic teacher maps noise to pictures; some methods regress on that map, or learn from
its ends alone. The samples are made once. Their noise and conditions are never stored: those of
pair i are what the run's own source gives for number i of a seed of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise_path import expand, perturb
from fewstep.diffusion.pixels import finite
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch, Cond, Sampler, Source
from fewstep.losses.score import denoising

PREFIX = "pairs/"
"""Of the purposes of their random numbers."""


@dataclass(frozen=True)
class Pairs:
    """Which pairs of the teacher a method learns from.

    Attributes:
        count: the number of pairs.
        sampler: how the teacher is sampled; None: by its own sampler.
        seed: the key of their noise and conditions.

    ValueError where count is below 1.
    """

    count: int = 4096
    sampler: Sampler | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"Pairs.count is 1 or more, got {self.count}")

    def draws(self, index: Tensor) -> Draws:
        """The random numbers of the pairs `index` (N,)."""
        return Draws(index, self.seed, PREFIX)

    @torch.no_grad()
    def samples(self, teacher: Generator, source: Source, index: Tensor) -> Tensor:
        """The teacher's samples of the pairs `index` (N,): (N, *).

        Raises `NotFinite` (a ValueError) where one is not finite.
        """
        draws = self.draws(index.to(teacher.device))
        batch = source(draws)
        sampler = self.sampler or teacher.sampler
        return finite(sampler(teacher.denoiser, batch.z, batch.cond, draws))


class Pair(NamedTuple):
    """Noise z (B, *), the teacher's samples x0 (B, *), and the conditions of both."""

    z: Tensor
    x0: Tensor
    cond: Cond


@dataclass(frozen=True, eq=False)
class PairSource:
    """`source`, whose batches also carry pairs, drawn uniformly: see `pair_of`.

    table: (count, *), the teacher's samples, which stay where they are.
    """

    source: Source
    pairs: Pairs
    table: Tensor

    def __call__(self, draws: Draws) -> Batch:
        batch = self.source(draws)
        index = draws.integers("pair", len(self.table))
        there = self.source(self.pairs.draws(index))
        more = {"pair_z": there.z, "pair_x0": self.table[index.to(self.table.device)].to(there.z)}
        if isinstance(there.cond, Mapping):
            more |= {f"pair_cond/{name}": value for name, value in there.cond.items()}
        elif there.cond is not None:
            more["pair_cond"] = there.cond
        return batch._replace(more={**batch.more, **more})

    def __getattr__(self, name: str) -> object:
        """Whatever else the source has, such as the conditions that samples get by default."""
        if name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)


def make_pairs(pairs: Pairs, teacher: Generator, source: Source, batch: int = 256) -> PairSource:
    """`source` with pairs of the teacher, all of them made now.

    Args:
        pairs: which pairs.
        teacher: a deterministic generator.
        source: gives their noise and conditions, and the batches that they are added to.
        batch: samples made together.
    """
    parts = torch.arange(pairs.count).split(batch)
    table = torch.cat([pairs.samples(teacher, source, part).cpu() for part in parts])
    return PairSource(source, pairs, table)


def pair_of(method: object, batch: Batch) -> Pair:
    """The pairs in a batch; ValueError where it has none."""
    if "pair_z" not in batch.more:
        raise ValueError(
            f"{type(method).__name__} needs pairs of noise and the teacher's samples, but "
            "Batch.more has none; make a source of them with make_pairs(...)"
        )
    more = batch.more
    parts = {k.partition("/")[2]: v for k, v in more.items() if k.startswith("pair_cond/")}
    return Pair(more["pair_z"], more["pair_x0"], parts or more.get("pair_cond"))


def line_loss(student: Any, pair: Pair, tau: Tensor) -> Tensor:
    """|v - (z - y)|^2, v the student's velocity on the straight line from y to z: (B,).

    At the flow time tau (B,) of its path, as a denoising of y: see `fewstep.methods.reflow`.
    """
    path = student.path
    t = path.time_of(tau.to(pair.x0))
    xt = perturb(path, pair.x0, pair.z, t)
    at: Tensor = expand(path.flow_time(t), xt)
    return denoising(student(xt, t, pair.cond), pair.x0, at**-2)
