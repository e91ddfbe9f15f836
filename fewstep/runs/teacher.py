"""Where a run's teacher, and with it its network, is from: a folder, a file, a closed form."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.storage.files import digest
from fewstep.diffusion.generator import Generator
from fewstep.nets.lora import LoRA, recorded
from fewstep.diffusion.model import Model, OfTeacher
from fewstep.teachers.diffusers.folder import is_pipeline, open_folder, refuse_single_file
from fewstep.teachers.diffusers.load import describe_network, with_text_and_vae, pipeline_card
from fewstep.teachers.diffusers.load import load_pipeline as load_pipeline
from fewstep.domains.domain import Domain
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder, first_difference
from fewstep.storage.model_folder import stored_card, weights_digest
from fewstep.teachers import snapshots


def open_generator(path: Path | str, device: torch.device | str = "cpu") -> Generator:
    """The generator in a pipeline, run or model folder, or in a snapshot file; on `device`."""
    if is_pipeline(path):
        return load_pipeline(path, device)
    refuse_single_file(path)
    found = snapshots.load_model_or_snapshot(path)
    found.denoiser.to(device)
    return found


def describe_model(path: Path | str) -> Model:
    """The description of what `opened` would give, found without reading a weight's value."""
    if is_pipeline(path):
        return describe_network(open_folder(path))
    refuse_single_file(path)
    return snapshots.stored_description(path)


def notes_on(path: Path | str) -> list[str]:
    """What a person should know of a teacher's folder before it is used."""
    unread = open_folder(path).unread if path and is_pipeline(path) else []
    if not unread:
        return []
    shown = ", ".join(unread[:4]) + (f" and {len(unread) - 4} more" if len(unread) > 4 else "")
    return [f"{path} holds weights that are not read, as stock diffusers does not: {shown}"]


def teacher_digest(path: Path | str) -> str:
    """SHA-256 over the weights of what `opened` would give."""
    if not is_pipeline(path):
        return digest(Path(path)) if Path(path).is_file() else weights_digest(path)
    files = (f"{file.name} {digest(file)}" for file in open_folder(path).weights())
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def digests_of(path: Path | str) -> dict[str, str]:
    """Digests of all that what `opened` gives computes with.

    Its weights; of a pipeline, and of its students, the text encoders and the VAE too. What the
    folder says of the network is part of a run's settings.
    """
    found = {"weights": teacher_digest(path)}
    if is_pipeline(path):
        folder = open_folder(path)
        return found | {"text": folder.text_digest, "vae": folder.vae_digest}
    told = {} if Path(path).is_file() else pipeline_card(stored_card(path))
    return found | {key: str(told[key]) for key in ("text", "vae") if key in told}


def digests(run: Run, teacher: str, init: str) -> dict[str, Any]:
    """Digests of all files that a `settled` run rests on, but for its data and its code.

    Those of the data are in the run itself, those of code files beside it.
    """
    models = {"teacher": teacher if run.distils else "", "init": init}
    found: dict[str, Any] = {key: digests_of(path) for key, path in models.items() if path}
    return found | run.domain.digests()


def teacher_of(folder: RunFolder, moved: str = "") -> str:
    """Where the teacher of a run is, which is the one that it was started with; "" for none.

    moved: where a person says that it is now, which is recorded. A ValueError where it is gone,
    or is another one.
    """
    facts = folder.facts()
    where = moved or facts.get("teacher") or ""
    known = (facts.get("digests") or {}).get("teacher")
    if not where or known is None:
        return str(where)
    try:
        found = digests_of(where)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the teacher of {folder.path} cannot be read ({error}); if it was moved, say where "
            "it is with --teacher"
        ) from None
    if found != known:
        raise ValueError(
            f"{where} no longer holds the teacher of {folder.path} "
            f"({first_difference(known, found, 'digests')}); say where it is with --teacher"
        )
    if moved:
        folder.relocate(moved)
    return str(where)


def load_finite(path: str, device: torch.device | str = "cpu") -> Generator:
    """The same as `opened`, all of whose numbers are finite."""
    found = open_generator(path, device)
    net: nn.Module = found.denoiser
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{path} holds numbers that are not finite, in {name}: its training diverged, or "
                "its file was converted wrongly; choose another model"
            )
    return found


def load_teacher(
    domain: Domain, path: str, device: torch.device | str = "cpu"
) -> Generator | None:
    """The teacher of a distillation: the model in `path`, or the domain's exact one."""
    return with_text_and_vae(load_finite(path, device)) if path else domain.exact()


def base_weights(lora: LoRA, teacher: str) -> dict[str, Tensor]:
    """The teacher's own state dict, in float32 and main memory, which adapters are merged with.

    A ValueError where the weights are not those any more that `lora` was recorded with.
    """
    recorded(lora, teacher_digest(teacher))
    found: nn.Module = open_generator(teacher).denoiser
    return found.state_dict()


def resolve_run(run: Run, teacher: str) -> Run:
    """The run as it is recorded: what it takes from its teacher and its files filled in."""
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
