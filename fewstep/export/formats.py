"""The formats that a finished student can be written in, one line each.

A writer is called with (run, out): a run folder, or a folder with model.json, and the file or
folder to write; adapters also take a rank, programs whether to decode. It loads the result again,
or follows it as the program it is for does, and returns the largest difference from the student
relative to the student's largest number. What differs too much is not kept: the writer raises
ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fewstep.config import nearest
from fewstep.export.checkpoint import to_checkpoint
from fewstep.export.comfyui import caution, to_comfyui
from fewstep.export.diffusers_pipeline import to_diffusers, to_safetensors
from fewstep.export.lora import to_kohya, to_lora
from fewstep.export.pt2_onnx import to_onnx, to_pt2
from fewstep.export.space import to_space
from fewstep.report.formatting import short
from fewstep.report.run_data import number, read_run
from fewstep.runs.run_folder import RunFolder
from fewstep.storage.model_folder import model_description, stored_card

Writer = Callable[..., float]


@dataclass(frozen=True)
class Format:
    """One way of shipping a student."""

    write: Writer
    what: str
    """What is written, and for whom."""
    takes: str = ""
    """The further argument of the writer, if any: "rank" or "pictures"."""


FORMATS: Mapping[str, Format] = {
    "diffusers": Format(to_diffusers, "a pipeline folder that stock diffusers samples right"),
    "safetensors": Format(to_safetensors, "a pipeline's network alone, under diffusers' names"),
    "checkpoint": Format(to_checkpoint, "one file in the original layout, of SD and SDXL"),
    "pt2": Format(to_pt2, "any student with its sampler, for torch.export.load", "pictures"),
    "onnx": Format(to_onnx, "any student with its sampler, for onnxruntime", "pictures"),
    "comfyui": Format(to_comfyui, "a pipeline's network and a workflow of ComfyUI's stock nodes"),
    "lora": Format(to_lora, "an adapter of a pipeline, under diffusers' names", "rank"),
    "space": Format(to_space, "a gradio app of it for the Hugging Face hub, or any machine"),
    "kohya": Format(to_kohya, "the same of a U-Net under kohya's names, one file", "rank"),
}
"""What `fewstep export --to` takes."""


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
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}{nearest(name, FORMATS)}")
    RunFolder(run).refuse_unfinished()
    options = {"rank": rank, "pictures": pictures or None}
    options = {key: value for key, value in options.items() if value is not None}
    for key in options:
        if FORMATS[name].takes != key:
            fit = [other for other, form in FORMATS.items() if form.takes == key]
            raise ValueError(f"--{key} is for {' and '.join(fit)}, not for {name!r}; leave it out")
    return FORMATS[name].write(run, out, **options)


def notes(run: Path, name: str) -> Iterator[str]:
    """Sentences for the user on this export, such as that a better model was kept."""
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
    if name == "comfyui" and (said := caution(model_description(run))):
        yield said
