"""Trials as records that cannot be mistaken for others.

A record holds its settings in words, the code it was made with, its numbers, and the SHA-256 of
all of it. Reading checks the digest, and that the settings are those that the entry of its name
gives for its calls, trial and seed: a number that was changed, or a result that stands under
another method's name, is refused. A file holds the records of one method:

    benchmarks/results/arena/SCENE/METHOD.json
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.arena.entries import SPACES, Ask, Point, entry, points
from benchmarks.arena.scenes import ROOT, Scene
from benchmarks.arena.solvers import sampler_of
from fewstep.storage.files import read_json
from fewstep.training.ema import EMA
from fewstep.training.optim import Optim

RESULTS = ROOT / "benchmarks" / "results" / "arena"
EMA_OF_ALL = EMA(4000)
MAKES_NUMBERS = (
    *("diffusion", "losses", "nets", "distillation", "methods", "training", "teachers"),
    *("data", "eval", "plan"),
)
"""Rooms of the package that results depend on."""
Record = dict[str, Any]


def concise(value: Any) -> str:
    """A value in words that read back as it: of configurations, what is not the default."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(concise, value))}{',' * (len(value) == 1)})"
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    shown = []
    for field in fields(value):
        default: Any = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        mine = getattr(value, field.name)
        if field.repr and (default is MISSING or mine != default):
            shown.append(f"{field.name}={concise(mine)}")
    return f"{type(value).__name__}({', '.join(shown)})"


def optim(point: Point, beta: float) -> Optim:
    """Adam with a cosine decay."""
    return Optim(point.lr, (beta, 0.99), decay="cosine")


def settings_of(
    on: Scene, name: str, calls: int, trial: int, seed: int, steps: int
) -> dict[str, Any]:
    """What a trial of an entry is, in words."""
    one = entry(name)
    point = points(one)[trial]
    method = one.method(Ask(calls, point.start, steps, on.labels), point)
    return {
        "scene": on.name,
        "method": concise(method),
        "calls": calls,
        "seed": seed,
        "steps": steps,
        "batch": on.batch,
        "budget": on.budget,
        "optim": concise(optim(point, SPACES[one.family].beta)),
        "ema": concise(EMA_OF_ALL),
        "samples": on.samples,
    }


def settings_of_solver(on: Scene, solver: str, calls: int, trial: int) -> dict[str, Any]:
    """What a trial of a solver is, in words."""
    sampler = sampler_of(solver, calls, trial)
    return {"scene": on.name, "sampler": concise(sampler), "samples": on.samples}


def sha(value: Any) -> str:
    """SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(record: Record) -> Record:
    """The record with its digest."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return {**rest, "digest": sha(rest)}


def check(record: Record, expected: Mapping[str, Any]) -> None:
    """ValueError unless a record is as it was written, and of the expected settings."""
    name = f"{record.get('name')} in {record.get('calls')} calls, seed {record.get('seed')}"
    if record != sealed(record):
        raise ValueError(f"{name}: the record is not the one that was written; its digest differs")
    if not record.get("code"):
        raise ValueError(f"{name}: the record does not say which code made it")
    for key, value in expected.items():
        if record["settings"].get(key) != value:
            raise ValueError(
                f"{name}: the record is of {key} {record['settings'].get(key)!r}, but what stands "
                f"under this name has {value!r}"
            )


def read(on: Scene, name: str, folder: Path | None = None) -> dict[str, Any]:
    """The file of a method, every record checked; with no records where there is none.

    ValueError where one is altered or stands under another method's name, and where records are
    of different teachers.
    """
    path = (folder or RESULTS) / on.name / f"{name}.json"
    if not path.is_file():
        return {"name": name, "plans": {}, "records": []}
    found: dict[str, Any] = read_json(path)
    for record in found["records"]:
        if record["name"] != name:
            raise ValueError(f"{path.name} holds a record of {record['name']}")
        check(record, expected_of(on, record))
    if len({record["teacher"] for record in found["records"]}) > 1:
        raise ValueError(f"{path.name} holds records of different teachers")
    return found


def expected_of(on: Scene, record: Record) -> dict[str, Any]:
    """The settings that the entry of a record's name gives for it."""
    if "solver" in record:
        return settings_of_solver(on, record["solver"], record["calls"], record["trial"])
    name, calls, trial, seed = (record[key] for key in ("name", "calls", "trial", "seed"))
    return settings_of(on, name, calls, trial, seed, record["settings"]["steps"])


@cache
def code_version() -> dict[str, str]:
    """The commit, and the SHA-256 of the sources that numbers depend on."""
    total = hashlib.sha256()
    package = ROOT / "fewstep"
    files = [p for room in MAKES_NUMBERS for p in sorted((package / room).rglob("*.py"))]
    here = Path(__file__).parent
    files += [here / f"{name}.py" for name in ("budget", "entries", "scenes", "solvers", "trials")]
    for path in files:
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"commit": head.stdout.strip() or "unknown", "sha256": total.hexdigest()[:16]}
