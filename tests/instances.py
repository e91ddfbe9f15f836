"""ONE list each of everything that comes in kinds. A new kind gets the whole battery by one line.

Every instance but the teachers is a frozen dataclass, so its repr says all of what it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import (
    Discrete,
    Karras,
    LogitNormal,
    LogNormal,
    Shifted,
    TimeLaw,
    Uniform,
    Whole,
)
from fewstep.diffusion.types import Sampler
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.guidance_scales import (
    LSG,
    AntiCFG,
    Guidance,
    Kappas,
    RandomLSG,
    Unguided,
    ZeroCFG,
)
from fewstep.distillation.method import Method
from fewstep.losses.distance import (
    Distance,
    Exponential,
    NormPower,
    PseudoHuber,
    SquaredL2,
    SumOfPowers,
)
from fewstep.losses.weight import L1, SNR, EDMWeight, Power, Weight
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.sim import SIM
from fewstep.teachers.gaussian import Gaussian, GaussianMixture

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
    Whole(20, 979),
    LogitNormal(),
    LogitNormal(-0.5, 0.7),
    Discrete((0.25, 0.5, 0.75, 1.0)),
    Shifted(3.0, 0.001),
)

PARAMETERISATIONS = ("edm", "eps", "v", "velocity")

DISTANCES: tuple[Distance, ...] = (
    SquaredL2(),
    PseudoHuber(0.5),
    NormPower(3.0),
    NormPower(4.0),
    SumOfPowers(4.0),
    Exponential(0.05),
)

WEIGHTS: tuple[Weight, ...] = (
    Power(),
    Power(2, -2),
    Power(1, -4, 3.0),
    EDMWeight(),
    SNR(),
    L1(),
)

GUIDANCE: tuple[Guidance, ...] = (
    Unguided(),
    LSG(4.5),
    RandomLSG(1.5, 4.5),
    ZeroCFG(),
    AntiCFG(),
    Kappas(1.0, 2.0, 3.0, 0.5, drop=0.0),
)

SAMPLERS: tuple[Sampler, ...] = (
    FewStep(),
    FewStep(t_init=1.0),
    FewStep(t_init=2.5, steps=4),
    FewStep(t_init=2.5, steps=3, noise="fixed", rho=1.7),
    FewStep(t_init=2.5, steps=3, noise="ddim"),
    Heun(),
    Heun(Karras(hi=20.0), steps=5, order=1),
    CFG(Heun(), 1.0),
)

METHODS: tuple[Method, ...] = (
    SiD(),
    SiD(FewStep(2.5, 2), alpha=0.5, times=LogNormal(), weight=Power(2, -4)),
    SiD(guidance=LSG(4.5)),
    SiD(FewStep(2.5, 4), guidance=ZeroCFG(), weight=Power(1, -1)),
    SiD(FewStep(2.5, 4, "ddim"), guidance=AntiCFG(), matching="final"),
    SiDA(),
    SiDA(student_from=2, adversarial_from=4, share=0.9, gan=0.1),
    SiDA(
        FewStep(2.5, 4, "fixed"),
        fake=Critic(judging=SNR(), average="sample", pool="space"),
        guidance=LSG(3.0),
        gan_weight=SNR(),
    ),
    SIM(),
    SIM(guidance=RandomLSG(1.5, 4.5)),
    SIM(distance=SquaredL2(), scale=Power(1, -2), weight=EDMWeight()),
    DiffInstruct(),
    DiffInstruct(guidance=Kappas(1.0, 2.0, 3.0, 0.5)),
    DiffInstruct(weight=L1(), fake=FakeScore(Karras(), Power(0, -2))),
    DMD2(),
    DMD2(FewStep(2.5, 4), ratio=2, gan=0.1, guidance=Kappas(1.0, 1.0, 1.0, 3.0)),
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
