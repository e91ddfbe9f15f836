"""A student as a Space of the Hugging Face hub: a gradio app that runs on any machine, too.

    README.md          the front matter that a Space is set up by, and the model card
    app.py             the page; it needs nothing of fewstep
    requirements.txt
    student.pt2        network and sampler as one program, or
    student/           a pipeline folder, of students of pipelines

A pipeline asks for ZeroGPU: its function is `spaces.GPU`, which lends a GPU for each call. Others
are small, and run on the processor. https://huggingface.co/docs/hub/spaces-config-reference,
https://huggingface.co/docs/hub/spaces-zerogpu
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from fewstep.diffusion.generator import Generator
from fewstep.export.atomic_output import new_output
from fewstep.export.diffusers_pipeline import OWN_FILE, picture, to_diffusers
from fewstep.export.model_card import NAMELESS, card, licences, teacher_name
from fewstep.export.pt2_onnx import to_pt2
from fewstep.report.formatting import count
from fewstep.storage.files import write
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.load import origin_folder
from fewstep.teachers.diffusers.network import DiffusersNet

SDK = "6.31.0"
"""The version of gradio that the app was tried with."""
TEMPLATES = Path(__file__).parent
NEEDS: Mapping[str, tuple[str, ...]] = {
    "program": (f"gradio=={SDK}", "torch>=2.10", "numpy>=1.26", "pillow>=10"),
    "pipeline": (
        *(f"gradio=={SDK}", "spaces", "torch>=2.8", "diffusers>=0.36", "transformers>=4.57"),
        *("safetensors", "sentencepiece", "protobuf"),
    ),
}
HARDWARE = {"program": "cpu-basic", "pipeline": "zero-a10g"}


def to_space(run: Path, out: Path) -> float:
    """Write the student of a run as the folder `out` of a Space, which is new or empty.

    Returns the largest relative difference of what is in it from the student. ValueError where a
    student makes neither pictures nor what a stock pipeline can decode.
    """
    student = load_student(run)
    pipeline = student.model is not None and isinstance(student.model.net, DiffusersNet)
    if not pipeline and (len(student.shape) != 3 or student.shape[0] not in (1, 3)):
        raise ValueError(
            f"{run} makes samples of shape {student.shape}, and a Space shows pictures: export it "
            "--to pt2 or onnx, or look at it with fewstep serve"
        )
    kind = "pipeline" if pipeline else "program"
    with new_output(out) as place:
        place.mkdir()
        if pipeline:
            difference = to_diffusers(run, place / "student")
        else:
            difference = to_pt2(run, place / "student.pt2")
            (place / "student.pt2.md").unlink()
        write(place / "app.py", app(student, kind, place))
        write(place / "requirements.txt", "".join(f"{need}\n" for need in NEEDS[kind]))
        write(place / "README.md", readme(student, run, kind))
    return difference


def app(student: Generator, kind: str, place: Path) -> str:
    """The page as Python; `place` holds what it loads."""
    text = (TEMPLATES / f"space_{kind}.py.txt").read_text(encoding="utf-8")
    title = name(student)
    filled = {"TITLE": json.dumps(title), "HEADING": json.dumps(f"# {title}\n\n{_made(student)}")}
    if kind == "pipeline":
        call = re.search(
            r'pipe\(prompt="a prompt", (.*)\)\.images', picture(student, origin_folder(student))
        )
        assert call is not None
        own = (place / "student" / "scheduler" / OWN_FILE.name).is_file()
        filled |= {"CALL": call[1], "CODE": ", trust_remote_code=True" if own else ""}
    for key, value in filled.items():
        text = text.replace(f"@{key}@", value)
    return text


def readme(student: Generator, run: Path, kind: str) -> str:
    """The front matter of a Space, and below it the model card."""
    head = {
        "title": json.dumps(name(student)),
        "emoji": "\u26a1",
        "colorFrom": "blue",
        "colorTo": "red",
        "sdk": "gradio",
        "sdk_version": SDK,
        "app_file": "app.py",
        "suggested_hardware": HARDWARE[kind],
        "pinned": "false",
    }
    licence = licences(student)
    head |= {key: licence[key] for key in ("license",) if key in licence}
    use = "pip install -r requirements.txt\npython app.py"
    _, _, body = card(student, run, use, {}).split("---\n", 2)
    lines = "".join(f"{key}: {value}\n" for key, value in head.items())
    return f"---\n{lines}---\n{body}".replace("```python\npip", "```\npip")


def name(student: Generator) -> str:
    """The title: the teacher's name where it has one, else the method's, and the calls."""
    teacher = teacher_name(student)
    first = f"A student of {method(student)}" if teacher == NAMELESS else teacher
    return f"{first} in {count(student.sampler.calls, 'call')}"


def method(student: Generator) -> str:
    """The name of the method that made it."""
    return str(student.card.get("method", "")).partition("(")[0] or "fewstep"


def _made(student: Generator) -> str:
    """How it was made, in a sentence."""
    calls = count(student.sampler.calls, "network call")
    return f"Distilled by {method(student)} with fewstep: {calls} a picture."
