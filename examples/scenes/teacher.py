"""The teacher: a UNet2DConditionModel on latents, trained by fewstep, saved for diffusers.

v-prediction (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512) on Stable Diffusion's betas
rescaled to zero terminal SNR (Lin et al. 2023, https://arxiv.org/abs/2305.08891), every timestep
alike. A tenth of the captions is replaced by the empty one, for classifier-free guidance.
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

from examples.scenes.sizes import Sizes
from examples.scenes.words import TOKENS
from fewstep.data.batches import epoch_order
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Uniform
from fewstep.diffusion.types import Batch, Cond, Source
from fewstep.domains.domain import Domain
from fewstep.losses.weight import Power
from fewstep.methods.pretrain import Pretrain
from fewstep.runs.run import Run
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.teachers.diffusers.scheduler_config import schedule_of
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

SHAPE = (4, 16, 16)
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Of a DDIMScheduler."""


@dataclass(frozen=True)
class Latents:
    """Latents with the states of their captions: batches, a function of the draws alone."""

    x0: Tensor
    """(N, 4, 16, 16), any precision."""
    rows: Tensor
    """(N,) the row of `prompts` that each has."""
    prompts: Tensor
    """(captions + 1, L, D), any precision: states of the learnt captions, and of none."""
    drop: float

    def __call__(self, draws: Draws) -> Batch:
        which = epoch_order(draws, len(self.x0))
        dropped = draws.uniform("drop") < self.drop
        text = torch.where(dropped, len(self.prompts) - 1, self.rows[which])
        z = draws.normal("z", self.x0.shape[1:])
        return Batch(z, {"prompt": self.prompts[text].float()}, self.x0[which].float(), draws)

    def condition(self, index: Tensor) -> Cond:
        """What samples `index` (N,) hear by default: the captions of the latents in turn."""
        return {"prompt": self.prompts[self.rows[index % len(self.rows)]].float()}


@dataclass(frozen=True)
class Scenes(Domain):
    """Encoded scenes in a folder: latents.safetensors and prompts.safetensors (see `Latents`)."""

    folder: str
    drop: float = 0.1

    def source(self, model: Model, data_free: bool) -> Source:
        home = Path(self.folder)
        prompts = load_file(home / "prompts.safetensors")["prompts"]
        return Latents(**load_file(home / "latents.safetensors"), prompts=prompts, drop=self.drop)


def network(sizes: Sizes) -> DiffusersNet:
    """A U-Net of two levels with cross-attention on the lower one, 8x8."""
    config = {
        "sample_size": SHAPE[1],
        "block_out_channels": sizes.unet_channels,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 384,
        "attention_head_dim": 4,  # which diffusers takes for the number of heads
        "norm_num_groups": 8,
    }
    return DiffusersNet("UNet2DConditionModel", json.dumps(config), TOKENS, pixels=32)


def run(sizes: Sizes, folder: Path) -> Run:
    """The teacher's training on what is in `folder` (see `Scenes`)."""
    schedule = schedule_of(SCHEDULER, "DDIMScheduler")
    return Run(
        method=Pretrain(
            sampler=FewStep(999.0, min(sizes.calls, 20), "ddim", unit=True),
            times=Uniform(0.0, 999.0),
            weight=Power(0, -2),
        ),
        model=Model(network(sizes), SHAPE, 0, schedule.path, schedule.predicts),
        domain=Scenes(str(folder)),
        steps=sizes.teacher_steps,
        batch=sizes.batch,
        optim=Optim(1.5e-3, betas=(0.9, 0.99), warmup=200, decay="cosine", clip=1.0),
        ema=EMA(halflife=10_000),
        sample_every=2000,
        save_every=250,
    )


def assemble(unet: Any, coder: Any, encoder: Any, words: Any) -> Any:
    """The teacher with all that belongs to it, as diffusers has it."""
    return diffusers.StableDiffusionPipeline(
        vae=coder,
        text_encoder=encoder,
        tokenizer=words,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
