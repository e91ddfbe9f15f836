"""Finished models: one folder with a description, the weights, and their digests.

    student/   model.json   model.safetensors   manifest.json

A network or sampler of the user's own file has a copy of that file beside them (see
`fewstep.storage.user_code`).
`load_student` rebuilds the network from its description and checks the digests before a weight
is used. Teachers trained here are stored the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from fewstep.config import encode, own_files, own_sources
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Sampler
from fewstep.diffusion.without_values import without_values
from fewstep.distillation.method import Method
from fewstep.storage.files import (
    Damaged,
    nothing,
    of_run,
    origin_of,
    pack,
    read_folder,
    read_json,
    read_manifest,
    spelled,
    unpack,
    write_folder,
)
from fewstep.storage.user_code import copies, decoded
from fewstep.training import distributed

SLACK = 4
"""Tensors that a network registers while it is built, for each that it stores."""
CALLS, NUMBERS = 10_000, 1 << 26
"""Network calls a sample, and numbers in one, that a stored model has at most."""
KIND = "fewstep model"
"""What the manifest of a finished model says it is."""


def save_student(
    folder: Path | str, net: nn.Module, model: Model, method: Method, card: Mapping[str, Any]
) -> None:
    """Write a finished student as a model folder.

    Args:
        folder: the new folder; an existing one is replaced when the new one is complete.
        net: an instance of `model`, whose state dict is stored.
        model: the description that the network is rebuilt from.
        method: its sampler is stored, and its repr goes into the card.
        card: what is known of origin and licence; JSON values.
    """
    card = {"method": repr(method), **card}
    save_model(folder, net.state_dict(), model, method.sampler, card)


def save_model(
    folder: Path | str,
    weights: Mapping[str, Tensor],
    model: Model,
    sampler: Sampler,
    card: Mapping[str, Any],
    adapters: Mapping[str, Tensor] = {},
    origin: Mapping[str, Any] = {},
    check: Callable[[], None] = nothing,
) -> None:
    """Write a model folder: description, weights and manifest.

    Args:
        folder: the new folder; an existing one is replaced when the new one is complete.
        weights: a state dict of `model.build()`, of any dtype.
        model: the description that the network is rebuilt from.
        sampler: how it is sampled by default.
        card: what is known of origin and licence; JSON values.
        adapters: the trained adapters, if they are merged into `weights` (see
            `fewstep.nets.lora`); they are stored as lora.safetensors.
        origin: the run that made it (see `fewstep.storage.files.of_run`).
        check: called before anything is written and again before anything is replaced.
    """
    description = {"model": encode(model), "sampler": encode(sampler), "card": dict(card)}
    if own := own_sources((model, sampler)):
        description["files"] = own_files((model, sampler))
    files = {
        **copies(own.values()),
        "model.json": (json.dumps(description, indent=2) + "\n").encode(),
        "model.safetensors": pack(weights),
    }
    if adapters:
        files["lora.safetensors"] = pack(adapters)
    extra = {"origin": dict(origin)} if origin else {}
    write_folder(Path(folder), files, {"kind": KIND, **extra}, check)


def load_student(folder: Path | str, device: torch.device | str = "cpu") -> Generator:
    """The generator stored in `folder`, or in a run folder that holds a finished one.

    Args:
        folder: a model folder, whose digests are checked before a weight is used, or a run folder.
        device: where the network goes.

    Returns: a `Generator` whose network is in evaluation mode, without gradients.

    Raises `Damaged` (a ValueError) where something is missing or altered, and ValueError where the
    described network is much larger than the stored weights or the two do not fit.
    """
    folder = is_finished(folder)
    _of_model(folder, read_folder(folder))
    description = _description(folder)
    model: Model = decoded(description["model"], Model, folder)
    sampler: Sampler = decoded(description["sampler"], Sampler, folder)
    if sampler.calls > CALLS or prod(model.shape) > NUMBERS:
        raise Damaged(
            f"{folder / 'model.json'} describes samples of shape {model.shape} in {sampler.calls} "
            "calls, more than any model that fewstep makes"
        )
    _refuse_larger(model, folder)
    net = model.build()
    load_weights(net, unpack(folder / "model.safetensors"), folder)
    net.requires_grad_(False).eval().to(device)
    return Generator(net, sampler, model.shape, model.classes, model, card=description["card"])


def _refuse_larger(model: Model, folder: Path) -> None:
    """ValueError where the described network is much larger than the stored weights.

    It is built on the meta device, which takes no memory for values, and no further than the
    stored weights allow.
    """
    weights = folder / "model.safetensors"
    try:
        with spelled(weights) as path, safe_open(path, "pt") as file:
            stored = [prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except FileNotFoundError:
        raise Damaged(f"{weights} is missing") from None
    except SafetensorError as error:
        raise Damaged(f"{weights} is not a safetensors file ({error})") from None
    most, numbers, met = SLACK * (len(stored) + 100), SLACK * (sum(stored) + 10_000), [0, 0]

    def meet(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        met[0] += 1
        met[1] += 0 if tensor is None else tensor.numel()
        if met[0] > most or met[1] > numbers:
            raise ValueError(
                f"{folder / 'model.json'} describes a larger network than the weights beside it"
            )

    hooks = (
        register_module_parameter_registration_hook(meet),
        register_module_buffer_registration_hook(meet),
    )
    try:
        with without_values():
            model.build()
    except (NotImplementedError, AttributeError):  # what cannot be built so is built below
        pass
    finally:
        for hook in hooks:
            hook.remove()


def model_description(folder: Path | str) -> Model:
    """The network that `load_student` would build, as its folder describes it."""
    folder = is_finished(folder)
    model: Model = decoded(_description(folder)["model"], Model, folder)
    return model


def stored_card(folder: Path | str) -> dict[str, Any]:
    """The card of a finished folder: what it records of its origin; {} where it has none."""
    card = _description(is_finished(folder)).get("card")
    return card if isinstance(card, dict) else {}


def weights_digest(folder: Path | str) -> str:
    """SHA-256 of the weights file, as the manifest records it; the file is not read."""
    folder = is_finished(folder)
    return str(_of_model(folder, read_manifest(folder))["sha256"]["model.safetensors"])


def _of_model(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """`facts`, a manifest; `Damaged` unless it is that of a finished model."""
    if facts.get("kind") != KIND:
        raise Damaged(f"{folder} is a checkpoint or something else, not a finished model")
    return facts


def is_finished(folder: Path | str) -> Path:
    """The model folder that `folder` is, or that is in the run folder `folder`.

    `Damaged` where there is none; ValueError where a run folder holds a model of another run.
    """
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
    """The content of model.json; `Damaged` where it describes no model."""
    description = read_json(folder / "model.json")
    if not isinstance(description, dict) or not {"model", "sampler"} <= description.keys():
        raise Damaged(f"{folder / 'model.json'} does not describe a model")
    if not isinstance(description.setdefault("card", {}), dict):
        raise Damaged(f"{folder / 'model.json'} has a card that is none")
    return description


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Load `tensors` into `net`; names and shapes must be the same.

    ValueError names the first few differences, and `origin` as the file. Tensors are sharded as
    those of the net are.
    """
    expected = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != given:
        differences = [
            f"{name}: expected {expected.get(name, 'nothing')}, found {given.get(name, 'nothing')}"
            for name in sorted(expected.keys() | given.keys())
            if expected.get(name) != given.get(name)
        ]
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{origin} does not fit: {'; '.join(differences[:3])}{more}")
    state = net.state_dict()
    net.load_state_dict({name: distributed.scatter(t, state[name]) for name, t in tensors.items()})
