"""A student as a LoRA adapter of its teacher's pipeline, for users who have the pipeline.

A student that was trained with adapters (`fewstep.nets.lora`) has them beside it. Of one that was
trained whole, the change of each layer is replaced by the nearest product of rank r,

    W_student - W_teacher = U S V',    B = U_r S_r^(1/2),    A = S_r^(1/2) V_r',

which leaves the singular values beyond r (Eckart & Young 1936). Biases, normalisations and
layers outside the blocks stay the teacher's: loaders know no adapters for them.

    lora     a folder: pytorch_lora_weights.safetensors under diffusers' names, and the scheduler
    kohya    a file under the names of kohya's scripts, which ComfyUI and others read; U-Nets alone

alpha / r is in B, and alpha = r in the file, so that readers of alpha and others agree. Where
ComfyUI's stock nodes can follow the steps, a workflow for it lies beside the file, or in the
folder of an SD3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.config import decode
from fewstep.diffusion.generator import Generator
from fewstep.export.atomic_output import new_output
from fewstep.export.client_metadata import example, kohya_keys, modelspec, save_tensors, sidecars
from fewstep.export.comfyui import sigmas, t5_tokens, without_t5, workflow
from fewstep.export.diffusers_pipeline import (
    PICTURE,
    against,
    made_of,
    of_pipeline,
    picture,
    scheduled,
)
from fewstep.export.model_card import card
from fewstep.export.schedulers import call
from fewstep.nets.lora import LoRA, pairs, recorded
from fewstep.runs.teacher import teacher_digest
from fewstep.storage.files import spelled, unpack, write, write_json
from fewstep.storage.model_folder import is_finished, load_student
from fewstep.teachers.diffusers.folder import PipelineFolder, is_pipeline, open_folder
from fewstep.teachers.diffusers.load import network, network_weights, origin_folder
from fewstep.teachers.diffusers.network import DiffusersNet, require_library
from fewstep.teachers.diffusers.text_and_vae import TextAndVAE

FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
WORKFLOW = "workflow.json"
BLOCKS = (
    "down_blocks",
    "mid_block",
    "up_blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "noise_refiner",
    "context_refiner",
)
"""Where loaders know adapters."""
TOLERANCE = 1e-4
"""Largest difference between the loaded file and its own formula: the order of sums differs."""

FRONT = {"base_model_relation": "adapter"}

Factors = dict[str, tuple[Tensor, Tensor]]
"""Name of a layer in diffusers -> A: (r, in, ...), B: (out, r, ...); added is B A."""


@dataclass(frozen=True)
class Parts:
    """A student as an adapter: its factors, and the pipeline and scheduler they belong to."""

    student: Generator
    folder: PipelineFolder
    scheduler: tuple[str, dict[str, Any]]
    factors: Factors
    before: Mapping[str, Tensor]
    """The weights of the pipeline's network, under diffusers' names."""

    @property
    def rank(self) -> int:
        """The rank of all layers."""
        return len(next(iter(self.factors.values()))[0])

    @cached_property
    def applied(self) -> Generator:
        """The student that teacher and factors make; another where the rank is not its own."""
        rebuilt = {f"net.net.{name}": t for name, t in self.before.items()}
        adapters = {f"net.net.{layer}.up": up for layer, (_, up) in self.factors.items()}
        adapters |= {f"net.net.{la}.down.weight": down for la, (down, _) in self.factors.items()}
        assert self.student.model is not None
        denoiser: Any = self.student.model.build()
        state = {
            **self.student.denoiser.state_dict(),
            **LoRA(self.rank).merged(rebuilt, adapters),
        }
        denoiser.load_state_dict(state)
        return replace(self.student, denoiser=denoiser)

    def facts(self) -> dict[str, str]:
        """The metadata of the file, as texts."""
        described = {"base": self.folder.path.name, "sampler": repr(self.student.sampler)}
        described |= {"rank": str(self.rank), "alpha": str(self.rank)}
        return {"format": "pt", **described, "card": json.dumps(dict(self.student.card))}


def to_lora(run: Path, out: Path, rank: int | None = None) -> float:
    """Write the folder `out` for `pipe.load_lora_weights`; what the pipeline then differs by.

    rank: of the adapters made of a student that was trained whole, or smaller ones of one that
    was trained with adapters; None: those it has.
    """
    adapter = parts(run, rank)
    name, (kind, config) = adapter.folder.family.network, adapter.scheduler
    state = {}
    for layer, (down, up) in adapter.factors.items():
        state[f"{name}.{layer}.lora_A.weight"] = down
        state[f"{name}.{layer}.lora_B.weight"] = up
    pipeline, shown = adapter.folder.pipeline, example(adapter.applied, run)
    metadata = {
        **adapter.facts(),
        **kohya_keys(adapter.student, pipeline, out),
        **modelspec(adapter.student, pipeline, shown, adapter=True),
    }
    with new_output(out) as place:
        place.mkdir()
        save_tensors(place / FILE, state, metadata)
        write(place / PICTURE, shown.png())
        getattr(require_library("diffusers"), kind)(**config).save_pretrained(place / "scheduler")
        if pipeline == "StableDiffusion3Pipeline":  # whose names in diffusers ComfyUI reads
            _workflow(adapter, place / WORKFLOW, f"{out.name}.safetensors")
        front = {**FRONT, "library_name": "diffusers", "pipeline_tag": "text-to-image"}
        python = use(adapter, out.name, True)
        facts = {"rank": adapter.rank, "caution": without_t5(adapter.folder) or None}
        text = card(adapter.student, run, python, facts, front, (shown.prompt, PICTURE))
        write(place / "README.md", text)
        return verified(adapter, place / FILE)


def to_kohya(run: Path, out: Path, rank: int | None = None) -> float:
    """Write the file `out`, of a U-Net; what a pipeline that loads it differs by."""
    adapter = parts(run, rank)
    if adapter.folder.family.network != "unet":
        raise ValueError(
            f"kohya's names are those of U-Nets, and a {adapter.folder.pipeline} has none; "
            "use --to lora"
        )
    state = {}
    for layer, (down, up) in adapter.factors.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        state[f"{name}.lora_down.weight"] = down
        state[f"{name}.lora_up.weight"] = up
        state[f"{name}.alpha"] = torch.tensor(float(len(down)))
    facts = {"ss_network_module": "networks.lora", "ss_network_dim": str(adapter.rank)}
    facts |= {"ss_network_alpha": str(adapter.rank), **adapter.facts()}
    pipeline, shown = adapter.folder.pipeline, example(adapter.applied, run)
    facts |= kohya_keys(adapter.student, pipeline, out)
    facts |= modelspec(adapter.student, pipeline, shown, adapter=True, original=True)
    with new_output(out, ".safetensors") as place:
        save_tensors(place, state, facts)
        sidecars(adapter.student, pipeline, place, shown)
        _workflow(adapter, place.with_name(f"{out.stem}.{WORKFLOW}"), out.name)
        rows = {"rank": adapter.rank, "sigmas": _sigmas(adapter.student)}
        shows = (shown.prompt, f"{out.stem}.png")
        text = card(adapter.student, run, use(adapter, out.name, False), rows, FRONT, shows)
        write(place.with_name(f"{out.name}.md"), text)
        return verified(adapter, place)


def _workflow(adapter: Parts, path: Path, name: str) -> None:
    """Write a workflow of ComfyUI's stock nodes for the adapter `name`, if they can follow it."""
    with suppress(ValueError):
        base = f"{adapter.folder.path.name}.safetensors"
        t5 = t5_tokens(adapter.folder)
        write_json(path, workflow(adapter.student, name, base, adapter=True, t5=t5))


def _sigmas(student: Generator) -> str:
    """The sigmas that ComfyUI's ManualSigmas takes, or why there are none."""
    try:
        return f"{sigmas(student)}, for ManualSigmas of ComfyUI"
    except ValueError as error:
        return f"none that ComfyUI follows: {error}"


def parts(run: Path, rank: int | None = None) -> Parts:
    """The student of a run as an adapter; a ValueError where it cannot be one."""
    if rank is not None and rank < 1:
        raise ValueError(f"--rank is 1 or more, got {rank}")
    if find_spec("peft") is None:
        raise ValueError("adapters need peft, which is not installed: pip install 'fewstep[t2i]'")
    student = load_student(run)
    model = student.model
    if model is None or not isinstance(model.net, DiffusersNet):
        raise ValueError(f"{run} was not distilled from a pipeline, which an adapter belongs to")
    folder = _base(of_pipeline(student, run), run)
    if not hasattr(TextAndVAE(folder).kind, "load_lora_weights"):
        raise ValueError(f"diffusers has no adapters for {folder.pipeline}; use --to diffusers")
    scheduler = scheduled(student, folder, run)
    if rank is None:
        factors, before = trained(run, student, folder), network_weights(folder)
    else:
        before = network_weights(folder)
        factors = extracted(student, before, rank)
    return Parts(student, folder, scheduler, factors, before)


def _base(student: Generator, run: Path) -> PipelineFolder:
    """The pipeline that the adapter of a student is for: its origin, or the one it was adapted of.

    ValueError where that is no pipeline's folder.
    """
    adapts = student.card.get("adapts")
    if not adapts:
        return origin_folder(student)
    if not is_pipeline(adapts):
        raise ValueError(
            f"the adapters of {run} lie on the student in {adapts}, which is no pipeline folder: "
            "export that with --to diffusers first, and adapt the folder"
        )
    return open_folder(adapts)


def trained(run: Path, student: Generator, folder: PipelineFolder) -> Factors:
    """The adapters that a run of `--lora` has trained on the network of `folder`; s is in B."""
    if "lora" not in student.card:
        raise ValueError(
            f"{run} was trained whole; say of which rank its adapter is to be, with --rank"
        )
    if "adapts" not in student.card and "folder" not in student.card.get("teacher", {}):
        raise ValueError(
            f"the adapters of {run} belong to a student of the pipeline, not to the pipeline "
            "itself; say of which rank an adapter of that is to be, with --rank"
        )
    lora = recorded(decode(student.card["lora"], LoRA), teacher_digest(folder.path))
    adapters = pairs(unpack(is_finished(run) / "lora.safetensors"))
    return {
        layer.removeprefix("net.net."): (down, lora.scale * up)
        for layer, (down, up) in adapters.items()
    }


def extracted(student: Generator, before: Mapping[str, Tensor], rank: int) -> Factors:
    """The nearest adapters of this rank to what a student's layers differ by from `before`."""
    changes = {}
    layers: nn.Module = student.denoiser.net.net
    for layer, module in layers.named_modules():
        grouped = getattr(module, "groups", 1) > 1
        if layer.startswith(BLOCKS) and isinstance(module, (nn.Linear, nn.Conv2d)) and not grouped:
            change = module.weight.detach() - before[f"{layer}.weight"]
            if change.count_nonzero():
                changes[layer] = change
    if not changes:
        raise ValueError("no layer of this student differs from its teacher; there is no adapter")
    rank = min(rank, max(min(change.flatten(1).shape) for change in changes.values()))
    return {layer: factored(change, rank) for layer, change in changes.items()}


def factored(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A: (r, in, ...) and B: (out, r, 1, ...) with B A nearest to `change`: (out, in, ...).

    Filled up with zeros where a layer has no such rank: readers expect one r and one alpha.
    """
    u, s, v = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    root, missing = s[:rank].sqrt(), max(0, rank - len(s))
    down = F.pad(root[:, None] * v[:rank], (0, 0, 0, missing)).to(change).contiguous()
    up = F.pad(u[:, :rank] * root, (0, missing)).to(change).contiguous()
    ones = (1,) * (change.ndim - 2)
    return down.reshape(rank, *change.shape[1:]), up.reshape(len(u), rank, *ones)


def verified(found: Parts, file: Path) -> float:
    """Load the file as its users do; the difference of the pipeline from the student.

    Raises ValueError where it is not what the teacher's weights and the factors give.
    """
    student, (kind, config) = found.student, found.scheduler
    pipe = TextAndVAE(found.folder).pipeline(network(found.folder))
    pipe.set_progress_bar_config(disable=True)
    with spelled(file) as named:
        pipe.load_lora_weights(str(named.parent), weight_name=named.name, local_files_only=True)
    pipe.scheduler = getattr(require_library("diffusers"), kind)(**config)
    off = against(pipe, found.applied)
    if not off <= TOLERANCE:
        raise ValueError(
            f"diffusers makes something else of these adapters, off by {off:.2g} of its range; "
            "nothing was written"
        )
    return against(pipe, student)


def use(found: Parts, name: str, scheduler: bool) -> str:
    """Python that samples with the adapter; `scheduler`: whether the scheduler lies beside it."""
    kind, config = found.scheduler
    stored = f'{kind}.from_pretrained("{name}", subfolder="scheduler")'
    made = stored if scheduler else call(kind, config)
    return f"""import torch
from diffusers import DiffusionPipeline, {kind}

{made_of(found.folder)}
pipe.load_lora_weights("{name}")
pipe.scheduler = {made}
{picture(found.student, found.folder)}
"""
