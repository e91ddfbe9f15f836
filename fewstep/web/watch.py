"""The page of a run in progress, served: it reads the files of the run, and nothing else.

GET  /              the page of `fewstep report`, without fresh samples
GET  /state         the step, the time left, and the version of the page
GET  /grid/N.png    the picture taken at step N

The training process is never spoken to. The page is drawn anew when files have changed and the
last drawing is old enough, so that it costs a small share of one core whatever the run writes; by
a thread of low priority, for training to come first where all cores are busy. Until it is
done the last page is the answer.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fewstep.report.page import asset, render
from fewstep.report.run_data import read_run, read_state
from fewstep.report.run_progress import progress
from fewstep.runs.run_folder import RunFolder
from fewstep.storage.files import Damaged

FILES = ("run.json", "log.jsonl", "gauges.jsonl", "metrics.json", "student/manifest.json")
OFTEN = 5.0
"""Seconds between two drawings, at least."""
SHARE = 100
"""Drawing takes at most one part in so many of the time."""
LOW = 10
"""The niceness of drawing. At 19 a thread that holds the interpreter's lock would hardly be run
where all cores are busy, and those that answer wait for it."""


@dataclass
class Watch:
    """A run folder, and the page that was last drawn of it."""

    path: Path
    page: str = ""
    version: str = ""
    seen: tuple[object, ...] = ()
    again: float = 0.0
    wrong: str = ""
    """Why the last drawing failed."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    drawing: threading.Thread = field(default_factory=threading.Thread)

    def newest(self) -> tuple[str, str]:
        """The page that was drawn last, and its version; the next is begun where that is due.

        Raises ValueError where the folder holds no run (any more).
        """
        with self.lock:
            files = self._files()
            due = files != self.seen and time.monotonic() >= self.again
            if not self.page:
                self._draw(files)
            elif due and not self.drawing.is_alive():
                self.drawing = threading.Thread(target=self._redraw, args=(files,), daemon=True)
                self.drawing.start()
            if self.wrong:
                raise ValueError(self.wrong)
            return self.page, self.version

    def _draw(self, files: tuple[object, ...]) -> None:
        """The page of those files."""
        began, cost = time.monotonic(), time.thread_time()
        page = render(read_run(self.path), None)
        rest = SHARE * (time.thread_time() - cost) if self.page else 0.0  # the first is waited for
        self.page, self.version, self.seen, self.wrong = page, str(hash(files)), files, ""
        self.again = began + max(OFTEN, rest)

    def _redraw(self, files: tuple[object, ...]) -> None:
        """The same, after everything else that this machine has to do."""
        _give_way()
        try:
            self._draw(files)
        except ValueError as error:
            self.wrong = str(error)
            self.again = time.monotonic() + OFTEN

    def _files(self) -> tuple[object, ...]:
        """What tells one state of the folder from another."""
        found: list[object] = []
        for name in FILES:
            try:
                stat = (self.path / name).stat()
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_mtime_ns, stat.st_size))
        return (*found, len(list((self.path / "grids").glob("step-*.png"))))

    def application(self) -> Starlette:
        """The routes; `fewstep.web.shell.serve` guards them."""
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/state", self._state),
                Route("/grid/{step:int}.png", self._grid),
                Route("/page.css", lambda _: Response(asset("style.css"), media_type="text/css")),
                Route(
                    "/page.js", lambda _: Response(asset("page.js"), media_type="text/javascript")
                ),
            ]
        )

    def _page(self, _: Request) -> Response:
        try:
            return HTMLResponse(self.newest()[0])
        except ValueError as error:
            return Response(str(error), 503, media_type="text/plain")

    def _state(self, _: Request) -> Response:
        try:
            version = self.newest()[1]
            f = read_state(self.path)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 503)
        now = progress(f)
        state = {"version": version, "share": now.share, "text": now.text}
        over = f.finished and self._files() == self.seen
        return JSONResponse({**state, "finished": over})

    def _grid(self, request: Request) -> Response:
        path = RunFolder(self.path).grids / f"step-{request.path_params['step']:08d}.png"
        if not path.is_file():
            return Response("there is no picture of this step", 404, media_type="text/plain")
        return FileResponse(path, media_type="image/png")


def _give_way() -> None:
    """A low priority for the calling thread; elsewhere than on Linux it is the process's."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW)


def watch(path: Path) -> Watch:
    """The page of a run, drawn once; a `Damaged` (ValueError) says why there is none."""
    made = Watch(path)
    if not made.newest()[0]:
        raise Damaged(f"{path} holds no run")
    return made
