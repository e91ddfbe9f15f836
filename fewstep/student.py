"""Finished models: one folder with a description, the weights, and their digests.

    student/   model.json   model.safetensors   manifest.json

`load_student` rebuilds the network from its description and checks the digests before a weight
is used. Teachers trained here are stored the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.checkpoint import load_weights
from fewstep.core import Method, Sampler
from fewstep.files import (
    Damaged,
    nothing,
    of_run,
    origin_of,
    pack,
    read_folder,
    read_json,
    read_manifest,
    unpack,
    write_folder,
)
from fewstep.generator import Generator
from fewstep.model import Model
from fewstep.spec import decode, encode

KIND = "fewstep model"
"""What the manifest of a finished model says it is."""


def save_student(
    folder: Path, net: nn.Module, model: Model, method: Method, card: Mapping[str, Any]
) -> None:
    """Write `net`, an instance of `model`, as a finished folder; `card` tells its origin."""
    card = {"method": repr(method), **card}
    save_model(folder, net.state_dict(), model, method.sampler, card)


def save_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    model: Model,
    sampler: Sampler,
    card: Mapping[str, Any],
    adapters: Mapping[str, Tensor] = {},
    origin: Mapping[str, Any] = {},
    check: Callable[[], None] = nothing,
) -> None:
    """Write a finished folder; `weights` are a state dict of `model.build()`, of any type.

    adapters: what was trained of them, if they are merged (see `fewstep.lora`): lora.safetensors.
    origin: the run that made it (see `fewstep.files.of_run`); check: as of `write_folder`.
    """
    description = {"model": encode(model), "sampler": encode(sampler), "card": dict(card)}
    files = {
        "model.json": (json.dumps(description, indent=2) + "\n").encode(),
        "model.safetensors": pack(weights),
    }
    if adapters:
        files["lora.safetensors"] = pack(adapters)
    told = {"origin": dict(origin)} if origin else {}
    write_folder(folder, files, {"kind": KIND, **told}, check)


def load_student(folder: Path | str, device: torch.device | str = "cpu") -> Generator:
    """The generator stored in `folder`, or in a run folder that holds a finished one.

    Raises `Damaged` (a ValueError) where something is missing or altered.
    """
    folder = finished(folder)
    _of_model(folder, read_folder(folder))
    description = _description(folder)
    model: Model = decode(description["model"], Model)
    sampler: Sampler = decode(description["sampler"], Sampler)
    net = model.build()
    load_weights(net, unpack(folder / "model.safetensors"), folder)
    net.requires_grad_(False).eval().to(device)
    return Generator(
        net, sampler, model.shape, model.classes, model, card=description.get("card", {})
    )


def stored_model(folder: Path | str) -> Model:
    """The network that `load_student` would build, as its folder describes it."""
    model: Model = decode(_description(finished(folder))["model"], Model)
    return model


def stored_card(folder: Path | str) -> dict[str, Any]:
    """What a finished folder tells of its origin."""
    card = _description(finished(folder)).get("card")
    return card if isinstance(card, dict) else {}


def stored_digest(folder: Path | str) -> str:
    """SHA-256 of the weights, as the manifest says; `load_student` refuses others."""
    folder = finished(folder)
    return str(_of_model(folder, read_manifest(folder))["sha256"]["model.safetensors"])


def _of_model(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """`facts`, which are the manifest of a finished model."""
    if facts.get("kind") != KIND:
        raise Damaged(f"{folder} is a checkpoint or something else, not a finished model")
    return facts


def finished(folder: Path | str) -> Path:
    """`folder`, or the finished model in the run folder that it is, if that run has made it."""
    folder = Path(folder)
    if (folder / "student" / "manifest.json").is_file():
        run, folder = folder, folder / "student"
        stored = read_manifest(folder)
        with suppress(Damaged):  # a model by itself is whole without its run
            facts = read_json(run / "run.json")
            if "origin" in stored:  # one that was put there by hand is of no run
                of_run(folder, stored, origin_of(facts))
    if not folder.exists():
        raise Damaged(f"there is no file or folder {folder}")
    if not (folder / "manifest.json").is_file():
        raise Damaged(f"{folder} holds no finished model (no manifest.json in it)")
    return folder


def _description(folder: Path) -> dict[str, Any]:
    """model.json."""
    description = read_json(folder / "model.json")
    if not isinstance(description, dict) or not {"model", "sampler"} <= description.keys():
        raise Damaged(f"{folder / 'model.json'} does not describe a model")
    return description
