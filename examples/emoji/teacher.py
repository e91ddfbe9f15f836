"""The teacher: a UNet2DConditionModel on the latents, trained by fewstep, saved for diffusers.

v-prediction (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512) on Stable Diffusion's betas:
|v - v_0|^2 = |f(x_t) - x_0|^2 / sigma_t^2, every timestep alike. A tenth of the prompts is
replaced by the empty one, for classifier-free guidance.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.emoji.contrast import NAMED
from examples.emoji.sizes import Sizes
from fewstep.data.batches import epoch_order
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Uniform
from fewstep.diffusion.types import Batch, Source
from fewstep.domains.domain import Domain
from fewstep.losses.weight import Power
from fewstep.methods.pretrain import Pretrain
from fewstep.runs.run import Run
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.teachers.diffusers.scheduler_config import Timesteps
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim


@dataclass(frozen=True)
class Latents:
    """Latents with what they are called: training batches, as a function of the draws alone."""

    x0: Tensor
    """(N, V, 4, 8, 8): V views of each picture."""
    prompts: Tensor
    """(T, L, D): the texts' embeddings; the empty one is the last."""
    called: Tensor
    """(N, W) rows of `prompts`: the name, then shared words, then -1."""
    drop: float

    def __call__(self, draws: Draws) -> Batch:
        rows = epoch_order(draws, len(self.x0))
        words = (self.called[rows] >= 0).sum(1) - 1
        place = 1 + (draws.uniform("word") * words).long()
        named = (draws.uniform("named") < NAMED) | (words == 0)
        text = self.called[rows, torch.where(named, 0, place)]
        text = torch.where(draws.uniform("drop") < self.drop, len(self.prompts) - 1, text)
        x0 = self.x0[rows, draws.integers("view", self.x0.shape[1])]
        z = draws.normal("z", x0.shape[1:])
        return Batch(z, {"prompt": self.prompts[text]}, x0, draws)

    def condition(self, index: Tensor) -> dict[str, Tensor]:
        """What samples `index` (N,) hear by default: the names in turn."""
        return {"prompt": self.prompts[self.called[index % len(self.x0), 0]]}


@dataclass(frozen=True)
class Captioned(Domain):
    """The latents and embeddings in a file of safetensors: x0, prompts, called (see `Latents`)."""

    file: str
    drop: float = 0.1

    def source(self, model: Model, data_free: bool) -> Source:
        return Latents(**load_file(self.file), drop=self.drop)


def network(sizes: Sizes) -> DiffusersNet:
    """A U-Net of two levels with cross-attention on the lower one, 4x4."""
    config = {
        "sample_size": 8,
        "block_out_channels": sizes.unet_channels,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": sizes.width,
        "attention_head_dim": 2,  # which diffusers takes for the number of heads
        "norm_num_groups": 8,
    }
    return DiffusersNet("UNet2DConditionModel", json.dumps(config), sizes.tokens, pixels=32)


def run(sizes: Sizes, file: Path) -> Run:
    """The teacher's training on the latents in `file`."""
    return Run(
        method=Pretrain(
            sampler=FewStep(999.0, sizes.calls, "ddim", unit=True),
            times=Uniform(0.0, 999.0),
            weight=Power(0, -2),
        ),
        model=Model(network(sizes), (4, 8, 8), 0, Timesteps(), "v"),
        domain=Captioned(str(file)),
        steps=sizes.teacher_steps,
        batch=sizes.batch,
        optim=Optim(1e-3, betas=(0.9, 0.99), warmup=100, decay="cosine", clip=1.0),
        ema=EMA(halflife=10_000),
        sample_every=1000,
        save_every=500,
    )


def assemble(trained: Path, vae: Any, encoder: Any, words: Any) -> Any:
    """The finished run `trained` with all that belongs to it, as diffusers has it."""
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        unet=load_student(trained).denoiser.net.net,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
