"""Exports in the programs that they are for: make clients COMFYUI=/path/to/ComfyUI

The pictures of exported students in a real ComfyUI, in stock diffusers and in onnxruntime, beside
those of the student itself, of the same noise and prompt. ComfyUI is started without a window on
the processor (`benchmarks.comfyui_server`), with models of published sizes and random weights
(`benchmarks.true_sizes`), of which nothing has to be downloaded. COMFYUI_PYTHON is the Python of
ComfyUI's own environment.

The noise is ComfyUI's: normal numbers of torch's generator of the processor, seeded with the
workflow's seed, and for steps with fresh noise with the seed + 1. They are given to the student.
Differences are told in 1/255 of a picture, as ComfyUI rounds pictures, and of latents relative to
the largest of them. What is known is kept in benchmarks/results/clients.json: a family is not run
again unless --again says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.comfyui_server import ComfyUI, require_comfyui
from benchmarks.true_sizes import FAMILIES
from fewstep.config import encode
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.samplers import FewStep
from fewstep.export.comfyui import workflow
from fewstep.export.diffusers_pipeline import sampled, stock
from fewstep.export.lora import FILE, WORKFLOW
from fewstep.export.traced_generator import Given
from fewstep.nets.lora import LoRA
from fewstep.runs.environment import environment
from fewstep.storage.files import read_json, write_json
from fewstep.storage.model_folder import load_student, save_model
from fewstep.teachers.diffusers.load import (
    at_shape,
    load_pipeline,
    origin_folder,
    with_text_and_vae,
)
from fewstep.teachers.diffusers.text_and_vae import TextAndVAE
from tests.tiny_pipelines import build

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "clients.json"
PROMPT, OTHER = "a small red cube on a table", "two dogs in the snow"
SEED = 20
SIDE = 16
"""Latents along a side: pictures of 128 x 128."""
USUAL = ("sd15", "sdxl", "sd3", "diffusers", "onnxruntime")
CASES = {
    "sd15": [("checkpoint", 1), *((form, k) for form in ("comfyui", "kohya") for k in (1, 4))],
    "sdxl": [("comfyui", 4), ("kohya", 4)],
    "sd3": [("comfyui", 4), ("lora", 4)],
}
"""Format and steps of the students of a family."""
ADAPTERS = ("kohya", "lora")
LOADED = {"sdxl": "sdxl", "sd3": "sd3"}
"""Families whose teacher ComfyUI loads in parts -> what DualCLIPLoader calls them."""
NETWORK, NETWORKS = "transformer", "diffusion_models"
PARTS = {
    NETWORK: (NETWORKS, "teacher.safetensors"),
    "text_encoder": ("text_encoders", "clip_l.safetensors"),
    "text_encoder_2": ("text_encoders", "clip_g.safetensors"),
    "vae": ("vae", "vae.safetensors"),
}
"""Part of a pipeline -> folder and file of ComfyUI's models."""
Workflow = dict[str, dict[str, Any]]


def main() -> None:
    """Run the families that are asked for, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--python", default=sys.executable, help="the Python of ComfyUI")
    parser.add_argument("--families", nargs="+", choices=[*FAMILIES, *OTHERS], default=USUAL)
    parser.add_argument("--work", type=Path, help="for models (default: a temporary folder)")
    parser.add_argument("--again", action="store_true", help="run what is known, too")
    parser.add_argument("--out", type=Path, default=OUT)
    flags = parser.parse_args()
    try:
        require_comfyui(flags.comfyui)
    except ValueError as error:
        parser.error(str(error))
    known = read_json(flags.out) if flags.out.exists() else {"families": {}}
    for name in flags.families:
        if name in known["families"] and not flags.again:
            print(f"{name} is known; --again runs it again")
            continue
        with tempfile.TemporaryDirectory(dir=flags.work) as place:
            if name in OTHERS:
                found = OTHERS[name](Path(place), flags.comfyui.resolve())
            else:
                found = family(name, Path(place), flags.comfyui.resolve(), flags.python)
        known["families"][name] = found
        known["environment"] = environment()
        write_json(flags.out, known)
        print(name, json.dumps(found, indent=2), flush=True)


def family(name: str, place: Path, comfyui: Path, python: str) -> dict[str, Any]:
    """What was found of a family, in the folder `place`."""
    teacher, home = place / "teacher", place / "comfyui"
    words = comfyui / "comfy" / "sd1_tokenizer"
    FAMILIES[name](words).save_pretrained(teacher)
    base = Base.of(name, teacher, home / "models")
    cases: dict[str, Any] = {}
    for form, steps in CASES[name.partition("_")[0]]:
        case = f"{form}_{steps}"
        student = place / case
        made(teacher, student, form, steps)
        work = patched(base.workflow(student, form), PROMPT, SEED)
        with ComfyUI(comfyui, python, home) as server:
            facts, files = server.facts, server.run(work)
        cases[case] = compared(teacher, student, form, files)
        print(name, case, json.dumps(cases[case]), flush=True)
        shutil.rmtree(student)
        base.forget()
    keys = ("comfyui_version", "pytorch_version", "python_version")
    return recorded({key: facts.get(key) for key in keys}, cases)


def sampler(flow: bool, steps: int) -> FewStep:
    """How a student of so many steps is sampled."""
    if flow:
        return FewStep(1.0, steps)
    return FewStep(625.0) if steps == 1 else FewStep(999.0, steps, unit=True)


def made(teacher: Path, out: Path, form: str, steps: int, side: int | None = SIDE) -> None:
    """Write a student of a teacher: changed everywhere, by adapters, or not at all.

    side: of its latents; None: as many as the teacher has.
    """
    known = load_pipeline(teacher)
    if side:
        known = at_shape(known, (known.shape[0], side, side))
    generator, net = torch.Generator().manual_seed(5), known.denoiser
    card: dict[str, Any] = {"teacher": dict(known.card)}
    adapters: Mapping[str, Tensor] = {}
    state = net.state_dict()
    if form in ADAPTERS:
        lora = LoRA(8)
        role = lora.adapt(net)
        for p in role.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
        adapters, card["lora"] = role.state_dict(), encode(lora)
        state = lora.merged(state, adapters)
    elif form != "checkpoint":
        for p in net.parameters():
            if p.ndim > 1:
                p.add_(0.3 * p.std() * torch.randn(p.shape, generator=generator))
    chosen = sampler(teacher_is_flow(teacher), steps)
    save_model(out, state, known.model, chosen, card, adapters)


def teacher_is_flow(teacher: Path) -> bool:
    """Whether a pipeline in this folder is a flow."""
    return (teacher / "transformer").is_dir()


@dataclass
class Base:
    """The teacher as ComfyUI has it, and the exports beside it."""

    teacher: Path
    models: Path
    kind: str
    """The type of its text encoders, where it is in parts, and not in one checkpoint."""
    written: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, teacher: Path, models: Path) -> Base:
        """Put the teacher of a family where ComfyUI looks for it."""
        for folder in ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae"):
            (models / folder).mkdir(parents=True)
        kind = LOADED.get(name.partition("_")[0], "")
        if kind:
            for part, (folder, file) in PARTS.items():
                home = teacher / part
                if part == NETWORK and not home.is_dir():
                    home = teacher / "unet"
                source = next(home.glob("*.safetensors"))
                if part.startswith("text_encoder"):
                    save_file(clip_names(load_file(source)), models / folder / file)
                else:
                    (models / folder / file).symlink_to(source)
        else:
            plain = teacher.with_name("plain")
            made(teacher, plain, "checkpoint", 1)
            export(plain, models / "checkpoints" / "teacher.safetensors", "checkpoint")
            shutil.rmtree(plain)
        return cls(teacher, models, kind)

    def workflow(self, student: Path, form: str) -> Workflow:
        """Export a student, and put its files where ComfyUI looks for them; its workflow."""
        if form == "checkpoint":
            return of_checkpoint(workflow(load_student(student), "", "teacher.safetensors"))
        out = student.with_name(f"{student.name}_out")
        if form == "kohya":
            out = out.with_suffix(".safetensors")
        export(student, out, form)
        file, folder, work = {
            "comfyui": (out / NETWORKS / f"{out.name}.safetensors", NETWORKS, out / WORKFLOW),
            "kohya": (out, "loras", out.with_suffix(".workflow.json")),
            "lora": (out / FILE, "loras", out / WORKFLOW),
        }[form]
        nodes: Workflow = read_json(work)
        name = out.name if form == "kohya" else f"{out.name}.safetensors"
        shutil.move(file, self.models / folder / name)
        self.written.append(self.models / folder / name)
        return in_parts(nodes, self.kind) if self.kind else nodes

    def forget(self) -> None:
        """Delete what was exported."""
        for path in self.written:
            path.unlink()
        self.written.clear()


def clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors as published folders name them; transformers 5 leaves some out."""
    own = ("text_model.", "text_projection.")
    return {n if n.startswith(own) else f"text_model.{n}": t for n, t in state.items()}


def export(student: Path, out: Path, form: str, *more: str) -> None:
    """The command, in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "fewstep", "export", str(student), str(out), "--to", form, *more],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )


def of_checkpoint(nodes: Workflow) -> Workflow:
    """A workflow whose network is that of the checkpoint, not a file of its own."""
    own, rest = named(nodes, "UNETLoader"), named(nodes, "CheckpointLoaderSimple")
    kept = {number: node for number, node in nodes.items() if number != own}
    return linked(kept, {(own, 0): [rest, 0]})


def in_parts(nodes: Workflow, kind: str) -> Workflow:
    """A workflow that loads the teacher's parts, as diffusers' folders hold them."""
    rest = named(nodes, "CheckpointLoaderSimple")
    kept = {number: node for number, node in nodes.items() if number != rest}
    first, second = (PARTS[f"text_encoder{more}"][1] for more in ("", "_2"))
    loaders: dict[str, tuple[str, dict[str, str]]] = {
        "network": ("UNETLoader", {"unet_name": PARTS[NETWORK][1]}),
        "words": ("DualCLIPLoader", {"clip_name1": first, "clip_name2": second, "type": kind}),
        "pictures": ("VAELoader", {"vae_name": PARTS["vae"][1]}),
    }
    loaders["network"][1]["weight_dtype"] = "default"
    for name, (loader, inputs) in loaders.items():
        kept[name] = {"class_type": loader, "inputs": inputs}
    return linked(kept, {(rest, i): [name, 0] for i, name in enumerate(loaders)})


def patched(nodes: Workflow, prompt: str, seed: int) -> Workflow:
    """A workflow of this prompt and seed, which saves its latents, too."""
    found = linked(nodes, {})
    found[named(found, "CLIPTextEncode")]["inputs"]["text"] = prompt
    found[named(found, "RandomNoise")]["inputs"]["noise_seed"] = seed
    drawn = [named(found, "SamplerCustomAdvanced"), 0]
    inputs = {"samples": drawn, "filename_prefix": "latents"}
    return {**found, "latents": {"class_type": "SaveLatent", "inputs": inputs}}


def named(nodes: Workflow, kind: str) -> str:
    """The number of the one node of a class; ValueError where there is not one."""
    found = [number for number, node in nodes.items() if node["class_type"] == kind]
    if len(found) != 1:
        raise ValueError(f"a workflow has one {kind}, this has {len(found)}")
    return found[0]


def linked(nodes: Workflow, instead: Mapping[tuple[str, int], list[Any]]) -> Workflow:
    """A copy of a workflow with links in place of others."""
    copy = {}
    for number, node in nodes.items():
        inputs = {
            name: instead.get((value[0], value[1]), value) if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        copy[number] = {**node, "inputs": inputs}
    return copy


def noise(seed: int, shape: Sequence[int], steps: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """ComfyUI's noise on a processor: z, and that of later steps with fresh noise; (1, *) each."""
    first = torch.Generator().manual_seed(seed)
    later = torch.Generator().manual_seed(seed + 1)
    z = torch.randn(1, *shape, generator=first)
    return z, tuple(torch.randn(1, *shape, generator=later) for _ in range(steps - 1))


def in_diffusers(place: Path, comfyui: Path) -> dict[str, Any]:
    """A student of Stable Diffusion 1.5 as a folder of stock diffusers."""
    teacher = place / "teacher"
    FAMILIES["sd15"](comfyui / "comfy" / "sd1_tokenizer").save_pretrained(teacher)
    folder, out = place / "student", place / "out"
    made(teacher, folder, "diffusers", 4)
    export(folder, out, "diffusers")
    cases = {"diffusers_4": of_stock(folder, out)}
    return recorded({"diffusers_version": version("diffusers")}, cases)


@torch.no_grad()
def of_stock(folder: Path, out: Path) -> dict[str, Any]:
    """How the picture of a stock pipeline differs from the student's in `folder`."""
    student = with_text_and_vae(load_student(folder))
    unscaled, ours = drawn(student, PROMPT)
    z, _ = noise(SEED, student.shape, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + 1)  # of the noise that the scheduler draws
        x = sampled(stock(out), PROMPT, z, student.sampler.calls, student.denoiser.net)
    theirs = TextAndVAE(origin_folder(student)).unscaled(x)
    same = difference(rounded(student.decode(x)), rounded(ours))
    return {**same, "latents": relative(theirs, unscaled)}


@torch.no_grad()
def in_onnxruntime(place: Path, comfyui: Path) -> dict[str, Any]:
    """Students of a tiny Stable Diffusion as ONNX programs that make pictures."""
    import onnxruntime

    teacher, cases = build("sd", place), {}
    for steps in (1, 4):
        folder, out = place / f"student_{steps}", place / f"out_{steps}.onnx"
        made(teacher, folder, "onnx", steps, side=None)
        export(folder, out, "onnx", "--pictures")
        student = with_text_and_vae(load_student(folder))
        assert student.text is not None
        z, later = noise(SEED, student.shape, steps)
        cond: Any = student.text([PROMPT])
        inputs = {"z": z, **cond}
        if later:
            inputs["noise"] = torch.stack(later, 1)
        session = onnxruntime.InferenceSession(out)
        (theirs,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        _, ours = drawn(student, PROMPT)
        same = difference(rounded(torch.from_numpy(theirs)), rounded(ours))
        cases[f"onnx_{steps}"] = {**same, "pictures": relative(torch.from_numpy(theirs), ours)}
    return recorded({"onnxruntime_version": version("onnxruntime")}, cases)


def recorded(client: Mapping[str, Any], cases: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a client."""
    return {"date": date.today().isoformat(), "client": dict(client), "cases": dict(cases)}


OTHERS = {"diffusers": in_diffusers, "onnxruntime": in_onnxruntime}
"""Clients beside ComfyUI."""


@torch.no_grad()
def drawn(student: Generator, prompt: str, words: int | None = None) -> tuple[Tensor, Tensor]:
    """Latents as the VAE has them and picture of a student, of ComfyUI's noise: (1, *) each.

    words: tokens of the prompt that the network hears; None: all.
    """
    assert student.text is not None
    cond: Any = student.text([prompt])
    z, later = noise(SEED, student.shape, student.sampler.calls)
    net = student.denoiser.net
    null = net.null_prompt
    try:
        if words is not None:
            cond = {**cond, "prompt": cond["prompt"][:, :words]}
            net.null_prompt = null[:words]  # whose length is what the network expects
        x = student.sampler(student.denoiser, z, cond, Given(z, noises=later))
    finally:
        net.null_prompt = null
    return TextAndVAE(origin_folder(student)).unscaled(x), student.decode(x)


def rounded(picture: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] in 1/255, rounded down as ComfyUI does: int16."""
    return (255 * (picture.float() / 2 + 0.5).clamp(0, 1)).floor().to(torch.int16)


def difference(theirs: Tensor, ours: Tensor) -> dict[str, float]:
    """The largest and the mean difference of pictures in 1/255."""
    if theirs.shape != ours.shape:
        raise ValueError(f"pictures of {tuple(theirs.shape)} and {tuple(ours.shape)}")
    gap = (theirs - ours).abs().float()
    return {"largest": float(gap.max()), "mean": float(gap.mean())}


def relative(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference of latents, relative to the largest of ours."""
    return float((theirs - ours).abs().max() / ours.abs().max())


def read_picture(path: Path) -> Tensor:
    """A picture in a file: (1, 3, H, W), int16."""
    with Image.open(path) as image:
        values = np.asarray(image.convert("RGB"), dtype=np.int16)
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def compared(teacher: Path, folder: Path, form: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """How the picture and the latents of ComfyUI differ from the student's.

    "other_prompt" is what the student's own picture differs by for another prompt, and
    "teacher", of adapters, what the teacher's does: what a client that does not load them shows.
    An SD3 without T5 hears 256 empty tokens more in diffusers than in ComfyUI; "with_empty" is
    the difference from that.
    """
    picture, latents = read_picture(files["images"]), load_file(files["latents"])["latent_tensor"]
    student = with_text_and_vae(load_student(folder))
    words = 77 if teacher_is_flow(teacher) else None
    x, ours = drawn(student, PROMPT, words)
    found: dict[str, Any] = {
        **difference(picture, rounded(ours)),
        "latents": relative(latents, x),
        "contrast": float(rounded(ours).float().std()),
        "other_prompt": difference(rounded(drawn(student, OTHER, words)[1]), rounded(ours)),
    }
    if words:
        found["with_empty"] = difference(picture, rounded(drawn(student, PROMPT)[1]))
    if form in ADAPTERS:
        known = load_pipeline(teacher)
        known = replace(at_shape(known, student.shape), sampler=student.sampler)
        del student
        found["teacher"] = difference(rounded(drawn(known, PROMPT, words)[1]), rounded(ours))
    return found


if __name__ == "__main__":
    main()
