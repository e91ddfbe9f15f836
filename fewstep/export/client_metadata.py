"""What clients read of an exported file: keys in its header, a sidecar, and a picture.

    modelspec.*              ModelSpec 1.0.1, https://github.com/Stability-AI/ModelSpec: what the
                             model is, and how it is used in a line (`usage_hint`)
    ss_base_model_version    of kohya's scripts: which model an adapter belongs to
    ss_output_name           of kohya's scripts: the name that clients show
    OUT.json, OUT.png        beside OUT.safetensors: a description, and a picture of its own

Architectures have the names that trainers write. A network of other sizes than the published ones
needs other code than theirs, so it is called by its pipeline.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fewstep.data.image_grid import grid
from fewstep.data.prompts import read_prompts
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import Flow
from fewstep.diffusion.pixels import to_uint8
from fewstep.diffusion.samplers import FewStep, course
from fewstep.export.model_card import headline, homes, licences, teacher_name
from fewstep.report.formatting import count
from fewstep.report.run_data import read_run
from fewstep.storage.files import spelled, write, write_json
from fewstep.teachers.diffusers.load import with_text_and_vae
from fewstep.teachers.diffusers.network import DiffusersNet

PROMPT = "a small red cube"
"""What is drawn where the run's own prompts are not at hand."""
SMALL = 256
"""Pixels along the longer side of a thumbnail."""
GENERATIVE_MODELS = "https://github.com/Stability-AI/generative-models"
"""The implementation that kohya's scripts name with adapters of SDXL."""

UNKNOWN = f"0x{0:064x}"
"""What is in the place of a digest until it is known."""

Sizes = Mapping[str, Any]
PUBLISHED: Mapping[str, tuple[tuple[str, Sizes], ...]] = {
    "UNet2DConditionModel": (
        (
            "stable-diffusion-v1",
            {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768},
        ),
        (
            "stable-diffusion-v2",
            {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024},
        ),
        (
            "stable-diffusion-xl-v1-base",
            {"block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048},
        ),
    ),
    "SD3Transformer2DModel": (
        ("stable-diffusion-3", {"num_layers": 24, "num_attention_heads": 24}),
        ("stable-diffusion-3-5-large", {"num_layers": 38, "num_attention_heads": 38}),
    ),
    "FluxTransformer2DModel": (
        ("flux-1", {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}),
    ),
    "QwenImageTransformer2DModel": (
        ("Qwen-Image", {"num_layers": 60, "num_attention_heads": 24}),
    ),
}
"""Class of a network -> (architecture, the sizes that tell it) of the published models."""
VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2_v",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
    "flux-1-dev": "flux1",
    "flux-1-schnell": "flux1",
}
"""Architecture -> `ss_base_model_version`, as kohya's scripts write it."""


@dataclass(frozen=True)
class Example:
    """A picture of a student, as it is shown beside what is exported."""

    picture: Image.Image
    prompt: str = ""
    """What it was drawn for; "" of a model that takes no prompts."""

    def thumbnail(self) -> str:
        """A small JPEG as an address that holds it, as `modelspec.thumbnail` has it."""
        small, file = self.picture.convert("RGB"), io.BytesIO()
        small.thumbnail((SMALL, SMALL))
        small.save(file, "JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

    def png(self) -> bytes:
        """The picture as a PNG file."""
        file = io.BytesIO()
        self.picture.save(file, "PNG")
        return file.getvalue()


def example(student: Generator, run: Path) -> Example:
    """What a student draws from noise number 0; sixteen pictures where it takes no prompts.

    The prompt is the first of the run's own file, where that is still there. ValueError where the
    teacher's text encoders or VAE are gone.
    """
    speaking = with_text_and_vae(student)
    if speaking.text is None:
        return Example(grid(speaking.sample(range(16))))
    prompt = first_prompt(run)
    x = speaking.sample([0], cond=speaking.text([prompt]))
    speaking.release()
    return Example(Image.fromarray(to_uint8(x)[0].cpu().numpy()), prompt)


def first_prompt(run: Path) -> str:
    """The first prompt of the file that a run was made with; `PROMPT` where it is gone."""
    for home in homes(run):
        domain = read_run(home).run.get("domain")
        if isinstance(domain, Mapping) and domain.get("type") == "Prompts":
            file = Path(str(domain.get("file")))
            if file.is_file():
                return read_prompts(file)[0]
    return PROMPT


def architecture(student: Generator, pipeline: str) -> str:
    """The architecture by the name that trainers have for it; else that of its pipeline."""
    model = student.model
    assert model is not None
    net = model.net
    assert isinstance(net, DiffusersNet)
    config = json.loads(net.config)
    for name, sizes in PUBLISHED.get(net.class_name, ()):
        if all(config.get(key) == size for key, size in sizes.items()):
            return name + _variant(name, config, model.predicts)
    return pipeline


def _variant(name: str, config: Mapping[str, Any], predicts: str) -> str:
    """What the sizes do not say of an architecture."""
    if name == "stable-diffusion-v2":
        return "-768-v" if predicts == "v" else "-512"
    if name == "stable-diffusion-3":
        return "-5-medium" if config.get("dual_attention_layers") else "-medium"
    if name == "flux-1":
        return "-dev" if config.get("guidance_embeds") else "-schnell"
    return ""


def hint(student: Generator) -> str:
    """How a student is used, in a line: "4 steps, cfg 1, LCM"."""
    sampler, path = student.sampler, student.denoiser.path
    times = course(sampler, path).times
    words = [count(len(times), "step")]
    words.append(f"cfg {sampler.kappa:g}" if isinstance(sampler, CFG) else "cfg 1")
    scale = student.denoiser.net.call.get("guidance_scale", 0)
    if scale > 1:  # which the network is told
        words.append(f"guidance {scale:g}")
    inner = sampler.sampler if isinstance(sampler, CFG) else sampler
    words.append(_sampler(inner, isinstance(path, Flow)))
    if times != FewStep(times[0], len(times)).ladder(path):
        words.append(f"at t = {', '.join(f'{t:g}' for t in times)}")
    elif times[0] < path.t_max:
        words.append(f"from t = {times[0]:g} of {path.t_max:g}")
    return ", ".join(words)


def _sampler(sampler: object, flow: bool) -> str:
    """What clients call a student's sampler."""
    if not isinstance(sampler, FewStep) or (sampler.noise == "fixed" and sampler.steps > 1):
        return f"sampler {type(sampler).__name__} of fewstep"
    if sampler.steps == 1 or (flow and sampler.noise == "ddim"):
        return "Euler"
    return "LCM" if sampler.noise == "fresh" else "DDIM"


def modelspec(
    student: Generator,
    pipeline: str,
    shown: Example,
    adapter: bool = False,
    original: bool = False,
) -> dict[str, str]:
    """The keys of ModelSpec of a student of a pipeline, without the digest of its tensors.

    Arguments:
        pipeline: the class of its pipeline.
        shown: the picture of the thumbnail.
        adapter: whether the file holds an adapter, and not a whole network.
        original: whether its tensors have the names of the original code, as kohya's scripts write
            too, not those of diffusers.
    """
    name, licence = architecture(student, pipeline), licences(student)
    height, width = student.denoiser.net.size
    assert student.model is not None
    generative_models = original and name == "stable-diffusion-xl-v1-base"
    facts = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{name}/lora" if adapter else name,
        "implementation": GENERATIVE_MODELS if generative_models else "diffusers",
        "title": headline(student),
        "resolution": f"{width}x{height}",
        "description": description(student),
        "usage_hint": hint(student),
        "tags": "few-step, distillation",
        "thumbnail": shown.thumbnail(),
    }
    stated = licence.get("license_name") or licence.get("license")
    if stated:
        facts["license"] = stated
    predicts = {"eps": "epsilon", "v": "v"}.get(student.model.predicts)
    if predicts:
        facts["prediction_type"] = predicts
    return {f"modelspec.{key}": value for key, value in facts.items()}


def description(student: Generator) -> str:
    """Where a student is from and how it is used, in two sentences."""
    method = str(student.card.get("method", "")).partition("(")[0]
    how = f" by {method}" if method else ""
    return (
        f"Distilled from {teacher_name(student)}{how} with fewstep. Use it with {hint(student)}."
    )


def kohya_keys(student: Generator, pipeline: str, out: Path) -> dict[str, str]:
    """What kohya's scripts write of the base model and the file's name."""
    name = architecture(student, pipeline)
    known = {"ss_base_model_version": VERSIONS[name]} if name in VERSIONS else {}
    second = str(name.startswith("stable-diffusion-v2"))
    return {**known, "ss_v2": second, "ss_output_name": out.stem}


def save_network(
    path: Path,
    state: Mapping[str, Tensor],
    student: Generator,
    pipeline: str,
    shown: Example,
    original: bool = False,
) -> None:
    """Write a whole network as a safetensors file, with its card and the keys of ModelSpec.

    Arguments as of `modelspec`.
    """
    facts = {"pipeline": pipeline, "sampler": repr(student.sampler), **student.card}
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    spec = modelspec(student, pipeline, shown, original=original)
    save_tensors(path, state, {"format": "pt", **metadata, **spec})


def save_tensors(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write the safetensors file `path` with its digest, `modelspec.hash_sha256`, in its header.

    That is SHA-256 of all but the header, and known when the tensors are in the file: zeros hold
    its place until then, so that no tensor is copied. A header is UTF-8: bytes of a name that are
    none become U+FFFD.
    """
    legible = {
        key: text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for key, text in {**facts, "modelspec.hash_sha256": UNKNOWN}.items()
    }
    partial = path.with_name(f".partial-{os.getpid()}.safetensors")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        with spelled(path.parent) as folder:
            save_file(dict(state), folder / partial.name, legible)
        partial.chmod(mode)  # which safetensors takes from everybody but the owner
        with partial.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            digest = hashlib.sha256()
            for block in iter(lambda: file.read(1 << 24), b""):
                digest.update(block)
            begun = b'"modelspec.hash_sha256":"'
            file.seek(8 + header.index(begun + UNKNOWN.encode()) + len(begun))
            file.write(f"0x{digest.hexdigest()}".encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sidecars(student: Generator, pipeline: str, file: Path, shown: Example) -> None:
    """Write the sidecar files of `file`, as A1111, Forge and InvokeAI read them."""
    known = VERSIONS.get(architecture(student, pipeline), "")
    family = next((name for start, name in FAMILIES.items() if known.startswith(start)), "Unknown")
    facts = {
        "description": description(student),
        "sd version": family,
        "activation text": "",
        "preferred weight": 1.0,
        "notes": hint(student),
    }
    write_json(file.with_name(f"{file.stem}.json"), facts)
    write(file.with_name(f"{file.stem}.png"), shown.png())


FAMILIES = {"sd_v1": "SD1", "sd_v2": "SD2", "sdxl": "SDXL"}
"""How a version begins -> what a sidecar's "sd version" says."""
