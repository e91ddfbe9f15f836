"""Everything, step by step: python -m examples.scenes --out runs/scenes

What is finished is not done again, and the same command continues. --small takes every step in
seconds, and learns nothing. Students that are compared with these alone are trained by --only.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from examples.scenes import results, stages
from examples.scenes.sizes import SMALL, Sizes
from examples.scenes.students import STUDENTS
from fewstep.storage.files import read_json, write_json
from fewstep.storage.folder_lock import locked
from fewstep.teachers.diffusers.network import require_library


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="examples.scenes", description=(__doc__ or ""))
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--small", action="store_true", help="in seconds, for tests")
    parser.add_argument(
        "--taught",
        action="store_true",
        help="begin at the students, with the autoencoder, teacher and judge of this folder",
    )
    parser.add_argument(
        "--only",
        choices=("teach", "judge", *STUDENTS, "measure", "keep"),
        help="one part of the work; keep: put what is taught into the file that --taught reads",
    )
    own = parser.parse_args(args)
    sizes = SMALL if own.small else Sizes()
    for name in ("diffusers", "transformers"):
        require_library(name)  # makes them quiet
    torch.set_num_threads(1)  # of small networks; the same numbers on every machine's cores
    own.out.mkdir(parents=True, exist_ok=True)
    with locked(own.out):
        same(own.out, {"sizes": asdict(sizes)} | ({"taught": True} if own.taught else {}))
        work = stages.Work(own.out, sizes, own.taught)
        if own.only in (None, "teach"):
            stages.teach(work)
        if own.only == "judge":
            _ = work.judge
        for name, student in STUDENTS.items():
            if own.only == name or (own.only is None and not student.extra):
                stages.distil(work, name)
        if own.only in (None, "measure"):
            results.measure(work)
        if own.only == "keep":
            stages.keep(work)
    if own.only is None:
        print(f"finished: {own.out / 'results.json'}, {own.out / 'pictures.png'}")


def same(out: Path, facts: dict[str, Any]) -> None:
    """Refuse a folder in which something else was begun."""
    place, facts = out / "scenes.json", json.loads(json.dumps(facts))
    if not place.is_file():
        write_json(place, facts)
    begun = read_json(place)
    for name in begun | facts:
        if begun.get(name) != facts.get(name):
            raise ValueError(f"{out} was begun with other {name}; choose another with --out")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"scenes: {error}", file=sys.stderr)
        sys.exit(2)
