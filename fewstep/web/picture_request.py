"""What a page asks for, field by field: each has its limits, and what is not known is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from fewstep.config import nearest

KINDS = ("picture", "grid", "walk", "variations")
BODY = 4096
"""Bytes of a request at most."""
PROMPT = 500
"""Characters of a prompt at most."""
SEED = 2**31 - 1
WHOLE = {
    "seed": (0, SEED),
    "other": (0, SEED),
    "steps": (1, 8),
    "teacher_steps": (1, 100),
    "count": (1, 64),
}
"""Fields that are whole numbers, with the least and the largest."""
REAL = {"guidance": (0.0, 30.0), "share": (0.01, 0.99)}
COUNTS = {"picture": (1, 1), "grid": (1, 64), "walk": (2, 16), "variations": (1, 16)}
"""How many pictures of each kind."""
OF_TEXT = 8
"""Pictures of a model of prompts at most, which are made together."""


@dataclass(frozen=True)
class PictureRequest:
    """Pictures that are asked for; None stands for what a model does by itself."""

    kind: str = "picture"
    """"picture": all steps of one; "grid": of seeds in a row; "walk": between seed and other;
    "variations": of seed, by the noise of the seeds from other on."""
    seed: int = 0
    other: int = 1
    label: int | None = None
    prompt: str | None = None
    steps: int | None = None
    """Of the student."""
    teacher_steps: int | None = None
    guidance: float | None = None
    """Of the teacher."""
    share: float = 0.5
    """Of noise, for variations."""
    count: int = 1


@dataclass(frozen=True)
class Limits:
    """What the models of a page take."""

    classes: int = 0
    prompts: bool = False
    teacher: bool = False
    points: bool = False
    kinds: tuple[str, ...] = field(default=KINDS)


def read(body: bytes, limits: Limits) -> PictureRequest:
    """The request in a body of JSON; ValueError, in one sentence, for any other."""
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ValueError("the request is not JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("the request is a JSON object of fields")
    known = {name: _field(name, value, limits) for name, value in fields.items()}
    request = PictureRequest(**known)
    _fits(request, limits)
    return request


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _field(name: str, value: Any, limits: Limits) -> Any:
    """The value of a field; ValueError where it has another type, or is beyond its limits."""
    whole = {**WHOLE, "label": (0, limits.classes)}
    if name == "kind":
        return _one_of(name, value, limits.kinds)
    if name == "prompt":
        return _prompt(value, limits)
    if name in ("label", "teacher_steps", "guidance", "steps") and value is None:
        return None
    if name in whole:
        return _number(name, value, *whole[name], int)
    if name in REAL:
        return _number(name, value, *REAL[name], float)
    raise ValueError(f"there is no field {name[:40]!r}{nearest(name[:40], [*whole, *REAL])}")


def _number(name: str, value: Any, low: float, high: float, kind: type) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {what} from {low:g} to {high:g}, got {_shown(value)}")
    return kind(value)


def _one_of(name: str, value: Any, values: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in values:
        raise ValueError(f"{name} is one of {', '.join(values)}, got {_shown(value)}")
    return value


def _prompt(value: Any, limits: Limits) -> str | None:
    if not limits.prompts:
        if value in (None, ""):
            return None
        raise ValueError("this model takes no prompt")
    if not isinstance(value, str) or not value.strip() or len(value) > PROMPT:
        raise ValueError(f"prompt is a text of 1 to {PROMPT} characters, got {_shown(value)}")
    if not value.isprintable():
        raise ValueError("prompt is one line of text, without control characters")
    return value


def _fits(request: PictureRequest, limits: Limits) -> None:
    """ValueError where fields do not fit each other, or the models."""
    low, high = COUNTS[request.kind]
    if limits.prompts:
        high = min(high, OF_TEXT)
    if not limits.points and not low <= request.count <= high:
        raise ValueError(
            f"count is a whole number from {low} to {high} for a {request.kind}, got "
            f"{request.count}"
        )
    if limits.prompts and request.prompt is None:
        raise ValueError("this model needs a prompt")
    if request.label is not None and not limits.classes:
        raise ValueError("this model takes no label")
    if request.kind == "walk" and request.seed == request.other:
        raise ValueError("a walk leads from one seed to another: choose two that differ")
    if request.guidance not in (None, 1.0) and not (limits.classes or limits.prompts):
        raise ValueError("guidance needs prompts or labels, and this model takes none")


def _shown(value: Any) -> str:
    """A value in a sentence."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
