"""SwD on pictures of 4x4, with networks of one number: calls, direction and patches by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.scale_wise import ScaleWise, enlarged, reduced
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.method import Nets
from fewstep.losses.mmd import rbf_mmd, tokens
from fewstep.losses.weight import Power
from fewstep.methods.swd import Call, SwD

F64 = torch.float64
DRAWS = Draws.range(0, 6)
X0, Z = (DRAWS.normal(name, (1, 4, 4), F64) for name in ("x0", "z"))
BATCH = Batch(Z, None, X0 + 0.3, DRAWS)
T = (2.5, 1.0)


class Slope(nn.Module):
    """c x_t, whose encoder gives 3 x_t and its square."""

    path = VE()

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.c * xt

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return torch.cat([3 * xt, xt**2], 1)

    def forward_with_features(
        self, xt: Tensor, t: Tensor, cond: Any = None
    ) -> tuple[Tensor, Tensor]:
        return self(xt, t), self.encode(xt, t)


def method(**more: Any) -> SwD:
    plain = {"weight": Power(), "ratio": 1, "times": Discrete((0.5,)), **more}
    return SwD(ScaleWise(T, (2, 1)), **plain)  # type: ignore[arg-type]


def nets(student: float = 0.6, fake: float = 0.2) -> Nets:
    return Nets({"student": Slope(student), "fake": Slope(fake)})


def inputs() -> tuple[Tensor, Tensor]:
    """What both calls are given in training."""
    assert BATCH.x0 is not None
    return T[0] * 2 * reduced(Z, 2), enlarged(reduced(BATCH.x0, 2), 2) + T[1] * Z


def test_the_inputs_of_both_calls() -> None:
    for k, xt in enumerate(inputs()):
        found = Call(method(), k + 1)(nets(), BATCH)
        torch.testing.assert_close(found, 0.6 * xt)
    assert Call(method(), 1)(nets(), BATCH).shape == (6, 1, 2, 2)


def test_the_calls_are_trained_in_turn() -> None:
    m = method(ratio=2)
    for step in range(4):
        turns = m.turns(step)
        assert [turn.net for turn in turns] == ["fake", "fake", "student"]
        assert turns[-1].loss.args[0].k == 1 + step % 2  # type: ignore[attr-defined]
        assert turns[0].loss.args[0].k == 1 + step % 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("k", [1, 2])
def test_the_direction_is_that_of_kl_at_the_size_of_the_call(k: int) -> None:
    """d/dc of the mean of c x_in (f_psi - f_phi)(c x_in + eps / 2)."""
    m, own = method(mmd=0.0), nets()
    loss = m.student_loss(Call(m, k), own, Slope(0.5), BATCH).total
    xin = inputs()[k - 1]
    eps = DRAWS.normal("eps", xin.shape[1:]).double()
    by_hand = ((0.2 - 0.5) * (0.6 * xin + 0.5 * eps) * xin).mean()
    assert loss is not None
    (found,) = torch.autograd.grad(loss, own["student"].parameters())
    assert float(found) == pytest.approx(float(by_hand), rel=1e-9)


@pytest.mark.parametrize("k", [1, 2])
def test_the_fake_score_learns_at_the_size_of_the_call(k: int) -> None:
    m = method(fake=FakeScore(Discrete((0.5,)), Power()))
    xin = inputs()[k - 1]
    found = m.turns(k - 1)[0].loss(nets(), Slope(0.5), BATCH).total
    eps = DRAWS.normal("eps", xin.shape[1:]).double()
    x = 0.6 * xin
    by_hand = ((0.2 * (x + 0.5 * eps) - x) ** 2).mean()
    assert float(found) == pytest.approx(float(by_hand), rel=1e-9)


def patches(xin: Tensor, c: float, k: int) -> tuple[Tensor, Tensor]:
    """The tokens of both sides at t = 0.7, with the same noise, by hand."""
    assert BATCH.x0 is not None
    eps = DRAWS.under("mmd").normal("eps", xin.shape[1:]).double()
    sides = (c * xin, reduced(BATCH.x0, 2 if k == 1 else 1))
    at = [side + 0.7 * eps for side in sides]
    a, b = (torch.cat([3 * x, x**2], 1).flatten(2).transpose(1, 2) for x in at)
    return a, b


def linear(a: Tensor, b: Tensor) -> Tensor:
    return (((a.mean(1) - b.mean(1)) ** 2 + 1e-6).sqrt() - 1e-3).mean()


Measure = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "by_hand"),
    [("linear", linear), ("rbf", lambda a, b: rbf_mmd(a, b, 2.0).mean())],
    ids=["linear", "rbf"],
)
def test_patches_meet_the_data_of_their_size(k: int, kernel: str, by_hand: Measure) -> None:
    """Value, and gradient through the encoder by differences; the step's level is no part."""
    m = method(mmd=0.25, mmd_times=Discrete((0.7,)), kernel=kernel, width=2.0)
    own, h = nets(fake=0.5), 1e-5  # no direction of the KL term: fake score and teacher agree
    loss = m.student_loss(Call(m, k), own, Slope(0.5), BATCH)
    xin = inputs()[k - 1]
    assert float(loss.logs["mmd"]) == pytest.approx(float(by_hand(*patches(xin, 0.6, k))))
    low, high = (0.25 * by_hand(*patches(xin, 0.6 + s, k)) for s in (-h, h))
    assert loss.total is not None
    (found,) = torch.autograd.grad(loss.total, own["student"].parameters())
    assert float(found) == pytest.approx(float(high - low) / (2 * h), rel=1e-5)


class OnePlace(Slope):
    """Features without places: a vector for each sample."""

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return super().encode(xt, t, cond).flatten(1)


def test_features_of_one_place_are_no_patches() -> None:
    """The linear kernel leaves them out, as mmd = 0 does; the other refuses them."""
    m, own = method(mmd_times=Discrete((0.7,))), nets()
    found = m.student_loss(Call(m, 1), own, OnePlace(0.5), BATCH)
    plain = method(mmd=0.0).student_loss(Call(m, 1), own, OnePlace(0.5), BATCH)
    assert float(found.logs["mmd"]) == 0
    assert found.total is not None
    assert plain.total is not None
    assert found.total.item() == plain.total.item()
    rbf = method(kernel="rbf")
    with pytest.raises(ValueError, match="there is one only"):
        rbf.student_loss(Call(rbf, 1), own, OnePlace(0.5), BATCH)


def test_data_have_no_discrepancy_to_themselves() -> None:
    m = method(mmd_times=Discrete((0.7,)))
    assert BATCH.x0 is not None
    found = m.discrepancy(Call(m, 2), Slope(0.5), BATCH, BATCH.x0)
    assert float(found.abs().max()) == 0
    assert float(m.discrepancy(Call(m, 2), Slope(0.5), BATCH, BATCH.x0 + 0.1).min()) > 0.1
    assert math.isfinite(float(tokens(Slope(1.0).encode(X0, T[0])).sum()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": FewStep()}, "SwD.sampler is a ScaleWise, got FewStep"),
        ({"kernel": "cubic"}, "SwD.kernel is 'linear' or 'rbf', got 'cubic'"),
        ({"ratio": 0}, "SwD.ratio is 1 or more, got 0"),
        ({"mmd": -1.0}, "SwD needs mmd >= 0 and width > 0"),
        ({"width": 0.0}, "SwD needs mmd >= 0 and width > 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SwD(**changes)
