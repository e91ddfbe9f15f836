"""Open the teacher of a run: a folder, a snapshot file, a pipeline, or a closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.autoencoder import are_latents, as_pictures
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model, OfTeacher
from fewstep.distillation.pictures import PictureFeatures, Reward, give_decoder
from fewstep.domains.domain import Domain
from fewstep.nets.lora import LoRA, recorded
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder, first_difference
from fewstep.storage.user_code import decoded
from fewstep.teachers.diffusers.load import at_shape, sized, with_text_and_vae
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.teachers.formats import format_of

UNDECODED = "none"
"""In place of the folder of an autoencoder: latents are given as they are."""


def open_generator(
    path: Path | str, device: torch.device | str = "cpu", model: Model | None = None
) -> Generator:
    """The generator in a pipeline, run or model folder, or in a snapshot file, on `device`.

    model: where that is another size of the same network of a pipeline, it is opened at that size.
    """
    generator = format_of(path).load(path, device)
    own = generator.model
    if model is None or own is None or own.net != model.net or own.shape == model.shape:
        return generator
    return at_shape(generator, model.shape) if isinstance(own.net, DiffusersNet) else generator


def open_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    vae: Path | str = "",
    size: str = "",
) -> Generator:
    """A finished model that makes what people look at: a student or a teacher.

    Args:
        path: a run or model folder, a pipeline folder, or a snapshot file.
        device: where the network goes.
        vae: the folder of the autoencoder that decodes latents, of a model that brings none;
            "none": they stay as they are.
        size: of the pictures of a pipeline or its student, such as "1024x768"; "": its own.

    Returns: a `Generator` with text encoders, decoder and conditions of its own. ValueError where
    one of them is missing, or nothing is to be decoded by `vae`.
    """
    described = describe_model(path, size) if size else None
    opened = with_text_and_vae(open_generator(path, device, described))
    opened = with_own_conditions(opened, path)
    if opened.text is not None:
        if vae:
            raise ValueError(f"{path} decodes its latents itself: leave out --vae")
        return opened
    if are_latents(opened.shape) and not vae:
        domain = domain_of(path)
        vae = vae if domain is None or domain.decodes else UNDECODED
    if str(vae) == UNDECODED:
        return opened
    return as_pictures(opened, str(vae))[0]


def with_conditions(generator: Generator, domain: Domain) -> Generator:
    """A generator whose samples have by default the conditions that the domain's data give."""
    found = domain.conditions()
    return generator if found is None else replace(generator, condition=found)


def with_own_conditions(generator: Generator, path: Path | str) -> Generator:
    """As `with_conditions`, by the domain of the run in `path`, if it is one and they are needed.

    ValueError where that domain cannot be read.
    """
    if not getattr(generator.denoiser, "data_conditions", None):
        return generator
    domain = domain_of(path)
    return generator if domain is None else with_conditions(generator, domain)


def domain_of(path: Path | str) -> Domain | None:
    """The domain of the run in the folder `path`; None where it is no run folder.

    ValueError where the domain cannot be read.
    """
    folder = Path(path)
    if not (folder / "run.json").is_file():
        return None
    found: Domain = decoded(RunFolder(folder).facts()["run"].get("domain"), Domain, folder)
    return found


def describe_model(path: Path | str, size: str = "") -> Model:
    """The `Model` that `open_generator` would give, found without reading a weight's value.

    size: of pictures, such as "1024x768", of a pipeline or its student; "": its own.
    """
    model = format_of(path).describe(path)
    return replace(model, shape=sized(model, size)) if size else model


def notes_on(path: Path | str) -> list[str]:
    """Notes for the user on a teacher's folder: weights in it that are not read."""
    unread = format_of(path).unread(path) if path else []
    if not unread:
        return []
    shown = ", ".join(unread[:4]) + (f" and {len(unread) - 4} more" if len(unread) > 4 else "")
    return [f"{path} holds weights that are not read, as stock diffusers does not: {shown}"]


def teacher_digest(path: Path | str) -> str:
    """SHA-256 over the weights that `open_generator` reads."""
    return format_of(path).weights_digest(path)


def digests_of(path: Path | str) -> dict[str, str]:
    """SHA-256 of everything that the generator in `path` computes with, by kind.

    Its "weights"; of a pipeline and its students also the "text" encoders and the "vae". What the
    folder says of the network is part of a run's settings.
    """
    kind = format_of(path)
    return {"weights": kind.weights_digest(path), **kind.further_digests(path)}


def digests(run: Run, models: Mapping[str, str]) -> dict[str, Any]:
    """Digests of all files that a resolved run depends on, except its data and its code.

    Those of the data are in the run itself, those of code files beside it. models: where its
    teacher is, and what its nets start as, by role; "" for none.
    """
    read = (key for key, path in models.items() if path and (run.distils or key != "teacher"))
    used = {key: models[key] for key in read}
    by_model: dict[str, Any] = {key: digests_of(path) for key, path in used.items()}
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


def load_finite(
    path: str, device: torch.device | str = "cpu", model: Model | None = None
) -> Generator:
    """As `open_generator`; ValueError where a weight is not finite."""
    generator = open_generator(path, device, model)
    net: nn.Module = generator.denoiser
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"{path} holds numbers that are not finite, in {name}: its training diverged, or "
                "its file was converted wrongly; choose another model"
            )
    return generator


def load_teacher(
    domain: Domain,
    path: str,
    device: torch.device | str = "cpu",
    model: Model | None = None,
) -> Generator | None:
    """The teacher of a distillation: the model in `path`, or the domain's exact one.

    It is asked as the domain says (`Domain.prepared`), and makes samples of the size of its
    student `model`. Losses on pictures decode with what it brings (`pictures_of`).
    """
    teacher = with_text_and_vae(load_finite(path, device, model)) if path else domain.exact()
    if teacher is not None:
        teacher = domain.prepared(teacher)
    if teacher is not None and teacher.text is not None:
        give_decoder(teacher.denoiser, teacher.decode)
    return teacher


def adapted_of(folder: RunFolder) -> str:
    """Path of what a run's adapters lie on: where its nets start, or its teacher."""
    return folder.facts()["init"] or teacher_of(folder)


def base_weights(lora: LoRA, teacher: str) -> dict[str, Tensor]:
    """The state dict, in float32 on the CPU, that adapters are merged with.

    teacher: what they were trained on, a run's teacher or its `init`.

    Raises ValueError where the weights are no longer those that `lora` was recorded with.
    """
    recorded(lora, teacher_digest(teacher))
    denoiser: nn.Module = open_generator(teacher).denoiser
    return denoiser.state_dict()


def settled(part: Any) -> Any:
    """A part of a method, with the digests of the files that it or its own parts read."""
    if isinstance(part, PictureFeatures | Reward):
        return part.settled()
    if not is_dataclass(part) or isinstance(part, type):
        return part
    own = {f.name: getattr(part, f.name) for f in fields(part) if f.init}
    new = {name: settled(value) for name, value in own.items()}
    changed: Any = {name: value for name, value in new.items() if value is not own[name]}
    return replace(part, **changed) if changed else part


def resolve_run(run: Run, teacher: str, init: str = "") -> Run:
    """The run as it is recorded: with the digests of its data, and its teacher's network.

    It ends where its method is finished.

    Raises ValueError where the network is to come from a teacher and none is given.
    """
    run = replace(run, domain=run.domain.settled(), steps=run.last_step)
    run = replace(run, method=settled(run.method))
    if run.lora is not None and teacher:
        run = replace(run, lora=recorded(run.lora, teacher_digest(init or teacher)))
    if not isinstance(run.model.net, OfTeacher):
        return run
    if not teacher:
        raise ValueError(
            "this run takes its network from its teacher: pass a pipeline folder, or the run "
            "folder of one, with --teacher"
        )
    return replace(run, model=describe_model(teacher))
