"""The embedded example: 8x8 handwritten digits, from training a teacher to a one-step student."""

from __future__ import annotations

from fewstep.data import digits as data
from fewstep.diffusion.model import Model
from fewstep.diffusion.time_distributions import Karras
from fewstep.distillation.fake_score import FakeScore
from fewstep.domains.digits import Digits
from fewstep.losses.weight import EDMWeight
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.runs.run import Run
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

MODEL = Model(MLP(width=256, blocks=2), data.SHAPE, data.CLASSES, sigma_data=data.SIGMA_DATA)


def digits_teacher() -> Run:
    """Train a class-conditional EDM teacher on 8x8 digits (about a minute on one core)."""
    return Run(
        method=Pretrain(weight=EDMWeight(data.SIGMA_DATA)),
        model=MODEL,
        domain=Digits(),
        steps=6000,
        optim=Optim(lr=2e-3, betas=(0.9, 0.99), warmup=50, decay="cosine"),
        ema=EMA(halflife=20_000),
        sample_every=1000,
        save_every=2000,
    )


def digits() -> Run:
    """Distil the digits teacher to one step with SiD (about a minute and a half on one core).

    The student's noise levels end at sigma = 2.5 (tmax 500), where it starts from: on pictures
    this small, higher levels carry nothing that the labels do not, and only add noise.
    """
    return Run(
        method=SiD(
            alpha=1.0,
            times=Karras(tmax=500.0),
            fake=FakeScore(weight=EDMWeight(data.SIGMA_DATA)),
        ),
        model=MODEL,
        domain=Digits(),
        steps=1800,
        batch=256,
        optim=Optim(lr=2e-3, betas=(0.0, 0.99), warmup=50, decay="linear"),
        ema=EMA(halflife=10_000),
        sample_every=150,
        save_every=600,
    )
