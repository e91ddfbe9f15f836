"""One piece of work at a time: those who wait are few, in order, and may leave.

A page streams what a network makes step by step. The network runs in a thread, one step after the
other, so that a client that goes away stops its work at the next step, and that of others begins.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import anyio
from anyio import to_thread
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send


class Busy(Exception):
    """As many pieces of work wait as may."""


class Desk:
    """Where work is handed in; `places` pieces of it at most, with the one that is done."""

    def __init__(self, places: int = 8) -> None:
        self.places, self.taken = places, 0
        self._turn = anyio.Semaphore(1)  # not a lock: another task may end the stream
        self._thread = anyio.CapacityLimiter(1)

    def take_place(self) -> None:
        """Hold a place until `leave`; `Busy` where all are taken."""
        if self.taken >= self.places:
            raise Busy
        self.taken += 1

    def leave(self) -> None:
        """Give the place back."""
        self.taken -= 1

    async def do(self, work: Callable[[], Iterator[Any]]) -> AsyncGenerator[Any, None]:
        """What `work` yields, when its turn comes; nothing else runs until it is done or left."""
        async with self._turn:
            steps = work()
            try:
                while True:
                    step = await to_thread.run_sync(next, steps, None, limiter=self._thread)
                    if step is None:
                        return
                    yield step
            finally:
                close = getattr(steps, "close", None)
                if close is not None:
                    close()


class Placed(StreamingResponse):
    """A stream that holds a place at a desk, and leaves it however it ends.

    Args:
        desk: where a place was taken for it.
        content: the stream.
        patience: seconds until a client that takes nothing is left.
        more: as of `StreamingResponse`.
    """

    def __init__(
        self, desk: Desk, content: AsyncGenerator[bytes, None], patience: float, **more: Any
    ) -> None:
        super().__init__(content, **more)
        self.desk, self.content, self.patience = desk, content, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, and leave the desk."""

        async def patient(message: Message) -> None:
            with anyio.fail_after(self.patience):
                await send(message)

        try:
            await super().__call__(scope, receive, patient)
        finally:
            with anyio.CancelScope(shield=True):
                await self.content.aclose()
            self.desk.leave()
