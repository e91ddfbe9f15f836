"""The playground: a student and its teacher, asked for pictures from a page.

GET  /          the page, with its style and script beside it
GET  /card      what the models are, and what may be asked of them
POST /make      pictures, as a stream of events, a line of JSON each (`fewstep.web.making`)
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

import fewstep
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.sampler_changes import from_share, in_steps
from fewstep.storage.machine_errors import sentence, short_of_memory
from fewstep.web.desk import Busy, Desk, Placed
from fewstep.web.making import POINTS, Event, Side, events, limits
from fewstep.web.picture_request import BODY, COUNTS, KINDS, OF_TEXT, PROMPT, SEED, WHOLE, read
from fewstep.web.shell import FILES, tell

PATIENCE = 20.0
"""Seconds for a body to come, and for a line to be taken."""
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


@dataclass(frozen=True)
class Playground:
    """The models of a page, the student first, and the desk where their work is handed in."""

    sides: list[Side]
    title: str
    desk: Desk = field(default_factory=Desk)

    def card(self) -> dict[str, Any]:
        """What the page is told of the models, and of the limits of its fields."""
        bounds = limits(self.sides)
        student = self.sides[0].generator
        guided = len(self.sides) > 1 and (bounds.classes > 0 or bounds.prompts)
        return {
            "title": self.title,
            "version": fewstep.__version__,
            "models": {side.name: _model(side) for side in self.sides},
            "classes": bounds.classes,
            "prompts": bounds.prompts,
            "points": POINTS if bounds.points else 0,
            "guided": guided,
            "kinds": [kind for kind in KINDS if kind != "variations" or self._varies()],
            "counts": {
                kind: [low, min(high, OF_TEXT) if bounds.prompts else high]
                for kind, (low, high) in COUNTS.items()
            },
            "most": {"seed": SEED, "prompt": PROMPT, "teacher_steps": WHOLE["teacher_steps"][1]},
            "shape": list(student.shape),
        }

    def _varies(self) -> bool:
        """Whether all samplers can start from the middle."""
        try:
            for side in self.sides:
                from_share(side.generator.sampler, side.generator.denoiser.path, 0.5)
        except ValueError:
            return False
        return True

    def application(self) -> Starlette:
        """The routes; `fewstep.web.shell.serve` guards them."""
        names = ("playground.html", "playground.css", "playground.js")
        files = [
            Route("/" if name.endswith("html") else f"/{name}", _file(name)) for name in names
        ]
        more = [
            Route("/card", self._card),
            Route("/make", self._make, methods=["POST"]),
        ]
        app = Starlette(routes=[*files, *more])
        app.router.redirect_slashes = False
        return app

    async def _card(self, _: Request) -> Response:
        return JSONResponse(self.card())

    async def _make(self, request: Request) -> Response:
        """Pictures; 4xx with a sentence for what cannot be made, 429 while the desk is full."""
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return _refused(415, "the request is JSON, with Content-Type: application/json")
        try:
            with anyio.fail_after(PATIENCE):
                body = await _body(request)
            wanted = read(body, limits(self.sides))
        except TimeoutError:
            return _refused(408, "the request did not come")
        except ClientDisconnect:
            return _refused(400, "the request was broken off")
        except ValueError as error:
            return _refused(400, str(error))
        try:
            self.desk.take_place()
        except Busy:
            again = {"Retry-After": "2"}
            return _refused(429, "others are waiting already; try again in a moment", again)
        stream = self._lines(lambda: _told(events(self.sides, wanted)))
        return Placed(self.desk, stream, media_type="application/x-ndjson", patience=PATIENCE)

    async def _lines(self, work: Any) -> AsyncGenerator[bytes, None]:
        """The events as lines; the first says how many are before."""
        yield _line({"event": "waiting", "ahead": self.desk.taken - 1})
        async with aclosing(self.desk.do(work)) as made:  # at once, for its turn to pass on
            async for event in made:
                yield _line(event)


def _model(side: Side) -> dict[str, Any]:
    """What the page is told of one model."""
    generator, path = side.generator, side.generator.denoiser.path
    own = generator.sampler
    possible = []
    for steps in range(1, 9):
        with suppress(ValueError):
            changed: Any = in_steps(own, steps)
            getattr(changed, "ladder", lambda _: [])(path)
            possible.append(steps)
    return {
        "calls": own.calls,
        "steps": _steps(own),
        "possible": possible,
        "from": side.opened.path or side.opened.expression,
        "parameters": sum(p.numel() for p in generator.denoiser.parameters()),
    }


def _steps(sampler: Any) -> int:
    """The number that `in_steps` changes."""
    while hasattr(sampler, "sampler"):
        sampler = sampler.sampler
    return int(getattr(sampler, "steps", sampler.calls))


def _told(made: Iterator[Event]) -> Iterator[Event]:
    """The events, and at the end one that says how it ended."""
    try:
        yield from made
        yield {"event": "end"}
    except Exception as error:
        known = isinstance(error, ValueError) or short_of_memory(error)
        if not known:
            tell(error)
        text = sentence(error) if isinstance(error, ValueError) else "the memory does not suffice"
        yield {"event": "error", "text": text if known else "it failed; the terminal tells more"}


async def _body(request: Request) -> bytes:
    """The body; ValueError where it is too long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            raise ValueError(f"a request has {BODY:,} bytes at most")
    return body


def _line(event: Event) -> bytes:
    return (json.dumps(event, separators=(",", ":")) + "\n").encode()


def _refused(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": text}, status, headers)


def _file(name: str) -> Any:
    """A route that answers with one file of this folder."""

    async def answer(_: Request) -> Response:
        kind = TYPES[name.rpartition(".")[2]]
        return FileResponse(FILES / name, media_type=kind)

    return answer


def title(generator: Generator) -> str:
    """What the student is called: its method, where that is known."""
    method = str(generator.card.get("method", "")).partition("(")[0]
    return f"{method} student" if method else "model"
