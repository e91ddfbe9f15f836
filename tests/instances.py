"""ONE list each of everything that comes in kinds. A new kind gets the whole battery by one line.

Every instance but the teachers is a frozen dataclass, so its repr says all of what it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.noise_path import VE, VP, Bridge, Flow, NoisePath, TrigFlow
from fewstep.diffusion.parallel_decoding import ParallelDecoding
from fewstep.diffusion.policies import DX, FollowPolicy, GMFlow
from fewstep.diffusion.samplers import (
    Ancestral,
    FewStep,
    Heun,
    JumpBack,
    Jumps,
    MultiStep,
    WithInput,
)
from fewstep.diffusion.scale_wise import ScaleWise
from fewstep.diffusion.time_distributions import (
    Discrete,
    Karras,
    LogitNormal,
    LogNormal,
    NoiseLevels,
    OfLevel,
    Shifted,
    TimeLaw,
    Uniform,
    Whole,
)
from fewstep.diffusion.types import Sampler
from fewstep.distillation.critic import Critic
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.feature_distance import FeatureDistance
from fewstep.distillation.flow_maps import Ladder
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
from fewstep.distillation.pairs import Pairs
from fewstep.distillation.preferences import Preference
from fewstep.eval.picture_networks import Ink
from fewstep.losses.adversarial import GradientPenalty
from fewstep.losses.distance import (
    Distance,
    Exponential,
    NormPower,
    PseudoHuber,
    SquaredL2,
    SumOfAbsolutes,
    SumOfPowers,
)
from fewstep.losses.weight import (
    L1,
    SNR,
    EDMWeight,
    MinSNR,
    Power,
    SignalNoise,
    TruncatedSNR,
    Weight,
)
from fewstep.methods.add import ADD
from fewstep.methods.align_your_steps import AlignYourSteps
from fewstep.methods.asd import ASD
from fewstep.methods.ayf import AYF
from fewstep.methods.boot import BOOT
from fewstep.methods.cdm import CDM
from fewstep.methods.consistency_distillation import ConsistencyDistillation
from fewstep.methods.consistency_training import ConsistencyTraining
from fewstep.methods.ctm import CTM
from fewstep.methods.decoupled_dmd import DecoupledDMD
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.diffusion2gan import Diffusion2GAN
from fewstep.methods.disback import DisBack
from fewstep.methods.distillation_dpo import DistillationDPO
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.dmdr import DMDR
from fewstep.methods.dode import DODE
from fewstep.methods.emd import EMD
from fewstep.methods.f_distill import FDistill
from fewstep.methods.flash_diffusion import FlashDiffusion
from fewstep.methods.flash_dmd import FlashDMD
from fewstep.methods.gas import GAS
from fewstep.methods.guidance_distillation import GuidanceDistillation
from fewstep.methods.ibmd import IBMD
from fewstep.methods.imagine_flash import ImagineFlash
from fewstep.methods.invertible_consistency import InvertibleConsistency
from fewstep.methods.jdm import JDM
from fewstep.methods.ladd import LADD
from fewstep.methods.lcm import LCM
from fewstep.methods.lightning import Lightning
from fewstep.methods.mean_flow import MeanFlow
from fewstep.methods.moment_matching import MomentMatching
from fewstep.methods.msd import MSD
from fewstep.methods.nct import NCT
from fewstep.methods.optimal_steps import OptimalSteps
from fewstep.methods.pair_regression import PairRegression
from fewstep.methods.pdd import PDD
from fewstep.methods.phased_consistency import PhasedConsistency
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.methods.pi_flow import PiFlow
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.progressive import ProgressiveDistillation
from fewstep.methods.pso import PSO
from fewstep.methods.reflow import Reflow
from fewstep.methods.rewarded import Rewarded
from fewstep.methods.scflow import SCFlow
from fewstep.methods.scfm import SCFM
from fewstep.methods.scm import SCM
from fewstep.methods.scott import SCott
from fewstep.methods.self_e import SelfE
from fewstep.methods.sfd import SFD
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.sim import SIM
from fewstep.methods.slam import SLAM
from fewstep.methods.slim_flow import SlimFlow
from fewstep.methods.swd import SwD
from fewstep.methods.tbcm import TBCM
from fewstep.methods.tdd import TDD
from fewstep.methods.tdm import TDM
from fewstep.methods.traflow import TraFlow
from fewstep.methods.uni_instruct import UniInstruct
from fewstep.methods.velocity_matching import VelocityMatching
from fewstep.methods.vsd import VSD
from fewstep.teachers.gaussian import Gaussian, GaussianMixture

PATHS: tuple[NoisePath, ...] = (
    VE(),
    Flow(),
    TrigFlow(),
    VP(),
    VP(1e-4, 0.02, schedule="linear"),
    VP(betas=(0.01, 0.05, 0.2, 0.5)),
    Bridge(),
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
    NoiseLevels(),
    NoiseLevels(Flow(), 0.01, 20.0, 3.0),
    OfLevel(LogNormal(), TrigFlow()),
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
    SignalNoise(),
    TruncatedSNR(),
    MinSNR(),
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
    Jumps(2.5, steps=3, rho=1.7),
    Ancestral(2.5, steps=3, rho=1.7),
    JumpBack(2.5, steps=4, rho=1.7),
    MultiStep(Karras(), 7, "dpm++"),
    MultiStep(Karras(hi=20.0), 6, "unipc", order=3),
    WithInput(FewStep(2.5, 2), "s", 0.5),
    LinearSolver(4, order=3),
    LinearSolver(times=(2.0, 0.5), a=((0.3,), (0.05, 0.2)), c=((0.6,), (-0.1, 0.9))),
    ScaleWise((2.5, 1.0), (1, 1)),
)

METHODS: tuple[Method, ...] = (
    SiD(),
    SiD(FewStep(2.5, 2), alpha=0.5, times=LogNormal(), weight=Power(2, -4)),
    SiD(FewStep(2.5, 2), shared=True),
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
    DMD2(FewStep(2.5, 4), ratio="auto", gan=0.1, guidance=Kappas(1.0, 1.0, 1.0, 3.0)),
    DMD2(
        fake=Critic(Karras(), average="sample", pool="learned", features="teacher", loss="hinge")
    ),
    DMD2(
        FewStep(2.5, 2),
        fake=Critic(average="sample", features="own", loss="relativistic"),
        ratio=1,
        gan=0.1,
    ),
    SiDA(fake=Critic(loss="least_squares", penalty=GradientPenalty(r1=0.1)), gan=0.1),
    SiDA(
        fake=Critic(
            average="sample",
            pool="learned",
            features="teacher",
            layers=("net.first", "net.blocks.0"),
            penalty=GradientPenalty(0.1, 0.2, 0.05),
        ),
        guidance=ZeroCFG(),
        gan=0.1,
    ),
    Pretrain(),
    FDistill(),
    FDistill(
        fake=Critic(average="sample", features="own", pool="learned", loss="least_squares"),
        gan=0.1,
    ),
    FDistill(family="kl", clip=(0.5, 2.0), bins=4, rate=0.5, ratio=1),
    UniInstruct(),
    UniInstruct(
        FewStep(2.5, 2),
        "kl",
        fake=Critic(average="sample", features="own", pool="learned"),
        rate=0.0,
        guidance=LSG(3.0),
    ),
    DMD(pairs=Pairs(8)),
    DMD(regression=0.0),
    MeanFlow(),
    MeanFlow(Jumps(2.5, 3), Uniform(0.1, 0.9), 0.0, "data", p=0.0),
    MeanFlow(diagonal=0.5, kappa=2.0),
    ProgressiveDistillation(start=4, stage_steps=2),
    ProgressiveDistillation(FewStep(2.5, 2, "ddim"), 8, 1, kappa=2.0),
    ProgressiveDistillation(JumpBack(2.5, 2), 2, 2, kappa=2.0, scales=(1.0, 3.0)),
    OptimalSteps(Heun(Karras(), 5, 1), 2),
    OptimalSteps(Heun(Karras(), 6, 1), 3, nearest="batch", kappa=2.0),
    AlignYourSteps(LinearSolver(2), rungs=4),
    AlignYourSteps(MultiStep(Karras(0.02, 2.5), 3, "unipc"), 5, 0.02, 2, kappa=2.0),
    GAS(LinearSolver(3, order=3), Pairs(8)),
    GAS(
        LinearSolver(times=(2.5, 0.6)),
        Pairs(8),
        SquaredL2(),
        judge=Discriminator(loss="hinge"),
        kappa=2.0,
    ),
    DODE(LinearSolver(3), fine=2),
    DODE(LinearSolver(times=(2.5, 0.6), order=2), 3, 1, 2, kappa=2.0),
    DecoupledDMD(),
    DecoupledDMD(FewStep(2.5, 3), 3.0, augmentation_weight=Power(1, -1), ratio=1),
    CDM(longest=2),
    CDM(FewStep(1.5, 2, "ddim"), 3.0, longest=1, off=0.0, ratio=1, pull=1.0),
    EMD(steps=2),
    EMD(
        times=LogNormal(),
        weight=Power(2, -2),
        steps=1,
        z_rate=0.0,
        cancel=False,
        guidance=LSG(3.0),
    ),
    MomentMatching(),
    MomentMatching(Ancestral(2.5, 2), Power(0, -1), anchor=0.0, kappa=2.0),
    TDM(),
    TDM(
        FewStep(2.5, 2, "ddim"), Uniform(0.1, 2.5), huber=1e-3, target="subinterval", ratio="auto"
    ),
    TDM(guidance=Kappas(real=4.5), weight=Power(1, -1), fake_rate=5.0, matching="final"),
    VSD(),
    VSD(FewStep(2.5, 2), Uniform(0.1, 2.0), Power(1, 1), fake_rate=3.0, guidance=LSG(4.5)),
    ConsistencyDistillation(),
    ConsistencyDistillation(
        FewStep(2.5, 2), Ladder(4, 3.0), 1, 0.9, PseudoHuber(0.1), Power(0, -1), 2.0
    ),
    ConsistencyTraining(),
    ConsistencyTraining(FewStep(2.5, 2), LogNormal(), 4.0, 2.0, 0.5, 3, 2, SquaredL2(), SNR()),
    LCM(),
    LCM(WithInput(FewStep(2.5), "w", 2.0), Ladder(5), (1.0, 4.0), 0.1, 0.0, 2),
    SCM(),
    SCM(times=LogNormal(0.4, 2.0), velocity="data", warmup=0, bins=0),
    SCM(bins=3, kappa=2.0),
    PairRegression(pairs=Pairs(8), distance=SumOfAbsolutes()),
    PairRegression(FewStep(2.5, 3, "ddim"), Pairs(8), SquaredL2(), "final"),
    Reflow(pairs=Pairs(8), reflow_steps=2, distil_steps=3),
    Reflow(FewStep(80.0, 3, "ddim"), Pairs(8), distil_steps=0),
    BOOT(),
    BOOT(steps=8, boundary=0.0, kappa=2.0),
    SFD(),
    SFD(FewStep(2.5, 2, "ddim"), 1, "heun", SquaredL2(), kappa=2.0),
    SlimFlow(pairs=Pairs(8), reflow_steps=2, anneal_steps=2, distil_steps=3),
    SlimFlow(
        pairs=Pairs(8), reflow_steps=1, schedule="cos", distil_steps=3, guide=0.5, span=(0.4, 0.6)
    ),
    TraFlow(),
    TraFlow(Jumps(2.5), 0.0, 0.5, 2.0, 0.0, 1, 1, kappa=2.0),
    SCFlow(),
    SCFlow(FewStep(2.5), 0.1, 0.5, 0.0, 0.0, c=0.1, truncate=0.5, decay=0.0, kappa=2.0),
    SCFlow(gan=0.5, discriminator=Discriminator(), line=0.0),
    TBCM(ladder=Ladder(3)),
    TBCM(FewStep(2.5, 2), Ladder(4, 3.0), warmup=0, kappa=2.0),
    SLAM(),
    SLAM(WithInput(FewStep(2.5), "gamma", 1.0), Ladder(5), "independent", 0.1, 0.0, 2.0),
    SCott(),
    SCott(FewStep(2.5), Ladder(5), 0.0, 1, 0.0, decay=0.0, kappa=2.0),
    SCott(eta=0.3, substeps=2, discriminator=Discriminator(loss="hinge")),
    ImagineFlash(),
    ImagineFlash(FewStep(2.5, 2), 1.0, 0, kappa=2.0),
    ImagineFlash(shift=0.5, steps=2, order=1, matching="final"),
    SelfE(),
    SelfE(Jumps(2.5, 2), 4.0, decay=0.0, auxiliary_from=3, drop=0.4, renormalise=False),
    PiFlow(FollowPolicy(2.5, policy=GMFlow(2), substeps=4)),
    PiFlow(FollowPolicy(2.5, 2, 2.0, DX(3), 4), states=1, window=1, mixing_steps=2, kappa=2.0),
    PDD(ParallelDecoding(2.5, 1, 4), (1, 2)),
    PDD(ParallelDecoding(2.5, 2, 4, 2.0), (2, 4), order=1, kappa=2.0),
    InvertibleConsistency(),
    InvertibleConsistency(Jumps(2.5, 2), Ladder(4), 2.0, (1.0, 3.0), preserve=0.0, c=0.1, order=2),
    GuidanceDistillation(),
    GuidanceDistillation(scales=(1.0, 3.0), kappa=2.0, weight=Power()),
    LADD(pairs=Pairs(8)),
    LADD(
        FewStep(2.5, 2),
        Pairs(8),
        Discriminator(LogNormal(), "own", loss="relativistic"),
        shares=(0.8, 0.2),
        early_shares=(0.0, 1.0),
        early=2,
    ),
    Lightning(teacher_steps=8, stages=(4, 2, 1), stage_steps=1, regressed=0, skip=1),
    Lightning(teacher_steps=4, stages=(2, 1), stage_steps=1, conditional=0.0, times=2, kappa=2.0),
    Diffusion2GAN(pairs=Pairs(8)),
    Diffusion2GAN(pairs=Pairs(8), distance=FeatureDistance(layers=("net.first",))),
    Diffusion2GAN(
        FewStep(80.0),
        Pairs(8),
        SumOfAbsolutes(),
        Discriminator(layers=("net.first", "net.blocks.0"), penalty=GradientPenalty(0.1, 0.1)),
        every=1,
    ),
    FlashDiffusion(FewStep(2.5, 2), 4, shares=((0.5, 0.5),), gan=(0.1,), dmd=(0.3,)),
    FlashDiffusion(
        FewStep(2.5),
        3,
        shares=((1.0,), (1.0,)),
        gan=(0.0, 0.1),
        dmd=(0.0, 0.0),
        stage_steps=1,
        solver="ddim",
        kappa=(1.0, 3.0),
        judge=Discriminator(features="own", loss="relativistic"),
    ),
    ASD(),
    ASD(
        FewStep(2.5, 4, "ddim"),
        ratio=1,
        judge=Discriminator(layers=("net.first", "net.blocks.0")),
        guidance=Kappas(1.0, 1.0, 1.0, 3.0),
    ),
    ADD(),
    ADD(
        FewStep(2.5, 2),
        (0.3, 0.7),
        Discriminator(LogNormal(), "own", loss="relativistic"),
        distil=0.5,
        weight=Power(1, -1),
    ),
    DisBack(targets=1, record_steps=1, target_steps=1),
    DisBack(
        FewStep(2.5, 2), targets=1, record_steps=1, target_steps=2, ratio=2, guidance=LSG(4.5)
    ),
    MSD(score_steps=1),
    PhasedDMD(FewStep(2.5, 2, "ddim"), phase_steps=1),
    PhasedDMD(FewStep(2.5, 4, "ddim"), phase_steps=1, ratio="auto", clip=1.0, guidance=LSG(4.5)),
    MSD(FewStep(2.5, 2), students=3, score_steps=2, guidance=Kappas(real=3.0)),
    CTM(),
    CTM(Jumps(2.5, 2), Ladder(5), 1, 1, "state", 0.0, PseudoHuber(0.1), denoising=0.0, kappa=2.0),
    PSO(FewStep(2.5, 2), reward=Ink(), beta=0.1, low=1e-9, high=1e9),
    PSO(FewStep(2.5, 3), reward=Ink(), beta=0.1, low=1e-9, high=1e9, labels="soft"),
    JDM(reward=Ink()),
    JDM(FewStep(2.5, 2), reward=Ink(), strength=3.0, weight=L1(), ratio="auto", matching="final"),
    DistillationDPO(reward=Ink()),
    DistillationDPO(
        FewStep(2.5, 2), reward=Ink(), winners=0.0, losers=1.0, scale=1.1, guidance=LSG(3.0)
    ),
    DMDR(reward=Ink(), cold=3, dynamic=2, ratio=2),
    DMDR(FewStep(2.5, 2), reward=Ink(), cold=0, dynamic=0, ratio=1, guidance=Kappas(real=3.0)),
    FlashDMD(),
    FlashDMD(
        FewStep(2.5, 3),
        ratio=2,
        keep=1.0,
        judge=Discriminator(features="own", loss="hinge"),
        preference=Preference(Ink(), 0.1, 1e-9, 1e9),
        preferred_from=1,
        share=1,
    ),
    NCT(control=Ink()),
    NCT(WithInput(FewStep(80.0), "c", 1.0), control=Ink(), blur=0.3, levels=2, bound=0.1),
    Rewarded(SiD(), Ink()),
    Rewarded(ProgressiveDistillation(start=4, stage_steps=2), Ink(0.6), 0.1, 1, 0.0, Ink(0.2)),
    SwD(ScaleWise((2.5, 1.0), (1, 1))),
    SwD(ScaleWise((2.5, 0.9, 0.3), (1, 1, 1)), mmd=0.3, ratio=1, guidance=Kappas(real=7.0)),
    IBMD(),
    IBMD(FewStep(2.5, 2), Karras(tmax=500.0), Power(), ratio=2, guidance=LSG(3.0)),
    PhasedConsistency(),
    PhasedConsistency(Jumps(2.5, 2), (4, 2), 2, 3, 2, 0.1, 0.9, 2.0),
    SCFM(),
    SCFM(FewStep(2.5, 2, "ddim"), (2, 3), 4, 0.5, (1.0, 3.0), 0.5, 0.0, 2.0),
    AYF(),
    AYF(Jumps(2.5, 2), "lmd", Uniform(0.1, 0.9), warmup=0, c=1.0, kappa=2.0),
    TDD(),
    TDD(Jumps(2.5, 2), (2, 3), 6, 0.5, 0.1, 2, 0.1, 0.5, kappa=2.0),
    VelocityMatching(),
    VelocityMatching(FewStep(2.5, 2), LogitNormal(), 0.5, 0.0, "rate", kappa=2.0),
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
