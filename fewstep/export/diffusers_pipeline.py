"""A student as a pipeline folder that stock diffusers loads and samples correctly.

    DiffusionPipeline.from_pretrained(out)(prompt, num_inference_steps=K, guidance_scale=0)

Text encoders, tokenizers and VAE are copied from the teacher's folder, the network has the
student's weights, and the scheduler carries the trajectory (`fewstep.export.schedulers`). Before
an export is called done it is loaded by diffusers alone and sampled beside the student itself.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import finite
from fewstep.diffusion.samplers import FewStep
from fewstep.export.atomic_output import new_output
from fewstep.export.client_metadata import Example, example, save_network, sidecars
from fewstep.export.folded_inputs import plain
from fewstep.export.model_card import card
from fewstep.export.schedulers import own_scheduler, stock_scheduler
from fewstep.export.traced_generator import Given, within
from fewstep.storage.files import read_json, spelled, write, write_json
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.adapter_base import Adapter, adapter_of
from fewstep.teachers.diffusers.folder import NEVER_LOADED, PipelineFolder, open_folder
from fewstep.teachers.diffusers.load import origin_folder, with_text_and_vae
from fewstep.teachers.diffusers.network import DiffusersNet, require_library
from fewstep.teachers.diffusers.text_and_vae import TextAndVAE

ELSE = "--to pt2 and --to onnx write any student with its sampler"
OWN, OWN_FILE = "FewstepSolver", Path(__file__).with_name("fewstep_solver.py")
"""The scheduler that is written where no stock one follows a solver, and its code."""
PICTURE = "picture.png"
"""The picture of a folder's card."""
TOLERANCE = 1e-5
"""Largest difference between the folder and the student, relative to the largest latent."""


def to_diffusers(run: Path, out: Path) -> float:
    """Write the student of a run as the pipeline folder `out`, which is new or empty.

    Returns the largest relative difference between the two on one prompt.
    """
    student = load_student(run)
    made = plain_of_pipeline(student, run)
    folder = origin_folder(made)
    scheduler = followed(made, folder, run)
    with new_output(out) as place:
        _write(place, made, folder, scheduler, run)
        difference = within(compare_pipelines(place, student), TOLERANCE, student, "pipeline")
    return difference


def to_safetensors(run: Path, out: Path) -> float:
    """Write the student's network as one file, under the names that diffusers has for it.

    Returns the largest difference of a weight from the student's, which is 0.
    """
    student = plain_of_pipeline(load_student(run), run)
    folder = origin_folder(student)
    kind = folder.family.network_class
    shown = example(student, run)
    with new_output(out, ".safetensors") as place:
        difference = network_file(student, folder, place, shown)
        sidecars(student, folder.pipeline, place, shown)
        config = json.dumps(str(folder.path / folder.family.network), ensure_ascii=False)
        use = f"""from diffusers import {kind}
from safetensors.torch import load_file

config = {config}  # in the teacher's folder
network = {kind}.from_config({kind}.load_config(config))
network.load_state_dict(load_file("{out.name}"))
"""
        text = card(student, run, use, {}, picture=(shown.prompt, f"{out.stem}.png"))
        write(place.with_name(f"{out.name}.md"), text)
    return difference


def network_file(student: Generator, folder: PipelineFolder, path: Path, shown: Example) -> float:
    """Write the network under diffusers' names; the largest difference on reading it again."""
    from safetensors.torch import load_file

    state = {k: v.contiguous() for k, v in student.denoiser.net.net.state_dict().items()}
    save_network(path, state, student, folder.pipeline, shown)
    with spelled(path) as named:
        again = load_file(named)
    return max(float((again[name] - state[name]).abs().max()) for name in state)


def followed(student: Generator, folder: PipelineFolder, run: Path) -> tuple[str, dict[str, Any]]:
    """As `scheduled`, or else a scheduler of its own file (`OWN`); ValueError where none is."""
    try:
        return scheduled(student, folder, run)
    except ValueError:
        assert student.model is not None
        path, predicts = student.denoiser.path, student.model.predicts
        config = own_scheduler(student.sampler, path, predicts)
        if config is None:
            raise
        return OWN, config


def scheduled(student: Generator, folder: PipelineFolder, run: Path) -> tuple[str, dict[str, Any]]:
    """Class and configuration of a stock scheduler with a student's steps; else ValueError."""
    sampler, model = student.sampler, student.model
    if not isinstance(sampler, FewStep):
        raise ValueError(
            f"{run} is sampled by {sampler}, which no stock scheduler follows; {ELSE}"
        )
    assert model is not None
    with or_else():
        return stock_scheduler(sampler, student.denoiser.path, model.predicts, folder.pipeline)


@contextmanager
def or_else() -> Iterator[None]:
    """Within the block, what stock programs cannot do is refused with the export that can."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; {ELSE}") from None


def of_pipeline(student: Generator, run: Path) -> Generator:
    """The student itself; a ValueError if it is not what a stock pipeline can be made of."""
    if student.model is None or not isinstance(student.model.net, DiffusersNet):
        raise ValueError(
            f"{run} was not distilled from a pipeline, so it cannot become one; {ELSE}"
        )
    if student.model.inputs:
        raise ValueError(
            f"{run} has further inputs ({', '.join(student.model.inputs)}), which the networks of "
            f"stock pipelines do not take; {ELSE}"
        )
    return student


def plain_of_pipeline(student: Generator, run: Path) -> Generator:
    """As `of_pipeline`, with further inputs that never change as weights (`folded_inputs`)."""
    if student.model is not None and isinstance(student.model.net, DiffusersNet):
        student = plain(student, run, f"; {ELSE}")
    return of_pipeline(student, run)


def _write(
    out: Path,
    student: Generator,
    folder: PipelineFolder,
    scheduler: tuple[str, dict[str, Any]],
    run: Path,
) -> None:
    """All files of the pipeline."""
    family, index = folder.family, read_json(folder.path / "model_index.json")
    for part in folder.parts:
        if part not in (family.network, "scheduler"):
            _copy(folder, part, out)
    student.denoiser.net.net.save_pretrained(out / family.network, safe_serialization=True)
    kind, config = scheduler
    index = {key: value for key, value in index.items() if key not in NEVER_LOADED}
    if kind == OWN:
        (out / "scheduler").mkdir()
        write(out / "scheduler" / OWN_FILE.name, OWN_FILE.read_bytes())
        write_json(out / "scheduler" / "scheduler_config.json", {"_class_name": OWN, **config})
        index |= {"scheduler": [OWN_FILE.stem, OWN]}
        facts = {
            "scheduler": f"{OWN}, code that is part of this folder: scheduler/{OWN_FILE.name}"
        }
    else:
        getattr(require_library("diffusers"), kind)(**config).save_pretrained(out / "scheduler")
        index |= {"scheduler": ["diffusers", kind]}
        facts = {"scheduler": f"{kind}, which has these steps already"}
    index[family.network] = ["diffusers", family.network_class]
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    index |= {part: [None, None] for part in NEVER_LOADED if part in _parts(folder)}
    write_json(out / "model_index.json", index)
    front = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    shown, use = example(student, run), _use(student, folder, out.name, kind == OWN)
    write(out / PICTURE, shown.png())
    text = card(student, run, use, facts, front, (shown.prompt, PICTURE))
    write(out / "README.md", text)


def _copy(folder: PipelineFolder, part: str, out: Path) -> None:
    """What is read of a part of the teacher, its weights under names without a variant."""
    weights = folder.files.get(part)
    for path in folder.read([part]):
        to = out / path.relative_to(folder.path)
        to.parent.mkdir(parents=True, exist_ok=True)
        if weights is None or path not in (weights.index, *weights.files):
            shutil.copyfile(path, to)
        elif path == weights.index:
            index = read_json(path)
            names = {file.name: weights.plain_name(file) for file in weights.files}
            index.setdefault("metadata", {})  # without which diffusers reads no index
            index["weight_map"] = {k: names[v] for k, v in index["weight_map"].items()}
            write_json(to.with_name(f"{weights.base}.safetensors.index.json"), index)
        else:
            shutil.copyfile(path, to.with_name(weights.plain_name(path)))


def _parts(folder: PipelineFolder) -> dict[str, Any]:
    """All parts that the teacher's folder names."""
    index = read_json(folder.path / "model_index.json")
    return {key: value for key, value in index.items() if isinstance(value, list)}


@torch.no_grad()
def compare_pipelines(folder: Path, student: Generator, prompt: str = "a small red cube") -> float:
    """Largest difference between a pipeline folder in stock diffusers and the student itself.

    Of the latents for one prompt and the same noise, relative to the largest of them.
    """
    code = folder / "scheduler" / OWN_FILE.name
    if code.is_file() and code.read_bytes() == OWN_FILE.read_bytes():  # of this package, no other
        from fewstep.export import fewstep_solver

        config = read_json(code.with_name("scheduler_config.json"))
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        scheduler = fewstep_solver.FewstepSolver(**given)
        left_out = origin_folder(student).left_out
        with patch.dict(sys.modules, {OWN_FILE.stem: fewstep_solver}):
            pipe = _loaded(folder, left_out, scheduler=scheduler)
        return against(pipe, student, prompt)
    return against(stock(folder), student, prompt)


@torch.no_grad()
def against(pipe: Any, student: Generator, prompt: str = "a small red cube") -> float:
    """As `compare_pipelines`, for a pipeline that is loaded already."""
    steps = student.sampler.calls
    net = adapter_of(student.denoiser)
    assert net is not None
    shape = net.to_stock(torch.empty(1, *student.shape)).shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        z, *drawn = (torch.randn(shape) for _ in range(steps))
        torch.manual_seed(1)
        torch.randn(shape)  # the scheduler goes on from here
        theirs = net.from_stock(sampled(pipe, prompt, z, steps, net))
    z, noises = net.from_stock(z), [net.drawn(noise) for noise in drawn]
    speaking = with_text_and_vae(student)
    assert speaking.text is not None
    cond = speaking.text([prompt])
    draws = Given(torch.zeros(1, dtype=torch.int64), noises=tuple(noises))
    reference = finite(student.sampler(student.denoiser, z, cond, draws))
    if net.scaled_latents:
        reference = TextAndVAE(origin_folder(student)).unscaled(reference)
    return float((theirs - reference).abs().max() / reference.abs().max())


def stock(folder: Path) -> Any:
    """The pipeline in a folder, as diffusers loads it; ValueError where the folder holds code."""
    return _loaded(folder, open_folder(folder).left_out)


def _loaded(folder: Path, left_out: Iterable[str], **more: Any) -> Any:
    require_library("transformers")  # be quiet
    with spelled(folder) as named:
        pipe = require_library("diffusers").DiffusionPipeline.from_pretrained(
            named,
            local_files_only=True,
            use_safetensors=True,
            **dict.fromkeys(left_out),
            **more,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe: Any, prompt: str, z: Tensor, steps: int, net: Adapter) -> Tensor:
    """What a stock pipeline makes of the noise z, as latents; noise comes from torch's own.

    z and latents are laid out as the pipeline has them.
    """
    more = {"use_resolution_binning": False} if hasattr(pipe, "_clean_caption") else {}
    size = {"height": net.size[0], "width": net.size[1]}
    arguments = {**size, **net.call, "latents": z, "output_type": "latent", **more}
    out: Tensor = pipe(prompt=prompt, num_inference_steps=steps, **arguments).images
    return out


def made_of(folder: PipelineFolder, *without: str) -> str:
    """Python that loads the teacher's pipeline from where it was, without some of its parts."""
    arguments = [json.dumps(str(folder.path), ensure_ascii=False)]
    if folder.variant:
        arguments.append(f'variant="{folder.variant}"')
    missing = [
        part
        for part, entry in _parts(folder).items()
        if part in NEVER_LOADED and entry != [None, None] and not (folder.path / part).is_dir()
    ]
    arguments += [f"{part}=None" for part in (*without, *missing, *folder.left_out)]
    return (
        f"pipe = DiffusionPipeline.from_pretrained({', '.join(arguments)})  # the teacher's folder"
    )


def embedded(folder: PipelineFolder, decodes: bool = False) -> str:
    """Python that makes the tensors of a condition, by their names, of a prompt.

    decodes: whether the pipeline is loaded with its VAE.
    """
    stock = TextAndVAE(folder)
    takes = inspect.signature(stock.kind.encode_prompt).parameters
    arguments = ['"a prompt"']
    for key, value in {"device": "cpu", "num_images_per_prompt": 1, **stock.settings}.items():
        if value != takes[key].default:
            call = f'inspect.signature(pipe.__call__).parameters["{key}"].default'
            arguments.append(f"{key}={call if isinstance(value, list) else repr(value)}")
    names = [name if name in folder.family.tensors else "_" for name in folder.family.encoded]
    without = (folder.family.network, *(() if decodes else ("vae",)))
    code = f"""{made_of(folder, *without)}
with torch.no_grad():
    {", ".join(names)} = pipe.encode_prompt({", ".join(arguments)})
"""
    return code + (_FILLED.format(tokens=stock.tokens) if folder.family.own_lengths else "")


_FILLED = """mask = torch.ones(prompt.shape[:2]) if mask is None else mask
fill = {tokens} - prompt.shape[1]
prompt = torch.nn.functional.pad(prompt, (0, 0, 0, fill))
mask = torch.nn.functional.pad(mask, (0, fill))
"""
"""Python that fills a prompt up to the length that a program is made for."""


def picture(student: Generator, folder: PipelineFolder) -> str:
    """Python code that calls the pipeline `pipe` with the arguments of its family.

    Those that move the size to the nearest of a list, which begins at 512, are told it.
    """
    net: Adapter = student.denoiser.net
    arguments = {name: f"{value:g}" for name, value in net.call.items()}
    if "use_resolution_binning" in inspect.signature(TextAndVAE(folder).kind.__call__).parameters:
        arguments |= {"height": f"{net.size[0]}", "width": f"{net.size[1]}"}
        arguments |= {"use_resolution_binning": "False"}
    call = ", ".join(f"{name}={value}" for name, value in arguments.items())
    return f"""torch.manual_seed(0)  # some pipelines pass no generator on to their scheduler
picture = pipe(prompt="a prompt", num_inference_steps={student.sampler.calls}, {call}).images[0]"""


def _use(student: Generator, folder: PipelineFolder, name: str, own_code: bool) -> str:
    """Python that samples the folder of this name, whose scheduler may be code of its own."""
    arguments = [f'"{name}"', *(f"{part}=None" for part in folder.left_out)]
    if own_code:
        arguments.append("trust_remote_code=True")
    return f"""import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({", ".join(arguments)})
{picture(student, folder)}
"""
