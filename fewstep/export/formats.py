"""The formats that a finished student can be written in, one entry each.

A writer is called with (run, out): a run folder, or a folder with model.json, and the file or
folder to write; adapters also take a rank, programs whether to decode. It loads the result again,
or follows it as the program it is for does, and returns the largest difference from the student
relative to the student's largest number. What differs too much is not kept: the writer raises
ValueError.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fewstep.config import nearest
from fewstep.report.formatting import short
from fewstep.runs.run_folder import RunFolder

Writer = Callable[..., float]


@dataclass(frozen=True)
class Format:
    """One way of shipping a student."""

    module: str
    """Of this folder; the writer of the format x is its function to_x."""
    what: str
    """What is written, and for whom."""
    takes: str = ""
    """The further argument of the writer, if any: "rank" or "pictures"."""
    file: str = ""
    """Name in a repository of what is one file, with its card beside it; "" for a folder."""


PIPELINE = "diffusers_pipeline"
WEIGHTS, ADAPTER = "model.safetensors", "pytorch_lora_weights_kohya.safetensors"
FORMATS: Mapping[str, Format] = {
    "diffusers": Format(PIPELINE, "a pipeline folder that stock diffusers samples right"),
    "safetensors": Format(
        PIPELINE, "a pipeline's network alone, under diffusers' names", file=WEIGHTS
    ),
    "checkpoint": Format(
        "checkpoint", "one file in the original layout, of SD and SDXL", file=WEIGHTS
    ),
    "pt2": Format(
        "pt2_onnx", "any student with its sampler, for torch.export.load", "pictures", "model.pt2"
    ),
    "onnx": Format(
        "pt2_onnx", "any student with its sampler, for onnxruntime", "pictures", "model.onnx"
    ),
    "comfyui": Format("comfyui", "a pipeline's network and a workflow of ComfyUI's stock nodes"),
    "lora": Format("lora", "an adapter of a pipeline, under diffusers' names", "rank"),
    "kohya": Format("lora", "the same of a U-Net under kohya's names, one file", "rank", ADAPTER),
    "space": Format("space", "a gradio app of a student, for the Hugging Face hub or any machine"),
}
"""What `fewstep export --to` takes. A name is part of that of its function, so it has
letters, digits and _ alone. Writers are imported when they are asked for."""


def format_called(name: str) -> Format:
    """The format of this name; a ValueError where there is none."""
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}{nearest(name, FORMATS)}")
    return FORMATS[name]


def writer(name: str) -> Writer:
    """The function that writes a format; a ValueError where there is none of this name."""
    module = importlib.import_module(f"fewstep.export.{format_called(name).module}")
    write: Writer = getattr(module, f"to_{name}")
    return write


def export(
    run: Path, out: Path, name: str, rank: int | None = None, pictures: bool | None = None
) -> float:
    """Write the student of a finished run in a format for other programs, and check the result.

    Arguments:
        run: a finished run folder, or a model folder.
        out: the file or folder to write.
        name: a key of `FORMATS`.
        rank: of an adapter, where it is not the one that was trained.
        pictures: whether a program decodes its latents to pictures.
    Returns the largest difference between the result and the student, relative to the student's
    largest number.
    Raises ValueError for an unknown format, an argument that it does not take, an unfinished run,
    a student that the format cannot hold, or a result that differs too much.
    """
    takes = format_called(name).takes
    RunFolder(run).refuse_unfinished()
    options = {"rank": rank, "pictures": pictures or None}
    options = {key: value for key, value in options.items() if value is not None}
    for key in options:
        if takes != key:
            fit = [other for other, form in FORMATS.items() if form.takes == key]
            raise ValueError(f"--{key} is for {' and '.join(fit)}, not for {name!r}; leave it out")
    return writer(name)(run, out, **options)


def notes(run: Path, name: str) -> Iterator[str]:
    """Sentences for the user on this export, such as that a better model was kept."""
    from fewstep.export.comfyui import caution, without_t5
    from fewstep.report.run_data import number, read_run
    from fewstep.storage.model_folder import model_description, stored_card
    from fewstep.teachers.diffusers.folder import open_folder
    from fewstep.teachers.diffusers.load import pipeline_card

    best = RunFolder(run).best
    if (best / "manifest.json").is_file():
        kept, last = stored_card(best), stored_card(run)
        if kept.get("steps") != last.get("steps"):
            rule = read_run(run).run.get("best")
            metric = str(rule.get("metric")) if isinstance(rule, Mapping) else "?"
            yield (
                f"this is the last model, of step {last.get('steps')}; the best, of step "
                f"{kept.get('steps')} ({metric} {short(number(kept, metric))}), is in {best}: "
                "export that folder if you want it"
            )
    if name == "comfyui":
        folder = open_folder(pipeline_card(stored_card(run))["folder"])
        yield from filter(None, (caution(model_description(run)), without_t5(folder)))
