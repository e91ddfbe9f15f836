"""The door of served pages: host, origin, token, headers, and errors without tracebacks."""

from __future__ import annotations

import socket
from typing import Any

import anyio
import pytest
from h11 import LocalProtocolError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fewstep.web.shell import HEADERS, PAUSE, Door, Guarded, serve
from tests.asgi import request

DOOR = Door(8123, "secret")
HOST = {"Host": "127.0.0.1:8123"}
IN = {**HOST, "X-Fewstep-Token": "secret"}


async def page(_: Request) -> PlainTextResponse:
    return PlainTextResponse("inside")


async def broken(_: Request) -> PlainTextResponse:
    raise RuntimeError("a password in /home/someone")


APP = Guarded(
    Starlette(routes=[Route("/", page), Route("/other", page), Route("/broken", broken)]), DOOR
)


@pytest.mark.parametrize(
    "headers",
    [
        IN,
        {**HOST, "Cookie": "fewstep-8123=secret"},
        {**HOST, "Cookie": "a=b; fewstep-8123=secret; c=d"},
        {**IN, "Host": "localhost:8123"},
        {**IN, "Origin": "http://127.0.0.1:8123"},
        {**IN, "Origin": "http://localhost:8123"},
    ],
    ids=range(6),
)
def test_who_is_let_in(headers: dict[str, str]) -> None:
    answer = request(APP, "/", headers=headers)
    assert (answer.status, answer.body) == (200, b"inside")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", HOST, 403),
        ("/other", {**HOST, "X-Fewstep-Token": "Secret"}, 403),
        ("/?token=", HOST, 403),
        ("/?token=secre", HOST, 403),
        ("/", {**HOST, "Cookie": "fewstep-8124=secret"}, 403),
        ("/", {**HOST, "Cookie": "fewstep-8123=\u00fc\u00fc"}, 403),
        ("/", {**IN, "Host": "127.0.0.1:8124"}, 421),
        ("/", {**IN, "Host": "127.0.0.1"}, 421),
        ("/", {**IN, "Host": "evil.example:8123"}, 421),
        ("/", {"X-Fewstep-Token": "secret"}, 421),
        ("/", {**IN, "Origin": "http://evil.example"}, 403),
        ("/", {**IN, "Origin": "https://127.0.0.1:8123"}, 403),
        ("/", {**IN, "Origin": "null"}, 403),
        ("/", [*IN.items(), ("Host", "evil.example")], 421),
        ("/", [*IN.items(), ("Origin", "http://127.0.0.1:8123"), ("Origin", "http://e")], 403),
    ],
    ids=range(15),
)
def test_who_is_not(path: str, headers: Any, status: int) -> None:
    answer = request(APP, path, headers=headers)
    assert answer.status == status
    assert b"inside" not in answer.body
    assert answer.header("set-cookie") is None


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "FOO"])
def test_other_methods(method: str) -> None:
    assert request(APP, "/", method, IN).status == 405


def test_the_address_sets_the_cookie() -> None:
    """For scripts invisible, never sent by other sites, and the name is the port's."""
    assert DOOR.address == "http://127.0.0.1:8123/?token=secret"
    answer = request(APP, "/?token=secret", headers=HOST)
    assert answer.header("set-cookie") == (
        "fewstep-8123=secret; HttpOnly; SameSite=Strict; Path=/"
    )
    assert request(APP, "/other", headers=IN).header("set-cookie") is None
    assert len({Door(1).token for _ in range(20)}) == 20
    assert min(len(Door(1).token) for _ in range(20)) == 32


@pytest.mark.parametrize(
    ("path", "headers"), [("/", IN), ("/nothing", IN), ("/", HOST), ("/broken", IN)]
)
def test_headers_of_every_answer(path: str, headers: dict[str, str]) -> None:
    answer = request(APP, path, headers=headers)
    for name, value in HEADERS.items():
        assert answer.header(name.lower()) == value, name
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_errors_say_nothing_of_the_inside(capsys: pytest.CaptureFixture[str]) -> None:
    answer = request(APP, "/broken", headers=IN)
    assert (answer.status, answer.body) == (500, b"Internal Server Error")
    err = capsys.readouterr().err
    assert err == "fewstep: RuntimeError: a password in /home/someone\n"


def test_a_refusal_waits_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.extend([seconds] if seconds else [])

    monkeypatch.setattr("fewstep.web.shell.anyio.sleep", sleep)
    statuses = [request(APP, path, headers=IN).status for path in ("/", "/nothing", "/broken")]
    assert statuses == [200, 404, 500]
    assert request(APP, headers=HOST).status == 403
    assert waited == [PAUSE] * 3


@pytest.mark.parametrize("state", ["MUST_CLOSE", "IDLE"])
def test_a_line_that_spoke_no_http_is_not_told(
    state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server has answered it by then, and lets nothing more be sent; other faults are told."""

    async def send(_: Any) -> None:
        raise LocalProtocolError(f"can't handle event type Response when state={state}")

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    pairs = [(k.lower().encode(), v.encode()) for k, v in IN.items()]
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": pairs}
    anyio.run(APP, scope, receive, send)
    assert ("LocalProtocolError" in capsys.readouterr().err) == (state != "MUST_CLOSE")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} cannot be used .* leave --port out"):
            serve(lambda _: APP, port, lambda _: None)
