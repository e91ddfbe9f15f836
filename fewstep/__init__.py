"""fewstep: distil a diffusion or flow model into a generator of one to four network calls.

The names below load on first use, so that `import fewstep` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Batch": "core",
    "Loss": "core",
    "Method": "core",
    "Turn": "core",
    "Draws": "draws",
    "EMA": "ema",
    "Generator": "generator",
    "Optim": "optim",
    "train": "training",
    "load_student": "student",
    "save_student": "student",
    "Images": "data.source",
    "Latents": "data.source",
    "FewStep": "sample",
    "Heun": "sample",
    "GaussianMixture": "teachers.gaussian",
    "LSG": "guidance",
    "LoRA": "lora",
    "AntiCFG": "guidance",
    "ZeroCFG": "guidance",
    "Critic": "critic",
    "Model": "model",
    "MLP": "nets.mlp",
    "PatchUNet": "nets.patch_unet",
    "SiD": "methods.sid",
    "SiDA": "methods.sida",
    "SIM": "methods.sim",
    "DMD2": "methods.dmd2",
    "DiffInstruct": "methods.diff_instruct",
    "Pretrain": "methods.pretrain",
}

__all__ = [
    "DMD2",
    "EMA",
    "LSG",
    "MLP",
    "SIM",
    "AntiCFG",
    "Batch",
    "Critic",
    "DiffInstruct",
    "Draws",
    "FewStep",
    "GaussianMixture",
    "Generator",
    "Heun",
    "Images",
    "Latents",
    "LoRA",
    "Loss",
    "Method",
    "Model",
    "Optim",
    "PatchUNet",
    "Pretrain",
    "SiD",
    "SiDA",
    "Turn",
    "ZeroCFG",
    "load_student",
    "save_student",
    "train",
]

if TYPE_CHECKING:
    from fewstep.core import Batch, Loss, Method, Turn
    from fewstep.critic import Critic
    from fewstep.data.source import Images, Latents
    from fewstep.draws import Draws
    from fewstep.ema import EMA
    from fewstep.generator import Generator
    from fewstep.guidance import LSG, AntiCFG, ZeroCFG
    from fewstep.lora import LoRA
    from fewstep.methods.diff_instruct import DiffInstruct
    from fewstep.methods.dmd2 import DMD2
    from fewstep.methods.pretrain import Pretrain
    from fewstep.methods.sid import SiD
    from fewstep.methods.sida import SiDA
    from fewstep.methods.sim import SIM
    from fewstep.model import Model
    from fewstep.nets.mlp import MLP
    from fewstep.nets.patch_unet import PatchUNet
    from fewstep.optim import Optim
    from fewstep.sample import FewStep, Heun
    from fewstep.student import load_student, save_student
    from fewstep.teachers.gaussian import GaussianMixture
    from fewstep.training import train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fewstep.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
