"""A diffusers folder as a teacher.

    teacher = load("stable-diffusion-v1-5")
    pictures = teacher.sample(range(2), cond=teacher.text(["a red cube", "a blue ball"]))

The network becomes a `Denoiser` once, here; text encoders and VAE are those of the stock
pipeline, loaded when they are first needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.generator import Generator
from fewstep.model import Model
from fewstep.path import Flow
from fewstep.pipelines.adapter import Adapter
from fewstep.pipelines.adapters import ADAPTERS
from fewstep.pipelines.folder import PipelineFolder, is_pipeline, open_folder
from fewstep.pipelines.net import Diffusers, arguments
from fewstep.pipelines.schedule import Schedule, schedule
from fewstep.pipelines.stock import Stock


def load(path: Path | str, device: torch.device | str = "cpu") -> Generator:
    """The generator in a local pipeline folder, in float32.

    Raises ValueError for a folder that is not of a known pipeline, or holds code.
    """
    folder = open_folder(path)
    model = describe(folder)
    stock = Stock(folder, device)
    denoiser: Any = model.build()
    adapter: Adapter = denoiser.net
    _fill(adapter, folder)
    adapter.set_null(stock.null())
    denoiser.requires_grad_(False).eval().to(device)
    return Generator(
        denoiser,
        timing(folder).sampler(),
        model.shape,
        model=model,
        decode=stock.decode,
        encode=stock.encode,
        text=stock.prompts,
        release=stock.release,
        card=card(folder),
    )


def dressed(generator: Generator) -> Generator:
    """A student with the text encoders and the VAE of the folder that it was distilled from.

    Raises ValueError where that folder is gone, or has other text encoders now.
    """
    of_pipeline = generator.model is not None and isinstance(generator.model.net, Diffusers)
    if not of_pipeline or generator.text is not None:
        return generator
    stock = Stock(origin(generator), generator.device)
    return replace(generator, text=stock.prompts, encode=stock.encode, decode=stock.decode)


def origin(generator: Generator) -> PipelineFolder:
    """The folder that a student was distilled from; ValueError as in `dressed`."""
    told = root(generator.card)
    if "folder" not in told or not is_pipeline(told["folder"]):
        raise ValueError(
            f"this model needs the text encoders and VAE of {told.get('folder', 'a pipeline')}, "
            "which is not there; put it back"
        )
    folder = open_folder(told["folder"])
    if folder.text_digest != told.get("text"):
        raise ValueError(f"{folder.path} has other text encoders than this model was trained with")
    return folder


def root(card: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the card of a pipeline's student, or of its student in turn, tells of the pipeline."""
    while "folder" not in card and "teacher" in card:
        card = card["teacher"]
    return card


def timing(folder: PipelineFolder) -> Schedule:
    """What the scheduler says about the network."""
    config, kind = folder.config(folder.family.network), ADAPTERS[folder.family.network_class]
    side = _shape(folder)[1] // kind.patch(config)
    found = schedule(folder.config("scheduler"), folder.parts["scheduler"], side**2)
    if isinstance(found.path, Flow) != kind.flow:
        said, trained = ("betas", "a flow") if kind.flow else ("a flow", "betas")
        raise ValueError(
            f"{folder.path}: a {folder.family.network_class} is trained on {trained}, but its "
            f"{folder.parts['scheduler']} says {said}; put the right scheduler back"
        )
    return found


def _shape(folder: PipelineFolder) -> tuple[int, int, int]:
    """Shape of a sample."""
    try:
        config = folder.config(folder.family.network)
        return ADAPTERS[folder.family.network_class].shape(config)
    except ValueError as error:
        raise ValueError(f"{folder.path}, {folder.family.network}: {error}") from None


def describe(folder: PipelineFolder) -> Model:
    """The network of a folder as a description, from its configurations alone."""
    found = timing(folder)
    family = folder.family
    config = folder.config(family.network)
    if folder.parts[family.network] in family.older:  # which had more arguments than it used
        config = {key: config[key] for key in config.keys() & arguments(family.network_class)}
    shape = _shape(folder)
    net = Diffusers(
        family.network_class,
        json.dumps(config, sort_keys=True),
        Stock(folder).tokens,
        shape[1] * Stock(folder).scale,
    )
    return Model(net, shape, 0, found.path, found.predicts)


def card(folder: PipelineFolder) -> dict[str, Any]:
    """What is known of origin: where the folder was, what it is, its text encoders and VAE."""
    return {
        "pipeline": folder.pipeline,
        "folder": str(folder.path.resolve()),
        "text": folder.text_digest,
        "vae": folder.vae_digest,
    }


def weights(folder: PipelineFolder) -> dict[str, Tensor]:
    """The network's tensors in float32, under diffusers' names."""
    from safetensors.torch import load_file

    files = [load_file(path) for path in folder.weights()]
    return {name: t.to(torch.float32) for file in files for name, t in file.items()}


def _fill(adapter: Adapter, folder: PipelineFolder) -> None:
    """Load the network's weights as float32, all of them and no others."""
    state = weights(folder)
    wanted = {name: tuple(t.shape) for name, t in adapter.net.state_dict().items()}
    came = {name: tuple(t.shape) for name, t in state.items()}
    wrong = sorted(n for n in wanted.keys() | came.keys() if wanted.get(n) != came.get(n))
    if wrong:
        n = wrong[0]
        raise ValueError(
            f"{folder.path}: the weights do not fit the configuration in {len(wrong)} places, "
            f"first {n}: expected {wanted.get(n, 'nothing')}, found {came.get(n, 'nothing')}"
        )
    adapter.net.load_state_dict(state)
