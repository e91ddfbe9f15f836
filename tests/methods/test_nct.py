"""NCT: where a linear student of a linear generator ends, and what lambda does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, WithInput
from fewstep.diffusion.types import Batch, Cond
from fewstep.distillation.method import Nets, Step
from fewstep.distillation.pictures import give_decoder
from fewstep.eval.picture_networks import Ink
from fewstep.losses.distance import PseudoHuber
from fewstep.methods.nct import NCT, Dual
from fewstep.nets.mlp import MLP
from fewstep.training.ema import EMA
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from tests.methods.test_rewarded import Slope
from tests.mixture import pretrained
from tests.quadrature import F64, Even, quantiles

SIZE, TAU = 0.5, 0.7


class Told(nn.Module):
    """The student u z + w c; with w = 0 a generator that is told nothing."""

    path = VE()

    def __init__(self, u: float, w: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor([u, w], dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Cond = None, c: Tensor | None = None) -> Tensor:
        u, w = self.values
        told = 0.0 if c is None else w * c[:, None]
        return u * xt / t[:, None] + told


@dataclass(frozen=True, eq=False)
class Three(Even):
    """Noises of the control and of the path, and all levels."""

    read: Tensor = torch.empty(0)
    level: Tensor = torch.empty(0)

    def normal(self, purpose: str, shape: Any, dtype: Any = torch.float32) -> Tensor:
        return (self.read if purpose == "control" else self.noise).reshape(-1, *shape)

    def integers(self, purpose: str, high: int) -> Tensor:
        assert int(self.level.max()) == high - 1
        return self.level


def rows(levels: int) -> Batch:
    """All of z, the control's noise, the path's and k, exact for products of two of them."""
    axes = *(quantiles(2),) * 3, torch.arange(levels, dtype=F64)
    z, read, eps, k = (x.reshape(-1, 1) for x in torch.meshgrid(*axes, indexing="ij"))
    draws = Three(torch.arange(len(z)), noise=eps, read=read, level=k[:, 0].long())
    return Batch(z, None, None, draws)


def scene(u: float, w: float, strength: float) -> tuple[Nets, Any]:
    generator: Any = Told(SIZE, 0.0)
    give_decoder(generator, lambda x: x[:, :, None, None])
    nets = Nets({"student": Told(u, w), "generator": generator, "dual": Dual(strength)})
    return nets, generator


def gradient(u: float, w: float, levels: int, strength: float, **more: Any) -> Tensor:
    """Of half the loss in (u, w)."""
    method = NCT(control=Slope(), blur=TAU, levels=levels, **more)
    nets, teacher = scene(u, w, strength)
    total = method.student_loss(nets, teacher, rows(levels)).total
    student: Any = nets["student"]
    assert total is not None
    (found,) = torch.autograd.grad(total / 2, [student.values])
    return found


def fixed(levels: int, strength: float) -> tuple[float, float]:
    """(u, w) where both gradients vanish: two linear equations of the moments of (z, c).

    In u: strength ((u - s) + w s) + u sum_k (1 - cos(theta_k - theta_{k-1})) = 0;
    in w: strength ((u - s) s + w (s^2 + tau^2)) - u s = 0, the levels' sum of cosines being -1.
    """
    rest = levels * (1 - math.cos(math.pi / 2 / levels))
    a = torch.tensor(
        [
            [strength + rest, strength * SIZE],
            [strength * SIZE - SIZE, strength * (SIZE**2 + TAU**2)],
        ],
        dtype=F64,
    )
    b = torch.tensor([strength * SIZE, strength * SIZE**2], dtype=F64)
    u, w = torch.linalg.solve(a, b).tolist()
    return u, w


@pytest.mark.parametrize(("levels", "strength"), [(1, 1.0), (8, 1.0), (32, 1.0), (32, 4.0)])
def test_the_linear_student_ends_where_derived(levels: int, strength: float) -> None:
    """No gradient to rounding; controls: another level, another lambda."""
    u, w = fixed(levels, strength)
    assert float(gradient(u, w, levels, strength).abs().max()) < 1e-12
    assert float(gradient(u, w, levels + 1, strength).abs().max()) > 1e-4
    assert float(gradient(u, w, levels, strength + 1).abs().max()) > 1e-2


def test_many_levels_have_the_posteriors_gain_and_too_small_a_spread() -> None:
    """The golden 0.338, and 0.331 for the posterior's 0.407."""
    for strength in (1.0, 4.0):
        gain = SIZE**2 / (SIZE**2 + strength * TAU**2)
        assert fixed(100_000, strength) == pytest.approx((SIZE * (1 - gain), gain), abs=1e-4)
    u, w = fixed(100_000, 1.0)
    assert (u, w) == pytest.approx((0.331, 0.338), abs=1e-3)
    assert SIZE * (1 - w) ** 0.5 == pytest.approx(0.407, abs=1e-3)


def test_without_the_constraint_a_constant_is_at_rest() -> None:
    assert float(gradient(0.0, 5.0, 8, 0.0).abs().max()) < 1e-12
    assert float(gradient(SIZE, 0.0, 8, 0.0).abs().max()) > 0.1


def test_the_terms_of_another_distance_by_hand() -> None:
    method, levels = NCT(control=Slope(), blur=TAU, levels=4, distance=PseudoHuber(0.1)), 4
    (u, w), at = (0.4, 0.2), rows(levels)
    nets, teacher = scene(u, w, 3.0)
    loss = method.student_loss(nets, teacher, at)
    draws = at.draws
    assert isinstance(draws, Three)
    c = SIZE * at.z + TAU * draws.read
    theta = [math.pi / 8 * (draws.level + i)[:, None].double() for i in (0, 1)]
    near, far = (u * (a.cos() * at.z + a.sin() * draws.noise) + w * c for a in theta)

    def mean(y: Tensor) -> Tensor:
        return ((y**2 + 0.1**2).sqrt() - 0.1).mean()

    consistency, boundary = 4 * mean(far - near), mean(u * at.z + w * c - SIZE * at.z)
    torch.testing.assert_close(loss.logs["consistency"].detach(), consistency)
    torch.testing.assert_close(loss.logs["boundary"].detach(), boundary)
    assert loss.total is not None
    torch.testing.assert_close(loss.total.detach(), consistency + 3 * boundary)
    torch.testing.assert_close(loss.sums["boundary"] / loss.sums["count"], boundary)
    assert int(loss.sums["count"]) == len(at.z)


def test_lambda_follows_the_constraint_and_is_never_negative() -> None:
    method = NCT(control=Ink(), bound=0.5, rate=0.1, strength=0.2)
    nets = method.init(None, Model(MLP(8, 1), (2,)).build())
    dual: Any = nets["dual"]

    def after(boundary: float) -> float:
        sums = {"boundary": torch.tensor(4 * boundary), "count": torch.tensor(4.0)}
        method.after_step(Step(nets, nets["student"], 0, 0, 1, sums))
        return float(dual.value)

    assert after(1.5) == pytest.approx(0.3)
    assert after(0.0) == pytest.approx(0.25)
    assert [after(-9.0), after(0.5), after(1.0)] == pytest.approx([0.0, 0.0, 0.05])
    method.after_step(Step(nets, nets["student"], 0, 0, 1, {}))
    assert dual.state_dict()["value"] == pytest.approx(0.05)
    assert method.frozen == {"generator"}
    assert NCT(control=Ink(), rate=0.0).frozen == {"generator", "dual"}


def test_the_student_starts_as_the_generator_and_is_told_c() -> None:
    model = Model(MLP(8, 1), (2,))
    net: Any = model.build(3)
    method = NCT(control=Ink())
    nets = method.init(None, net)
    student: Any = nets["student"]
    x, t = torch.ones(2, 2), torch.full((2,), 2.5)
    assert torch.equal(student(x, t, c=torch.tensor([1.0, -3.0])), net(x, t))
    assert method.result(model).inputs == ("c",)
    assert method.sampler == WithInput(FewStep(2.5), "c", 0.0)


def test_what_does_not_fit_is_refused() -> None:
    for sampler in (
        FewStep(2.5),
        WithInput(FewStep(2.5), "w", 0.0),
        WithInput(FewStep(2.5, 2), "c", 0.0),
    ):
        with pytest.raises(ValueError, match=r"^NCT.sampler is of one call and says c, as WithIn"):
            NCT(sampler, control=Ink())
    for wrong in ({"blur": -1.0}, {"bound": -1.0}, {"rate": -1.0}, {"strength": -1.0}):
        with pytest.raises(ValueError, match=r"^NCT needs blur, strength, bound and rate of 0 or"):
            NCT(control=Ink(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"and levels >= 1; got 0, 1, 0, 0.01 and 0$"):
        NCT(control=Ink(), levels=0)


@pytest.mark.slow
def test_samples_have_the_control_that_they_are_told() -> None:
    """Through the loop: the mean of both numbers follows c, which the start does not hear."""
    teacher: Any = pretrained()
    give_decoder(teacher, lambda x: x[:, None, None])
    method = NCT(control=Slope(), levels=16, rate=0.0)
    settings: Any = {"batch": 256, "ema": EMA(4000), "steps": 150, "optim": Optim(2e-3)}

    def off(net: Any) -> float:
        draws, ends = Draws.range(10**9, 500, seed=1), (-0.05, 0.05)
        made = [
            WithInput(FewStep(2.5), "c", c)(net, draws.normal("z", (2,)), None, draws).mean()
            for c in ends
        ]
        return float((made[1] - made[0]).detach() / (ends[1] - ends[0]))

    *_, last = train(method, teacher, pretrained(), Latents((2,)), **settings)
    assert off(last.state.average) == pytest.approx(1, abs=0.3)
