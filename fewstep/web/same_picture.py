"""The Python and the command that make the pictures of a page again, to the bit."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from fewstep.web.picture_request import PictureRequest


@dataclass(frozen=True)
class Opened:
    """How a model is opened: by a path, or by an expression."""

    path: str = ""
    vae: str = ""
    expression: str = ""
    """Python for a model that is in no folder."""
    imports: str = ""
    """Where that expression has its names from."""

    @property
    def python(self) -> str:
        """An expression that opens it."""
        if self.expression:
            return self.expression
        vae = f", vae={self.vae!r}" if self.vae else ""
        return f"open_model({self.path!r}{vae})"


FILES = (".txt", ".jsonl", ".csv", ".parquet")
"""What `fewstep sample --prompts` takes for files."""


def python(model: Opened, student: Opened | None, request: PictureRequest, points: int = 0) -> str:
    """Lines that leave the pictures in x.

    student: of a teacher, which varies the student's picture; None for the student itself.
    points: samples of a model of points that are made at once.
    """
    steps = request.teacher_steps if student else request.steps
    changed = model.python + ("" if steps is None else f".in_steps({steps})")
    if student and request.guidance is not None:
        changed += f".guided({request.guidance!r})"
    call, lines, used = "", [f"model = {changed}"], [model]
    names = [request.kind] if request.kind in ("walk", "variations") else []
    if request.kind == "walk":
        call = f"walk(model, {request.seed}, {request.other}, {request.count}{_asked(request)})"
    elif request.kind == "variations":
        source = ""
        if student:
            used.append(student)
            many = "" if request.steps is None else f".in_steps({request.steps})"
            lines.append(f"student = {student.python}{many}")
            source = ", source=student"
        seeds = f"range({request.other}, {request.other + (points or request.count)})"
        call = f"variations(model, {request.seed}, {seeds}, {request.share!r}"
        call += f"{_asked(request)}{source})"
    else:
        call = _sampled(request, points or request.count)
    return "\n".join([*_imports(used, names), *lines, f"x = {call}"])


def _imports(used: list[Opened], names: list[str]) -> list[str]:
    """The lines that import what is used."""
    public = sorted({*names, *("open_model" for model in used if not model.expression)})
    ours = [f"from fewstep import {', '.join(public)}"] if public else []
    return [*ours, *(model.imports for model in used if model.imports)]


def _sampled(request: PictureRequest, count: int) -> str:
    """The call of `Generator.sample`."""
    last = request.seed + count
    seeds = f"[{request.seed}]" if count == 1 else f"range({request.seed}, {last})"
    if request.prompt is not None:
        return f"model.sample({seeds}, cond=model.text([{request.prompt!r}] * {count}))"
    label = "" if request.label is None else f", [{request.label}] * {count}"
    return f"model.sample({seeds}{label})"


def _asked(request: PictureRequest) -> str:
    """The keywords of a label or prompt."""
    label = "" if request.label is None else f", label={request.label}"
    return label + ("" if request.prompt is None else f", prompt={request.prompt!r}")


def command(
    model: Opened, student: Opened | None, request: PictureRequest, points: int = 0
) -> str:
    """The command that writes the pictures; "" where there is none.

    A model in no folder has none, nor a prompt that would be taken for a file, nor a teacher's
    variations of what its student makes.
    """
    teacher = student is not None
    file = request.prompt is not None and Path(request.prompt).suffix in FILES
    if model.expression or file or (teacher and request.kind == "variations"):
        return ""
    count = points or request.count
    last = request.seed + count - 1
    seeds = f"{request.seed}" if count == 1 else f"{request.seed}-{last}"
    words = ["fewstep", "sample", model.path]
    if request.kind == "walk":
        words += ["--seeds", f"{request.seed},{request.other}", "--walk", str(request.count)]
    elif request.kind == "variations":
        noise = f"{request.other}-{request.other + count - 1}"
        words += ["--seeds", f"{request.seed},{noise}", "--vary", repr(request.share)]
    else:
        words += ["--seeds", seeds]
    if request.label is not None:
        words += ["--labels", str(request.label)]
    if request.prompt is not None:
        words.append(f"--prompts={request.prompt}")
        words += ["--no-captions"] if request.kind in ("picture", "grid") else []
    steps = request.teacher_steps if teacher else request.steps
    words += [] if steps is None else ["--steps", str(steps)]
    if teacher and request.guidance is not None:
        words += ["--guidance", repr(request.guidance)]
    words += ["--vae", model.vae] if model.vae else []
    return shlex.join([*words, "--out", f"{request.kind}.png"])
