"""What every served page has: this machine alone may read it, and nothing leaves or enters.

loopback     the socket is bound to 127.0.0.1
Host         that of the socket, so that no foreign name can be pointed at it (DNS rebinding)
Origin       of this page, where a browser names one
token        drawn at each start; in the printed address, then in a cookie that scripts cannot read
headers      nothing is loaded from elsewhere, framed, guessed or kept
errors       one sentence, never a traceback; a moment's pause before each, for a client that asks
             wrongly over and over to take little from others
"""

from __future__ import annotations

import secrets
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from os import environ
from pathlib import Path
from urllib.parse import parse_qs

import anyio
from h11 import LocalProtocolError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
"""Of every answer."""
METHODS = ("GET", "HEAD", "POST")
PAUSE = 0.02
"""Seconds before a request is refused."""
FILES = Path(__file__).parent


@dataclass(frozen=True)
class Door:
    """Who may come in: the port, and the token of this start."""

    port: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    @property
    def address(self) -> str:
        """What is printed, for this user's browser."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    @property
    def cookie(self) -> str:
        """Its name; cookies of one host are shared by its ports."""
        return f"fewstep-{self.port}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The values of Host that are this page."""
        return tuple(f"{name}:{self.port}" for name in ("127.0.0.1", "localhost"))

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the sentence for a request that is not let in; None for one that is."""
        headers = Headers(scope=scope)
        if headers.getlist("host") not in [[host] for host in self.hosts]:
            return 421, f"this page is at {self.hosts[0]} alone"
        if scope["method"] not in METHODS:
            return 405, f"this page knows {', '.join(METHODS)}"
        origins = headers.getlist("origin")
        if origins not in ([], *([f"http://{host}"] for host in self.hosts)):
            return 403, "another page cannot ask this one"
        if not self._has_token(scope, headers):
            return 403, "open the address that the command printed; it holds this start's token"
        return None

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        given = [headers.get("x-fewstep-token", "")]
        given += parse_qs(scope["query_string"].decode("latin-1")).get("token", [])[:1]
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            morsel = None
        given.append("" if morsel is None else morsel.value)
        return any(secrets.compare_digest(g.encode(), self.token.encode()) for g in given)


class Guarded:
    """An application behind a door: refusals, headers, and errors in one sentence."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(message, scope)
                if message["status"] >= 400:
                    await anyio.sleep(PAUSE)
            try:
                await send(message)
            except LocalProtocolError as error:
                if "state=MUST_CLOSE" not in str(error):
                    raise
                raise ClientDisconnect from None  # what came was no HTTP, and was answered so

        refusal = self.door.refusal(scope)
        app = self.app if refusal is None else PlainTextResponse(refusal[1], refusal[0])
        try:
            await app(scope, receive, guarded)
        except ClientDisconnect:
            pass
        except Exception as error:  # it was answered with status 500, or the line is broken
            tell(error)

    def _add_headers(self, message: Message, scope: Scope) -> None:
        headers = MutableHeaders(scope=message)
        for name, value in HEADERS.items():
            headers[name] = value
        if scope["path"] == "/" and message["status"] == 200:
            cookie = f"{self.door.cookie}={self.door.token}; HttpOnly; SameSite=Strict; Path=/"
            headers.append("Set-Cookie", cookie)


def tell(error: Exception) -> None:
    """One line on the terminal, or all of it where FEWSTEP_DEBUG is set."""
    if environ.get("FEWSTEP_DEBUG"):
        traceback.print_exception(error)
    else:
        print(f"fewstep: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)


def serve(make: Callable[[Door], ASGIApp], port: int, ready: Callable[[Door], None]) -> None:
    """Serve an application on 127.0.0.1 until it is stopped.

    Args:
        make: the application, without its guard.
        port: 0 for a free one.
        ready: called once connections are taken.

    ValueError where the port is taken.
    """
    import uvicorn

    try:
        listening = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise ValueError(
            f"port {port} cannot be used ({error.strerror}); leave --port out for a free one"
        ) from None
    door = Door(listening.getsockname()[1])
    config = uvicorn.Config(
        Guarded(make(door), door),
        log_level="critical",
        access_log=False,
        server_header=False,
        http="h11",
        ws="none",
        lifespan="off",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=16_384,
    )
    ready(door)
    uvicorn.Server(config).run(sockets=[listening])
