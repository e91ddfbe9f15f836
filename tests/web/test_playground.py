"""The routes of the playground: the page, its card, pictures, and requests that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from fewstep.cli.serve import open_sides
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.scale_wise import ScaleWise
from fewstep.domains.ring import Ring
from fewstep.teachers.gaussian import Gaussian
from fewstep.web.making import Side
from fewstep.web.playground import Playground, title
from fewstep.web.same_picture import Opened
from tests.asgi import Answer, exchange, request

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def playground(finished: Path) -> Playground:
    return Playground(open_sides(finished / "runs/sid", "", False, "", "cpu"), "SiD student")


def make(playground: Playground, body: Any, headers: dict[str, str] = JSON) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(playground.application(), "/make", "POST", headers, data)


def test_the_page_and_its_files(playground: Playground) -> None:
    """Nothing in them is loaded from elsewhere, and nothing inline that the policy would stop."""
    app = playground.application()
    for path, kind in {
        "/": "text/html",
        "/playground.css": "text/css",
        "/playground.js": "text/javascript",
    }.items():
        answer = request(app, path)
        assert answer.status == 200
        assert str(answer.header("content-type")).startswith(kind)
        text = answer.body.decode()
        for foreign in ("http://", "https://", "//cdn", "style=", "onclick", "innerHTML"):
            assert foreign not in text, (path, foreign)
    for path in (
        "/playground.html",
        "/shell.py",
        "/../shell.py",
        "/..%2fshell.py",
        "/.git",
        "/card/",
    ):
        assert request(app, path).status == 404
    assert request(app, "/make").status == 405
    assert request(app, "/card", "POST").status == 405


def test_the_card(playground: Playground) -> None:
    card = request(playground.application(), "/card").body
    told = json.loads(card)
    assert told["models"]["student"]["calls"] == 1
    assert told["models"]["teacher"]["steps"] == 18
    assert told["models"]["student"]["possible"] == list(range(1, 9))
    assert (told["classes"], told["guided"], told["points"]) == (10, True, 0)
    assert told["kinds"] == ["picture", "grid", "walk", "variations"]
    assert title(playground.sides[0].generator) == "SiD student"
    assert title(Ring().exact()) == "model"


def test_a_student_with_steps_of_its_own() -> None:
    own = Generator(Gaussian([0.0, 0.0], 0.3, VE()), ScaleWise((2.5, 1.0), (1, 1)), (2,))
    told = Playground([Side("student", own, Opened("x"))], "t").card()
    assert told["models"]["student"]["possible"] == []
    assert told["kinds"] == ["picture", "grid", "walk"]


def test_pictures(playground: Playground) -> None:
    """A stream of lines, from waiting to the end; the next one finds the desk free."""
    for _ in range(2):
        answer = make(playground, {"seed": 3, "label": 5})
        assert (answer.status, answer.header("content-type")) == (200, "application/x-ndjson")
        assert answer.lines[0] == {"event": "waiting", "ahead": 0}
        assert answer.lines[-1] == {"event": "end"}
        assert [e["side"] for e in answer.lines if e["event"] == "made"] == ["student", "teacher"]
    assert playground.desk.taken == 0


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"seed": -1}, 400, "seed is a whole number from 0"),
        (b"{", 400, "the request is not JSON"),
        (b" " * 5000, 400, "a request has 4,096 bytes at most"),
        ({"steps": 9}, 400, "steps is a whole number from 1 to 8, got 9"),
    ],
    ids=range(4),
)
def test_wrong_requests(playground: Playground, body: Any, status: int, message: str) -> None:
    answer = make(playground, body)
    assert answer.status == status
    assert message in json.loads(answer.body)["error"]
    assert playground.desk.taken == 0


def test_other_types_are_refused(playground: Playground) -> None:
    """A form of another page could send text/plain without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert make(playground, {}, {"Content-Type": kind}).status == 415
    assert make(playground, {}, {"Content-Type": "application/json; charset=utf-8"}).status == 200


def test_a_full_desk(playground: Playground) -> None:
    for _ in range(playground.desk.places):
        playground.desk.take_place()
    answer = make(playground, {"seed": 3})
    assert (answer.status, answer.header("retry-after")) == (429, "2")
    for _ in range(playground.desk.places):
        playground.desk.leave()
    assert make(playground, {"seed": 3}).status == 200


def test_a_client_that_goes(playground: Playground) -> None:
    """The teacher is not asked for the rest of its steps."""
    app, calls = playground.application(), [0]
    teacher = playground.sides[1].generator.denoiser
    handle = teacher.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    async def go() -> Answer:
        body = [json.dumps({"seed": 3, "teacher_steps": 100}).encode()]
        leave = lambda part: b'"calls":3,' in part  # noqa: E731
        return await exchange(app, "/make", "POST", JSON, body, leave)

    anyio.run(go)
    handle.remove()
    assert 0 < calls[0] < 20
    assert playground.desk.taken == 0


def test_failures_are_told_in_a_sentence(
    playground: Playground, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a user's mistake what it was; of a fault nothing, but on the terminal."""
    for error, text in {
        ValueError("3 of 4 samples are not finite"): "3 of 4 samples are not finite",
        RuntimeError("in /home/someone"): "it failed; the terminal tells more",
        MemoryError(): "the memory does not suffice",
    }.items():

        def broken(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr("fewstep.web.making.begin", broken)
        assert make(playground, {"seed": 3}).lines[-1] == {"event": "error", "text": text}
    assert capsys.readouterr().err == "fewstep: RuntimeError: in /home/someone\n"
