"""What a run has computed, counted in forward passes of its teacher's network.

A step is done once more on tensors without numbers (`fewstep.plan.meta_step`), and the operations
of its products and convolutions, forward and backward, are divided by those of one forward pass on
one sample. So methods can be compared by what they cost, whatever machine they ran on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.plan.meta_memory import AsOnDevice, MetaMemory
from fewstep.plan.meta_step import Unseen, measure_step
from fewstep.runs.run import Run

LOOKED_AT = 8
"""Steps that are averaged, where steps differ: which call of a rollout is trained changes."""


class Forwards(NamedTuple):
    """Forward passes of one sample through the teacher's network.

    step: of one step, the mean over the last ones; before: of what was made before step 0 (pairs).
    """

    step: float
    before: float = 0.0

    def at(self, step: float) -> float:
        """All of them until this step."""
        return self.before + self.step * step


def forwards(run: Run, teacher: Model | None, calls: float = 0.0) -> Forwards:
    """The cost of `run`.

    Args:
        run: as it is recorded.
        teacher: its teacher's network; None where the teacher is exact: it is then counted as if
            it were the run's own network, and pairs of it cost nothing.
        calls: of the teacher's own sampler, which makes pairs.

    Raises ValueError where a step cannot be done without numbers.
    """
    unit = operations_of_a_forward(teacher or run.model)
    ends = [run.steps - k for k in range(min(LOOKED_AT, run.steps) if _varies(run) else 1)]
    steps = [measure_step(replace(run, steps=end), teacher=teacher).operations for end in ends]
    pairs = run.method.needs_pairs()
    each = 0.0 if pairs is None else pairs.sampler.calls if pairs.sampler else calls
    before = 0.0 if pairs is None or teacher is None else pairs.count * each
    return Forwards(sum(steps) / len(steps) / unit, before)


def _varies(run: Run) -> bool:
    """Whether a step may cost another amount than the one before."""
    last = range(max(0, run.steps - LOOKED_AT), run.steps)
    orders = {tuple(turn.net for turn in run.method.turns(step)) for step in last}
    return run.method.sampler.calls > 1 or len(orders) > 1


def operations_of_a_forward(model: Model) -> float:
    """Floating-point operations of one forward pass of one sample."""
    ledger, unseen = MetaMemory(), Unseen(model, "meta")
    teacher = unseen.exact()
    batch = unseen.source_for(teacher, model, True)(Draws.range(0, 1, 0, "meta"))
    with ledger, AsOnDevice(None, wide=False), torch.no_grad():
        teacher.denoiser(batch.z, torch.ones(1, device="meta"), batch.cond)
    return float(ledger.operations)
