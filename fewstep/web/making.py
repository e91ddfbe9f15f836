"""Pictures step by step: what a request asks for, as a stream of events, and how it is made again.

The events of one side (student or teacher) are

    start    how many steps and network calls will be made
    state    a step of its sampler: the prediction x_0, the input x_t, time, calls, milliseconds
    made     the pictures, with the Python and the command that make the same ones, to the bit

Milliseconds are those of the sampler alone, without text encoders, decoder and PNG.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.image_grid import class_columns, grid, is_points, png
from fewstep.diffusion.around import (
    Start,
    default_label,
    start,
    start_of_variations,
    start_of_walk,
)
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise_path import expand
from fewstep.diffusion.pixels import finite
from fewstep.diffusion.types import State
from fewstep.web.picture_request import Limits, PictureRequest
from fewstep.web.same_picture import Opened, command, python

Event = dict[str, Any]
POINTS = 1000
"""Samples of a model of points that are shown at once."""


@dataclass(frozen=True)
class Side:
    """One model of the page."""

    name: str
    """"student" or "teacher"."""
    generator: Generator
    opened: Opened
    """How it is opened again."""

    def sampled(self, request: PictureRequest) -> Generator:
        """The generator in the steps, and with the guidance, that are asked of this side."""
        found = self.generator
        steps = request.steps if self.name == "student" else request.teacher_steps
        if steps is not None:
            found = found.in_steps(steps)
        if self.name == "teacher" and request.guidance is not None:
            found = found.guided(request.guidance)
        return found


def limits(sides: list[Side]) -> Limits:
    """What may be asked of these models."""
    student = sides[0].generator
    return Limits(student.classes, student.text is not None, len(sides) > 1, student.shape == (2,))


def seeds_of(request: PictureRequest, points: bool) -> range:
    """The seeds of the pictures of a request that is no walk; of variations, of their noise."""
    first = request.other if request.kind == "variations" else request.seed
    return range(first, first + (POINTS if points else request.count))


def events(sides: list[Side], request: PictureRequest) -> Iterator[Event]:
    """All events of a request, side after side; the student's are first.

    ValueError where a model cannot make what is asked for; nothing of that side was sent then.
    """
    for side in sides:
        yield from _of_side(side, sides[0], request)


def _of_side(side: Side, student: Side, request: PictureRequest) -> Iterator[Event]:
    generator = side.sampled(request)
    named = {"side": side.name}
    begun = begin(generator, student.sampled(request), request)
    yield {"event": "start", **named, "calls": begun.sampler.calls}
    last: State | None = None
    shown = request.kind == "picture"
    for state, calls, seconds in timed(generator, begun):
        last = state
        if bool((state.s < state.t).all()):  # else a correction of the same step
            card = _state(generator, state, shown)
            yield {"event": "state", **named, "calls": calls, "ms": 1000 * seconds, **card}
    assert last is not None
    with torch.no_grad():
        x = finite(generator.decode(finite(last.x0))).cpu()
    card = {"png": uri(grid(x, columns(generator, request))), **_points(x)}
    if request.kind == "walk" and not is_points(x):
        card["frames"] = [uri(grid(frame[None])) for frame in x]
    of = None if side is student else student.opened
    same = side.opened, of, request, POINTS if generator.shape == (2,) else 0
    card |= {"python": python(*same), "command": command(*same)}
    yield {"event": "made", **named, "calls": calls, "ms": 1000 * seconds, **card}


def begin(generator: Generator, student: Generator, request: PictureRequest) -> Start:
    """What the sampler starts from: as the Python calls and commands of the same picture do."""
    asked = request.label, request.prompt
    if request.kind == "walk":
        return start_of_walk(generator, request.seed, request.other, request.count, *asked)
    seeds = seeds_of(request, generator.shape == (2,))
    if request.kind == "variations":
        x0 = start(student, [request.seed], *asked).x0(student)
        label = default_label(generator, request.seed, request.label)
        return start_of_variations(generator, x0, seeds, request.share, label, request.prompt)
    return start(generator, seeds, *asked)


def timed(generator: Generator, begun: Start) -> Iterator[tuple[State, int, float]]:
    """The states of a sampler, each with the network calls and the seconds so far."""
    states, seconds = begun.states(generator), 0.0
    with counted(generator.denoiser) as calls:
        while True:
            began = perf_counter()
            with torch.no_grad():
                state = next(states, None)
            if generator.device.type == "cuda":
                torch.cuda.synchronize()
            seconds += perf_counter() - began
            if state is None:
                return
            yield state, calls(), seconds


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[Callable[[], int]]:
    """How often the network was called since the block began."""
    made = [0]

    def hear(*_: Any) -> None:
        made[0] += 1

    handle = denoiser.register_forward_pre_hook(hear)
    try:
        yield lambda: made[0]
    finally:
        handle.remove()


@torch.no_grad()
def _state(generator: Generator, state: State, shown: bool) -> Event:
    """Time and noise level of a state, and where it is to be seen its x_0 and x_t."""
    alpha, sigma = (c(state.t[:1].double()) for c in (state.path.alpha, state.path.sigma))
    card: Event = {"t": float(state.t[0]), "share": float(sigma / (alpha + sigma))}
    if not shown:
        return card
    t = expand(state.t, state.xt)
    noisy = finite(state.xt / (state.path.alpha(t) + state.path.sigma(t))).cpu()
    x0 = finite(generator.decode(finite(state.x0))).cpu()
    if is_points(x0):
        return {**card, **_points(x0), "noisy_points": _points(noisy)["points"]}
    return {**card, "png": uri(grid(x0)), "noisy": uri(grid(noisy))}


def columns(generator: Generator, request: PictureRequest) -> int | None:
    """Of the grid, as `fewstep sample` has them."""
    every = request.label is None and request.kind == "grid"
    return class_columns(generator.classes, request.count) if every else None


def _points(x: Tensor) -> Event:
    """Points (N, 2) as numbers for the page; nothing for pictures."""
    if not is_points(x):
        return {}
    return {"points": [[_number(a), _number(b)] for a, b in x.tolist()]}


def _number(value: float) -> float:
    return round(value, 4) if math.isfinite(value) else 0.0


def uri(image: Any) -> str:
    """A picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def warm(side: Side) -> None:
    """Make the first step of a picture, so that what is loaded or compiled once is done."""
    prompt = None if side.generator.text is None else "a picture"
    request = PictureRequest(prompt=prompt)
    begun = begin(side.generator, side.generator, request)
    with torch.no_grad():
        state = next(begun.states(side.generator))
        side.generator.decode(state.x0)
