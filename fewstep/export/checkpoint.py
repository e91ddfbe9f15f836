"""A student as one checkpoint file in the original layout: network, autoencoder, text encoders.

    model.diffusion_model.*          the student's U-Net
    first_stage_model.*              the autoencoder of its teacher
    cond_stage_model.*               the text encoder of Stable Diffusion 1 (`transformer.`) or
                                     2 (`model.`)
    conditioner.embedders.0 and 1.*  both of SDXL

This is what most programs for pictures call a checkpoint. It holds no scheduler: the card says
with which sampler and steps it is to be used. What is written is read again by diffusers'
`from_single_file`, and every tensor is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.export.atomic_output import new_output
from fewstep.export.client_metadata import example, save_network, sidecars
from fewstep.export.diffusers_pipeline import picture, plain_of_pipeline, scheduled
from fewstep.export.model_card import card
from fewstep.export.original_names import clip_names, open_clip_names, unet_names, vae_names
from fewstep.export.schedulers import call
from fewstep.storage.files import spelled, write
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers import parts
from fewstep.teachers.diffusers.folder import PipelineFolder
from fewstep.teachers.diffusers.load import origin_folder
from fewstep.teachers.diffusers.network import require_library
from fewstep.teachers.diffusers.single_file import UNET, VAE, left_out

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Whose networks are U-Nets of the original code."""
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
WIDE = 1024
"""Width of the text encoder of Stable Diffusion 2, OpenCLIP's; that of 1 is CLIP's."""


def to_checkpoint(run: Path, out: Path) -> float:
    """Write the student of a run as the file `out`, a new one named .safetensors.

    Returns the largest difference of a weight that diffusers reads from it, which is 0. ValueError
    for a student of another pipeline than `PIPELINES`, or with other parts than these have.
    """
    student = plain_of_pipeline(load_student(run), run)
    folder = origin_folder(student)
    if folder.pipeline not in PIPELINES:
        raise ValueError(
            f"checkpoints in the original layout are written of {' and '.join(PIPELINES)}, and "
            f"this is a {folder.pipeline}; use --to diffusers"
        )
    scheduler = scheduled(student, folder, run)
    shown = example(student, run)
    with new_output(out, ".safetensors") as place:
        state = original(student, folder)
        save_network(place, state, student, folder.pipeline, shown, original=True)
        del state
        sidecars(student, folder.pipeline, place, shown)
        off = _difference(place, student, folder)
        use = _use(student, folder, out.name, scheduler)
        write(
            place.with_name(f"{out.name}.md"),
            card(student, run, use, {}, picture=(shown.prompt, f"{out.stem}.png")),
        )
    return off


def original(student: Generator, folder: PipelineFolder) -> dict[str, Tensor]:
    """All tensors of the file, float32 and contiguous, by their original names.

    Those that are so already are the networks' own, not copies.
    """
    unet = student.denoiser.net.net
    state = _under(UNET, unet_names(unet.state_dict(), unet.config))
    vae = parts.vae(folder)
    state |= _under(VAE, vae_names(vae.state_dict(), vae.config))
    first = parts.text_encoder(folder, "text_encoder").state_dict()
    if "text_encoder_2" in folder.files:
        second = parts.text_encoder(folder, "text_encoder_2").state_dict()
        state |= _under(FIRST, clip_names(first)) | _under(SECOND, open_clip_names(second))
    elif folder.parts["text_encoder"] not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ValueError(
            f"the original layout has no place for a {folder.parts['text_encoder']}; use "
            "--to diffusers"
        )
    elif folder.text_config("text_encoder").hidden_size == WIDE:
        state |= _under(OPEN_CLIP, open_clip_names(first))
    else:
        state |= _under(CLIP, clip_names(first))
    return state


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under a prefix."""
    return {
        prefix + name: t.detach().to("cpu", torch.float32).contiguous()
        for name, t in state.items()
    }


def _difference(path: Path, student: Generator, folder: PipelineFolder) -> float:
    """The largest difference of a weight that diffusers reads; ValueError where one is missing."""
    kind: Any = getattr(require_library("diffusers"), folder.pipeline)
    with spelled(path) as named:
        pipe = kind.from_single_file(
            str(named), config=str(folder.path), local_files_only=True, **left_out(kind)
        )
    expected = {"unet": student.denoiser.net.net, "vae": parts.vae(folder)}
    expected |= {name: parts.text_encoder(folder, name) for name in folder.encoders}
    worst = 0.0
    for name, module in expected.items():
        found = getattr(pipe, name).state_dict()
        for key, tensor in module.state_dict().items():
            if key not in found or found[key].is_meta or found[key].shape != tensor.shape:
                raise ValueError(f"diffusers finds no {key} of the {name} in {path.name}")
            gap = (found[key].float().cpu() - tensor.float().cpu()).abs().max()
            worst = max(worst, float(gap))
    if worst > 0:
        raise ValueError(
            f"diffusers reads a weight of {path.name} that is off by {worst:.2g}; nothing was "
            "written"
        )
    return worst


def _use(
    student: Generator, folder: PipelineFolder, name: str, scheduler: tuple[str, dict[str, Any]]
) -> str:
    """Python that samples from the file, with configurations from the teacher's folder."""
    kind, config = scheduler
    home = json.dumps(str(folder.path), ensure_ascii=False)
    return f"""import torch
from diffusers import {folder.pipeline}, {kind}

pipe = {folder.pipeline}.from_single_file(
    "{name}", config={home}, local_files_only=True  # the teacher's folder
)
pipe.scheduler = {call(kind, config)}
{picture(student, folder)}
"""
