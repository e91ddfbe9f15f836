"""Progressive distillation on a Gaussian: the student is the product of its teacher's steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, JumpBack, WithInput
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Nets
from fewstep.distillation.stages import Stage
from fewstep.methods.progressive import ProgressiveDistillation
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import Gaussian
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.networks import stirred
from tests.quadrature import F64

STARTS: dict[str, tuple[NoisePath, FewStep]] = {
    "ve": (VE(), FewStep(2.5, noise="ddim", rho=2.0)),
    "flow": (Flow(), FewStep(1.0, noise="ddim")),
    "trig": (TrigFlow(), FewStep(1.5, noise="ddim", rho=1.3)),
    "vp": (VP(), FewStep(999.0, noise="ddim")),
}


class Gains(nn.Module):
    """g = c(t) x_t with a free number c for each time it was told of: an exact student."""

    def __init__(self, path: NoisePath) -> None:
        super().__init__()
        self.path, self.table = path, dict[float, float]()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        times = t.expand(len(xt)).tolist()
        return xt * torch.tensor([self.table[time] for time in times], dtype=F64)[:, None]


def gaussian(path: NoisePath) -> Gaussian:
    return Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[0.25]], dtype=F64), path)


def distilled(m: ProgressiveDistillation, path: NoisePath, wrong: bool = False) -> float:
    """The factor of the one-step student, each stage fitted exactly to its targets."""
    target = Gains(path)
    for stage in range(m.stages):
        nets = Nets({"student": Gains(path), "target": target, "stage": Stage()})
        draws = Draws.range(0, 400)
        x0 = draws.normal("x0", (1,), F64)
        xt, t, g = m.target(stage, nets, gaussian(path), x0, None, draws)
        if wrong:  # the second step's prediction in every interval
            net: Any = target if stage else gaussian(path)
            sampler = m.stage_sampler(stage)
            fine = x0.new_tensor(
                FewStep(sampler.t_init, 2 * sampler.steps, "ddim", sampler.rho).ladder(path)
            )
            middle = fine[1 + torch.cdist(fine[:, None], t[:, None]).argmin(0)]
            g = net(path.ddim(xt, net(xt, t), t, middle), middle)
        target = Gains(path)
        target.table = dict(zip(t.tolist(), (g / xt)[:, 0].tolist(), strict=True))
        assert len(target.table) == m.stage_sampler(stage).steps
    (factor,) = target.table.values()
    start = m.sampler.t_init  # type: ignore[attr-defined]
    return factor * float(path.sigma(torch.tensor(start, dtype=F64)))


def product(path: NoisePath, sampler: FewStep, steps: int) -> float:
    """The teacher's own factor after `steps` deterministic steps."""
    fine = FewStep(sampler.t_init, steps, "ddim", sampler.rho)
    return float(fine(gaussian(path), torch.ones(1, 1, dtype=F64)))


@pytest.mark.parametrize("name", STARTS)
def test_one_step_is_all_of_the_teachers_steps(name: str) -> None:
    path, sampler = STARTS[name]
    m = ProgressiveDistillation(sampler, start=8)
    expected = product(path, sampler, 16)
    assert distilled(m, path) == pytest.approx(expected, rel=1e-11)
    assert abs(distilled(m, path, wrong=True) / expected - 1) > 1e-2
    assert abs(product(path, sampler, 8) / expected - 1) > 1e-3  # a stage left out


MODEL = Model(MLP(16, 1), (1,))


def steps_of(m: ProgressiveDistillation, count: int) -> Any:
    settings: Any = {"batch": 16, "optim": Optim(1e-2, (0.9, 0.99)), "ema": EMA(0.0)}
    return train(m, gaussian(VE()), MODEL.build(), normal, steps=count, **settings)


def normal(draws: Draws) -> Batch:
    """Normal data of one dimension."""
    return Batch(draws.normal("z", (1,)), None, 0.5 * draws.normal("x0", (1,)), draws)


def test_stages_through_the_loop() -> None:
    """At the end of a stage the target becomes the student, optimiser and rate begin anew."""
    m = ProgressiveDistillation(start=4, stage_steps=3)
    rates, stages, ages, products = [], [], [], []
    for record in steps_of(m, m.length):
        state = record.state
        rates.append(record.logs["student/lr"])
        stages.append(int(state.nets["stage"].number))
        products.append(m.product(state.nets, state.average, None).sampler.calls)
        optimizer = state.optimizers.get("student")
        ages.append(0 if optimizer is None else int(next(iter(optimizer.state.values()))["step"]))
        same = all(
            torch.equal(a, b)
            for a, b in zip(
                state.nets["target"].parameters(), state.nets["student"].parameters(), strict=True
            )
        )
        assert same == (record.restarted == ("student",))
    assert stages == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert products == [4, 4, 4, 2, 2, 2, 1, 1, 1]
    assert ages == [1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert rates == pytest.approx([1e-2 * r / 3 for r in (3, 2, 1) * 3])


def test_a_stage_learns_from_the_student_before_it() -> None:
    """Not from the run's teacher: another target gives another gradient."""
    m = ProgressiveDistillation(start=2, stage_steps=1)
    nets = m.init(gaussian(VE()), MODEL.build(3).double())
    draws = Draws.range(0, 8)
    x0 = draws.normal("x0", (1,), F64)
    *_, before = m.target(1, nets, gaussian(VE()), x0, None, draws)
    nets["target"].load_state_dict(MODEL.build(4).double().state_dict())
    stirred(nets["target"], 3)
    *_, after = m.target(1, nets, gaussian(VE()), x0, None, draws)
    *_, first = m.target(0, nets, gaussian(VE()), x0, None, draws)
    assert (before - after).abs().max() > 1e-3
    assert (before - first).abs().max() > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProgressiveDistillation(start=6),
        lambda: ProgressiveDistillation(FewStep(2.5, 4, "ddim"), start=2),
        lambda: ProgressiveDistillation(FewStep(2.5)),
        lambda: ProgressiveDistillation(Heun()),
        lambda: ProgressiveDistillation(stage_steps=0),
        lambda: ProgressiveDistillation(JumpBack(2.5, 3), start=2),
        lambda: ProgressiveDistillation(scales=(3.0, 1.0)),
        lambda: ProgressiveDistillation(scales=(2.0, 3.0)),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"ProgressiveDistillation\.(start|sampler|scales) is"):
        make()


class ToldGains(nn.Module):
    """g = c(t, w) x_t with a free number for each time and scale it was told of."""

    input_names = ("w",)

    def __init__(self, path: NoisePath) -> None:
        super().__init__()
        self.path, self.table = path, dict[tuple[float, float], float]()

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, *, w: Tensor) -> Tensor:
        keys = zip(t.expand(len(xt)).tolist(), w.expand(len(xt)).tolist(), strict=True)
        return xt * torch.tensor([self.table[key] for key in keys], dtype=F64)[:, None]


class TwoClasses(nn.Module):
    """N(0, 1/4) with its label 0, N(0, 1) without one, told nothing: x_0-predictions c x_t."""

    def __init__(self, path: NoisePath) -> None:
        super().__init__()
        self.path = path

    def gain(self, t: Tensor, variance: float) -> Tensor:
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return (alpha * variance / (alpha**2 * variance + sigma**2))[:, None]

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt * self.gain(t.expand(len(xt)), 1.0 if cond is None else 0.25)


class AtScale(TwoClasses):
    """The same after stage one: one network that is told w."""

    input_names = ("w",)

    def forward(
        self, xt: Tensor, t: Tensor, cond: Any = None, *, w: Tensor | None = None
    ) -> Tensor:
        assert w is not None
        t = t.expand(len(xt))
        free, own = self.gain(t, 1.0), self.gain(t, 0.25)
        return xt * (free + (1 + w)[:, None] * (own - free))


@pytest.mark.parametrize("teacher", [TwoClasses, AtScale])
@pytest.mark.parametrize("name", STARTS)
def test_the_students_of_all_scales_are_the_guided_teachers_steps(name: str, teacher: Any) -> None:
    """One step is the product of 8 at each w; w read as kappa is another."""
    path, sampler = STARTS[name]
    m = ProgressiveDistillation(sampler, start=4, scales=(1.0, 3.0))
    target = ToldGains(path)
    draws, cond = Draws.range(0, 600), torch.zeros(600, dtype=torch.int64)
    x0 = draws.normal("x0", (1,), F64)
    w = m.scale(draws).double().mul(2).round() / 2  # a few scales, each met at every time
    rounded: Any = ProgressiveDistillation(sampler, start=4, scales=(1.0, 3.0))
    object.__setattr__(rounded, "scale", lambda draws: w)
    for stage in range(m.stages):
        nets = Nets({"student": ToldGains(path), "target": target, "stage": Stage()})
        xt, t, g = rounded.target(stage, nets, teacher(path), x0, cond, draws)
        target = ToldGains(path)
        keys = zip(t.tolist(), (w - 1).tolist(), strict=True)
        target.table = dict(zip(keys, (g / xt)[:, 0].tolist(), strict=True))
    fine = FewStep(sampler.t_init, 8, "ddim", sampler.rho)
    z, label = torch.ones(1, 1, dtype=F64), torch.zeros(1, dtype=torch.int64)
    start = torch.tensor(sampler.t_init, dtype=F64)
    for (_, told), gain in target.table.items():
        made = gain * float(path.sigma(start))
        for kappa, right in ((1 + told, True), (told, False)):
            expected = float(CFG(fine, kappa)(TwoClasses(path), z, label))
            assert (abs(made / expected - 1) < 1e-10) == right


def test_the_student_is_told_what_its_target_was_made_for() -> None:
    """The loss is zero for a student that knows w, and only at the same w."""
    path, sampler = STARTS["flow"]
    m = ProgressiveDistillation(sampler, start=1, scales=(1.0, 3.0))
    draws, cond = Draws.range(0, 20), torch.zeros(20, dtype=torch.int64)
    x0 = draws.normal("x0", (1,), F64)
    nets = m.init(TwoClasses(path), Model(MLP(8, 1), (1,), 2, path, "velocity").build())
    assert nets["student"].input_names == ("w",)
    xt, t, g = m.target(0, nets, TwoClasses(path), x0, cond, draws)
    student = ToldGains(path)
    told = (m.scale(draws).double() - 1).tolist()
    student.table = dict(
        zip(zip(t.tolist(), told, strict=True), (g / xt)[:, 0].tolist(), strict=True)
    )
    batch = Batch(x0, cond, x0, draws)
    total = m.student_loss(0, Nets({"student": student}), TwoClasses(path), batch).total
    assert total is not None
    assert float(total) < 1e-20
    assert m.product(nets, nets["student"], None).sampler == WithInput(sampler, "w", 0.0)
    assert m.result(Model(MLP(8, 1), (1,))).inputs == ("w",)


@pytest.mark.parametrize("name", STARTS)
def test_steps_of_twice_the_length_from_all_times(name: str) -> None:
    """The last stage of `JumpBack`: two of the teacher's steps from each of the N times."""
    path, sampler = STARTS[name]
    m = ProgressiveDistillation(JumpBack(sampler.t_init, 4, sampler.rho), start=2)
    assert (m.stages, m.final) == (1, 2)
    draws = Draws.range(0, 200)
    x0 = draws.normal("x0", (1,), F64)
    nets = Nets({"student": Gains(path), "target": Gains(path), "stage": Stage()})
    xt, t, g = m.target(0, nets, gaussian(path), x0, None, draws)
    ladder = x0.new_tensor([*m.sampler.ladder(path), 0.0])  # type: ignore[attr-defined]
    assert sorted(set(t.tolist()), reverse=True) == ladder[:-1].tolist()
    for i in range(4):
        here, exact = t == ladder[i], gaussian(path)
        x, f = xt[here], exact(xt[here], ladder[i])
        if i < 3:
            x = path.ddim(x, f, ladder[i], ladder[i + 1])
            f = exact(x, ladder[i + 1])
        if i < 2:
            x = path.ddim(x, f, ladder[i + 1], ladder[i + 2])
            landed = path.ddim(xt[here], g[here], ladder[i], ladder[i + 2])
            torch.testing.assert_close(landed, x, rtol=1e-9, atol=1e-9)
        else:
            torch.testing.assert_close(g[here], f, rtol=1e-9, atol=1e-9)
    early = ProgressiveDistillation(JumpBack(sampler.t_init, 4, sampler.rho), start=4)
    assert len(set(early.target(0, nets, gaussian(path), x0, None, draws)[1].tolist())) == 4
    stage: Any = nets["stage"]
    assert early.product(nets, nets["student"], None).sampler.calls == 4
    assert isinstance(early.product(nets, nets["student"], None).sampler, FewStep)
    stage.number.fill_(1)
    assert early.product(nets, nets["student"], None).sampler == early.sampler
