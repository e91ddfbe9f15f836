"""Points in the plane: a ring of Gaussians whose teacher is exact, for experiments in seconds."""

from __future__ import annotations

from fewstep.diffusion.model import Model
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.fake_score import FakeScore
from fewstep.domains.ring import Ring
from fewstep.losses.weight import EDMWeight
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.runs.run import Run
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

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
