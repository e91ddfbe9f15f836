"""MNIST at 16x16: a convolutional teacher and its distillation, on data of your own."""

from __future__ import annotations

from fewstep.data import mnist as data
from fewstep.diffusion.model import Model
from fewstep.diffusion.time_distributions import Karras
from fewstep.distillation.fake_score import FakeScore
from fewstep.domains.mnist import Mnist
from fewstep.losses.weight import EDMWeight
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sid import SiD
from fewstep.nets.patch_unet import PatchUNet
from fewstep.runs.run import Run
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

MODEL = Model(PatchUNet(), data.SHAPE, data.CLASSES, sigma_data=data.SIGMA_DATA)


def mnist_teacher() -> Run:
    """Train a class-conditional EDM teacher on 16x16 MNIST (about half an hour on one core)."""
    return Run(
        method=Pretrain(weight=EDMWeight(data.SIGMA_DATA)),
        model=MODEL,
        domain=Mnist(drop=0.1),
        steps=18_000,
        batch=64,
        optim=Optim(lr=2e-3, betas=(0.9, 0.99), warmup=100, decay="cosine"),
        ema=EMA(halflife=50_000),
        sample_every=2000,
        save_every=1000,
    )


def mnist() -> Run:
    """Distil the MNIST teacher to one step with SiD."""
    return Run(
        method=SiD(
            alpha=1.0,
            times=Karras(tmax=500.0),
            fake=FakeScore(weight=EDMWeight(data.SIGMA_DATA)),
        ),
        model=MODEL,
        domain=Mnist(),
        steps=3000,
        optim=Optim(lr=3e-4, betas=(0.0, 0.99), warmup=50, decay="linear"),
        ema=EMA(halflife=10_000),
        sample_every=250,
        save_every=500,
    )
