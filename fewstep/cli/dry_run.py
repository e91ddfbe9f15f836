"""What a run will cost, from three steps actually taken: its last, when all of it has begun."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Source
from fewstep.domains.domain import Domain
from fewstep.domains.prompts import Prompted
from fewstep.plan.meta_step import Nothing
from fewstep.runs.run import Run
from fewstep.runs.runner import PreparedRun
from fewstep.teachers.diffusers.adapter_base import adapter_of
from fewstep.training.progress import remark

STEPS = 3
LONG, SHOWN = 1000, 100
"""Characters of a setting that is too long for a dry run, and what is shown of it."""


@dataclass(frozen=True)
class Trial(Domain):
    """A domain of prompts that encodes nothing; doubts about the teacher become a remark."""

    domain: Prompted

    def source(self, model: Model, data_free: bool) -> Source:
        """As the domain of prompts itself."""
        return self.domain.source(model, data_free)

    def source_for(self, teacher: Generator | None, model: Model, data_free: bool) -> Source:
        """Conditions of zeros, where the run itself would have any."""
        net = None if teacher is None else adapter_of(teacher.denoiser)
        if teacher is None or teacher.text is None or net is None:
            return self.domain.source(model, data_free)
        self.domain.refuse(data_free)
        if doubts := self.domain.doubts(teacher):
            remark(f"the run itself would stop here: {doubts}")
        return Nothing(model, data_free, net)


def tried(run: Run) -> Run:
    """`run` for a few steps that tell its cost: prompts are neither encoded nor stored."""
    if not isinstance(run.domain, Prompted):
        return run
    return replace(run, domain=Trial(run.domain))


def shortened(tree: Any) -> Any:
    """A stored configuration for people: long texts, such as a network's, lose their ends."""
    if isinstance(tree, dict):
        return {name: shortened(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [shortened(value) for value in tree]
    if isinstance(tree, str) and len(tree) > LONG:
        return f"{tree[:SHOWN]}... ({len(tree):,} characters)"
    return tree


def estimate(work: PreparedRun) -> str:
    """A few lines: parameters, memory of weights and optimisers, time on this machine."""
    work = work.rehearsal()
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
