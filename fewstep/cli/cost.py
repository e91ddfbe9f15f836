"""What a run will cost, from three steps actually taken: its last, when all of it has begun."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice

from fewstep.runner import Work

STEPS = 3


def estimate(work: Work) -> str:
    """A few lines: parameters, memory of weights and optimisers, time on this machine."""
    run, net = work.run, work.net
    longer = replace(run, steps=max(run.steps, STEPS + 1))
    state = work.init()
    state.step = longer.steps - STEPS - 1
    steps = replace(work, run=longer).records(state)
    record = next(steps)
    began = time.perf_counter()
    for record in islice(steps, STEPS):  # noqa: B007
        pass
    each = (time.perf_counter() - began) / STEPS
    nets = record.state.nets
    trained = sum(p.numel() for n in record.state.optimizers for p in nets[n].parameters())
    kept = (*net.parameters(), *net.buffers(), *record.state.average.parameters())
    entries = [e for o in record.state.optimizers.values() for e in o.state.values()]
    moments = [t for entry in entries for t in entry.values()]
    turns = ", ".join(turn.net for turn in run.method.turns(run.steps - 1))
    memory = (2 * 4 * trained + sum(t.nbytes for t in (*kept, *moments))) / 2**20
    return (
        f"one step: {turns}\n"
        f"trained parameters: {trained:,} (weights, gradients, Adam; with the frozen networks "
        f"{memory:.0f} MiB before activations)\n"
        f"time: {1000 * each:.0f} ms a step here, {each * run.steps / 60:.1f} minutes for "
        f"{run.steps:,} steps ({run.steps * run.batch:,} images)"
    )
