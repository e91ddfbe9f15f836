"""Guidance distillation: the mixture of two predictions for every scale, and how it is sampled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import CFG, guided
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, WithInput
from fewstep.diffusion.time_distributions import Karras, LogNormal
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import add_noise
from fewstep.distillation.method import Nets
from fewstep.losses.weight import Power
from fewstep.methods.guidance_distillation import GuidanceDistillation
from fewstep.nets.mlp import MLP
from tests.quadrature import F64


class Two(nn.Module):
    """A teacher of one dimension with two denoisers: x / (1 + t^2) alone, 0.6 x + 0.3 with c."""

    path = VE()

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.calls += 1
        free = xt / (1 + t.reshape(-1, 1) ** 2)
        return free if cond is None else 0.6 * xt + 0.3


class Mixed(nn.Module):
    """(1 + w) f_c - w f_0, told w; `shift` is what it adds to w."""

    path = VE()

    def __init__(self, teacher: Any, shift: float = 0.0) -> None:
        super().__init__()
        self.teacher, self.shift = [teacher], shift

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None, *, w: Tensor) -> Tensor:
        self.told = w
        w = w.reshape(-1, 1) + self.shift
        f: Any = self.teacher[0]
        out: Tensor = (1 + w) * f(xt, t, cond) - w * f(xt, t, None)
        return out


def batch(count: int = 200) -> Batch:
    draws = Draws.range(0, count)
    x0 = 0.5 * draws.normal("data", (1,), F64)
    return Batch(x0, torch.zeros(count, dtype=torch.int64), x0, draws)


def total(student: nn.Module, m: GuidanceDistillation) -> float:
    found = m.student_loss(Nets({"student": student}), Two(), batch()).total
    assert found is not None
    return found.item()


def test_the_mixture_is_the_zero_of_the_loss_for_every_scale() -> None:
    m = GuidanceDistillation()
    assert total(Mixed(Two()), m) < 1e-10
    assert total(Mixed(Two(), shift=1.0), m) > 0.01  # kappa taken for w
    assert total(Mixed(Two(), shift=-1.0), m) > 0.01
    student = Mixed(Two())
    total(student, m)
    assert 0.0 <= float(student.told.min()) < 0.2  # w, not kappa
    assert 3.8 < float(student.told.max()) <= 4.0
    kappa = m.scale(batch())
    assert 1.0 <= float(kappa.min()) < 1.2
    assert 4.8 < float(kappa.max()) <= 5.0


def test_least_squares_find_both_denoisers() -> None:
    """At one noise level, in the features x, 1, w x, w: exact coefficients, whatever is drawn."""
    m = GuidanceDistillation(times=Karras(1.999, 2.001), weight=Power())
    given, teacher = batch(), Two()
    n = add_noise(VE(), given.z, m.times, given)
    n = n._replace(t=torch.full_like(n.t, 2.0))
    w = m.scale(given).to(F64) - 1
    target = m.target(teacher, n, given, w)
    x, w = n.xt, w[:, None]
    features = torch.cat([x, torch.ones_like(x), w * x, w], 1)
    found = torch.linalg.lstsq(features, target).solution[:, 0].tolist()
    assert found == pytest.approx([0.6, 0.3, 0.6 - 0.2, 0.3], abs=1e-9)


def test_the_weight_is_the_larger_of_two_losses() -> None:
    """max(1, SNR), at the noise levels that were drawn: a constant error by hand."""

    class Off(Mixed):
        def forward(self, *args: Any, **named: Any) -> Tensor:
            return super().forward(*args, **named) + 0.1

    m, given = GuidanceDistillation(), batch()
    n = add_noise(VE(), given.z, m.times, given)
    expected = (n.sigma**-2).clamp(min=1).mean() * 0.01
    assert total(Off(Two()), m) == pytest.approx(expected.item(), rel=1e-6)


def test_a_sample_at_scale_w_is_the_guided_teachers_at_half_the_calls() -> None:
    teacher, given = Two(), batch(5)
    m = GuidanceDistillation(Heun(steps=4), kappa=3.0)
    net, sampler = m.product(Nets(), Mixed(teacher), teacher)
    expected = CFG(Heun(steps=4), 3.0)(teacher, given.z, given.cond)
    denoiser: Any = net
    found = sampler(denoiser, given.z, given.cond)
    torch.testing.assert_close(found, expected)
    assert sampler == WithInput(Heun(steps=4), "w", 2.0)
    assert 2 * sampler.calls == CFG(Heun(steps=4), 3.0).calls
    other = replace(sampler, value=3.0)(denoiser, given.z, given.cond)
    assert (other - expected).abs().max() > 0.05


def test_with_inputs_is_as_trainable_as_its_sampler() -> None:
    assert WithInput(FewStep(2.5, 2), "w", 1.0).trainable
    assert not WithInput(Heun(), "w", 1.0).trainable
    with pytest.raises(ValueError, match=r"WithInput.value is a finite number, got nan"):
        WithInput(Heun(), "w", float("nan"))


def test_the_student_starts_as_the_teacher() -> None:
    """Whatever w is; and its description says what was added, once."""
    model = Model(MLP(16, 1), (2,), 3)
    net: Any = model.build(1)
    m = GuidanceDistillation()
    student: Any = m.init(net, net)["student"]
    draws = Draws.range(0, 4)
    x, t, cond = draws.normal("x", (2,)), draws.uniform("t"), draws.integers("label", 3)
    assert torch.equal(student(x, t, cond, w=4 * t), net(x, t, cond))
    assert m.result(model) == replace(model, inputs=("w",))
    assert m.result(m.result(model)) == m.result(model)
    assert m.init(net, student)["student"].input_names == ("w",)


def test_the_targets_have_no_graph_and_the_teachers_scale_is_one_above_w() -> None:
    net: Any = Model(MLP(16, 1), (2,), 3).build(1)
    draws = Draws.range(0, 6)
    x0 = draws.normal("x", (2,))
    given = Batch(x0, draws.integers("label", 3), x0, draws)
    m = GuidanceDistillation(times=LogNormal())
    n = add_noise(net.path, x0, m.times, given)
    target = m.target(net, n, given, torch.full((6,), 1.5))
    assert not target.requires_grad
    torch.testing.assert_close(
        target, guided(net, n.xt, n.t, given.cond, [2.5]).predictions[0].detach()
    )


@pytest.mark.parametrize("settings", [{"scales": (3.0, 1.0)}, {"kappa": 6.0}])
def test_settings_that_mean_nothing_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match="is a range"):
        GuidanceDistillation(**settings)


def test_a_teacher_without_conditions_is_refused() -> None:
    m = GuidanceDistillation()
    with pytest.raises(ValueError, match="guidance needs conditions"):
        m.student_loss(Nets({"student": Mixed(Two())}), Two(), batch()._replace(cond=None))
