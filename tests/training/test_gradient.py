"""A turn reads its device once, for all that it logs and guards, and waits for it nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch
from fewstep.distillation.guidance_scales import LSG
from fewstep.distillation.method import Loss, Method, Nets
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.nets.mlp import MLP
from fewstep.plan import meta_step
from fewstep.plan.meta_memory import AsOnDevice, MetaMemory
from fewstep.recipes.digits import digits
from fewstep.training.gradient import _after
from tests.instances import METHODS
from tests.parameters import firsts
from tests.waiting import Waits

MODEL = Model(MLP(8, 1), (1, 4, 4), 3, VE())
ONE = "training/gradient.py _on_host"


def waits(method: Method, model: Model = MODEL) -> list[str]:
    """Where a step of two parts waits, when everything has been met before."""
    run = replace(digits(), method=method, model=model, batch=4, accumulate=2, steps=6)
    with MetaMemory(), AsOnDevice(None, wide=True):
        work = meta_step.prepared(run, "meta").rehearsal()
        state = meta_step.begun(work)
        with Waits() as found:
            assert len(list(work.records(state))) == 1
    return found.places


@pytest.mark.parametrize(
    "method",
    [SiD(FewStep(2.5, 2), guidance=LSG(4.5)), SiDA(), DMD2(ratio=2)],
    ids=lambda method: type(method).__name__,
)
def test_a_turn_reads_its_device_once(method: Method) -> None:
    """And clipping, which needs the norm, reads nothing more."""
    assert waits(method) == [ONE] * len(method.turns(5))


def test_timesteps_and_their_table_are_no_wait() -> None:
    model = replace(MODEL, path=VP(), predicts="eps")
    assert waits(SiD(FewStep(999.0)), model) == [ONE] * 2


@dataclass(frozen=True)
class Reads(SiD):
    """SiD whose student waits twice in each part: it reads a number, and copies a list."""

    def student_loss(self, rollout: Any, nets: Nets, teacher: Any, batch: Batch) -> Loss:
        loss = super().student_loss(rollout, nets, teacher, batch)
        assert loss.total is not None
        if float(loss.total.detach()) < 0:
            return loss
        return loss._replace(total=loss.total * loss.total.new_tensor([1.0, 2.0])[0])


def test_a_wait_is_noticed() -> None:
    """Negative control."""
    assert len(waits(Reads())) == 2 + 2 * 2


ALLOWED = {
    "methods/dode.py between",  # a solver whose times are found is made anew in each step
    "methods/dode.py trajectory",
    "methods/progressive.py product",  # a reward's samples are those of the present stage
}


@pytest.mark.slow
@pytest.mark.parametrize("method", firsts(METHODS), ids=repr)
def test_no_method_waits_beside(method: Method) -> None:
    try:
        found = waits(method)
    except ValueError as error:  # of methods for other paths, prompts and pictures
        pytest.skip(str(error))
    assert set(found) - ALLOWED <= {ONE}
    assert found.count(ONE) == len(method.turns(min(method.length or 6, 6) - 1))


def test_what_is_expected_next_is_of_the_own_share() -> None:
    """Of eight samples in two processes and two parts: parts of two, then the next eight's."""
    samples = range(16, 24)
    first, second = range(16, 20), range(20, 24)
    assert [_after(start, 2, first, samples) for start in (16, 18)] == [18, 24]
    assert [_after(start, 2, second, samples) for start in (20, 22)] == [22, 28]
