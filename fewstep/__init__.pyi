from fewstep.data.batches import Images as Images, Latents as Latents
from fewstep.diffusion.around import variations as variations, walk as walk
from fewstep.diffusion.assisted import (
    Assisted as Assisted,
    Corrected as Corrected,
    Gated as Gated,
    Handover as Handover,
)
from fewstep.diffusion.derivative import jvp as jvp
from fewstep.diffusion.extra_inputs import ExtraInputs as ExtraInputs
from fewstep.diffusion.generator import Generator as Generator
from fewstep.diffusion.image_to_image import image_to_image as image_to_image
from fewstep.diffusion.inversion import invert as invert
from fewstep.diffusion.linear_solver import LinearSolver as LinearSolver
from fewstep.diffusion.model import Model as Model
from fewstep.diffusion.noise_path import (
    VE as VE,
    VP as VP,
    Bridge as Bridge,
    Flow as Flow,
    NoisePath as NoisePath,
    TrigFlow as TrigFlow,
)
from fewstep.diffusion.parallel_decoding import ParallelDecoding as ParallelDecoding
from fewstep.diffusion.policies import DX as DX, FollowPolicy as FollowPolicy, GMFlow as GMFlow
from fewstep.diffusion.rng import Draws as Draws
from fewstep.diffusion.samplers import (
    Ancestral as Ancestral,
    FewStep as FewStep,
    Heun as Heun,
    JumpBack as JumpBack,
    Jumps as Jumps,
    MultiStep as MultiStep,
    WithInput as WithInput,
)
from fewstep.diffusion.scale_wise import ScaleWise as ScaleWise
from fewstep.diffusion.types import (
    Batch as Batch,
    Denoiser as Denoiser,
    Sampler as Sampler,
    Source as Source,
    State as State,
)
from fewstep.distillation.critic import Critic as Critic
from fewstep.distillation.discriminator import Discriminator as Discriminator
from fewstep.distillation.fake_score import (
    FakeScore as FakeScore,
    generate as generate,
    predict as predict,
)
from fewstep.distillation.guidance_scales import (
    LSG as LSG,
    AntiCFG as AntiCFG,
    ZeroCFG as ZeroCFG,
)
from fewstep.distillation.method import (
    Loss as Loss,
    Method as Method,
    Nets as Nets,
    Product as Product,
    Step as Step,
    Turn as Turn,
)
from fewstep.distillation.pairs import Pairs as Pairs, make_pairs as make_pairs
from fewstep.distillation.pictures import (
    PictureFeatures as PictureFeatures,
    Reward as Reward,
    pictures_of as pictures_of,
)
from fewstep.distillation.preferences import Preference as Preference
from fewstep.losses.score import denoising as denoising
from fewstep.methods.add import ADD as ADD
from fewstep.methods.align_your_steps import AlignYourSteps as AlignYourSteps
from fewstep.methods.asd import ASD as ASD
from fewstep.methods.ayf import AYF as AYF
from fewstep.methods.boot import BOOT as BOOT
from fewstep.methods.cdm import CDM as CDM
from fewstep.methods.consistency_distillation import (
    ConsistencyDistillation as ConsistencyDistillation,
)
from fewstep.methods.consistency_training import ConsistencyTraining as ConsistencyTraining
from fewstep.methods.ctm import CTM as CTM
from fewstep.methods.decoupled_dmd import DecoupledDMD as DecoupledDMD
from fewstep.methods.diff_instruct import DiffInstruct as DiffInstruct
from fewstep.methods.diffusion2gan import Diffusion2GAN as Diffusion2GAN
from fewstep.methods.disback import DisBack as DisBack
from fewstep.methods.distillation_dpo import DistillationDPO as DistillationDPO
from fewstep.methods.dmd import DMD as DMD
from fewstep.methods.dmd2 import DMD2 as DMD2
from fewstep.methods.dmdr import DMDR as DMDR
from fewstep.methods.dode import DODE as DODE
from fewstep.methods.emd import EMD as EMD
from fewstep.methods.f_distill import FDistill as FDistill
from fewstep.methods.flash_diffusion import FlashDiffusion as FlashDiffusion
from fewstep.methods.flash_dmd import FlashDMD as FlashDMD
from fewstep.methods.gas import GAS as GAS
from fewstep.methods.guidance_distillation import GuidanceDistillation as GuidanceDistillation
from fewstep.methods.ibmd import IBMD as IBMD
from fewstep.methods.imagine_flash import ImagineFlash as ImagineFlash
from fewstep.methods.invertible_consistency import InvertibleConsistency as InvertibleConsistency
from fewstep.methods.jdm import JDM as JDM
from fewstep.methods.ladd import LADD as LADD
from fewstep.methods.lcm import LCM as LCM
from fewstep.methods.lightning import Lightning as Lightning
from fewstep.methods.mean_flow import MeanFlow as MeanFlow
from fewstep.methods.moment_matching import MomentMatching as MomentMatching
from fewstep.methods.msd import MSD as MSD
from fewstep.methods.nct import NCT as NCT
from fewstep.methods.optimal_steps import OptimalSteps as OptimalSteps
from fewstep.methods.pair_regression import PairRegression as PairRegression
from fewstep.methods.pdd import PDD as PDD
from fewstep.methods.phased_consistency import PhasedConsistency as PhasedConsistency
from fewstep.methods.phased_dmd import PhasedDMD as PhasedDMD
from fewstep.methods.pi_flow import PiFlow as PiFlow
from fewstep.methods.pretrain import Pretrain as Pretrain
from fewstep.methods.progressive import ProgressiveDistillation as ProgressiveDistillation
from fewstep.methods.pso import PSO as PSO
from fewstep.methods.reflow import Reflow as Reflow
from fewstep.methods.rewarded import Rewarded as Rewarded
from fewstep.methods.scflow import SCFlow as SCFlow
from fewstep.methods.scfm import SCFM as SCFM
from fewstep.methods.scm import SCM as SCM
from fewstep.methods.scott import SCott as SCott
from fewstep.methods.self_e import SelfE as SelfE
from fewstep.methods.sfd import SFD as SFD
from fewstep.methods.sid import SiD as SiD
from fewstep.methods.sida import SiDA as SiDA
from fewstep.methods.sim import SIM as SIM
from fewstep.methods.slam import SLAM as SLAM
from fewstep.methods.slim_flow import SlimFlow as SlimFlow
from fewstep.methods.swd import SwD as SwD
from fewstep.methods.tbcm import TBCM as TBCM
from fewstep.methods.tdd import TDD as TDD
from fewstep.methods.tdm import TDM as TDM
from fewstep.methods.traflow import TraFlow as TraFlow
from fewstep.methods.uni_instruct import UniInstruct as UniInstruct
from fewstep.methods.velocity_matching import VelocityMatching as VelocityMatching
from fewstep.methods.vsd import VSD as VSD
from fewstep.nets.beside import Beside as Beside
from fewstep.nets.lora import LoRA as LoRA
from fewstep.nets.mlp import MLP as MLP
from fewstep.nets.patch_unet import PatchUNet as PatchUNet
from fewstep.nets.routed import Routed as Routed
from fewstep.runs.teacher import open_model as open_model
from fewstep.storage.model_folder import load_student as load_student, save_student as save_student
from fewstep.teachers.gaussian import GaussianMixture as GaussianMixture
from fewstep.training.ema import EMA as EMA
from fewstep.training.loop import train as train
from fewstep.training.optim import Optim as Optim

__version__: str
