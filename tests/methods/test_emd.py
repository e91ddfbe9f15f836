"""EMD: Langevin steps in noise and latent lead from one KL gradient to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VE, Flow, NoisePath, coefficients
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import Loss, Nets
from fewstep.losses.weight import L1, Power
from fewstep.methods.emd import EMD
from fewstep.teachers.gaussian import Gaussian
from tests.quadrature import F64, Line

MU, VAR, A, B, SIGMA = 1.0, 0.25, 0.2, 0.8, 0.5
REVERSE, FORWARD = (-1.6, 0.7011236), (-0.8988764, -0.25249337)
"""Gradients of KL(p_t || q_t) and of KL(q_t || p_t) in (a, b)."""


@dataclass(frozen=True, eq=False)
class Cubature(Draws):
    """Points +-sqrt(M) e_i for the M normal numbers of a chain of some steps: 2 M samples.

    Their first two moments are those of M standard normal numbers, so that the mean of a quadratic
    function over them is its expectation, exactly; here all that is linear makes such functions.
    """

    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, steps: int) -> Cubature:
        noises = (f"langevin/{name}{k}" for k in range(steps) for name in ("eps", "z"))
        names = ("z", "eps", *noises)
        return cls(torch.arange(2 * len(names)), names=names)

    def normal(
        self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        i, count = self.names.index(self.prefix + purpose), len(self.names)
        column = torch.zeros(2, count, dtype=F64)
        column[0, i], column[1, i] = count**0.5, -(count**0.5)
        return column.reshape(-1, *shape)

    def uniform(self, purpose: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((2 * len(self.names),), 0.5, dtype=F64)


def gaussian(mean: float, variance: float, path: NoisePath) -> Gaussian:
    return Gaussian(torch.tensor([mean], dtype=F64), torch.tensor([[variance]], dtype=F64), path)


def method(**changes: Any) -> EMD:
    settings: dict[str, Any] = {"times": Discrete((SIGMA,)), "weight": Power(2, -2)}
    settings |= {"sampler": FewStep(1.0), "sigma_data": 0.0}
    return EMD(**settings | changes)


def loss(m: EMD, path: NoisePath = VE()) -> tuple[Loss, Line]:
    student = Line(A, B, path)
    nets = Nets({"student": student, "fake": gaussian(A, B**2, path)})
    draws = Cubature.of(m.steps)
    at = Batch(draws.normal("z", (1,)), None, None, draws)
    return m.student_loss(nets, gaussian(MU, VAR, path), at), student


def gradient(m: EMD, path: NoisePath = VE()) -> Tensor:
    found, student = loss(m, path)
    assert found.total is not None
    return student.gradient(found.total)


@pytest.mark.parametrize("cancel", [True, False])
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_one_step_at_rest_is_the_reverse_kl(rate: float, cancel: bool) -> None:
    found = gradient(method(steps=1, eps_rate=rate, z_rate=0.0, cancel=cancel))
    assert found.tolist() == pytest.approx(REVERSE, rel=1e-6)


def test_many_steps_are_the_forward_kl() -> None:
    """Small steps that end: a first-order bias cancels, and the rest is of second order."""
    found = gradient(method(steps=600, eps_rate=0.02, z_rate=0.02, cancel=False))
    assert found.tolist() == pytest.approx(FORWARD, rel=5e-3)


def test_at_rest_many_steps_are_not() -> None:
    """The control: z has to move."""
    found = gradient(method(steps=600, eps_rate=0.02, z_rate=0.0, cancel=False))
    miss = (found - torch.tensor(FORWARD)).norm() / torch.tensor(FORWARD).norm()
    assert float(miss) > 0.5


def test_sixteen_steps_are_in_between() -> None:
    """Golden moments of the chain, of which the student is told over 1 - 0.9^16.

    Cancelling leaves d/da as it is, and biases d/db once z moves.
    """
    share = 1 - 0.9**16
    whole = method(steps=16, eps_rate=0.1, z_rate=0.05, cancel=False)
    assert (share * gradient(whole)).tolist() == pytest.approx([-0.9468, -0.1124], abs=1e-4)
    cut = gradient(method(steps=16, eps_rate=0.1, z_rate=0.05))
    assert (share * cut).tolist() == pytest.approx([-0.9468, -0.2827], abs=1e-4)


def test_cancelling_is_exact_while_z_rests() -> None:
    with_noise, without = (
        gradient(method(steps=16, z_rate=0.0, cancel=cancel)) for cancel in (False, True)
    )
    torch.testing.assert_close(with_noise, without)


def test_it_is_the_same_on_a_flow() -> None:
    """At the level sigma / alpha = 1/2, t = 1/3: the exact weight makes the same gradient."""
    m = method(steps=16, z_rate=0.05, cancel=False)
    on_flow = method(steps=16, z_rate=0.05, cancel=False, times=Discrete((1 / 3,)))
    torch.testing.assert_close(gradient(on_flow, Flow()), gradient(m))


def test_z_moves_less_at_low_noise() -> None:
    """A rate of 0.05 at sigma 1/2 is 0.1 with a sigma_data of 1/2."""
    plain = gradient(method(steps=16, z_rate=0.05))
    torch.testing.assert_close(gradient(method(steps=16, z_rate=0.1, sigma_data=0.5)), plain)


def test_the_weight_is_that_of_the_first_samples() -> None:
    """By hand, for one step at rest: (f_psi - f_phi) over its L1."""
    m = method(steps=1, z_rate=0.0, weight=L1())
    found, student = loss(m)
    draws = Cubature.of(1)
    z, eps = draws.normal("z", (1,)), draws.normal("eps", (1,))
    x, t = A + B * z, torch.full((len(z),), SIGMA, dtype=F64)
    alpha, sigma = coefficients(VE(), x, t)
    xt = alpha * x + sigma * eps
    real, fake = gaussian(MU, VAR, VE())(xt, t), gaussian(A, B**2, VE())(xt, t)
    push = (fake - real) / (x - real).abs()
    expected = torch.stack([push.mean(), (push * z).mean()])
    assert found.total is not None
    torch.testing.assert_close(student.gradient(found.total), expected)
    assert float(found.logs["push"]) == pytest.approx(float(push.abs().mean()))
    assert float(found.logs["latent"]) == pytest.approx(1.0)


def test_the_weight_stays_while_the_chain_goes_on() -> None:
    m = method(steps=3, weight=L1())
    student, draws = Line(A, B), Cubature.of(3)
    z, eps = draws.normal("z", (1,)), draws.normal("eps", (1,))
    nets = Nets({"student": student, "fake": gaussian(A, B**2, VE())})
    end = m.chain(nets, gaussian(MU, VAR, VE()), Batch(z, None, None, draws))
    x, t = A + B * z, torch.full((len(z),), SIGMA, dtype=F64)
    first = (x - gaussian(MU, VAR, VE())(x + SIGMA * eps, t)).abs()
    torch.testing.assert_close(end.weight, 1 / first)
    assert float((end.z - z).abs().max()) > 0.1


def test_at_the_teachers_law_nothing_is_pushed() -> None:
    """The exact student: cancelled noise leaves nothing at all, in every sample."""
    student = Line(MU, VAR**0.5)
    teacher = gaussian(MU, VAR, VE())
    draws = Draws.range(0, 50)
    at = Batch(draws.normal("z", (1,), F64), None, None, draws)
    m = method(times=Discrete((0.2, 1.0, 3.0)))
    found = m.student_loss(Nets({"student": student, "fake": teacher}), teacher, at)
    assert float(found.logs["push"]) < 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": FewStep(2.5, 2)}, "EMD distils one call, but its sampler makes 2"),
        ({"steps": 0}, "steps >= 1"),
        ({"eps_rate": 0.0}, "0 < eps_rate"),
        ({"z_rate": -0.1}, "z_rate"),
        ({"sigma_data": -1.0}, "0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMD(**changes)
