"""MultiStep against the stock solvers, on exact mixtures: step by step, and by its order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.noise_path import (
    VE,
    VP,
    Flow,
    NoisePath,
    TrigFlow,
    x0_to_eps,
    x0_to_v,
    x0_to_velocity,
)
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete, Karras, TimeLaw, Uniform, Whole
from fewstep.diffusion.types import Sampler
from fewstep.teachers.gaussian import GaussianMixture

diffusers = pytest.importorskip("diffusers")

F64 = torch.float64
MEANS = torch.tensor([[0.4, -0.7, 0.1], [-1.1, 0.3, 0.6], [0.8, 0.9, -0.5]], dtype=F64)
Z = Draws.range(0, 32).normal("z", (3,), F64)
Kind = Literal["dpm++", "unipc"]


def mixture(path: NoisePath, dtype: torch.dtype = F64) -> GaussianMixture:
    return GaussianMixture(MEANS.to(dtype), 0.15, path=path)


class Stock(NamedTuple):
    """A stock scheduler with its timesteps set, on a path."""

    path: NoisePath
    scheduler: Any
    says: str
    """What the network predicts for it."""

    def times(self) -> list[float]:
        """Of its calls, on the path."""
        sigmas: list[float] = self.scheduler.sigmas[:-1].double().tolist()
        if isinstance(self.path, VP):
            return [float(t) for t in self.scheduler.timesteps]
        return sigmas

    def law(self) -> TimeLaw:
        return Discrete(tuple(reversed(self.times())))

    def sample(self, net: GaussianMixture, z: Tensor) -> list[Tensor]:
        """The inputs of the network, from the same noise, and at the end the sample."""
        times = torch.tensor(self.times()).to(z)
        x = self.path.sigma(times[0]) * z
        xs = [x]
        for t, step in zip(times, self.scheduler.timesteps, strict=True):
            said = self.output(x, net(x, t), t)
            x = self.scheduler.step(said, step, x).prev_sample
            xs.append(x)
        return xs

    def output(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """What a network that denoises like this says."""
        if self.says == "edm":
            shrink, std = 0.25 / (t**2 + 0.25), t * 0.5 / (t**2 + 0.25).sqrt()
            return (x0 - shrink * x) / std
        convert: Callable[..., Tensor] = {
            "epsilon": x0_to_eps,
            "v_prediction": x0_to_v,
            "flow_prediction": x0_to_velocity,
        }[self.says]
        return convert(self.path, x, x0, t)


SCHEDULERS = {
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def on_betas(kind: Kind, order: int, steps: int, says: str, spacing: str) -> Stock:
    scheduler = SCHEDULERS[kind](
        **BETAS,
        prediction_type=says,
        solver_order=order,
        timestep_spacing=spacing,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    return Stock(VP(), scheduler, says)


def on_a_flow(kind: Kind, order: int, steps: int, shift: float) -> Stock:
    scheduler = SCHEDULERS[kind](
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=order,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    return Stock(Flow(), scheduler, "flow_prediction")


def of_edm(steps: int) -> Stock:
    scheduler = diffusers.EDMDPMSolverMultistepScheduler()
    scheduler.set_timesteps(steps)
    return Stock(VE(), scheduler, "edm")


STOCK: list[tuple[Kind, int, Stock]] = [
    *[
        (kind, order, on_betas(kind, order, steps, says, spacing))
        for kind, order in (("dpm++", 2), ("unipc", 2), ("unipc", 3))
        for steps, says, spacing in (
            (10, "epsilon", "linspace"),
            (10, "v_prediction", "trailing"),
            (20, "v_prediction", "leading"),
            (3, "v_prediction", "linspace"),
        )
    ],
    *[
        (kind, order, on_a_flow(kind, order, steps, shift))
        for kind, order in (("dpm++", 2), ("unipc", 2), ("unipc", 3))
        for steps, shift in ((10, 1.0), (20, 3.0))
    ],
    *[("dpm++", 2, of_edm(steps)) for steps in (5, 18)],
]


def name(case: Any) -> str | None:
    if isinstance(case, Stock):
        return f"{type(case.path).__name__}-{case.says}-{len(case.times())}"
    return None


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "order", "stock"), STOCK, ids=name)
def test_every_input_is_that_of_the_stock_solver(
    kind: Kind, order: int, stock: Stock, dtype: torch.dtype
) -> None:
    """And the sample at the end: to 1e-5 of their size, which is what its tables hold."""
    net, z = mixture(stock.path, dtype), Z.to(dtype)
    stock.scheduler.set_timesteps(len(stock.scheduler.timesteps))  # forgets former calls
    expected = stock.sample(net, z)
    sampler = MultiStep(stock.law(), len(stock.times()), kind, order)
    states = list(sampler.states(net, z))
    found = [states[0].xt, *(state.xs for state in states)]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("says", ["epsilon", "v_prediction"])
def test_ddim_is_the_stock_scheduler_s(says: str, dtype: torch.dtype) -> None:
    """Heun of order 1 and FewStep with "ddim" noise: to 1e-5."""
    scheduler = diffusers.DDIMScheduler(
        **BETAS, prediction_type=says, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(10)
    stock, net, z = Stock(VP(), scheduler, says), mixture(VP(), dtype), Z.to(dtype)
    times = torch.tensor([float(t) for t in scheduler.timesteps])
    x = VP().sigma(times[0].to(z)) * z
    for t, step in zip(times.to(z), scheduler.timesteps, strict=True):
        x = scheduler.step(stock.output(x, net(x, t), t), step, x).prev_sample
    law = Discrete(tuple(times.flip(0).tolist()))
    for sampler in (Heun(law, 10, 1), FewStep(999.0, 10, "ddim")):
        assert (sampler(net, z) - x).norm() <= 1e-5 * x.norm()


@pytest.mark.parametrize(("kind", "order"), [("dpm++", 2), ("unipc", 2), ("unipc", 3)])
def test_noise_levels_decide_not_the_path(kind: Kind, order: int) -> None:
    """The same alpha / sigma make the same samples: so TrigFlow's are those that stock made."""
    levels = torch.tensor([30.0, 9.0, 4.0, 1.5, 0.8, 0.3, 0.1], dtype=F64)
    times = {VE(): levels, Flow(): levels / (1 + levels), TrigFlow(): levels.atan()}
    found = [
        MultiStep(Discrete(tuple(reversed(t.tolist()))), len(t), kind, order)(mixture(path), Z)
        for path, t in times.items()
    ]
    for x in found[1:]:
        torch.testing.assert_close(x, found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "order"), [("dpm++", 2), ("unipc", 2), ("unipc", 3)])
def test_from_pure_noise(kind: Kind, order: int, dtype: torch.dtype) -> None:
    """alpha = 0: the first two steps are DDIM's, and UniPC's correction of the first a mean.

    Of the same noise levels, Flow and TrigFlow make the same samples, although pi / 2 is no
    number of the computer's.
    """
    levels = torch.tensor([math.inf, 9.0, 4.0, 1.5, 0.8, 0.3, 0.1], dtype=F64)
    found = []
    for path, t in ((Flow(), (1 + 1 / levels).reciprocal()), (TrigFlow(), levels.atan())):
        net, t = mixture(path, dtype), t.to(dtype)
        sampler = MultiStep(Discrete(tuple(reversed(t.tolist()))), len(t), kind, order)
        first, second, *_, last = sampler.states(net, Z.to(dtype))
        exact = {"rtol": 1e-6, "atol": 1e-6}
        by_hand = path.ddim(first.xt, first.x0, t[0], t[1])
        torch.testing.assert_close(first.xs, by_hand, **exact)
        start = by_hand
        if kind == "unipc":
            start = path.ddim(first.xt, (first.x0 + second.x0) / 2, t[0], t[1])
        torch.testing.assert_close(second.xs, path.ddim(start, second.x0, t[1], t[2]), **exact)
        found.append(last.x0)
        assert last.x0.isfinite().all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


CASES: list[tuple[NoisePath, TimeLaw]] = [
    (VE(), Karras(0.02, 20.0)),
    (Flow(), Uniform(0.1, 1.0)),
    (TrigFlow(), Uniform(0.1, math.pi / 2)),
    (VP(), Uniform(99.0, 999.0)),
]
ORDERS: list[tuple[Callable[[TimeLaw, int], Sampler], float, float]] = [
    (lambda law, n: Heun(law, n, 1), 1.0, 0.1),
    (lambda law, n: MultiStep(law, n, "dpm++"), 2.0, 0.25),
    (lambda law, n: MultiStep(law, n, "unipc"), 3.0, 0.5),
    (lambda law, n: MultiStep(law, n, "unipc", 3), 3.5, 1.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "law"), CASES, ids=lambda case: repr(case))
def test_orders_of_convergence(path: NoisePath, law: TimeLaw) -> None:
    """Slopes from 33 to 129 calls against a fine solution by Heun's method.

    UniPC's correction raises its order by one.
    """
    net = mixture(path)
    fine = Heun(law, 3000)(net, Z)
    for make, order, off in ORDERS:
        few, many = (float((make(law, n)(net, Z) - fine).norm()) for n in (33, 129))
        assert math.log2(few / many) / 2 == pytest.approx(order, abs=off)


def test_impossible_solvers_are_refused() -> None:
    law, net = Uniform(0.1, 1.0), mixture(Flow())
    with pytest.raises(ValueError, match=r"MultiStep\.kind is 'dpm\+\+' or 'unipc', got 'dpm'"):
        MultiStep(law, 8, "dpm")  # type: ignore[arg-type]
    for steps, kind, order in ((0, "dpm++", 2), (8, "dpm++", 3), (8, "unipc", 1)):
        with pytest.raises(ValueError, match="needs steps >= 1 and order 2, or 3 of unipc, got"):
            MultiStep(law, steps, kind, order)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be finite and end where there is still noise"):
        MultiStep(Uniform(0.0, 1.0), 8, "dpm++")(net, Z)
    with pytest.raises(ValueError, match="the noise should decrease along the ladder of Multi"):
        MultiStep(Whole(0, 5), 8, "dpm++")(mixture(VP()), Z)
    with pytest.raises(ValueError, match="cannot be trained through MultiStep"):
        MultiStep(law, 8, "dpm++").part(1, net, Z)


def test_one_call_is_the_denoiser() -> None:
    net, top = mixture(Flow()), torch.tensor(1.0, dtype=F64)
    x = MultiStep(Uniform(0.1, 1.0), 1, "unipc", 3)(net, Z)
    assert torch.equal(x, net(Z, top))
