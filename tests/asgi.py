"""Requests to an application within this process, without a socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import anyio


class Answer(NamedTuple):
    """What a client sees."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body.splitlines()]


def request(
    app: Any,
    path: str = "/",
    method: str = "GET",
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    body: bytes = b"",
) -> Answer:
    """One request, from a client that stays to the end."""
    return anyio.run(exchange, app, path, method, headers, [body], None)


async def exchange(
    app: Any,
    path: str,
    method: str,
    headers: Mapping[str, str] | Sequence[tuple[str, str]],
    parts: list[bytes],
    leave: Callable[[bytes], bool] | None,
) -> Answer:
    """One request; the client goes away once `leave` says so of a part of the body."""
    pairs = list(headers.items()) if isinstance(headers, Mapping) else headers
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in pairs],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 80),
    }
    sent: list[dict[str, Any]] = []
    gone, left = anyio.Event(), list(parts)

    async def receive() -> dict[str, Any]:
        if left:
            part = left.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(left)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await anyio.sleep(0)
        sent.append(message)
        if leave is not None and leave(message.get("body", b"")):
            gone.set()
            await anyio.sleep(0.01)

    await app(scope, receive, send)
    start = next(m for m in sent if m["type"] == "http.response.start")
    named = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in start["headers"]]
    return Answer(start["status"], named, b"".join(m.get("body", b"") for m in sent))
