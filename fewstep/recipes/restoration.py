"""Digits restored from 4x4 pixels: a bridge model, and its distillation to one call.

    fewstep train restoration_teacher --out runs/bridge
    fewstep distill restoration --teacher runs/bridge --out runs/ibmd

What is restored when they are sampled and measured are the held-out digits, in turn.
"""

from __future__ import annotations

from fewstep.data import digits as data
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import Bridge
from fewstep.diffusion.samplers import Heun
from fewstep.diffusion.time_distributions import Uniform
from fewstep.distillation.fake_score import FakeScore
from fewstep.domains.digits import Digits
from fewstep.losses.weight import EDMWeight
from fewstep.methods.ibmd import IBMD
from fewstep.methods.pretrain import Pretrain
from fewstep.nets.beside import Beside
from fewstep.nets.mlp import MLP
from fewstep.runs.run import Run
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

MODEL = Model(
    Beside(MLP(width=256, blocks=2)), data.SHAPE, path=Bridge(), sigma_data=data.SIGMA_DATA
)
TIMES = Uniform(0.02, 0.98)
WEIGHT = EDMWeight(data.SIGMA_DATA)


def restoration_teacher() -> Run:
    """Train a bridge model that restores 8x8 digits from 4x4 (about a minute on one core)."""
    return Run(
        method=Pretrain(Heun(Uniform(0.02, 0.9), steps=12), TIMES, WEIGHT),
        model=MODEL,
        domain=Digits(restore=2),
        steps=6000,
        optim=Optim(lr=2e-3, betas=(0.9, 0.99), warmup=50, decay="cosine"),
        ema=EMA(halflife=20_000),
        sample_every=1000,
        save_every=2000,
    )


def restoration() -> Run:
    """Distil that bridge to one call with IBMD (about a minute and a half on one core)."""
    return Run(
        method=IBMD(fake=FakeScore(TIMES, WEIGHT)),
        model=MODEL,
        domain=Digits(restore=2),
        steps=1800,
        batch=256,
        optim=Optim(lr=1e-3, betas=(0.0, 0.99), warmup=50, decay="linear"),
        ema=EMA(halflife=10_000),
        sample_every=150,
        save_every=600,
    )
