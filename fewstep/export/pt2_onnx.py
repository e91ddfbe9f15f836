"""A student as a program for other runtimes: torch.export (.pt2) and ONNX (.onnx).

Both hold the weights, the network and the sampler's loop (see `fewstep.export.traced_generator`),
for any student, of a pipeline or not. Of a pipeline the text encoders stay where they are: the
program takes embeddings and gives latents, or pictures, by the VAE's decoder, where these are
asked for.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.export.atomic_output import new_output
from fewstep.export.client_metadata import Example, example
from fewstep.export.diffusers_pipeline import embedded
from fewstep.export.model_card import card
from fewstep.export.traced_generator import (
    Inputs,
    batches,
    described,
    difference,
    examples,
    traced,
    within,
)
from fewstep.storage.files import spelled, write
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.adapter_base import adapter_of
from fewstep.teachers.diffusers.compatibility import moments
from fewstep.teachers.diffusers.load import origin_folder, with_text_and_vae

FACTS = "fewstep.json"
"""Where a .pt2 file says what it is; in an .onnx file it is the metadata "fewstep"."""
PT2_TOLERANCE, ONNX_TOLERANCE = 1e-5, 1e-4
OPSET = 20
"""Version of ONNX's operators that is written."""


def to_pt2(run: Path, out: Path, pictures: bool = False) -> float:
    """Write the student of a run as the torch.export program `out`, a new file named .pt2.

    `torch.export.load(out).module()({"z": z, ...})` -> x_0. Returns the largest relative
    difference from the student.
    """
    student = opened(run, pictures)
    with new_output(out, ".pt2") as place:
        program = traced(student)
        facts = described(student, examples(student, 1), batches(program))
        whole = io.BytesIO()  # written to a disk that is full, torch ends the process
        torch.export.save(program, whole, extra_files={FACTS: json.dumps(facts)})
        write(place, whole.getvalue())
        again: Any = torch.export.load(io.BytesIO(place.read_bytes())).module()
        worst = within(difference(student, again), PT2_TOLERANCE, student, "program")
        use = _pt2_use(student, out, facts)
        write(place.with_name(f"{out.name}.md"), card(student, run, use, facts))
    return worst


def to_onnx(run: Path, out: Path, pictures: bool = False) -> float:
    """Write the student of a run as the ONNX model `out`, a new file named .onnx.

    Its inputs have the program's names, its output is "x". Weights of more than 1.5 GiB go into
    a second file, `out`.data. Returns the largest relative difference that onnxruntime finds.
    """
    runtime, _ = needed("onnxruntime"), needed("onnxscript")
    student = opened(run, pictures)
    with new_output(out, ".onnx") as place:
        program, inputs = traced(student), examples(student, 1)
        _refuse_complex_numbers(program)
        _without_idle_squeezes(program)
        facts = described(student, inputs, batches(program)) | {"opset": OPSET}
        with quiet(), told_as_sentence():
            model: Any = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,  # it drops the addition of numbers near 0, such as 1e-15
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=["x"],
                verbose=False,
            )
            model.model.metadata_props["fewstep"] = json.dumps(facts)
            model.save(place)
        try:
            with spelled(place) as named:
                session = runtime.InferenceSession(named, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ValueError(
                f"onnxruntime does not take what torch.onnx made of this network: {error}"
            ) from None

        def ran(inputs: Inputs) -> Tensor:
            feed = {name: tensor.numpy() for name, tensor in inputs.items()}
            return torch.from_numpy(session.run(["x"], feed)[0])

        worst = within(difference(student, ran), ONNX_TOLERANCE, student, "program")
        use, shown = _onnx_use(student, out, facts, pictures), _example(run)
        picture = None
        if shown is not None:
            picture = (shown.prompt, f"{out.name}.png")
            write(place.with_name(picture[1]), shown.png())
        text = card(student, run, use, facts, picture=picture)
        write(place.with_name(f"{out.name}.md"), text)
    return worst


def _refuse_complex_numbers(program: Any) -> None:
    """ONNX has none; torch.onnx would say so after minutes of a large network."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_complex():
            raise ValueError(
                "ONNX cannot write this network (it computes with complex numbers); "
                "use --to pt2 or --to diffusers"
            )


@contextmanager
def told_as_sentence() -> Iterator[None]:
    """Within the block, what torch.onnx cannot write is a ValueError with the innermost reason."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        inner: BaseException = error
        while inner.__cause__ is not None:
            inner = inner.__cause__
        why = str(inner).partition("\n")[0]
        raise ValueError(
            f"torch.onnx cannot write this network ({why}); use --to pt2 or --to diffusers"
        ) from None


def opened(run: Path, pictures: bool) -> Generator:
    """The student, which decodes its latents if it is to make pictures."""
    student = load_student(run)
    net = adapter_of(student.denoiser)
    if net is not None and net.own_lengths:
        raise ValueError(
            f"the prompts of a {type(net.net).__name__} have lengths of their own, so that no "
            "graph takes them all; use --to diffusers or safetensors"
        )
    if not pictures:
        return student
    speaking = with_text_and_vae(student)
    if speaking is student:
        raise ValueError(f"{run} has no VAE to decode with: leave out --pictures")
    return speaking


def _without_idle_squeezes(program: torch.export.ExportedProgram) -> None:
    """Take out, in place, squeezes of a dimension that is not 1.

    They do nothing in torch (PixArt's network has one), and are an error in ONNX.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.squeeze.dim:
            source, dim = node.args
            size = source.meta["val"].shape[dim]
            if isinstance(size, int) and size != 1:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
    program.graph_module.recompile()


def needed(name: str) -> ModuleType:
    """A module of the extra `onnx`; a ValueError says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"ONNX needs {name}, which is not installed: pip install 'fewstep[onnx]'"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch.onnx warnings about libraries that are not used here."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _feed(facts: dict[str, Any], made: tuple[str, ...], ending: str) -> str:
    """The inputs of one picture as Python: {"z": torch.randn(1, 1, 8, 8), ...}.

    made: those that were made before, under their own names; others are examples.
    """
    entries = []
    for name, about in facts["inputs"].items():
        shape = ", ".join(map(str, [1, *about["shape"][1:]]))
        if name in made:
            value = f"{name}.float()"
        elif about["type"] == "int64":
            value = f"torch.zeros({shape}, dtype=torch.int64)"
        else:
            value = f"torch.{'randn' if name in ('z', 'noise') else 'zeros'}({shape})"
        entries.append(f'"{name}": {value}{ending}')
    return "{" + ", ".join(entries) + "}"


def _example(run: Path) -> Example | None:
    """A picture of the student; None of what cannot be shown or decoded here."""
    student = load_student(run)
    net = adapter_of(student.denoiser)
    if net is None and not _shows(student):
        return None
    try:
        return example(student, run)
    except ValueError:  # the teacher's folder is gone
        return None


def _spoken(student: Generator, decodes: bool = False) -> tuple[str, str, tuple[str, ...]]:
    """(imports, Python, names) of the embeddings, by the teacher's pipeline where it is there."""
    try:
        folder = origin_folder(student)
    except ValueError:
        return "", "", ()
    made = embedded(folder, decodes)
    imports = (
        "import inspect\n" * ("inspect." in made) + "from diffusers import DiffusionPipeline\n"
    )
    return imports, made, folder.family.tensors


def _pt2_use(student: Generator, out: Path, facts: dict[str, Any]) -> str:
    imports, made, names = _spoken(student)
    return f"""import torch
{imports}
{made}generator = torch.export.load("{out.name}").module()
x = generator({_feed(facts, names, "")})
"""


def _onnx_use(student: Generator, out: Path, facts: dict[str, Any], pictures: bool = False) -> str:
    ending, needs, decodes = _ending(student, pictures)
    imports, made, names = _spoken(student, decodes)
    return f"""import onnxruntime
import torch
{imports}{needs}
{made}generator = onnxruntime.InferenceSession("{out.name}")
(x,) = generator.run(["x"], {_feed(facts, names, ".numpy()")})
{ending}"""


_PIXELS = """pixels = ((x[0] + 1) * 127.5).clip(0, 255).round().astype("uint8")
Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save("picture.png")
"""
_DECODED = """latents = torch.from_numpy(x) * torch.tensor({std}) + torch.tensor({mean})
with torch.no_grad():
    decoded = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
pipe.image_processor.postprocess(decoded)[0].save("picture.png")
"""
"""Python that makes a picture of what a program gives: pixels, or latents."""


def _ending(student: Generator, pictures: bool) -> tuple[str, str, bool]:
    """(Python that writes picture.png, its imports, whether it needs the pipeline's VAE).

    Nothing of samples that are no pictures, and of latents whose pipeline folds them.
    """
    image = "from PIL import Image\n"
    if pictures or (adapter_of(student.denoiser) is None and _shows(student)):
        return _PIXELS, image, False
    try:
        folder = origin_folder(student)
    except ValueError:
        return "", "", False
    if folder.vae_kind.frames or folder.vae_kind.folded > 1:
        return "# x holds latents: exported with --pictures it holds pictures\n", "", False
    mean, std = ([[[number]] for number in numbers] for numbers in moments(folder))
    return _DECODED.format(mean=mean, std=std), "", True


def _shows(student: Generator) -> bool:
    """Whether the samples are pictures."""
    return len(student.shape) == 3 and student.shape[0] in (1, 3)
