"""Which method to take, as the arena has it (docs/arena.md): `fewstep recipes --for "..."`.

The arena's leaderboards are kept beside this module as choices.json; benchmarks/arena writes it. A
wish is words: "no data, 4 steps, 24 GB". What it does not say is not asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fewstep.config import nearest

CALLS = (1, 4)
"""Network calls that were measured."""
SHOWN = 3
"""Methods that are named, where as many suit."""
BYTES = 4
"""Of a weight in float32."""
WORDS: Mapping[str, str] = {
    "no data": "no real data: the teacher alone, or samples of it",
    "data": "real data at hand",
    "guidance": "a guided teacher",
    "robust": "no trial that failed",
    "4 steps": "network calls a sample",
    "24 GB": "memory for weights",
}
"""Parts of a wish, and what each means."""


@dataclass(frozen=True)
class Wish:
    """What a student is wanted for; None: no matter."""

    calls: int = 1
    data: bool = True
    guidance: bool = False
    robust: bool = False
    gigabytes: float | None = None


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """The rows that suit, best first, and what was passed over."""

    wish: Wish
    rows: Sequence[Row]
    notes: Sequence[str]


def wish(text: str) -> Wish:
    """Read "no data, 4 steps, 24 GB"; ValueError, with the words that there are, for others."""
    found: dict[str, Any] = {}
    for part in (part.strip().lower() for part in text.split(",")):
        calls = re.fullmatch(r"(\d+) ?(?:steps?|calls?)", part)
        memory = re.fullmatch(r"(\d+(?:\.\d+)?) ?gi?b", part)
        if calls and int(calls[1]) > 0:
            found["calls"] = int(calls[1])
        elif memory and float(memory[1]) > 0:
            found["gigabytes"] = float(memory[1])
        elif part in ("no data", "data", "data-free", "with data"):
            found["data"] = part in ("data", "with data")
        elif part in ("guidance", "robust"):
            found[part] = True
        else:
            raise ValueError(
                f"{part!r} is no part of a wish, which has commas between its parts"
                f"{nearest(part, WORDS)}"
            )
    return Wish(**found)


def measured() -> dict[str, Any]:
    """The leaderboards: "scenes", in words, and "rows" with their places and distances in each."""
    text = (files("fewstep.recipes") / "choices.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def answer(asked: Wish, table: Mapping[str, Any]) -> Answer:
    """The rows of `table` that suit, in the order of their mean place."""
    calls = min(CALLS, key=lambda count: abs(count - asked.calls))
    notes = []
    if calls != asked.calls:
        notes.append(f"{asked.calls} calls were not measured; these are the results of {calls}")
    rows = [row for row in table["rows"] if row["calls"] == calls]
    rows = [row for row in rows if asked.data or row["needs"] != "data"]
    rows = [row for row in rows if row["guidance"] or not asked.guidance]
    if asked.robust:
        rows = [row for row in rows if row["failed"] == 0]
    rows.sort(key=lambda row: row["place"])
    if not rows:
        notes.append("no method that was measured suits; leave out a part of the wish")
    return Answer(asked, rows, notes)


def largest(row: Row, gigabytes: float) -> float:
    """Weights of the largest network that `row`'s networks, moments and a gradient leave room for.

    In float32, without activations: a bound, of which `fewstep plan` tells the rest.
    """
    return gigabytes * 2**30 / (BYTES * (float(row["copies"]) + 1))


def command(row: Row) -> str:
    """How to run it; the lengths of stages, which are the arena's, are left out."""
    setting = re.sub(r"(, )?\b(\w+_steps|warmup|updates)=[1-9]\d*", "", row["setting"])
    setting = setting.replace("(, ", "(")
    return f'fewstep distill RECIPE --teacher TEACHER --method "{setting}"'


def place(row: Row, scene: str, name: str) -> str:
    """Where a method is among all of its calls, in words; `name` is that of the scene."""
    if scene not in row["places"]:
        return f"no part in {name}"
    return (
        f"{row['places'][scene]} of {row['of'][scene]} on {name} "
        f"(distance {row['distances'][scene]:.2g})"
    )


def told(found: Answer, table: Mapping[str, Any]) -> list[str]:
    """The answer in lines."""
    scenes = " and ".join(table["scenes"].values())
    lines = [f"by mean place on {scenes}; docs/arena.md tells what that cannot show"]
    lines += found.notes
    for row in found.rows[:SHOWN]:
        places = "; ".join(place(row, key, name) for key, name in table["scenes"].items())
        lines.append("")
        lines.append(
            f"{row['name']} ({row['family']}), from {FROM[row['needs']]}: {places}; "
            f"{row['failed']} of {row['runs']} trials failed"
        )
        if found.wish.gigabytes is not None:
            most = largest(row, found.wish.gigabytes) / 1e6
            lines.append(
                f"  {row['copies']:.1f} times the weights while training: in "
                f"{found.wish.gigabytes:g} GB a network of {most:,.0f} million at most, less what "
                "activations take (fewstep plan TEACHER --gpus tells)"
            )
        lines.append(f"  {command(row)}")
    return lines


FROM: Mapping[str, str] = {
    "data": "data",
    "pairs": "samples of the teacher",
    "nothing": "the teacher alone",
}
"""What a method learns from, in words."""
