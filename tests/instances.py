"""ONE list each of everything that comes in kinds. A new kind gets the whole battery by one line.

Every instance but the teachers is a frozen dataclass, so its repr says all of what it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fewstep.core import Method, Sampler
from fewstep.fake_score import FakeScore
from fewstep.losses.distance import Distance, NormPower, PseudoHuber, SquaredL2, SumOfPowers
from fewstep.losses.weight import L1, EDMWeight, Power, Weight
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sid import SiD
from fewstep.methods.sim import SIM
from fewstep.path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.sample import FewStep, Heun
from fewstep.teachers.gaussian import Gaussian, GaussianMixture
from fewstep.times import Discrete, Karras, LogitNormal, LogNormal, TimeLaw, Uniform

PATHS: tuple[NoisePath, ...] = (
    VE(),
    Flow(),
    TrigFlow(),
    VP(),
    VP(1e-4, 0.02, schedule="linear"),
    VP(betas=(0.01, 0.05, 0.2, 0.5)),
)

TIME_LAWS: tuple[TimeLaw, ...] = (
    LogNormal(),
    LogNormal(0.4, 2.0),
    Karras(),
    Karras(tmax=800.0),
    Uniform(20.0, 980.0),
    LogitNormal(),
    LogitNormal(-0.5, 0.7),
    Discrete((0.25, 0.5, 0.75, 1.0)),
)

PARAMETERISATIONS = ("edm", "eps", "v", "velocity")

DISTANCES: tuple[Distance, ...] = (
    SquaredL2(),
    PseudoHuber(0.5),
    NormPower(3.0),
    NormPower(4.0),
    SumOfPowers(4.0),
)

WEIGHTS: tuple[Weight, ...] = (Power(), Power(2, -2), Power(1, -4, 3.0), EDMWeight(), L1())

SAMPLERS: tuple[Sampler, ...] = (
    FewStep(),
    FewStep(t_init=1.0),
    FewStep(t_init=2.5, steps=4),
    Heun(),
    Heun(Karras(hi=20.0), steps=5, order=1),
)

METHODS: tuple[Method, ...] = (
    SiD(),
    SiD(FewStep(2.5, 2), alpha=0.5, times=LogNormal(), weight=Power(2, -4)),
    SIM(),
    SIM(distance=SquaredL2(), scale=Power(1, -2), weight=EDMWeight()),
    DiffInstruct(),
    DiffInstruct(weight=L1(), fake=FakeScore(Karras(), Power(0, -2))),
    Pretrain(),
)

TEACHERS: dict[str, Callable[[NoisePath], GaussianMixture]] = {
    "gaussian": lambda path: Gaussian(
        torch.tensor([0.4, -0.7], dtype=torch.float64),
        torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64),
        path,
    ),
    "mixture": lambda path: GaussianMixture(
        torch.tensor([[1.0, 0.5], [-0.8, 0.3], [0.1, -1.2]], dtype=torch.float64),
        torch.tensor(
            [[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.2, -0.15], [-0.15, 0.25]]],
            dtype=torch.float64,
        ),
        torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
        path,
    ),
    "ring": lambda path: GaussianMixture.ring(5, 1.0, 0.2, path).double(),
}
