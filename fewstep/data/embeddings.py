"""Conditions of prompts, encoded once and kept on disk.

    cache/<digest of the text encoders>/shard-00000.safetensors  shard-00001.safetensors  ...

A shard holds the conditions of up to `SHARD` prompts, row by row, in half precision, and the
SHA-256 of each prompt. What is there is not encoded again, by whichever run and in whatever order
its prompts come; a run that was stopped loses the shard it was writing. Other encoders, or other
files of the same, have another folder. One process at a time may fill it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fewstep.data.batches import epoch_order
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.storage.bounded_reading import json_value, tensors_header
from fewstep.storage.files import write
from fewstep.training.progress import report_progress

Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Prompts (N) -> a condition of (N, *) tensors."""
SHARD = 256


def key(prompt: str) -> str:
    """The SHA-256 that identifies a prompt."""
    return hashlib.sha256(prompt.encode()).hexdigest()


class Embeddings:
    """Conditions of prompts in one folder, made by one set of encoders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            self._add(path)

    def _add(self, path: Path) -> None:
        """Open a shard; a damaged one is renamed, and its prompts are encoded again."""
        try:
            tensors_header(path)
            file = safe_open(path, "pt")
            keys = json_value((file.metadata() or {}).get("prompts", "[]"), 2 * SHARD)
            rows = {file.get_slice(part).get_shape()[0] for part in file.keys()}  # noqa: SIM118
            if not isinstance(keys, list) or rows != {len(keys)} or {*map(type, keys)} != {str}:
                raise ValueError("not a row for each prompt")
        except (SafetensorError, ValueError, IndexError):
            path.rename(path.with_suffix(".damaged"))
            return
        self._open[path] = file
        self.places |= {name: (path, row) for row, name in enumerate(keys)}

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are not stored yet, without duplicates."""
        return [p for p in dict.fromkeys(prompts) if key(p) not in self.places]

    def fill(
        self, prompts: Sequence[str], encode: Encode, batch: int = 32, what: str = "prompts"
    ) -> Iterator[int]:
        """Encode the missing prompts; yields the number done after each shard."""
        todo = self.missing(prompts)
        self.folder.mkdir(parents=True, exist_ok=True)
        for torn in self.folder.glob(".shard-*.partial-*"):
            torn.unlink()
        for start in range(0, len(todo), SHARD):
            part = todo[start : start + SHARD]
            pieces = []
            for i in range(0, len(part), batch):
                report_progress(f"encoding {what}", start + i, len(todo))
                pieces.append(encode(part[i : i + batch]))
            tensors = {
                name: torch.cat([_half(p[name], name) for p in pieces]).cpu().contiguous()
                for name in pieces[0]
            }
            names = [p.stem[6:] for p in self.folder.glob("shard-*.*")]
            number = 1 + max((int(name) for name in names if name.isdigit()), default=-1)
            path = self.folder / f"shard-{number:05}.safetensors"
            write(path, save(tensors, {"prompts": json.dumps([key(p) for p in part])}))
            self._add(path)
            yield start + len(part)

    def rows(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The conditions of prompts by their keys: float32 (N, *) tensors."""
        slices: dict[str, list[Tensor]] = {}
        for name in keys:
            path, row = self.places[name]
            file = self._open[path]
            for part in file.keys():  # noqa: SIM118
                slices.setdefault(part, []).append(file.get_slice(part)[row : row + 1])
        return {part: torch.cat(pieces).float() for part, pieces in slices.items()}


def _half(x: Tensor, name: str) -> Tensor:
    half = x.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise ValueError(f"the encoders gave a {name!r} that is not finite in half precision")
    return half


@dataclass(frozen=True, eq=False)
class Conditioned:
    """Data-free batches: noise of `shape`, and prompts in an order drawn anew each epoch."""

    shape: tuple[int, ...]
    embeddings: Embeddings
    keys: Sequence[str]
    """Of the prompts, doubles kept."""

    def __call__(self, draws: Draws) -> Batch:
        rows = epoch_order(draws, len(self.keys))
        device = draws.index.device
        return Batch(draws.normal("z", self.shape), self._at(rows, device), None, draws)

    def condition(self, index: Tensor) -> dict[str, Tensor]:
        """The conditions that samples `index` (N,) have by default: the prompts in turn."""
        return self._at(index % len(self.keys), index.device)

    def _at(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        cond = self.embeddings.rows([self.keys[row] for row in rows.tolist()])
        return {name: value.to(device) for name, value in cond.items()}
