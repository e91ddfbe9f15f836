"""A whole pipeline in one file, in the layout of its first code, as a folder of diffusers.

    model.safetensors    the weights of network, autoencoder and text encoders, under the names of
                         the code that trained them (`LAYOUTS`)

What such a file lacks is everything else: configurations, scheduler and tokenizers. They come from
a pipeline folder of the same family, whose weights are not needed, except those of parts that the
file does not hold (FLUX's files are often the transformer alone). Names are changed by diffusers'
own converters, `from_single_file`, given that folder and no network; the file is read by
safetensors and nothing of it is executed.
"""

from __future__ import annotations

import inspect
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.storage.files import digest, read_json, require_vacant, write_json
from fewstep.storage.safetensors_header import Tensors, header
from fewstep.teachers.diffusers import parts
from fewstep.teachers.diffusers.folder import (
    NEVER_LOADED,
    PipelineFolder,
    described,
    first_line,
    is_pipeline,
    open_folder,
)
from fewstep.teachers.diffusers.hub import PREFIX, WORDS, local
from fewstep.teachers.diffusers.load import describe_network
from fewstep.teachers.diffusers.network import require_library

RECORD = "conversion.json"
"""In a folder that was made of a file: which one."""
UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""What the names of the network's and the autoencoder's tensors begin with in U-Net layouts."""
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""What belongs to an autoencoder; files also hold what its training needed."""
ATTENDED = "attn2.to_k.weight"
"""A tensor (F, D) whose D is the width of the prompts."""


@dataclass(frozen=True)
class Layout:
    """One family of single files."""

    name: str
    pipeline: str
    """The class of its pipeline."""
    marks: tuple[str, ...]
    """What is in the name of some tensor each."""
    config: str
    """The repository whose configurations and tokenizers are those of the published file."""
    apart: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parts that a file of this family may lack -> what the names of their tensors begin with."""

    def fits(self, names: Tensors) -> bool:
        """Whether a file has tensors of all these marks."""
        return all(any(mark in name for name in names.shapes) for mark in self.marks)


LAYOUTS = (
    Layout(
        "SDXL",
        "StableDiffusionXLPipeline",
        (f"{UNET}input_blocks.", "conditioner.embedders.1.model."),
        "stabilityai/stable-diffusion-xl-base-1.0",
    ),
    Layout(
        "Stable Diffusion 2",
        "StableDiffusionPipeline",
        (f"{UNET}input_blocks.", "cond_stage_model.model."),
        "stabilityai/stable-diffusion-2-1",
    ),
    Layout(
        "Stable Diffusion 1",
        "StableDiffusionPipeline",
        (f"{UNET}input_blocks.", "cond_stage_model.transformer."),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    Layout(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        ("joint_blocks.0.x_block.",),
        "stabilityai/stable-diffusion-3-medium-diffusers",
        {
            "vae": ("first_stage_model.", "vae."),
            "text_encoder": ("text_encoders.clip_l.",),
            "text_encoder_2": ("text_encoders.clip_g.",),
            "text_encoder_3": ("text_encoders.t5xxl.",),
        },
    ),
    Layout(
        "FLUX.1",
        "FluxPipeline",
        ("double_blocks.0.img_attn.", "double_blocks.0.img_mod."),
        "black-forest-labs/FLUX.1-schnell",
        {
            "vae": ("first_stage_model.", "vae."),
            "text_encoder": ("text_encoders.clip_l.",),
            "text_encoder_2": ("text_encoders.t5xxl.",),
        },
    ),
)
"""In the order in which they are looked for."""


def is_single_file(path: Path | str) -> bool:
    """Whether a path is that of a .safetensors file."""
    return Path(path).suffix == ".safetensors" and Path(path).is_file()


def layout_of(path: Path) -> Layout:
    """The family of a single file, by the names in its header alone.

    Raises ValueError for a file of another family, of parts of one, or of an inpainting network.
    """
    names = header(path)
    found = next((layout for layout in LAYOUTS if layout.fits(names)), None)
    if found is None:
        known = ", ".join(layout.name for layout in LAYOUTS)
        first = next(iter(names.shapes), "nothing")
        raise ValueError(
            f"{path} holds no whole checkpoint in a layout that is known here ({known}); it holds "
            f"such tensors as {first!r}"
        )
    first_layer = names.shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 4))
    if first_layer[1] != 4:
        raise ValueError(
            f"{path} is an inpainting network, or another with inputs of its own "
            f"({first_layer[1]} channels in place of 4), which is no teacher here"
        )
    return found


def convert_checkpoint(path: Path, out: Path, config: Path) -> Layout:
    """Write the pipeline folder of a single file; returns which layout it had.

    Arguments:
        path: a .safetensors file.
        out: the folder to write, new or empty.
        config: a pipeline folder of the same family, for configurations, scheduler and tokenizers,
            and for the weights of parts that the file lacks.
    Raises ValueError where the file is of no known layout, the folder is of another family or
    size, or the result is no whole pipeline.
    """
    layout = layout_of(path)
    require_vacant(out)
    _refuse_other(path, layout, config)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _converted(path, layout, config, partial)
        folder = open_folder(partial)
        describe_network(folder)
        _refuse_lost(path, folder)
        told = {"file": path.name, "sha256": digest(path), "layout": layout.name}
        write_json(partial / RECORD, {**told, "config": str(config)})
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return layout


def _refuse_other(path: Path, layout: Layout, config: Path) -> None:
    """Raise ValueError where the folder of configurations is of another family than the file."""
    pipeline, _, _ = described(config)
    if pipeline != layout.pipeline:
        raise ValueError(
            f"{path} is {layout.name}, a {layout.pipeline}, but {config} describes a {pipeline}"
        )
    width = next((shape[1] for n, shape in header(path).shapes.items() if ATTENDED in n), None)
    if layout.marks[0].startswith(UNET):
        says = (read_json(config / "unet" / "config.json") or {}).get("cross_attention_dim")
        if says != width:
            raise ValueError(
                f"{path} is {layout.name} and hears prompts of width {width}, but {config} "
                f"describes a network of width {says}; name a folder of the same model"
            )


def _converted(path: Path, layout: Layout, config: Path, out: Path) -> None:
    """What diffusers makes of the file, saved in `out`."""
    require_library("transformers")
    kind: Any = getattr(require_library("diffusers"), layout.pipeline)
    given = {**left_out(kind), **_from_folder(path, layout, config)}
    try:
        pipe = kind.from_single_file(str(path), config=str(config), local_files_only=True, **given)
        pipe.save_pretrained(out, safe_serialization=True)
    except Exception as error:  # any error another library raises
        raise ValueError(
            f"{path} cannot be converted with {config}: {first_line(error)}"
        ) from None


def left_out(kind: Any) -> dict[str, Any]:
    """Arguments with which a stock pipeline of class `kind` is made without its other parts."""
    takes = inspect.signature(kind.__init__).parameters
    without: dict[str, Any] = {part: None for part in NEVER_LOADED if part in takes}
    return without | ({"requires_safety_checker": False} if "safety_checker" in without else {})


def _from_folder(path: Path, layout: Layout, config: Path) -> dict[str, Any]:
    """The parts that the file lacks, of the folder; ValueError where that has none either."""
    names, (_, there, _) = header(path).shapes, described(config)
    missing = [
        part
        for part, prefixes in layout.apart.items()
        if part in there and not any(name.startswith(prefixes) for name in names)
    ]
    if not missing:
        return {}
    try:
        folder = open_folder(config)
    except ValueError as error:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}, which a whole pipeline folder would have: {error}"
        ) from None
    read = {part: parts.text_encoder(folder, part) for part in missing if part != "vae"}
    return read | ({"vae": parts.vae(folder)} if "vae" in missing else {})


def _refuse_lost(path: Path, folder: PipelineFolder) -> None:
    """Raise ValueError where a U-Net or its VAE has fewer numbers than the file holds of it.

    A configuration with fewer layers would leave the others behind, unsaid.
    """
    held = header(path).shapes
    for prefix, part in ((UNET, "unet"), (VAE, "vae")):
        if part not in folder.files or not any(name.startswith(f"{UNET}input") for name in held):
            continue
        own = tuple(prefix + start for start in (VAE_PARTS if part == "vae" else ("",)))
        there = _count({n: s for n, s in held.items() if n.startswith(own)})
        made = _count(folder.files[part].header().shapes)
        if there and there != made:
            raise ValueError(
                f"{path} holds {there:,} numbers of the {part}, and {made:,} are left of them by "
                "the configuration that was given; name a folder of the same model"
            )


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def configurations(layout: Layout, name: str = "") -> Path:
    """The folder with the configurations of a layout: `name`, or what the hub has for it.

    name: a folder, or hub:ORG/NAME; "": the published model's own. No weights are fetched. Raises
    ValueError where they cannot be had.
    """
    if name and not name.startswith(PREFIX):
        return Path(name)
    repository = name.removeprefix(PREFIX) or layout.config
    require_library("diffusers")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[*WORDS]))
    except Exception as error:  # of the hub, or whichever library makes the connection
        raise ValueError(
            f"the configurations and tokenizers of {layout.name}, which are not in the file, "
            f"could not be fetched from {repository} ({first_line(error)}); name a pipeline "
            "folder that has them: fewstep convert FILE FOLDER --config PIPELINE"
        ) from None


def located(name: str, tell: Callable[[str], None] = lambda text: None) -> str:
    """The folder of a pipeline that is on the hub, or in a single file; other names as they are.

    A single file is converted once, to FILE.pipeline beside it, and `tell` hears of that; the
    folder is used again for the same file, and refused for another one. ValueError as of
    `fewstep.teachers.diffusers.hub.local` and `convert_checkpoint`.
    """
    if not is_single_file(name):
        return local(name)
    path = Path(name)
    out = path.with_suffix(".pipeline")
    if is_pipeline(out):
        record = read_json(out / RECORD) if (out / RECORD).is_file() else {}
        if not isinstance(record, dict) or record.get("sha256") != digest(path):
            raise ValueError(f"{out} was not made of {path} as it is now; move one of them away")
        return str(out)
    layout = convert_checkpoint(path, out, configurations(layout_of(path)))
    tell(f"{path} is a checkpoint of {layout.name}; as a folder it is {out}")
    return str(out)
