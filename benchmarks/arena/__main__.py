"""The command line of the arena; see the package for its rules.

    python -m benchmarks.arena mixture [--methods SiD,DMD2] [--calls 1,4] [--seeds 0-2]
    python -m benchmarks.arena digits --trials 1 --seeds 0
    FEWSTEP_MNIST=mnist.npz python -m benchmarks.arena mnist --methods SiD,DMD2
    python -m benchmarks.arena page

Finished trials are kept after each and never repeated, so that it may be killed at any time and
started again, in parts and side by side for different methods. A teacher that is missing is
trained first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.arena import baselines, records
from benchmarks.arena.budget import Cost, affordable
from benchmarks.arena.entries import BETWEEN, CALLS, ENTRIES, Ask, Entry, entry, points
from benchmarks.arena.leaderboard import chosen
from benchmarks.arena.scenes import NAMES, Scene, scene
from benchmarks.arena.solvers import STARTS, asked
from benchmarks.arena.trials import conduct
from fewstep.storage.files import write_json


class Task(NamedTuple):
    """A trial that is wanted; trial -1: the best one of tuning."""

    entry: Entry
    calls: int
    trial: int
    seed: int


def tasks(
    entries: Sequence[Entry], calls: Sequence[int], seeds: Sequence[int], trials: int
) -> Iterator[Task]:
    """Defaults first, then the other trials of tuning, then the best one's other seeds.

    Last the calls that take over the settings of four.
    """
    asked = [(one, count) for one in entries for count in calls if count in one.calls]
    for trial in range(trials):
        yield from (Task(one, count, trial, 0) for one, count in asked)
    asked += [(one, count) for one in entries for count in calls if count in one.between]
    for seed in seeds:
        yield from (Task(one, count, -1, seed) for one, count in asked)


def plan(on: Scene, one: Entry, calls: int, kept: dict[str, Any]) -> Cost:
    """How many steps the budget pays for: found once, and kept with the records."""
    key = str(calls)
    if key not in kept["plans"]:
        point = points(one)[0]
        make = lambda steps: one.method(Ask(calls, point.start, steps, on.labels), point)  # noqa: E731
        kept["plans"][key] = affordable(make, on)._asdict()
    return Cost(**kept["plans"][key])


def save(on: Scene, name: str, kept: dict[str, Any]) -> None:
    """Write the file of a method."""
    folder = records.RESULTS / on.name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", kept)


def do(on: Scene, task: Task, trials: int) -> None:
    """Conduct one trial, unless it is there."""
    name = task.entry.name
    kept = records.read(on, name)
    kept["records"] = [r for r in kept["records"] if r["teacher"] == on.teacher_digest]
    trial = task.trial
    if trial < 0:
        best = chosen(kept["records"], task.calls, on.distance, trials)
        if best is None:
            return
        trial = best
    known = {(r["calls"], r["trial"], r["seed"]) for r in kept["records"]}
    if (task.calls, trial, task.seed) in known:
        return
    cost = plan(on, task.entry, task.calls, kept)
    record = conduct(on, name, task.calls, trial, task.seed, cost)
    kept["records"].append(record)
    save(on, name, kept)
    shown = record["failure"] or f"{on.distance} {record['test'][on.distance]:.4g}"
    print(
        f"{on.name} {name}, {task.calls} calls, trial {trial}, seed {task.seed}: {shown}, "
        f"{record['seconds']:.1f} s",
        flush=True,
    )


def measure_baselines(on: Scene) -> None:
    """Conduct the trials of the baselines that are missing."""
    kept = records.read(on, "baselines")
    kept["records"] = [r for r in kept["records"] if r["teacher"] == on.teacher_digest]
    known = {(r["solver"], r["calls"], r["trial"]) for r in kept["records"]}
    for solver, calls in asked():
        for trial in range(len(STARTS)):
            if (solver, calls, trial) not in known:
                kept["records"].append(baselines.conduct(on, solver, calls, trial))
                save(on, "baselines", kept)


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers: "0-2,5" -> 0, 1, 2, 5."""
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return tuple(found)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser("python -m benchmarks.arena", description=__doc__)
    every = (*CALLS, *BETWEEN)
    flags.add_argument("what", choices=(*NAMES, "page"))
    flags.add_argument("--methods", help="names, with commas between them (default: all)")
    flags.add_argument("--calls", type=numbers, default=every, help="of the students, such as 1,4")
    flags.add_argument("--seeds", type=numbers, default=(0, 1, 2), help="such as 0-2")
    flags.add_argument("--trials", type=int, default=3, help="of tuning, 1 (defaults alone) or 3")
    return flags


def main(args: list[str]) -> int:
    given = parser().parse_args(args)
    if given.what == "page":
        from benchmarks.arena.pages import write_all

        write_all()
        return 0
    torch.set_num_threads(1)
    on = scene(given.what)
    try:
        wanted = (given.methods or ",".join(one.name for one in ENTRIES)).split(",")
        entries = [entry(name) for name in wanted]
    except ValueError as error:
        parser().error(str(error))
    if given.trials not in (1, 3) or not set(given.calls) <= {*CALLS, *BETWEEN}:
        parser().error(f"--trials is 1 or 3, and --calls are of {(*CALLS, *BETWEEN)}")
    entries = [one for one in entries if on.name in one.scenes]
    if not given.methods:
        measure_baselines(on)
    wrong = 0
    for task in tasks(entries, given.calls, given.seeds, given.trials):
        try:
            do(on, task, given.trials)
        except ValueError as error:
            print(f"{task.entry.name}, {task.calls} calls: {error}", file=sys.stderr, flush=True)
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
