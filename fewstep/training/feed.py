"""Batches on the device of training, the next one made while a step computes.

A batch is a pure function of its draws, so it can be made early, by another thread, and is the
same. It is made in main memory: rows of data are found there without asking the device, and what
is copied comes from pinned memory, so that the device does not wait either. On a CPU a batch is
made when it is wanted, except from sources that read files (`from_disk`), whose decoding can use
another core.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch, Source


class Feed:
    """The batches of a source by the numbers of their samples.

    Arguments:
        source: turns draws into batches, and draws from no global generator. With an attribute
            `from_disk` that is true it reads files, and is worth a thread on a CPU too.
        seed: of the draws.
        device: where the batches are wanted.
    """

    def __init__(self, source: Source, seed: int, device: torch.device) -> None:
        self.source, self.seed, self.device = source, seed, device
        slow = device.type == "cpu" and getattr(source, "from_disk", False)
        apart = slow or device.type not in ("cpu", "meta")
        self._thread = ThreadPoolExecutor(1, "feed") if apart else None
        self._coming: dict[tuple[int, int], Future[Batch]] = {}

    def batch(self, start: int, count: int) -> Batch:
        """The batch of the samples start, ..., start + count - 1.

        What the source raises is raised here, if the batch was made early too.
        """
        if self._thread is None:
            return self.source(Draws.range(start, count, self.seed, self.device))
        made = self._coming.pop((start, count), None)
        for key in [key for key in self._coming if key[0] <= start]:  # wanted no more
            self._coming.pop(key).cancel()
        batch = self._made(start, count) if made is None else made.result()
        return moved(batch, self.device)

    def expect(self, start: int, count: int) -> None:
        """Begin to make a batch that is likely to be asked for next."""
        if self._thread is not None and (start, count) not in self._coming:
            self._coming[start, count] = self._thread.submit(self._made, start, count)

    def _made(self, start: int, count: int) -> Batch:
        """A batch in main memory, pinned where it will be copied to a GPU."""
        batch = self.source(Draws.range(start, count, self.seed))
        return _each(batch, Tensor.pin_memory) if self.device.type == "cuda" else batch


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with all its tensors on `device`; the host does not wait for the copies."""
    return _each(batch, lambda x: x.to(device, non_blocking=True))


def _each(batch: Batch, change: Any) -> Batch:
    """The batch with every tensor changed; those that are on another device stay."""

    def of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: of(part) for name, part in value.items()}
        return change(value) if isinstance(value, Tensor) and value.device.type == "cpu" else value

    draws = batch.draws and replace(batch.draws, index=of(batch.draws.index))
    return Batch(of(batch.z), of(batch.cond), of(batch.x0), draws, of(batch.more))
