"""Load snapshots of EDM, EDM2, SiD and SiDA, and convert them to model folders.

    teacher = load_snapshot("edm-cifar10-32x32-uncond-vp.pkl")
    convert("edm-cifar10-32x32-uncond-vp.pkl", "teachers/cifar10")

A teacher is sampled by EDM's 18 Heun steps, over the noise levels its network was made for; a
one-step student (SiD, SiDA) by one call at sigma = 2.5. Weights keep their stored types in the
folder and are float32 in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Karras
from fewstep.diffusion.types import Sampler
from fewstep.nets.precond import Preconditioned
from fewstep.safe_pickle import Snapshot, SnapshotObject, read_snapshot
from fewstep.storage.model_folder import save_model
from fewstep.teachers import edm, edm2
from fewstep.teachers.network_config import describe

LICENCE = "none recorded in the file; CC BY-NC-SA 4.0 if this is one of NVIDIA's"
"""What is known of the licence of an EDM or EDM2 network, and of its code."""


def load_snapshot(
    path: str | Path,
    name: str = "",
    student: bool = False,
    device: torch.device | str = "cpu",
) -> Generator:
    """The generator in a snapshot or training state; nothing of the file is executed.

    Args:
        path: the file (.pkl or .pt).
        name: the object of the file; by default "ema", else "G_ema", else its only network.
        student: sample with one call at sigma = 2.5 (SiD, SiDA) in place of 18 Heun steps.
        device: where the network goes.

    Raises ValueError for a file that is not such a snapshot, or not of a network known here.
    """
    net, model, sampler, card, _ = _open(Path(path), name, student)
    net.requires_grad_(False).to(device)
    return Generator(net, sampler, model.shape, model.classes, model, card=card)


def stored_description(path: str | Path) -> Model:
    """The `Model` that `load_snapshot` would give; no weight's value is read."""
    snapshot = read_snapshot(path)
    return description(snapshot.objects[choose_object(snapshot)])[0]


def convert(path: str | Path, out: str | Path, name: str = "", student: bool = False) -> None:
    """Write what `load_snapshot` would give as the model folder `out`.

    ValueError where `out` is not new or an empty folder, and as of `load_snapshot`.
    """
    folder = Path(out) if Path(out).name not in ("", "..") else Path(out).resolve()
    taken = folder.is_symlink() or (folder.exists() and not folder.is_dir())
    if taken or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{out} exists already; choose a new or empty folder")
    _, model, sampler, card, snapshot_object = _open(Path(path), name, student)
    save_model(folder, snapshot_object.state, model, sampler, card)


def _open(
    path: Path, name: str, student: bool
) -> tuple[Preconditioned, Model, Sampler, dict[str, Any], SnapshotObject]:
    """The network, its description, sampler and card, and its object in the file."""
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "missing"
        raise ValueError(f"{path} is {kind}; a snapshot is a file (.pkl or .pt)")
    snapshot = read_snapshot(path)
    try:
        chosen = choose_object(snapshot, name)
        snapshot_object = snapshot.objects[chosen]
        model, net = network(snapshot_object)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    card = {"source": {"file": path.name, "sha256": snapshot.sha256, "object": chosen}}
    card["source"] |= {
        "class": snapshot_object.class_name,
        "source_sha256": snapshot_object.source_sha256,
    }
    encoder = snapshot.objects.get("encoder")
    coder = {"class": encoder.class_name, "arguments": encoder.init_kwargs} if encoder else None
    full = {**card, "encoder": coder, "licence": LICENCE}
    sampler = FewStep(2.5) if student else Heun(_times(model.path))
    return net, model, sampler, jsonable(full), snapshot_object


def choose_object(snapshot: Snapshot, name: str = "") -> str:
    """The name of the object to load: `name`, or ema, or G_ema, or the only network.

    ValueError where there is none, or it is not clear which.
    """
    networks = [key for key, snapshot_object in snapshot.objects.items() if snapshot_object.state]
    holds = f"it holds {', '.join(networks)}" if networks else "it holds none"
    if name:
        if name not in networks:
            raise ValueError(f"there is no network {name!r}; {holds}")
        return name
    first = [key for key in ("ema", "G_ema", *networks[: len(networks) == 1]) if key in networks]
    if not first:
        raise ValueError(f"which network is meant is not clear; {holds}")
    return first[0]


def network(found: SnapshotObject) -> tuple[Model, Preconditioned]:
    """The description and denoiser of an object of a snapshot; ValueError where it is none."""
    model, _ = description(found)
    if found.class_name == "Precond":
        return model, edm2.build(found.init_kwargs, found.state)
    return model, edm.build(found.init_kwargs, found.state, class_name=found.class_name)


def description(found: SnapshotObject) -> tuple[Model, Preconditioned]:
    """The description of an object of a snapshot, and its network without weights."""
    if found.init_args:
        raise ValueError(f"{found.class_name} was made with arguments that have no names")
    return describe(found.class_name, found.init_kwargs)


def jsonable(value: Any) -> Any:
    """`value` as JSON values; infinity and NaN as words."""
    return json.loads(json.dumps(value), parse_constant=str)


def _times(path: NoisePath) -> Karras:
    """EDM's ladder, within the levels that the network was made for."""
    return Karras(max(Karras.lo, path.t_min), min(Karras.hi, path.t_max))
