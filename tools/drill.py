"""Kill, forget, corrupt: whether a run comes through, as JSON.

    python tools/drill.py --kills 200 --corruptions 1000 --out runs/drill --results FILE

A small distillation is killed (SIGKILL) at random moments and at random file operations inside
its saves, and started again with the same command until it ends; its last checkpoint, model and
log must be those of an undisturbed run, byte for byte. As controls, a run that forgets one part
of its state must end otherwise. Then stored checkpoints are damaged by flipped bits, cuts and
zeroed pages: every damage must be refused, and no weight may have changed.

Processes are forked from this one, where torch is imported already; each is a process of its own
that knows the disk alone. Stop it at any time: with the same --out it goes on. The exit status is
1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch._dynamo  # optimisers import it: seconds, saved in every forked process
from lives import CONTROLS, STEPS, Life, forgets, live, stops_halfway

from fewstep.cli import recipe_run, run_flags
from fewstep.config import decode
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.runner import prepare
from fewstep.storage import checkpoint
from fewstep.storage.files import Damaged, read_folder, read_json, write_json
from fewstep.training.distributed import fingerprint
from fewstep.training.loop import State

PRELOADED = (run_flags, recipe_run)
PER_RUN = 5
"""Kills before a run is left to end."""
PAGE = 4096


def outcome(folder: Path) -> dict[str, Any]:
    """What a finished run left: digests of nets, average, optimisers and model; counters; log."""
    run = RunFolder(folder)
    newest = read_folder(checkpoint.find_checkpoints(run.checkpoints)[-1])
    newest.pop("origin")  # each run has an id of its own
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in run.lines("log.jsonl")]
    student = read_folder(run.student)["sha256"]["model.safetensors"]
    return {"checkpoint": newest, "student": student, "log": lines}


def good(folder: Path) -> list[int]:
    """The steps of the sound checkpoints."""
    steps = []
    for path in checkpoint.find_checkpoints(folder / "checkpoints"):
        try:
            steps.append(int(read_folder(path)["step"]))
        except Damaged:
            continue
    return steps


def survive(folder: Path, seed: str, kills: int, in_saves: int, whole: Life) -> dict[str, Any]:
    """One run with up to `kills` deaths, `in_saves` of them inside saves; what happened."""
    rng, deaths, before = random.Random(seed), [], []
    shutil.rmtree(folder, ignore_errors=True)
    plan = ["save"] * in_saves + ["anywhere"] * (kills - in_saves)
    rng.shuffle(plan)
    while True:
        kind = plan[0] if plan else "none"
        left = 1 - max(before, default=0) / STEPS
        moment, place = rng.uniform(0, 0.9 * whole.seconds * left), rng.randrange(whole.operations)
        after = moment if kind == "anywhere" else None
        in_save = (rng.randint(1, 3), place) if kind == "save" else None
        life = live(folder, after, in_save)
        kept = good(folder)
        if (before and max(kept, default=-1) < max(before)) or len(kept) < min(2, len(before)):
            return {"deaths": deaths, "error": f"of the checkpoints {before}, {kept} are left"}
        if not life.killed and life.code != 0:
            return {"deaths": deaths, "error": f"exit code {life.code}: {life.told}"}
        resumed = (f"continuing from step {max(before, default=0)} ", "is finished already")
        if before and life.told and not any(text in life.told for text in resumed):
            return {"deaths": deaths, "error": f"after {before} it said: {life.told}"}
        if not life.killed:
            return {"deaths": deaths, "error": ""}
        last = [line["step"] for line in RunFolder(folder).lines("log.jsonl")][-1:]
        lost = max(last, default=0) - max(kept, default=0)
        deaths.append({"kind": kind, "lost": lost, "kept": len(kept)})
        plan, before = plan[1:], kept


def campaign(out: Path, seed: int, kills: int, in_saves: int) -> dict[str, Any]:
    """Runs until `kills` processes have been killed; finished ones are remembered in `out`."""
    shutil.rmtree(out / "undisturbed", ignore_errors=True)
    whole = live(out / "undisturbed")
    if whole.code:
        raise SystemExit(f"the undisturbed run failed: {whole.told}")
    expected = outcome(out / "undisturbed")
    stored = out / "kills.json"
    runs: list[dict[str, Any]] = read_json(stored) if stored.exists() else []
    deaths = [death for run in runs for death in run["deaths"]]
    while len(deaths) < kills:
        wanted = min(PER_RUN, kills - len(deaths))
        share = in_saves - sum(death["kind"] == "save" for death in deaths)
        some = max(0, min(wanted, -(-share * wanted // (kills - len(deaths)))))
        folder = out / f"run-{len(runs)}"
        run = survive(folder, f"{seed}:{len(runs)}", wanted, some, whole)
        run["equal"] = not run["error"] and outcome(folder) == expected
        runs, deaths = [*runs, run], [*deaths, *run["deaths"]]
        write_json(stored, runs)
        if run["equal"]:
            shutil.rmtree(folder)
        print(f"kills: {len(deaths)}/{kills}", file=sys.stderr, flush=True)
    failed = [i for i, run in enumerate(runs) if not run["equal"]]
    survived = [death for run in runs if not run["error"] for death in run["deaths"]]
    return {
        "kills": len(deaths),
        **{
            what: {
                "kills": sum(death["kind"] == kind for death in deaths),
                "continued": sum(death["kind"] == kind for death in survived),
            }
            for what, kind in (("at any moment", "anywhere"), ("inside a save", "save"))
        },
        "before the first checkpoint": sum(death["kept"] == 0 for death in deaths),
        "runs": len(runs),
        "equal to the undisturbed run": len(runs) - len(failed),
        "most steps lost": max((death["lost"] for death in deaths), default=0),
        "failed": {i: runs[i]["error"] or "another result" for i in failed},
    }


def controls(out: Path) -> dict[str, bool]:
    """What is forgotten half-way -> whether the end differs; "nothing" must not."""
    half, expected = out / "half", outcome(out / "undisturbed")
    shutil.rmtree(half, ignore_errors=True)
    life = live(half, hook=stops_halfway)
    if life.code != 75:
        raise SystemExit(f"the run did not stop half-way: {life.told}")
    differs = {}
    for name in CONTROLS:
        folder = out / "forgetful"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(half, folder)
        life = live(folder, hook=lambda name=name: forgets(name))  # type: ignore[misc]
        differs[name] = life.code != 0 or outcome(folder) != expected
        print(f"forgets {name}: {'differs' if differs[name] else 'same'}", file=sys.stderr)
    return differs


def _damage(path: Path, kind: str, rng: random.Random) -> bool:
    """Flip a bit, cut, or zero a page of a file; whether that changed it."""
    data = bytearray(path.read_bytes())
    before, place = bytes(data), rng.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[place:]
    else:
        page = place // PAGE * PAGE
        data[page : page + PAGE] = bytes(len(data[page : page + PAGE]))
    path.write_bytes(data)
    return bytes(data) != before


def corrupt(out: Path, seed: int, count: int) -> dict[str, Any]:
    """Damage the checkpoint in out/half `count` times; how many are seen before a weight moves."""
    source = checkpoint.find_checkpoints(out / "half" / "checkpoints")[-1]
    run: Run = decode(read_json(out / "half" / "run.json")["run"], Run)
    state = prepare(run, "mixture", "").init()
    optim = run.optims(state.nets)
    before = _all(state)
    rng, seen, done = random.Random(f"corrupt:{seed}"), 0, 0
    kinds = dict.fromkeys(("flip", "cut", "zero"), 0)
    names = sorted(path.name for path in source.iterdir())
    bad = out / "bad"
    while done < count:
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(source, bad)
        kind = rng.choice(list(kinds))
        if not _damage(bad / rng.choice(names), kind, rng):
            continue
        done, kinds[kind] = done + 1, kinds[kind] + 1
        try:
            checkpoint.load_checkpoint(bad, state, run.method, optim)
        except Damaged:
            seen += torch.equal(_all(state), before)
    checkpoint.load_checkpoint(
        source, state, run.method, optim
    )  # and nothing but damage is refused
    return {"corruptions": done, **kinds, "detected": seen}


def _all(state: State) -> torch.Tensor:
    parts = checkpoint.tensors(state)
    return fingerprint({f"{part}.{k}": t for part in parts for k, t in parts[part].items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--in-saves", type=int, default=0, help="of them; default: a quarter")
    parser.add_argument("--corruptions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/drill"))
    parser.add_argument("--results", type=Path, help="where the JSON is kept too")
    own = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    own.out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"seed": own.seed}
    told["kills"] = campaign(own.out, own.seed, own.kills, own.in_saves or own.kills // 4)
    told["forgetting is noticed"] = controls(own.out)
    told["forgotten parts"] = len(CONTROLS) - 1
    told["of them noticed"] = sum(
        differs for name, differs in told["forgetting is noticed"].items() if name != "nothing"
    )
    told["damage"] = corrupt(own.out, own.seed, own.corruptions)
    told["seconds"] = round(time.monotonic() - began, 1)
    for place in filter(None, (own.out / "drill.json", own.results)):
        write_json(place, told)
    print(json.dumps(told, indent=2))
    noticed = told["forgetting is noticed"]
    sound = not told["kills"]["failed"] and told["damage"]["detected"] == own.corruptions
    sound = sound and all(differs != (name == "nothing") for name, differs in noticed.items())
    raise SystemExit(0 if sound else 1)


if __name__ == "__main__":
    main()
