"""One rollout for both halves of a step: its gradients are those of two on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Turn
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim

F64 = torch.float64
BATCH = 12
SAMPLERS = (FewStep(2.5), FewStep(2.5, 3))
TEACHER = GaussianMixture.ring(3).double()
OPTIM = Optim(1e-2, eps=1e-3)


def source(draws: Draws) -> Batch:
    return Latents((2,))(draws)._replace(z=draws.normal("z", (2,), F64))


def net() -> nn.Module:
    return Model(MLP(16, 1), (2,)).build(1).double()


def gradients(method: SiD, steps: int = 1, **settings: Any) -> tuple[list[list[Tensor]], State]:
    """Of each update, as the optimiser is given them; and the state afterwards."""
    had: list[list[Tensor]] = []

    def seen(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        had.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    hook = register_optimizer_step_pre_hook(seen)
    with torch.random.fork_rng():
        state = settings.pop("state", None) or State.init(method, TEACHER, net())
        settings = {"batch": BATCH, "optim": OPTIM, "state": state, **settings}
        try:
            for _ in train(method, TEACHER, nn.Identity(), source, steps=steps, **settings):
                pass
        finally:
            hook.remove()
    return had, state


@dataclass(frozen=True)
class Twice(SiD):
    """SiD on the samples of a shared rollout, which each half makes for itself."""

    def turns(self, step: int) -> Sequence[Turn]:
        rollout = Rollout.at(step, self.sampler, self.matching)

        def learn(nets: Any, teacher: Any, batch: Batch) -> Any:
            x = rollout(nets, batch).detach()
            assert batch.draws is not None
            own = batch._replace(draws=batch.draws.under("fake"))
            return self.fake.loss(lambda *_: x, self.guidance, nets, teacher, own)

        student = Turn("student", partial(self.student_loss, rollout), same=True)
        return Turn("fake", learn), student


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_its_gradients_are_those_of_two_rollouts(sampler: FewStep, accumulate: int) -> None:
    """To the bit, over three steps; on other samples they would be others."""
    settings: Any = {"steps": 3, "accumulate": accumulate}
    shared, state = gradients(SiD(sampler, shared=True), **settings)
    twice, other = gradients(Twice(sampler), **settings)
    assert len(shared) == 6
    for one, two in zip(shared, twice, strict=True):
        assert all(map(torch.equal, one, two))
        assert any(g.any() for g in one)
    assert state.drawn == other.drawn == 3 * BATCH
    assert state.images == 3 * BATCH
    apart, state = gradients(SiD(sampler), **settings)
    assert state.drawn == 6 * BATCH
    assert not all(map(torch.equal, apart[1], shared[1]))


@pytest.mark.parametrize(("shared", "calls"), [(True, 1), (False, 2)])
def test_the_student_is_called_once(shared: bool, calls: int) -> None:
    method = SiD(shared=shared)
    state = State.init(method, TEACHER, net())
    counted = []
    state.nets["student"].register_forward_hook(lambda *_: counted.append(1))
    gradients(method, state=state)
    assert len(counted) == calls


def test_a_continued_run_is_the_run() -> None:
    method = SiD(FewStep(2.5, 3), shared=True)
    whole = gradients(method, steps=5)[1]
    half = gradients(method, steps=2)[1]
    continued = gradients(method, steps=5, state=deepcopy(half))[1]
    pairs = zip(whole.nets.parameters(), continued.nets.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_both_halves_have_noise_of_their_own() -> None:
    """The fake score's is drawn under its name, so that the halves are not in step."""
    draws = Draws.range(0, BATCH)
    assert not torch.equal(draws.under("fake").uniform("t"), draws.uniform("t"))
    seen = []

    @dataclass(frozen=True)
    class Watched(SiD):
        def turns(self, step: int) -> Sequence[Turn]:
            return [t._replace(loss=partial(self.watch, t)) for t in super().turns(step)]

        def watch(self, turn: Turn, nets: Any, teacher: Any, batch: Batch) -> Any:
            hook = nets["fake"].register_forward_hook(lambda m, args, out: seen.append(args[1]))
            loss = turn.loss(nets, teacher, batch)
            hook.remove()
            return loss

    gradients(Watched(shared=True))
    assert len(seen) == 2
    assert not torch.isclose(seen[0].log().sort().values, seen[1].log().sort().values).any()


def test_nothing_is_before_the_first_turn() -> None:
    @dataclass(frozen=True)
    class Lost(SiD):
        def turns(self, step: int) -> Sequence[Turn]:
            return super().turns(step)[1:]

    with pytest.raises(ValueError, match="no turn is before the first"):
        gradients(Lost(shared=True))
