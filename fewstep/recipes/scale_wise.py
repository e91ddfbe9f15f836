"""Digits whose student begins at half their size, and a teacher that knows both sizes.

fewstep train scale_wise_teacher --out runs/sizes
fewstep distill scale_wise --teacher runs/sizes --out runs/swd
"""

from __future__ import annotations

from fewstep.data import digits as data
from fewstep.diffusion.model import Model
from fewstep.diffusion.time_distributions import Karras
from fewstep.distillation.fake_score import FakeScore
from fewstep.domains.digits import Digits
from fewstep.losses.weight import EDMWeight
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.swd import SwD
from fewstep.nets.patch_unet import PatchUNet
from fewstep.runs.run import Run
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

MODEL = Model(PatchUNet(width=32), data.SHAPE, data.CLASSES, sigma_data=data.SIGMA_DATA)
"""A convolutional network, which takes 4x4 digits as it takes 8x8 ones."""


def scale_wise_teacher() -> Run:
    """Train an EDM teacher on digits of 8x8 and of 4x4 (about three minutes on one core)."""
    return Run(
        method=Pretrain(weight=EDMWeight(data.SIGMA_DATA), scales=(1, 2)),
        model=MODEL,
        domain=Digits(),
        steps=4000,
        optim=Optim(lr=2e-3, betas=(0.9, 0.99), warmup=50, decay="cosine"),
        ema=EMA(halflife=20_000),
        sample_every=2000,
        save_every=2000,
    )


def scale_wise() -> Run:
    """Distil that teacher with SwD: a call at 4x4, then one at 8x8 (some minutes on one core)."""
    return Run(
        method=SwD(
            times=Karras(tmax=500.0),
            mmd=0.1,
            fake=FakeScore(weight=EDMWeight(data.SIGMA_DATA)),
            ratio=1,
        ),
        model=MODEL,
        domain=Digits(),
        steps=1200,
        optim=Optim(lr=1e-3, betas=(0.0, 0.99), warmup=50, decay="linear"),
        ema=EMA(halflife=10_000),
        sample_every=250,
        save_every=500,
    )
