"""How many steps a budget pays for, counted in forward passes of the teacher's network.

Steps are done on tensors without numbers (`fewstep.plan.meta_step`), and their operations, forward
and backward, divided by those of one forward pass of one sample. Stages and turns differ, so steps
all along the run are looked at. Pairs that are made before it are paid for too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from statistics import fmean, stdev
from typing import NamedTuple

from benchmarks.arena.scenes import Scene
from fewstep.compare.cost import operations_of_a_forward
from fewstep.diffusion.model import Model
from fewstep.distillation.method import Method
from fewstep.domains.ring import Ring
from fewstep.plan.meta_step import StepCost, measure_step
from fewstep.runs.run import Run

FIRST = 200
"""Steps that a first estimate is of."""
FEW, MOST = 6, 24
"""Steps that are looked at, at least and at most."""
CLOSE = 0.03
"""Standard error of the mean at which no more are looked at, as a share of it."""


class Cost(NamedTuple):
    """What a student costs.

    steps: that are paid for; forwards: a step, in the mean; before: forwards before step 0; peak
    and kept: bytes at the worst moment of a step and between two steps.
    """

    steps: int
    forwards: float
    before: float
    peak: int
    kept: int

    def at(self, step: float) -> float:
        """Forward passes until then."""
        return self.before + self.forwards * step


@cache
def _unit(model: Model) -> float:
    return operations_of_a_forward(model)


def places(steps: int) -> Iterator[int]:
    """Numbers of steps, from 1, in an order that soon covers them: pairs of neighbours."""
    for n in range(MOST // 2):
        share = sum((n >> k & 1) / 2 ** (k + 1) for k in range(8)) + 0.07  # bits, mirrored
        step = 1 + int(share % 1 * max(steps - 1, 1))
        yield from dict.fromkeys(min(step + more, steps) for more in (0, 1))


def of_steps(method: Method, scene: Scene, steps: int, most: int = MOST) -> Cost:
    """The cost of so many steps; `most` of them are looked at."""
    run = Run(method, scene.model, Ring(), steps, batch=scene.batch)
    each: list[StepCost] = []
    for end in places(run.last_step):
        each.append(measure_step(replace(run, steps=end), teacher=scene.model))
        found = [one.operations for one in each]
        error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        if len(each) >= most or (len(each) >= FEW and error < CLOSE * fmean(found)):
            break
    forwards = fmean(found) / _unit(scene.model)
    pairs = method.needs_pairs()
    calls = 0 if pairs is None else (pairs.sampler or scene.teacher.sampler).calls
    before = 0.0 if pairs is None else float(pairs.count * calls)
    peak, kept = (max(getattr(one, name) for one in each) for name in ("peak", "kept"))
    return Cost(run.last_step, forwards, before, peak, kept)


def affordable(make: Callable[[int], Method], scene: Scene) -> Cost:
    """The steps that the scene's budget pays for, of the method that `make` gives for them.

    make: steps -> method, whose stages may depend on the number.
    """
    guess = of_steps(make(FIRST), scene, FIRST, FEW)
    steps = max(1, int((scene.budget - guess.before) / guess.forwards))
    cost = of_steps(make(steps), scene, steps)
    if cost.steps < steps or abs(cost.at(steps) / scene.budget - 1) < CLOSE:
        return cost
    steps = max(1, int((scene.budget - cost.before) / cost.forwards))
    return cost._replace(steps=steps)  # stages of nearly the same shares cost the same
