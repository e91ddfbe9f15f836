"""Phased DMD on a Gaussian, exactly: two signs in place of z and eps make means of squares exact.

Data N(0, 1/4) on the flow path, a first phase from t = 1 to s = 1/2, states noised to t = 3/4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fewstep.diffusion.denoisers import EDM
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete, Uniform
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.method import Nets
from fewstep.losses.weight import Power
from fewstep.methods.phased_dmd import PhasedDMD
from fewstep.nets.experts import ExpertsNet
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import Gaussian
from fewstep.training.ema import EMA
from fewstep.training.loop import Record, train
from fewstep.training.optim import Optim
from tests.methods.test_tdm import BATCH, SD, SIGNS, TEACHER, TRUE, Slope

F64 = torch.float64


def method(**more: Any) -> PhasedDMD:
    plain = {
        "times": Discrete((0.75,)),
        "weight": Power(),
        "fake_weight": Power(),
        "phase_steps": 3,
        **more,
    }
    sampler = plain.pop("sampler", FewStep(1.0, 2, "ddim"))
    return PhasedDMD(sampler, **plain)


def gradient(m: PhasedDMD, student: float, fake: float, which: str, k: int = 1) -> float:
    nets = Nets({"student": Slope(student), "fake": Slope(fake)})
    found = getattr(m, f"{which}_loss")(Rollout(m.sampler, k), nets, TEACHER, BATCH)
    return float(torch.autograd.grad(found.total, nets[which].parameters())[0])


def learned(m: PhasedDMD, student: float, k: int = 1) -> float:
    at, further = (gradient(m, student, c, "fake", k) for c in (0.0, 1.0))
    return at / (at - further)


def test_the_fake_score_of_the_exact_flow_map_is_the_teachers() -> None:
    """0.10810811, where no x_0 is known; and the exact student rests, another does not."""
    m = method()
    assert learned(m, SD) == pytest.approx(0.10810811, abs=1e-8)
    assert abs(gradient(m, SD, learned(m, SD), "student")) < 1e-12
    for student, sign in ((SD - 0.02, -1), (SD + 0.02, 1)):
        assert sign * gradient(m, student, learned(m, student), "student") > 1e-4


def test_the_direction_is_on_the_state() -> None:
    """d/dc of x_s = (c + 1)/2 z along (f_psi - f_phi)(x_t), x_t = r x_s + tau eps, by hand."""
    c, fake = 0.4, 0.3
    expected = 0.5 * (fake - TRUE) * 0.5 * (0.5 * c + 0.5)
    assert gradient(method(), c, fake, "student") == pytest.approx(expected, rel=1e-12)


def test_the_fake_scores_loss_is_clipped() -> None:
    """Plain regression where 1 / share^2 = 1.125 is below the clip; else clip share^2 of it."""
    share2 = (0.75**2 - 0.25**2) / 0.75**2
    plain, clipped = (gradient(method(clip=clip), 0.4, 0.3, "fake") for clip in (10.0, 0.5))
    assert clipped == pytest.approx(plain * 0.5 * share2, rel=1e-12)
    spread = 0.5 * 0.4 + 0.5
    xt = 0.5 * spread * SIGNS[:, 0] + math.sqrt(0.5) * SIGNS[:, 1]
    target = (xt - 0.75**2 / math.sqrt(0.5) * SIGNS[:, 1]) / 0.25
    assert plain == pytest.approx(float((2 * (0.3 * xt - target) * xt).mean()), rel=1e-9)


def test_the_last_phase_ends_at_data() -> None:
    """The state is x_0 there, noised from data; the fake score's target is x_0, too."""
    m = method()
    nets = Nets({"student": Slope(0.4), "fake": Slope(0.3)})
    reached = m.reached(Rollout(m.sampler, 2), nets, BATCH)
    assert reached.s is None
    assert torch.equal(reached.xs, reached.x0)
    n, share, target = m.noised(Flow(), reached, BATCH)
    torch.testing.assert_close(n.xt, 0.25 * reached.x0 + 0.75 * SIGNS[:, 1:])
    assert torch.equal(target, reached.x0)
    assert torch.equal(share, torch.ones_like(share))


def test_any_call_of_a_phase_leads_to_its_end() -> None:
    m = method(sampler=FewStep(1.0, 4, "ddim"))
    assert m.ends(Flow()) == [0.5, 0.0]
    nets = Nets({"student": Slope(0.3)})
    first, second = (m.reached(Rollout(m.sampler, k), nets, BATCH) for k in (1, 2))
    for reached, t in ((first, 1.0), (second, 0.75)):
        assert float(reached.s[0]) == 0.5  # type: ignore[index]
        state = m.sampler.state(1 if t == 1 else 2, nets["student"], BATCH.z, None, BATCH.draws)  # type: ignore[arg-type]
        eps = (state.xt - (1 - t) * state.x0) / t
        torch.testing.assert_close(reached.xs, 0.5 * state.x0 + 0.5 * eps)


def test_levels_go_up_to_the_noisiest() -> None:
    m = PhasedDMD(FewStep(1.0, 2, "ddim"), times=Uniform(0.01, 1.0))
    draws = Draws.range(0, 500)
    at = Batch(draws.normal("z", (1,), F64), None, None, draws)
    for k, low in ((1, 0.5), (2, 0.01)):
        reached = m.reached(Rollout(m.sampler, k), Nets({"student": Slope(0.2)}), at)
        t = m.noised(Flow(), reached, at).noised.t
        assert low <= float(t.min()) < low + 0.01
        assert 0.99 < float(t.max()) <= 1


def test_the_calls_that_learn() -> None:
    """Those of the phase alone, each in turn; the last one with "final"."""
    for matching, expected in (("uniform", [{1, 2}, {3, 4}]), ("final", [{2}, {4}])):
        m = method(sampler=FewStep(1.0, 4, "ddim"), phase_steps=20, matching=matching, ratio=2)
        seen: list[set[int]] = [set(), set()]
        for step in range(60):
            turns = m.turns(step)
            assert [turn.net for turn in turns] == ["fake", "fake", "student"]
            calls = {turn.loss.args[0].k for turn in turns}  # type: ignore[attr-defined]
            assert len(calls) == 1
            seen[step >= 20] |= calls
        assert seen == expected


@pytest.mark.parametrize(
    ("path", "predicts", "bounds"),
    [(Flow(), "velocity", 0.75), (VP(), "edm", 749 / 999), (VE(), "denoiser", None)],
)
def test_bounds_are_between_the_calls(path: Any, predicts: Any, bounds: float | None) -> None:
    start = {Flow: 1.0, VP: 999.0, VE: 2.5}[type(path)]
    m = PhasedDMD(FewStep(start, 2, "ddim"))
    ladder = m.sampler.ladder(path)  # type: ignore[attr-defined]
    expected = sum(ladder) / 2 if bounds is None else bounds
    if isinstance(path, VP):
        expected = sum(ladder) / 2 / path.t_max
    (found,) = m.result(Model(MLP(), (2,), 0, path, predicts)).net.bounds  # type: ignore[attr-defined]
    assert found == pytest.approx(expected, rel=1e-12)


def experts(net: Any) -> Any:
    return next(m for m in net.modules() if isinstance(m, ExpertsNet)).nets


def values(net: Any) -> list[float]:
    return [float(p.detach().sum()) for p in net.parameters()]


def trained(phase_steps: int, steps: int) -> Iterator[Record]:
    """Training of two calls in two phases from a fresh network."""
    torch.manual_seed(0)
    net = EDM(MLP(8, 1).build((1,), 0), VE())
    teacher = Gaussian(torch.zeros(1), torch.tensor([[0.25]]), VE())
    sampler, times = FewStep(2.5, 2, "ddim"), Uniform(0.1, 10.0)
    m = method(sampler=sampler, times=times, phase_steps=phase_steps)

    def source(draws: Draws) -> Batch:
        return Batch(draws.normal("z", (1,)), None, None, draws)

    ema = EMA(8.0, 1.0)
    return train(m, teacher, net, source, batch=8, steps=steps, optim=Optim(1e-2), ema=ema)


def test_a_finished_expert_is_its_average_and_stays() -> None:
    """Phase one moves the first expert alone; then it rests, and the fake score starts anew."""
    *_, control = trained(100, 4)  # whose first phase goes on
    average = values(experts(control.state.average)[0])
    assert average != values(experts(control.state.nets["student"])[0])
    for record in trained(4, 8):
        nets = record.state.nets
        first, second = experts(nets["student"])
        start = values(nets["start"])
        if record.step <= 4:
            assert values(second) == values(experts(control.state.nets["student"])[1])
        if record.step == 4:
            assert record.restarted == ("fake", "student")
            assert values(nets["fake"]) == start
        if record.step >= 4:
            assert values(first) == values(experts(record.state.average)[0]) == average
        if record.step > 4:
            assert values(second) != values(experts(control.state.nets["student"])[1])
            assert values(nets["fake"]) != start


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": FewStep(2.5, 4)}, r"PhasedDMD.sampler is a FewStep\(noise='ddim'\), got"),
        (
            {"sampler": FewStep(2.5, 3, "ddim")},
            "as many calls in every phase, got 2, 400 and 3 calls",
        ),
        ({"phases": 0}, "phases and phase_steps of 1 or more"),
        ({"phase_steps": 0}, "phases and phase_steps of 1 or more"),
        ({"ratio": 0}, "PhasedDMD.ratio is 1 or more, got 0"),
        ({"clip": 0.0}, "clip > 0"),
        ({"fake_rate": 0.0}, "fake_rate > 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhasedDMD(**changes)
