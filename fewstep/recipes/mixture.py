"""Points in the plane: a ring of Gaussians whose teacher is exact, for experiments in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core import Source
from fewstep.data.source import Images, Latents
from fewstep.ema import EMA
from fewstep.eval.evaluate import Yardstick
from fewstep.fake_score import FakeScore
from fewstep.generator import Generator
from fewstep.losses.weight import EDMWeight
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sid import SiD
from fewstep.model import Model
from fewstep.nets.mlp import MLP
from fewstep.optim import Optim
from fewstep.recipes.run import Domain, Run
from fewstep.sample import FewStep, Heun
from fewstep.teachers.gaussian import GaussianMixture


@dataclass(frozen=True)
class Ring(Domain):
    """Equal round Gaussians on a circle; exact samples serve as data."""

    count: int = 6
    radius: float = 1.0
    std: float = 0.2

    def mixture(self) -> GaussianMixture:
        """The distribution itself."""
        return GaussianMixture.ring(self.count, self.radius, self.std)

    def source(self, model: Model, data_free: bool) -> Source:
        if model.shape != (2,) or model.classes:
            raise ValueError(
                f"points are (2,) without classes, got Model.shape {model.shape} with "
                f"{model.classes}"
            )
        return Latents((2,)) if data_free else Images(self.points(50_000, seed=1))

    def points(self, count: int, seed: int) -> Tensor:
        """Exact samples: (count, 2)."""
        return self.mixture().sample(count, torch.Generator().manual_seed(seed))

    def yardstick(self) -> Yardstick:
        held_out = self.points(5000, seed=3)
        return Yardstick(
            "fd_points",
            self.points(5000, seed=2),
            held_out,
            self.component(held_out),
            lambda x: (x, self.component(x)),
            limit=float("inf"),
        )

    def component(self, x: Tensor) -> Tensor:
        """The nearest component of each point: (N, 2) -> (N,)."""
        return torch.cdist(x, self.mixture().means).argmin(1)

    def exact(self) -> Generator:
        return Generator(self.mixture(), Heun(), (2,))


MODEL = Model(MLP(width=128, blocks=2), (2,), sigma_data=0.7)


def mixture_teacher() -> Run:
    """Fit a network to the ring, for `distill mixture --init` to start from (seconds)."""
    return Run(
        method=Pretrain(weight=EDMWeight(0.7)),
        model=MODEL,
        domain=Ring(),
        steps=800,
        batch=256,
        optim=Optim(lr=2e-3, betas=(0.9, 0.99), decay="cosine"),
        ema=EMA(halflife=10_000),
    )


def mixture() -> Run:
    """Distil an exact ring of six Gaussians to one step with SiD (seconds).

    The teacher is exact. Pass --init with a run of mixture_teacher: a student that starts from
    random weights stays on a smeared ring.
    """
    return Run(
        method=SiD(sampler=FewStep(2.5), alpha=1.0, fake=FakeScore(weight=EDMWeight(0.7))),
        model=MODEL,
        domain=Ring(),
        steps=800,
        batch=256,
        optim=Optim(lr=1e-3, betas=(0.0, 0.99), warmup=50, decay="linear"),
        ema=EMA(halflife=10_000),
    )
