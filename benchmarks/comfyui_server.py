"""A ComfyUI without a window, on folders of its own, and what it makes of a workflow.

    with ComfyUI(Path("/path/to/ComfyUI"), python, home) as server:
        made = server.run(workflow)

Models, inputs, outputs, settings and the data base are in `home`, so that nothing of the user's
is read or changed. It runs on the processor in float32, listens on this machine alone, and keeps
no model in memory when a node is done.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

SINGLE = ("--cpu", "--fp32-unet", "--fp32-text-enc", "--fp32-vae", "--cache-none")
ALONE = ("--disable-api-nodes", "--disable-all-custom-nodes", "--disable-metadata")
STARTS, WORKS = 300, 3600
"""Seconds that a start and a workflow may take."""


def require_comfyui(folder: Path) -> None:
    """ValueError unless `folder` is ComfyUI's."""
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        raise ValueError(
            f"{folder} is not ComfyUI's folder, which has main.py and comfy/ in it; give "
            "COMFYUI=/path/to/ComfyUI"
        )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass
class ComfyUI:
    """A running server, from `__enter__` to `__exit__`."""

    folder: Path
    python: str
    home: Path
    port: int = field(default_factory=free_port)

    def __enter__(self) -> ComfyUI:
        require_comfyui(self.folder)
        for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        self._log = (self.home / "server.log").open("wb")
        address = ("--listen", "127.0.0.1", "--port", str(self.port))
        places = ("--base-directory", str(self.home), "--database-url", "sqlite:///:memory:")
        self._process = subprocess.Popen(
            [self.python, "main.py", *address, *places, *SINGLE, *ALONE],
            cwd=self.folder,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self.facts: dict[str, Any] = self._started()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def run(self, workflow: dict[str, Any]) -> dict[str, Path]:
        """The files that the nodes of a workflow save, by the kind ("images", "latents").

        ValueError with the server's own words where it refuses the workflow, or a node fails.
        """
        number = self._ask("/prompt", {"prompt": workflow})["prompt_id"]
        end = time.monotonic() + WORKS
        while time.monotonic() < end:
            self._alive()
            history = self._ask(f"/history/{number}")
            if number in history:
                return self._files(history[number])
            time.sleep(0.5)
        raise ValueError(f"ComfyUI has not finished the workflow in {WORKS} seconds")

    def _files(self, told: dict[str, Any]) -> dict[str, Path]:
        if told["status"]["status_str"] != "success":
            raise ValueError(f"ComfyUI failed: {json.dumps(told['status']['messages'])[-2000:]}")
        found = {}
        for output in told["outputs"].values():
            for kind, files in output.items():
                for file in files:
                    folder = self.home / file["type"] / file["subfolder"]
                    found[kind] = folder / file["filename"]
        return found

    def _started(self) -> dict[str, Any]:
        end = time.monotonic() + STARTS
        while time.monotonic() < end:
            self._alive()
            try:
                return dict(self._ask("/system_stats")["system"])
            except OSError:
                time.sleep(0.5)
        raise ValueError(f"ComfyUI did not answer within {STARTS} seconds:\n{self.log()}")

    def _alive(self) -> None:
        if self._process.poll() is not None:
            raise ValueError(f"ComfyUI ended by itself:\n{self.log()}")

    def log(self) -> str:
        """The end of what it printed."""
        return (self.home / "server.log").read_text(errors="replace")[-3000:]

    def _ask(self, path: str, sent: Any = None) -> dict[str, Any]:
        data = None if sent is None else json.dumps(sent).encode()
        address = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            raise ValueError(f"ComfyUI refuses: {error.read().decode()[:2000]}") from None
