"""Requests that a page should survive: bytes for a socket, each a function of its number."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

PATHS = (
    *("/", "/card", "/make", "/playground.js", "/playground.css", "/nothing", "//", "/make/"),
    *(
        "/../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/%2e%2e/shell.py",
        "/shell.py",
        "/.git/config",
    ),
    *("/playground.js/../shell.py", "/static/../../x", "/\u00fc", "/%00", "/card?x=" + "a" * 3000),
    *("/make?token=wrong", "*", "http://evil.example/", "/" + "a" * 20_000),
)
METHODS = (*("GET", "POST") * 6, "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "X" * 300)
FIELDS = (
    "kind",
    "seed",
    "other",
    "label",
    "prompt",
    "steps",
    "teacher_steps",
    "guidance",
    "share",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 8, 9, 64, 10**30, -(2**63), 2**31, 0.5, 1e308, -0.0),
    *("", "a", "walk", "grid", "variations", "picture", "../../etc/passwd", "\u0000", "\ud800x"),
    *([], [[]] * 50, {}, {"a": {"b": 1}}, "a" * 3000, "<script>alert(1)</script>", "' OR 1=1 --"),
)
TYPES = ("application/json",) * 6 + ("text/plain", "multipart/form-data; boundary=x", "")
OURS = {"/", "/card", "/make", "/playground.js", "/playground.css"}
"""All that is served."""


class Door(NamedTuple):
    """Where a server listens, and the token that lets in."""

    port: int
    token: str


def hostile(number: int, door: Door) -> bytes:
    """Request `number`, whole or not."""
    chance = random.Random(number)
    if chance.random() < 0.05:
        return chance.randbytes(chance.choice((1, 20, 400))) + b"\r\n\r\n"
    method = chance.choice(METHODS)
    path = "/make" if method == "POST" and chance.random() < 0.7 else chance.choice(PATHS)
    body = _body(chance) if method != "GET" or chance.random() < 0.1 else b""
    head = [f"{method} {path} HTTP/1.1".encode()]
    head += [line.encode("latin-1", "replace") for line in _headers(chance, door, len(body))]
    whole = b"\r\n".join(head) + b"\r\n\r\n" + body
    if chance.random() < 0.05:
        cut = chance.randrange(len(whole))
        return whole[:cut] + chance.randbytes(8) + whole[cut + 8 :]
    return whole


def _headers(chance: random.Random, door: Door, length: int) -> Iterator[str]:
    here = f"127.0.0.1:{door.port}"
    if chance.random() < 0.97:
        yield f"Host: {here if chance.random() < 0.9 else chance.choice(('evil', '', here + '0'))}"
    if chance.random() < 0.9:
        yield f"X-Fewstep-Token: {door.token}"
    if chance.random() < 0.1:
        yield f"Origin: {chance.choice(('null', 'http://evil.example', f'http://{here}'))}"
    if chance.random() < 0.1:
        yield "Cookie: " + chance.choice(("a=\x01;;==", f"fewstep-{door.port}=x", "x" * 5000))
    yield f"Content-Type: {chance.choice(TYPES)}"
    if chance.random() < 0.05:
        yield chance.choice(
            ("Transfer-Encoding: chunked", "Expect: 100-continue", "Upgrade: websocket")
        )
    lies = (-1, 0, 10**9, "x") if chance.random() < 0.03 else (length,)
    yield f"Content-Length: {chance.choice(lies)}"
    yield "Connection: close"


def _body(chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.1:
        return chance.randbytes(chance.choice((0, 5, 500, 9000)))
    if kind < 0.15:
        return b"[" * 4000
    names = chance.sample(FIELDS, chance.randrange(4)) + ["count", "../x"][: chance.randrange(3)]
    text = json.dumps({name: chance.choice(VALUES) for name in names})
    if kind < 0.25:
        text = text.replace("null", chance.choice(("NaN", "Infinity", "1e999", "1" * 3000)))
    return text.encode("utf-8", "surrogatepass")


class Answered(NamedTuple):
    """The status of an answer, 0 for a connection that was closed without one; and its body."""

    status: int
    body: bytes


def ask(door: Door, data: bytes, stays: float = 0.3, patience: float = 20.0) -> Answered:
    """Send bytes, and read to the end.

    stays: seconds without an answer after which the client hangs up its half of the line, as one
    that sent half of a request would for ever wait.
    """
    with socket.create_connection(("127.0.0.1", door.port), stays) as line:
        received = b""
        with suppress(ConnectionError):
            line.sendall(data)
            while True:
                try:
                    part = line.recv(1 << 16)
                except TimeoutError:
                    line.settimeout(patience)
                    line.shutdown(socket.SHUT_WR)
                    continue
                if not part:
                    break
                received += part
    head, _, body = received.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return Answered(int(words[1]) if len(words) > 1 and words[1].isdigit() else 0, body)


def normal(door: Door, seed: int) -> bytes:
    """What the page asks for: one picture of both models."""
    body = json.dumps({"seed": seed, "label": seed % 10}).encode()
    head = (
        f"POST /make HTTP/1.1\r\nHost: 127.0.0.1:{door.port}\r\nX-Fewstep-Token: {door.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body
