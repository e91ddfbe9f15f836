"""One piece of work at a time, a bounded queue, and clients that go away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest

from fewstep.web.desk import Busy, Desk, Placed
from tests.asgi import exchange


def test_places_are_bounded() -> None:
    desk = Desk(2)
    desk.take_place()
    desk.take_place()
    with pytest.raises(Busy):
        desk.take_place()
    desk.leave()
    desk.take_place()


def test_work_is_done_one_after_the_other() -> None:
    """In the order of coming, though all wait in threads and could overlap."""
    now, seen, most = 0, [], 0

    def work(name: str) -> Iterator[str]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        for step in range(3):
            yield f"{name}{step}"
        now -= 1

    async def client(desk: Desk, name: str) -> None:
        async for step in desk.do(lambda: work(name)):
            seen.append(step)
            await anyio.sleep(0)

    async def all_at_once() -> None:
        desk = Desk()
        async with anyio.create_task_group() as group:
            for name in "abc":
                group.start_soon(client, desk, name)
                await anyio.sleep(0)

    anyio.run(all_at_once)
    assert seen == [f"{name}{step}" for name in "abc" for step in range(3)]
    assert most == 1


def stream(desk: Desk, steps: list[int], closed: list[bool], patience: float = 5) -> Placed:
    """A response of three steps a piece of work, which notes what was done and how it ended."""

    def work() -> Iterator[int]:
        try:
            for step in range(1000):
                steps.append(step)
                yield step
        finally:
            closed.append(True)

    async def lines() -> AsyncIterator[bytes]:
        async for step in desk.do(work):
            yield f"{step}\n".encode()

    desk.take_place()
    return Placed(desk, lines(), patience)


def test_a_client_that_goes_stops_its_work_and_leaves_its_place() -> None:
    desk, steps, closed = Desk(1), list[int](), list[bool]()
    app: Any = stream(desk, steps, closed)
    answer = anyio.run(exchange, app, "/", "GET", {}, [b""], lambda part: part == b"4\n")
    assert answer.body.startswith(b"0\n1\n2\n3\n4\n")
    assert len(steps) < 20
    assert closed == [True]
    assert desk.taken == 0


def test_a_client_that_takes_nothing_is_left() -> None:
    """Its place is free again, and the work has stopped."""
    desk, steps, closed = Desk(1), list[int](), list[bool]()
    app: Any = stream(desk, steps, closed, patience=0.05)

    async def deaf() -> None:
        async def receive() -> dict[str, Any]:
            await anyio.sleep_forever()
            raise AssertionError

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await anyio.sleep_forever()

        scope = {"type": "http", "method": "GET", "asgi": {"spec_version": "2.3"}}
        with anyio.fail_after(5):
            await app(scope, receive, send)

    with pytest.raises(BaseException) as caught:  # noqa: PT011
        anyio.run(deaf)
    assert "TimeoutError" in repr(caught.value)
    assert (desk.taken, closed, len(steps)) == (0, [True], 1)


def test_a_failure_leaves_the_place_and_the_turn() -> None:
    desk = Desk(1)

    def broken() -> Iterator[int]:
        yield 1
        raise RuntimeError("a fault")

    async def lines() -> AsyncIterator[bytes]:
        async for step in desk.do(broken):
            yield str(step).encode()

    desk.take_place()
    with pytest.raises(BaseException, match=r"a fault|unhandled"):
        anyio.run(exchange, Placed(desk, lines(), 5.0), "/", "GET", {}, [b""], None)
    steps, closed = list[int](), list[bool]()
    assert desk.taken == 0
    app: Any = stream(desk, steps, closed)
    anyio.run(exchange, app, "/", "GET", {}, [b""], lambda part: part == b"2\n")
    assert closed == [True]
