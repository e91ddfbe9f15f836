"""A diffusers folder as a teacher.

    teacher = load_pipeline("stable-diffusion-v1-5")
    pictures = teacher.sample(range(2), cond=teacher.text(["a red cube", "a blue ball"]))

The network becomes a `Denoiser` once, here; text encoders and VAE are those of the stock
pipeline, loaded when they are first needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import Flow
from fewstep.teachers.diffusers import parts
from fewstep.teachers.diffusers.adapter_base import Adapter, adapter_of
from fewstep.teachers.diffusers.adapters import ADAPTERS
from fewstep.teachers.diffusers.compatibility import check
from fewstep.teachers.diffusers.folder import PipelineFolder, is_pipeline, open_folder
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.teachers.diffusers.scheduler_config import Schedule, schedule_of
from fewstep.teachers.diffusers.text_and_vae import TextAndVAE


def load_pipeline(path: Path | str, device: torch.device | str = "cpu") -> Generator:
    """The teacher in a local folder of a diffusers pipeline, in float32 and evaluation mode.

    Arguments:
        path: the folder, with model_index.json and weights in safetensors.
        device: where the network is, and its text encoders and VAE once they are used.
    Returns a `Generator` of latents; `text` encodes prompts to conditions, `decode` and `encode`
    convert latents (N, C, h, w) and pictures (N, 3, H, W), `release` frees text encoders and VAE.
    Raises ValueError where diffusers is missing, or the folder is of no known pipeline, holds
    code, is not complete, or its parts do not fit each other.
    """
    folder = open_folder(path)
    model = describe_network(folder)
    stock = TextAndVAE(folder, device)
    denoiser: Any = model.build()
    adapter: Adapter = denoiser.net
    _fill(adapter, folder)
    adapter.set_null(stock.null())
    denoiser.requires_grad_(False).eval().to(device)
    return Generator(
        denoiser,
        read_schedule(folder).sampler(),
        model.shape,
        model=model,
        decode=stock.decode,
        encode=stock.encode,
        text=stock.prompts,
        release=stock.release,
        card=origin_card(folder),
    )


def with_text_and_vae(generator: Generator) -> Generator:
    """A student with the text encoders and the VAE of the folder that it was distilled from.

    Raises ValueError where that folder is gone, or has other text encoders now.
    """
    of_pipeline = generator.model is not None and isinstance(generator.model.net, DiffusersNet)
    if not of_pipeline or generator.text is not None:
        return generator
    stock = TextAndVAE(origin_folder(generator), generator.device)
    return replace(generator, text=stock.prompts, encode=stock.encode, decode=stock.decode)


def origin_folder(generator: Generator) -> PipelineFolder:
    """The folder that a student was distilled from.

    Raises ValueError where it is gone, or holds other text encoders or another VAE now.
    """
    card = pipeline_card(generator.card)
    if "folder" not in card or not is_pipeline(card["folder"]):
        raise ValueError(
            f"this model needs the text encoders and VAE of {card.get('folder', 'a pipeline')}, "
            "which is not there; put it back"
        )
    folder = open_folder(card["folder"])
    if folder.vae_digest != card.get("vae", folder.vae_digest):
        raise ValueError(f"{folder.path} has another VAE than this model was trained with")
    if folder.text_digest != card.get("text"):
        raise ValueError(f"{folder.path} has other text encoders than this model was trained with")
    return folder


def pipeline_card(card: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of a student's card on the pipeline, also of a student's student."""
    while "folder" not in card and "teacher" in card:
        card = card["teacher"]
    return card


def at_shape(generator: Generator, shape: tuple[int, ...]) -> Generator:
    """The same model of a pipeline for samples of another size; the generator is changed, too.

    A pipeline's own times are those of the new size. Raises ValueError for a model without sizes,
    and for a size that its network does not take.
    """
    net, model = adapter_of(generator.denoiser), generator.model
    if model is None or not isinstance(model.net, DiffusersNet) or net is None:
        raise ValueError("only models of text-to-image pipelines are of any size")
    model.net.fits(shape)
    net.resize(shape)
    sampler = generator.sampler
    if "folder" in generator.card:  # the pipeline itself, whose times depend on the size
        sampler = read_schedule(open_folder(generator.card["folder"]), shape).sampler()
    return replace(generator, shape=shape, model=replace(model, shape=shape), sampler=sampler)


def sized(model: Model, size: str) -> tuple[int, ...]:
    """The shape of samples of `model` for pictures of "WIDTHxHEIGHT" pixels, such as "1024x768".

    Raises ValueError for what is no such size, or not one of this model.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if match is None:
        raise ValueError(f"a size is WIDTHxHEIGHT in pixels, such as 1024x768, got {size!r}")
    if not isinstance(model.net, DiffusersNet):
        raise ValueError("--size is for text-to-image pipelines and their students; leave it out")
    scale, (width, height) = model.net.scale, map(int, match.groups())
    if not width or not height or width % scale or height % scale:
        raise ValueError(f"this model makes pictures of multiples of {scale} pixels, got {size}")
    shape = (model.shape[0], height // scale, width // scale)
    model.net.fits(shape)
    return shape


def read_schedule(folder: PipelineFolder, shape: tuple[int, ...] = ()) -> Schedule:
    """The noise path, prediction type and shift that the scheduler of a folder describes.

    shape: of a sample; (): that which the network's configuration names.
    """
    config, kind = folder.config(folder.family.network), ADAPTERS[folder.family.network_class]
    _, height, width = shape or _shape(folder)
    places = (height // kind.patch(config)) * (width // kind.patch(config))
    where, by_steps = folder.config_path("scheduler"), folder.family.shift == "steps"
    try:
        schedule = schedule_of(
            folder.config("scheduler"), folder.parts["scheduler"], places, by_steps
        )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(where) in text else f"{where}: {text}") from None
    if isinstance(schedule.path, Flow) != kind.flow:
        said, trained = ("betas", "a flow") if kind.flow else ("a flow", "betas")
        raise ValueError(
            f"{folder.path}: a {folder.family.network_class} is trained on {trained}, but its "
            f"{folder.parts['scheduler']} says {said}; put the right scheduler back"
        )
    return schedule


def _shape(folder: PipelineFolder) -> tuple[int, int, int]:
    """Shape (C, H, W) of a sample."""
    try:
        config = folder.config(folder.family.network)
        return ADAPTERS[folder.family.network_class].shape(config)
    except ValueError as error:
        raise ValueError(f"{folder.path}, {folder.family.network}: {error}") from None


def describe_network(folder: PipelineFolder) -> Model:
    """The network of a folder as a description, from configurations and headers alone.

    Raises ValueError where parts of the folder do not fit each other.
    """
    schedule = read_schedule(folder)
    family, stock = folder.family, TextAndVAE(folder)
    config, shape = folder.config(family.network), _shape(folder)
    words = json.dumps(config, sort_keys=True)
    net = DiffusersNet(family.network_class, words, stock.tokens, shape[1] * stock.scale)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            adapter = net.build(shape, 0)
    except ValueError as error:
        raise ValueError(f"{folder.config_path(family.network)}: {error}") from None
    check(folder, adapter)
    return Model(net, shape, 0, schedule.path, schedule.predicts)


def origin_card(folder: PipelineFolder) -> dict[str, Any]:
    """The card of a pipeline: its folder, what it is, digests of text encoders and VAE."""
    return {
        "pipeline": folder.pipeline,
        "folder": str(folder.path.resolve()),
        "text": folder.text_digest,
        "vae": folder.vae_digest,
    }


def network_weights(folder: PipelineFolder) -> dict[str, Tensor]:
    """The network's tensors in float32, under diffusers' names."""
    stored = parts.tensors(folder.files[folder.family.network])
    return {name: t.to(torch.float32) for name, t in stored.items()}


def network(folder: PipelineFolder) -> Any:
    """The network of a folder as an object of diffusers, in float32."""
    name, kind = folder.family.network, folder.family.network_class
    net = parts.built(kind, folder.config(name), folder.path / name, meta=False)
    net.load_state_dict(network_weights(folder))
    return net.requires_grad_(False).eval()


def _fill(adapter: Adapter, folder: PipelineFolder) -> None:
    """Load the network's weights as float32, all of them and no others."""
    state = network_weights(folder)
    parts.fit(adapter.net.state_dict(), state, folder.path / folder.family.network)
    adapter.net.load_state_dict(state)
