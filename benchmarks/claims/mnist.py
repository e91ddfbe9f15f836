"""The headline of three claims on MNIST at 16x16: python benchmarks/claims/mnist.py [CLAIM ...]

One seed. Needs mnist.npz (FEWSTEP_MNIST, or in the working folder) and the teacher that is kept in
benchmarks/assets/mnist_teacher. Results: benchmarks/results/claims/mnist-CLAIM.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import lab
from lab import Setting, Trial

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.critic import Critic
from fewstep.domains.mnist import Mnist
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.recipes.mnist import mnist
from fewstep.storage.model_folder import load_student

RECIPE = mnist()
assert isinstance(RECIPE.method, SiD)
SID: SiD = RECIPE.method


def teacher() -> Generator:
    """The teacher that recipe mnist_teacher trained."""
    return load_student(lab.ROOT / "benchmarks" / "assets" / "mnist_teacher")


SETTING = Setting(
    "mnist",
    Mnist(),
    teacher,
    replace(RECIPE.optim, lr=5e-4),
    RECIPE.ema,
    batch=64,
    steps=400,
    samples=2000,
)


def sid(**changes: Any) -> SiD:
    """SiD as in recipe mnist."""
    return replace(SID, **changes)


def sida() -> SiDA:
    """SiDA with the same settings."""
    return SiDA(
        times=SID.times, fake=Critic(weight=SID.fake.weight, judging=SID.fake.weight), gan=0.01
    )


def adversarial() -> Iterable[Trial]:
    """Claims 1 and 3: SiD, and SiDA with real data."""
    yield Trial("SiD", sid())
    yield Trial("SiDA", sida())


def steps() -> Iterable[Trial]:
    """Claim 5: two calls."""
    for matching in ("uniform", "final"):
        yield Trial(f"2 calls, {matching}", sid(sampler=FewStep(2.5, 2), matching=matching))


CLAIMS: dict[str, Callable[[], Iterable[Trial]]] = {"adversarial": adversarial, "steps": steps}

if __name__ == "__main__":
    lab.main(CLAIMS, SETTING, (__doc__ or "").partition("\n")[0])
