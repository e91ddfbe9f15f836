"""Open the teacher of a run: a folder, a snapshot file, a pipeline, or a closed form."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model, OfTeacher
from fewstep.domains.domain import Domain
from fewstep.nets.lora import LoRA, recorded
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder, first_difference
from fewstep.storage.files import digest
from fewstep.storage.model_folder import stored_card, weights_digest
from fewstep.teachers import snapshots
from fewstep.teachers.diffusers.folder import is_pipeline, open_folder, refuse_single_file
from fewstep.teachers.diffusers.load import (
    describe_network,
    load_pipeline as load_pipeline,
    pipeline_card,
    with_text_and_vae,
)


def open_generator(path: Path | str, device: torch.device | str = "cpu") -> Generator:
    """The generator in a pipeline, run or model folder, or in a snapshot file, on `device`."""
    if is_pipeline(path):
        return load_pipeline(path, device)
    refuse_single_file(path)
    generator = snapshots.load_model_or_snapshot(path)
    generator.denoiser.to(device)
    return generator


def describe_model(path: Path | str) -> Model:
    """The `Model` that `open_generator` would give, found without reading a weight's value."""
    if is_pipeline(path):
        return describe_network(open_folder(path))
    refuse_single_file(path)
    return snapshots.stored_description(path)


def notes_on(path: Path | str) -> list[str]:
    """Notes for the user on a teacher's folder: weights in it that are not read."""
    unread = open_folder(path).unread if path and is_pipeline(path) else []
    if not unread:
        return []
    shown = ", ".join(unread[:4]) + (f" and {len(unread) - 4} more" if len(unread) > 4 else "")
    return [f"{path} holds weights that are not read, as stock diffusers does not: {shown}"]


def teacher_digest(path: Path | str) -> str:
    """SHA-256 over the weights that `open_generator` reads."""
    if not is_pipeline(path):
        return digest(Path(path)) if Path(path).is_file() else weights_digest(path)
    files = (f"{file.name} {digest(file)}" for file in open_folder(path).weights())
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def digests_of(path: Path | str) -> dict[str, str]:
    """SHA-256 of everything that the generator in `path` computes with, by kind.

    Its "weights"; of a pipeline and its students also the "text" encoders and the "vae". What the
    folder says of the network is part of a run's settings.
    """
    sha256 = {"weights": teacher_digest(path)}
    if is_pipeline(path):
        folder = open_folder(path)
        return sha256 | {"text": folder.text_digest, "vae": folder.vae_digest}
    card = {} if Path(path).is_file() else pipeline_card(stored_card(path))
    return sha256 | {key: str(card[key]) for key in ("text", "vae") if key in card}


def digests(run: Run, teacher: str, init: str) -> dict[str, Any]:
    """Digests of all files that a resolved run depends on, except its data and its code.

    Those of the data are in the run itself, those of code files beside it.
    """
    models = {"teacher": teacher if run.distils else "", "init": init}
    by_model: dict[str, Any] = {key: digests_of(path) for key, path in models.items() if path}
    return by_model | run.domain.digests()


def teacher_of(folder: RunFolder, moved: str = "") -> str:
    """Path of a run's teacher, checked to be the one the run was started with; "" for none.

    Arguments:
        folder: the run folder.
        moved: where the teacher is now, if the user says so; it is recorded.
    Raises ValueError where the teacher is gone, or is another one.
    """
    facts = folder.facts()
    where = moved or facts.get("teacher") or ""
    known = (facts.get("digests") or {}).get("teacher")
    if not where or known is None:
        return str(where)
    try:
        present = digests_of(where)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the teacher of {folder.path} cannot be read ({error}); if it was moved, say where "
            "it is with --teacher"
        ) from None
    if present != known:
        raise ValueError(
            f"{where} no longer holds the teacher of {folder.path} "
            f"({first_difference(known, present, 'digests')}); say where it is with --teacher"
        )
    if moved:
        folder.relocate(moved)
    return str(where)


def load_finite(path: str, device: torch.device | str = "cpu") -> Generator:
    """As `open_generator`; ValueError where a weight is not finite."""
    generator = open_generator(path, device)
    net: nn.Module = generator.denoiser
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{path} holds numbers that are not finite, in {name}: its training diverged, or "
                "its file was converted wrongly; choose another model"
            )
    return generator


def load_teacher(
    domain: Domain, path: str, device: torch.device | str = "cpu"
) -> Generator | None:
    """The teacher of a distillation: the model in `path`, or the domain's exact one."""
    return with_text_and_vae(load_finite(path, device)) if path else domain.exact()


def base_weights(lora: LoRA, teacher: str) -> dict[str, Tensor]:
    """The teacher's state dict, in float32 on the CPU, which adapters are merged with.

    Raises ValueError where the weights are no longer those that `lora` was recorded with.
    """
    recorded(lora, teacher_digest(teacher))
    denoiser: nn.Module = open_generator(teacher).denoiser
    return denoiser.state_dict()


def resolve_run(run: Run, teacher: str) -> Run:
    """The run as it is recorded: with the digests of its data, and its teacher's network.

    Raises ValueError where the network is to come from a teacher and none is given.
    """
    run = replace(run, domain=run.domain.settled())
    if run.lora is not None and teacher:
        run = replace(run, lora=recorded(run.lora, teacher_digest(teacher)))
    if not isinstance(run.model.net, OfTeacher):
        return run
    if not teacher:
        raise ValueError(
            "this run takes its network from its teacher: pass a pipeline folder, or the run "
            "folder of one, with --teacher"
        )
    return replace(run, model=describe_model(teacher))
