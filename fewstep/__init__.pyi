from fewstep.data.batches import Images as Images, Latents as Latents
from fewstep.diffusion.generator import Generator as Generator
from fewstep.diffusion.model import Model as Model
from fewstep.diffusion.noise_path import (
    VE as VE,
    VP as VP,
    Flow as Flow,
    NoisePath as NoisePath,
    TrigFlow as TrigFlow,
)
from fewstep.diffusion.rng import Draws as Draws
from fewstep.diffusion.samplers import FewStep as FewStep, Heun as Heun
from fewstep.diffusion.types import (
    Batch as Batch,
    Denoiser as Denoiser,
    Sampler as Sampler,
    Source as Source,
)
from fewstep.distillation.critic import Critic as Critic
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
    Turn as Turn,
)
from fewstep.losses.score import denoising as denoising
from fewstep.methods.diff_instruct import DiffInstruct as DiffInstruct
from fewstep.methods.dmd2 import DMD2 as DMD2
from fewstep.methods.pretrain import Pretrain as Pretrain
from fewstep.methods.sid import SiD as SiD
from fewstep.methods.sida import SiDA as SiDA
from fewstep.methods.sim import SIM as SIM
from fewstep.nets.lora import LoRA as LoRA
from fewstep.nets.mlp import MLP as MLP
from fewstep.nets.patch_unet import PatchUNet as PatchUNet
from fewstep.storage.model_folder import load_student as load_student, save_student as save_student
from fewstep.teachers.gaussian import GaussianMixture as GaussianMixture
from fewstep.training.ema import EMA as EMA
from fewstep.training.loop import train as train
from fewstep.training.optim import Optim as Optim

__version__: str
