"""What everybody is compared on: a teacher, and how samples are measured.

The mixture is known exactly, so its distance has no reference samples: the energy distance

    2 E|x - y| - E|x - x'| - E|y - y'|,   x, x' samples, y, y' of the mixture,

is zero for equal laws alone. In the plane |v| is pi / 2 times the mean of |v . u| over directions
u, and on a line E|x - y| of a Gaussian mixture is elementary, so that the expectations over y are
exact; those over x are without bias, so that exact samples have a distance of zero in the mean.

MNIST is of the user's own copy, whose path is in the environment variable FEWSTEP_MNIST.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batches import Images, Latents
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.time_distributions import LogNormal
from fewstep.diffusion.types import Source
from fewstep.domains.digits import Digits
from fewstep.domains.domain import Domain
from fewstep.domains.mnist import Mnist
from fewstep.eval.domain_scores import SampleMetrics, score
from fewstep.methods.pretrain import Pretrain
from fewstep.nets.mlp import MLP
from fewstep.recipes.digits import digits_teacher
from fewstep.recipes.mnist import MODEL as CONVOLUTIONS
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.runner import execute
from fewstep.storage.model_folder import load_student, save_student
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "benchmarks" / "assets"
"""Where teachers are kept: trained on another machine they are not the same bits."""
TEST, VALIDATION, LOOKS = 0, 1_000_000, 2_000_000
"""First seed of the noise that is reported, that settings are chosen on, and that curves show."""
Scores = dict[str, float]


@dataclass(frozen=True, eq=False)
class Scene:
    """A teacher's problem.

    Attributes:
        name: of the scene.
        model: the network of teacher and student.
        distance: name of the score that ranks; less is better.
        diversity: name of the score of diversity; more is better.
        budget: forward passes of one sample that a student may cost.
        batch: samples an update.
        samples: that a finished student is measured by, on each draw of noise.
        looked: samples of a look while training.
        home: folder of the teacher.
        teach: makes the teacher in it.
        data: source with data.
        measure: samples, labels -> scores.
        labels: whether samples have any.
    """

    name: str
    model: Model
    distance: str
    diversity: str
    budget: int
    batch: int
    samples: int
    looked: int
    home: Path
    teach: Callable[[Path], None]
    data: Callable[[Model], Source]
    measure: Callable[[Tensor, Tensor | None], Scores]
    labels: bool = False

    @cached_property
    def teacher(self) -> Generator:
        """The teacher, trained at first use."""
        if not self._finished():
            self.teach(self.home)
        return load_student(self.home)

    def _finished(self) -> bool:
        return RunFolder(self.home).finished or (self.home / "manifest.json").is_file()

    @cached_property
    def teacher_digest(self) -> str:
        """SHA-256 of the teacher's weights, the first 16 digits."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.teacher.denoiser.state_dict().items()):
            total.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return total.hexdigest()[:16]

    def source(self, needs_data: bool) -> Source:
        """Batches with data, or of noise and labels alone."""
        if needs_data:
            return self.data(self.model)
        return Latents(self.model.shape, self.model.classes)

    def scores(self, generator: Generator, first: int, count: int = 0) -> Scores:
        """Scores of the samples of seeds first, first + 1, ...; ValueError if not finite."""
        seeds = range(first, first + (count or self.samples))
        labels = torch.tensor(list(seeds)) % generator.classes if generator.classes else None
        return self.measure(generator.sample(seeds), labels)


MIXTURE = GaussianMixture(
    [[1.2, 0.2], [-1.0, 0.8], [0.1, -1.2], [-0.9, -0.6], [0.3, 0.9]],
    [[0.02, 0.06], [0.05, 0.01], [0.01, 0.01], [0.06, 0.06], [0.01, 0.04]],
    [0.3, 0.2, 0.25, 0.15, 0.1],
)
"""Five unequal Gaussians in the plane."""
NETWORK = Model(MLP(width=64, blocks=2), (2,), sigma_data=0.85)
"""Of the mixture's teacher."""
DIRECTIONS = 48


def _absolute(d: Tensor, s: Tensor) -> Tensor:
    """E|d + s n| for a standard normal n."""
    u = d / s
    return s * math.sqrt(2 / math.pi) * torch.exp(-u * u / 2) + d * torch.erf(u / math.sqrt(2))


def energy(x: Tensor, law: GaussianMixture) -> Scores:
    """`distance` of samples x (N, 2), and their `spread`: E|x - x'| as a share of E|y - y'|."""
    x = x.double()
    angle = torch.arange(DIRECTIONS) * (math.pi / DIRECTIONS)
    u = torch.stack([angle.cos(), angle.sin()]).double()
    basis, weight = law.basis.double(), law.log_weights.double().exp()
    cov = basis @ torch.diag_embed(law.variances.double()) @ basis.mT
    mean = law.means.double() @ u
    std = torch.einsum("dk,cde,ek->ck", u, cov, u).sqrt()
    along = (x @ u).sort(0).values
    parts = [w * _absolute(along - m, s).mean() for w, m, s in zip(weight, mean, std, strict=True)]
    between = _absolute(mean[:, None] - mean, (std[:, None] ** 2 + std**2).sqrt()).mean(-1)
    yy = (weight[:, None] * weight * between).sum()
    n = len(x)
    rank = 2 * torch.arange(n).double() - n + 1
    xx = 2 * (rank[:, None] * along).sum(0).mean() / (n * (n - 1))
    xy = torch.stack(parts).sum()
    return {"distance": math.pi / 2 * float(2 * xy - xx - yy), "spread": float(xx / yy)}


def least_mode(x: Tensor, law: GaussianMixture) -> float:
    """The share of the component that has too few samples most, over its weight: 1 is right."""
    labels = range(len(law.means))
    now = torch.tensor(0.0)
    each = [law.log_prob(x, now, torch.full((len(x),), k)) + law.log_weights[k] for k in labels]
    nearest = torch.stack(each).argmax(0)
    share = torch.bincount(nearest, minlength=len(law.means)) / len(x)
    return float((share / law.log_weights.exp()).min())


def of_points(x: Tensor, _: Tensor | None) -> Scores:
    """Scores of samples of the mixture."""
    return {**energy(x, MIXTURE), "least_mode": least_mode(x, MIXTURE)}


def points(_: Model) -> Images:
    """50,000 exact samples as data."""
    return Images(MIXTURE.sample(50_000, torch.Generator().manual_seed(1)))


def teach_points(home: Path) -> None:
    """A network fitted to the mixture's samples, in seconds."""
    model, method = NETWORK, Pretrain(times=LogNormal(-0.8, 1.4))
    optim = Optim(4e-3, (0.9, 0.99), decay="cosine")
    settings: Any = {"batch": 256, "steps": 2000, "optim": optim, "ema": EMA(20_000)}
    *_, last = train(method, None, model.build(), points(model), **settings)
    save_student(home, last.state.average, model, method, {})


def teach_digits(home: Path) -> None:
    """The recipe's teacher, with a tenth of its labels dropped so that it can be guided."""
    for _ in execute(
        replace(digits_teacher(), domain=Digits(drop=0.1)), home, recipe="digits_teacher"
    ):
        pass


def of_pictures(domain: Domain, x: Tensor, labels: Tensor | None) -> Scores:
    """Scores of a domain's samples: Frechet distance in its features, recall, ..."""
    metrics = _metrics(domain)
    found = score(x, labels, metrics)
    return {name: found[name] for name in (metrics.distance, "precision", "recall", "accuracy")}


@cache
def _metrics(domain: Domain) -> SampleMetrics:
    return domain.sample_metrics()


def pictures(domain: Domain, distance: str, **more: Any) -> Scene:
    """A scene of labelled pictures; more: the fields of `Scene` that are its own."""
    return Scene(
        distance=distance,
        diversity="recall",
        samples=2_000,
        data=lambda model: domain.source(model, False),
        measure=partial(of_pictures, domain),
        labels=True,
        **more,
    )


def teach_mnist(home: Path) -> None:
    """It is with the benchmarks."""
    raise ValueError(f"{home} is missing; it is a part of the repository")


def scene(name: str) -> Scene:
    """The scene called `name`; ValueError where there is none."""
    if name == "mixture":
        return Scene(
            name=name,
            model=NETWORK,
            distance="distance",
            diversity="spread",
            budget=300_000,
            batch=128,
            samples=10_000,
            looked=5_000,
            home=ASSETS / "mixture_teacher",
            teach=teach_points,
            data=points,
            measure=of_points,
        )
    if name == "digits":
        return pictures(
            Digits(),
            "fd_digits",
            name=name,
            model=digits_teacher().model,
            budget=300_000,
            batch=128,
            looked=1_000,
            home=ASSETS / "digits_teacher",
            teach=teach_digits,
        )
    if name == "mnist":
        return pictures(
            Mnist(),
            "fd_mnist",
            name=name,
            model=CONVOLUTIONS,
            budget=200_000,
            batch=64,
            looked=500,
            home=ASSETS / "mnist_teacher",
            teach=teach_mnist,
        )
    raise ValueError(f"there is no scene {name!r}; there are {', '.join(NAMES)}")


NAMES: Sequence[str] = ("mixture", "digits", "mnist")
