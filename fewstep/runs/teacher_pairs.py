"""The teacher's samples that a run's method learns from, made once and kept in its folder.

    pairs/part-00000/   x0.safetensors   manifest.json

Each part holds the samples of 1,024 pairs. A part that is there is not made again, so a run that
is stopped while it prepares goes on where it was; processes share the parts among them. Digests
are checked on reading, and the parts belong to the run that made them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.types import Source
from fewstep.distillation.pairs import Pairs, PairSource
from fewstep.runs.run_folder import RunFolder
from fewstep.storage.files import Damaged, of_run, pack, read_folder, unpack, write_folder
from fewstep.training import distributed
from fewstep.training.progress import report_progress

PART = 1024
"""Pairs in a file."""
KIND = "fewstep pairs"


def stored_pairs(
    pairs: Pairs, teacher: Generator, source: Source, folder: RunFolder, batch: int
) -> PairSource:
    """`source` with the pairs that are in the run folder; makes those that are missing.

    Arguments:
        pairs: which pairs.
        teacher: the teacher, sampled without gradients.
        source: of the run; gives noise and conditions.
        folder: the run folder, locked by rank 0.
        batch: samples that are made together.
    Raises `Damaged` where a part is altered, ValueError where it is of another run, or a sample is
    not finite.
    """
    home = folder.path / "pairs"
    parts = torch.arange(pairs.count).split(PART)
    paths = [home / f"part-{number:05d}" for number in range(len(parts))]
    done = 0
    for number, (path, index) in enumerate(zip(paths, parts, strict=True)):
        mine = number % distributed.world_size() == distributed.rank()
        if mine and not path.exists():
            made = []
            for piece in index.split(batch):
                made.append(pairs.samples(teacher, source, piece).cpu())
                ready = done + sum(map(len, made))
                report_progress("sampling the teacher", ready, pairs.count)
            facts: dict[str, Any] = {"kind": KIND, "count": len(index)}
            files = {"x0.safetensors": pack({"x0": torch.cat(made)})}
            write_folder(path, files, {**facts, "origin": dict(folder.origin)}, folder.check)
        done += len(index)
        report_progress("sampling the teacher", done, pairs.count)
    distributed.max_over_ranks(0)  # all parts are there
    read = [
        _read(path, len(index), folder.origin) for path, index in zip(paths, parts, strict=True)
    ]
    return PairSource(source, pairs, torch.cat(read))


def _read(path: Path, count: int, origin: Mapping[str, Any]) -> torch.Tensor:
    facts = read_folder(path)
    of_run(path, facts, origin)
    x0 = unpack(path / "x0.safetensors").get("x0")
    if facts.get("kind") != KIND or x0 is None or len(x0) != count:
        raise Damaged(f"{path} does not hold {count} samples of the teacher; remove it")
    return x0
