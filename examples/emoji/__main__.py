"""Everything, step by step: python -m examples.emoji emoji_noto_32.npz --out runs/emoji

What is finished is not done again, and the same command continues. Takes about an hour of one
core; --small takes every step in seconds, and learns nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from examples.emoji import results, stages, study
from examples.emoji.data import load
from examples.emoji.sizes import SMALL, Sizes
from fewstep.storage.files import digest, read_json, write_json
from fewstep.storage.folder_lock import locked
from fewstep.teachers.diffusers.network import require_library


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="examples.emoji", description=(__doc__ or ""))
    parser.add_argument("data", type=Path, help="the .npz of captioned emoji")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--small", action="store_true", help="in seconds, for tests")
    own = parser.parse_args(args)
    sizes = SMALL if own.small else Sizes()
    for name in ("diffusers", "transformers"):
        require_library(name)  # makes them quiet
    torch.set_num_threads(1)  # of small networks; the same numbers on every machine's cores
    emoji = load(own.data, sizes.groups, sizes.pictures)
    own.out.mkdir(parents=True, exist_ok=True)
    with locked(own.out):
        same(own.out, {"data": digest(own.data), "sizes": asdict(sizes)})
        work = stages.Work(own.out, emoji, sizes)
        stages.teach(work)
        for student in stages.STUDENTS:
            stages.distil(work, student)
        results.measure(work)
        study.conduct(work)
    print(f"finished: {own.out / 'results.json'}, {own.out / 'pictures.png'}")


def same(out: Path, facts: dict[str, Any]) -> None:
    """Refuse a folder in which something else was begun."""
    place, facts = out / "emoji.json", json.loads(json.dumps(facts))
    if not place.is_file():
        write_json(place, facts)
    for name, value in read_json(place).items():
        if value != facts[name]:
            raise ValueError(f"{out} was begun with other {name}; choose another with --out")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"emoji: {error}", file=sys.stderr)
        sys.exit(2)
