"""A stand-in for the Hugging Face hub on this machine: what uploading a folder asks it for."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn:
    """Repositories, their files, and the answers that a test asks for.

    token: the only one that is known; status: an answer to every request to make a repository.
    """

    def __init__(self, token: str = "hf_right") -> None:
        self.token, self.status, self.url = token, 200, ""
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.asked: list[str] = []

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON for a request."""
        self.asked.append(path)
        parts = path.split("?")[0].strip("/").split("/")
        if path.startswith("/api/whoami"):
            return 200, {"type": "user", "name": "me"}
        if path.startswith("/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/api/repos/create"):
            return self._create(json.loads(body))
        name = "/".join(parts[2:4])
        if "tree" in parts:
            return 200, [
                {"type": "file", "path": file, "size": len(data), "oid": "0"}
                for file, data in self.files[name].items()
            ]
        if "preupload" in parts:
            asked = json.loads(body)["files"]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": file["path"], **told} for file in asked]}
        if "commit" in parts:
            return self._commit(name, body)
        if name not in self.files:
            return 404, {"error": "Repository not found"}
        return 200, {"id": name, "sha": "0" * 40, "siblings": [], "private": False}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        if self.status != 200:
            return self.status, {"error": "no"}
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.created.append(asked)
        self.files.setdefault(name, {".gitattributes": b""})
        return 200, {"url": f"{self.url}/{name}", "id": name}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.files[name][value["path"]] = base64.b64decode(value["content"])
        oid = "1" * 40
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}


@contextmanager
def standing_in(hub: StandIn) -> Iterator[str]:
    """The address of the stand-in, within the block."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, told = 401, {"error": "Invalid username or password."}
            if self.headers.get("Authorization") == f"Bearer {hub.token}":
                status, told = hub.answer(self.path, body)
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.url
    finally:
        server.shutdown()
        server.server_close()
