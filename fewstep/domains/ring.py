"""A ring of Gaussians in the plane, whose teacher is exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.data.batches import Images, Latents
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.samplers import Heun
from fewstep.diffusion.types import Source
from fewstep.domains.domain import Domain
from fewstep.eval.domain_scores import SampleMetrics
from fewstep.teachers.gaussian import GaussianMixture


@dataclass(frozen=True)
class Ring(Domain):
    """Equal round Gaussians on a circle; exact samples serve as data."""

    count: int = 6
    """Number of Gaussians."""
    radius: float = 1.0
    """Radius of the circle, on which their means lie."""
    std: float = 0.2
    """Standard deviation of each Gaussian."""

    def mixture(self) -> GaussianMixture:
        """The distribution as an exact Gaussian mixture."""
        return GaussianMixture.ring(self.count, self.radius, self.std)

    def source(self, model: Model, data_free: bool) -> Source:
        """50,000 exact samples (2,); data-free: noise alone."""
        if model.shape != (2,) or model.classes:
            raise ValueError(
                f"points are (2,) without classes, got Model.shape {model.shape} with "
                f"{model.classes}"
            )
        return Latents((2,)) if data_free else Images(self.points(50_000, seed=1))

    def points(self, count: int, seed: int) -> Tensor:
        """Exact samples: (count, 2)."""
        return self.mixture().sample(count, torch.Generator().manual_seed(seed))

    def sample_metrics(self) -> SampleMetrics:
        """Metrics of points against 5,000 exact samples, with 5,000 others as anchor."""
        held_out = self.points(5000, seed=3)
        return SampleMetrics(
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
        """The mixture with a Heun sampler, as the exact teacher."""
        return Generator(self.mixture(), Heun(), (2,))
