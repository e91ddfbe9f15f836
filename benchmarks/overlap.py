"""How much of gradients is averaged before the backward pass ends: python benchmarks/overlap.py

Two processes over gloo do steps of SiD on EDM's CIFAR-10 network at half its width; buckets are
an eighth of the usual ones, so that there are as many as in a network eight times as large. Of
each update of a net: bytes whose sending began before the backward pass ended, bytes that were
averaged by then (the lesser of both processes), and all bytes, which are those of its weights.
Counts, no times: both processes may share a core. The figures go into results/overlap.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

from fewstep.data.batches import Latents
from fewstep.methods.sid import SiD
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.runs.environment import environment
from fewstep.storage.files import write_json
from fewstep.training import averaging, distributed
from fewstep.training.loop import State, train
from tests.processes import results

OUT = Path(__file__).parent / "results" / "overlap.json"
STEPS = 3
SHARE = 8


class Trace(averaging._Queue):
    """The queue itself, which notes what is under way and what is done when it is finished."""

    found: ClassVar[list[dict[str, int]]] = []

    def finish(self) -> None:
        begun = [sum(p.nbytes for p in part) for part in self.parts[: self.sent]]
        done = len(begun) - len(self.flying) + sum(s.work.is_completed() for s in self.flying)
        every = [sum(p.nbytes for p in part) for part in self.parts]
        facts = {"buckets": len(every), "bytes": sum(every)}
        facts |= {"begun": sum(begun), "over": sum(begun[:done])}
        self.found.append(facts)
        super().finish()


def steps() -> dict[str, Any]:
    """The figures of the last step's two turns, on this process."""
    with distributed.process_group():
        distributed.BUCKET //= SHARE
        averaging._Queue = Trace  # type: ignore[misc]
        net = EDMPrecond(32, 3, model_type="SongUNet", model_channels=64, channel_mult=[2, 2, 2])
        state = State.init(SiD(), net, net)
        sizes = sum(p.nbytes for p in net.parameters())
        source = Latents((3, 32, 32))
        for _ in train(SiD(), net, net, source, batch=4, steps=STEPS, state=state, accumulate=2):
            pass
        return {"weights": sizes, "turns": Trace.found[-2:]}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = results(2, Path(folder), steps, within=550)
    turns = {}
    for i, name in enumerate(("fake", "student")):
        mine = [found["turns"][i] for found in ranks]
        whole = mine[0]["bytes"]
        turns[name] = {
            "buckets": mine[0]["buckets"],
            "megabytes": whole / 1e6,
            "of weights": whole / ranks[0]["weights"],
            "percent begun": min(100 * each["begun"] / whole for each in mine),
            "percent over": min(100 * each["over"] / whole for each in mine),
        }
        print(name, turns[name])
    write_json(OUT, {"environment": environment(), "turns": turns})


if __name__ == "__main__":
    main()
