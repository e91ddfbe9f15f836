"""SDXL-Lightning: the pair discriminator on linear maps, the teacher's landings, the stages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.method import Nets, Step
from fewstep.methods.lightning import Lightning
from tests import instances
from tests.exact_judges import Joint
from tests.mixture import MODEL
from tests.quadrature import F64, batch

K, SIGMA, W = 0.6, 2.0, 0.3
"""The teacher lands at 0.6 x_t, x_t has variance 4, and landings get noise of variance 0.3."""


class Linear(nn.Module):
    """The denoiser k x_t."""

    def __init__(self, k: float, path: NoisePath = VE()) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=F64))
        self.path = path

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.k * xt


def one_step(paired: bool = True) -> Lightning:
    judge = Discriminator(Discrete((W**0.5,)), "own", joint=True)
    return Lightning(
        FewStep(SIGMA, noise="ddim"),
        2,
        (1,),
        regressed=0,
        judge=judge,
        times=1,
        conditional=paired,
        squared=0.0,
    )


def optimum(c: float) -> Any:
    """log q / p of y = k x_t + noise against c x_t + noise, given x_t or not."""

    def logit(y: Tensor, xt: Tensor | None) -> Tensor:
        if xt is not None:
            return ((y - c * xt) ** 2 - (y - K * xt) ** 2) / (2 * W)
        v, u = K**2 * SIGMA**2 + W, c**2 * SIGMA**2 + W
        return y**2 / (2 * u) - y**2 / (2 * v) + math.log(u / v) / 2

    return logit


def gradient(c: float, paired: bool) -> float:
    """d/dc of the student's loss at the optimal discriminator."""
    student, m = Linear(c), one_step(paired)
    nets = Nets({"student": student, "discriminator": Joint(optimum(c))})
    at = batch(300)
    at = at._replace(x0=torch.zeros_like(at.z))
    (_, turn) = m.turns(0)
    total = turn.loss(nets, teacher(), at).total
    assert total is not None
    return float(torch.autograd.grad(total, student.k)[0])


def teacher() -> Any:
    """The denoiser k x whose two steps, 2 -> 1 -> 0, make (1 + k) / 2 k = K of x_t."""
    return Linear((math.sqrt(1 + 8 * K) - 1) / 2)


def test_pairs_tell_the_map_and_marginals_do_not() -> None:
    """Zero at the teacher's map; at its mirror image only without x_t. Golden: -15.7."""
    assert abs(gradient(K, True)) < 1e-12
    assert abs(gradient(K, False)) < 1e-12
    assert abs(gradient(-K, False)) < 1e-12
    assert gradient(-K, True) == pytest.approx(-15.7, abs=0.1)
    assert gradient(0.5, True) < -0.1
    assert gradient(0.7, True) > 0.1


def test_the_discriminator_rests_at_the_ratio_of_joint_laws() -> None:
    """And not where teacher and student are swapped, nor without x_t where that matters."""
    for c, swapped in ((0.2, False), (0.2, True)):
        nets = Nets({"student": Linear(c), "discriminator": Joint(optimum(c))})
        judge: Any = nets["discriminator"]
        if swapped:
            right = judge.logit
            judge.logit = lambda y, xt, f=right: -f(y, xt)
        at = batch(400)
        at = at._replace(x0=torch.zeros_like(at.z))
        total = one_step().turns(0)[0].loss(nets, teacher(), at).total
        assert total is not None
        slope = float(torch.autograd.grad(total, judge.scale)[0])
        assert slope > 0.5 if swapped else abs(slope) < 2e-3


@pytest.mark.parametrize("path", [VE(), Flow(), VP()], ids=lambda path: type(path).__name__)
def test_landings_are_the_teachers_states(path: NoisePath) -> None:
    """From the times of the stage, whose first input is pure noise, through its own steps."""
    start = {"VE": 2.5, "Flow": 1.0, "VP": 999.0}[type(path).__name__]
    ddim = FewStep(start, 2, "ddim")
    m = Lightning(ddim, 8, (4, 2), regressed=2, skip=0, times=4)
    net: Any = instances.TEACHERS["mixture"](path)
    draws = Draws.range(0, 60)
    z, x0 = draws.normal("z", (2,), F64), draws.normal("x0", (2,), F64)
    for stage, (teacher, target) in ((0, (net, None)), (1, (None, net))):
        nets = Nets({"student": nn.Identity()})
        if target is not None:
            nets["target"] = target
        found = m.jump(stage, nets, teacher or Linear(0.0, path), Batch(z, None, x0, draws))
        fine = 8 if stage == 0 else 4
        ladder = [*replace(ddim, steps=fine).ladder(path), path.t_min]
        stride = 2
        for i, t in enumerate(found.t.tolist()):
            start_at = ladder.index(pytest.approx(t))
            end = (start_at // stride + 1) * stride
            x = found.xt[i : i + 1]
            if start_at == 0:
                pure = path.sigma(torch.tensor(t, dtype=F64)) * z[i]
                torch.testing.assert_close(x[0], pure)
            else:
                level = torch.tensor(t, dtype=F64)
                noised = path.alpha(level) * x0[i] + path.sigma(level) * z[i]
                torch.testing.assert_close(x[0], noised)
            for at, to in zip(range(start_at, end), range(start_at + 1, end + 1), strict=True):
                now, then = (torch.tensor([ladder[j]], dtype=F64) for j in (at, to))
                prediction = net(x, now)
                x = prediction if to == fine else path.ddim(x, prediction, now, then)
            torch.testing.assert_close(found.xs[i : i + 1], x)
            assert bool(found.last[i]) == (end == fine)
            assert float(found.s[i]) == pytest.approx(ladder[end])
        assert len(set(found.t.tolist())) == 4


def test_only_landings_on_data_get_noise() -> None:
    m = Lightning(FewStep(2.0, 2, "ddim"), 4, (2,), times=2)
    draws = Draws.range(0, 40)
    z = draws.normal("z", (2,), F64)
    net: Any = instances.TEACHERS["mixture"](VE())
    jump = m.jump(0, Nets({}), net, Batch(z, None, z, draws))
    n = m.seen(VE(), jump.xs, jump, Batch(z, None, z, draws))
    assert 0 < int(jump.last.sum()) < 40
    assert torch.equal(n.xt[~jump.last], jump.xs[~jump.last])
    assert set(n.t[~jump.last].tolist()) == {1.0}
    assert {round(t, 6) for t in n.t[jump.last].tolist()} <= {0.1, 0.7, 1.6, 4.1}
    noise = (n.xt - jump.xs)[jump.last] / n.t[jump.last][:, None]
    assert float(noise.std()) == pytest.approx(1, abs=0.25)


def test_squared_errors_of_the_first_stage() -> None:
    """Zero for a student that is the one step of its teacher, by hand for another."""
    m = replace(one_step(), regressed=1)
    at = batch(100)
    at = at._replace(x0=torch.zeros_like(at.z))
    for c in (K, 0.4):
        nets = Nets({"student": Linear(c)})
        total = m.turns(0)[0].loss(nets, teacher(), at).total
        assert total is not None
        expected = (c - K) ** 2 * SIGMA**2
        assert float(total.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-12)


class Fading(nn.Module):
    """The denoiser x_t / (1 + t)."""

    path = VE()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt / (1 + t[:, None])


def test_a_student_is_asked_at_the_time_that_it_leaves_from() -> None:
    """And lands by one step of DDIM, or on its prediction where the landing is on data."""
    m = Lightning(FewStep(2.0, 2, "ddim"), 4, (2,), times=2)
    draws = Draws.range(0, 40)
    z = draws.normal("z", (2,), F64)
    at = m.jump(0, Nets({}), Fading(), Batch(z, None, z, draws))
    prediction = at.xt / (1 + at.t[:, None])
    share = (at.s / at.t)[:, None]
    by_hand = torch.where(at.last[:, None], prediction, prediction + share * (at.xt - prediction))
    found = m.predicted(Nets({"student": Fading()}), at, None)
    torch.testing.assert_close(found, by_hand)


def test_who_teaches_whom() -> None:
    """Students of two steps and one learn from the stage before the last; the others in turn."""
    m = Lightning()
    early = replace(m, sampler=FewStep(2.5, 2, "ddim"), stages=(4, 2))
    assert [early.origin(stage) for stage in range(2)] == [-1, -1]  # before the last: the run's
    assert [m.origin(stage) for stage in range(4)] == [-1, 0, 0, 1]
    assert [m.grid(stage) for stage in range(4)] == [(8, 8, 32), (4, 4, 8), (2, 4, 8), (1, 4, 4)]
    short = replace(m, stage_steps=2)
    net: Any = MODEL.build()
    nets = short.init(None, net)
    assert set(nets) == {"student", "discriminator", "target", "before", "stage"}
    fresh = {name: p.clone() for name, p in nets["discriminator"].state_dict().items()}
    seen = []
    for step in range(short.length):
        for name in ("student", "discriminator"):
            for p in nets[name].parameters():
                p.data.fill_(step + 1.0)
        done = Step(nets, net, step, 0, 1, {})
        short.after_step(done)
        one = [float(next(nets[name].parameters()).flatten()[0].detach()) for name in NAMES]
        product = short.product(nets, net, None).sampler
        seen.append((*one[:2], product.calls, done.restarted))
        if step % 2 and step < 7:  # made anew from the student, with a new head
            judge: Any = nets["discriminator"]
            assert all(bool((p == step + 1).all()) for p in judge.net.parameters())
            assert torch.equal(judge.head.layers[0].weight, fresh["head.layers.0.weight"])
    start = float(next(net.parameters()).flatten()[0].detach())
    both = ["student", "discriminator"]
    assert seen == [
        *((start, start, 8, []), (2.0, start, 8, both)),
        *((2.0, start, 4, []), (4.0, 2.0, 4, both)),
        *((4.0, 2.0, 2, []), (6.0, 4.0, 2, both)),
        *((6.0, 4.0, 1, []), (6.0, 4.0, 1, [])),
    ]


NAMES = ("target", "before", "student")


def test_a_stage_begins_with_pairs_and_ends_without() -> None:
    m = Lightning(stage_steps=10, conditional=0.3, squared=0.0)
    assert m.length == 40
    assert [turn.net for turn in m.turns(9)] == ["student"]
    for step, stage, paired in ((10, 1, True), (12, 1, True), (13, 1, False), (39, 3, False)):
        turns = m.turns(step)
        assert [turn.net for turn in turns] == ["discriminator", "student"]
        assert all(turn.loss.args == (stage, paired) for turn in turns)  # type: ignore[attr-defined]
        assert [turn.rate for turn in turns] == [1.0, 0.1]


def test_the_student_is_regressed_while_its_judge_learns() -> None:
    """At first in a stage; `conditional` is a part of the rest."""
    m = Lightning(stage_steps=10, conditional=0.4, squared=0.5, rate=0.2)
    for step, net, paired in ((10, False, True), (14, False, True), (15, True, True)):
        judge, student = m.turns(step)
        fooling: Any = student.loss
        assert judge.loss.args == (1, paired)  # type: ignore[attr-defined]
        assert fooling.func == (m.student_loss if net else m.regression_loss)
        assert fooling.args == ((1, paired) if net else (1,))
        assert student.rate == (0.2 if net else 1.0)
    assert [m.turns(step)[1].loss.args[1] for step in (16, 17, 19)] == [True, False, False]  # type: ignore[attr-defined]


def test_the_student_hears_of_pairs_as_its_judge_does() -> None:
    """In the unconditional part neither side tells of x_t."""
    heard: list[bool] = []

    def logit(y: Tensor, xt: Tensor | None) -> Tensor:
        heard.append(xt is not None)
        return y

    nets = Nets({"student": Linear(K), "discriminator": Joint(logit)})
    at = batch(5)
    at = at._replace(x0=torch.zeros_like(at.z))
    for paired in (True, False):
        for turn in one_step(paired).turns(0):
            turn.loss(nets, teacher(), at)
        assert heard == [paired] * 3
        heard.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": FewStep(2.5)}, r"Lightning.sampler is a FewStep\(t_init, steps, 'ddim', rho"),
        ({"stages": (8, 3, 1)}, r"Lightning.stages are numbers of steps, each of which divides"),
        ({"stages": (8, 4)}, r"to the sampler's 1; got \(32, 8, 4\)"),
        ({"conditional": 2.0}, r"conditional in \[0, 1\], got 450, 1 and 2"),
        ({"squared": 1.0}, r"squared in \[0, 1\) and a rate above 0, got 1 and 0.1"),
        ({"rate": 0.0}, r"squared in \[0, 1\) and a rate above 0, got 0.5 and 0"),
        ({"judge": Discriminator(features="own")}, r"Lightning.judge is Discriminator\(features="),
        (
            {"judge": replace(Lightning().judge, mismatch=0.5)},
            r"has times, and neither augment nor mismatch; got Disc",
        ),
        ({"times": 3}, r"Lightning.times between 2 steps of a student and 8 of its teacher are 3"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Lightning(), **change)
