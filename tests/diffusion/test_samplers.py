"""Samplers against exact Gaussians: orders of convergence, call counts, values by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import (
    Ancestral,
    FewStep,
    Heun,
    JumpBack,
    Jumps,
    WithInput,
    course,
    ladder_of,
)
from fewstep.diffusion.scale_wise import ScaleWise
from fewstep.diffusion.time_distributions import Karras, LogNormal, TimeLaw, Uniform
from fewstep.diffusion.types import Sampler
from fewstep.teachers.gaussian import Gaussian
from fewstep.teachers.preflight import time_of
from tests.conditional import CLASSES, DIM, Conditional
from tests.instances import SAMPLERS, TEACHERS

F64 = torch.float64
MU = torch.tensor([0.4, -0.7], dtype=F64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
EYE = torch.eye(2, dtype=F64)
Z = Draws.range(0, 16).normal("z", (2,), F64)


@dataclass
class Counted:
    """A denoiser that remembers the times it was called at; asked for a jump, it denoises."""

    inner: Any

    def __post_init__(self) -> None:
        self.path = self.inner.path
        self.times: list[float] = []

    def __call__(self, xt: Tensor, t: Tensor, cond: Any = None, s: Tensor | None = None) -> Tensor:
        self.times.append(float(t.flatten()[0]))
        return self.inner(xt, t, cond)


CASES: list[tuple[NoisePath, TimeLaw]] = [
    (VE(), Karras()),
    (Flow(), Uniform(0.02, 1.0)),
    (TrigFlow(), Uniform(0.02, math.pi / 2)),
    (VP(), Uniform(0.0, 999.0)),
]


def exact(path: NoisePath, times: TimeLaw) -> Tensor:
    """The flow from pure noise sigma z at the top to the bottom of the ladder, denoised there."""
    teacher = Gaussian(MU, COV, path)
    top, bottom = (float(times.quantile(torch.tensor(u, dtype=F64))) for u in (1.0, 0.0))
    noise = path.sigma(torch.tensor(top, dtype=F64)) * Z
    return teacher(teacher.flow(noise, top, bottom), torch.tensor(bottom, dtype=F64))


@pytest.mark.parametrize(
    ("path", "times"), [*CASES[:3], (VP(), Uniform(19.0, 999.0))], ids=lambda case: repr(case)
)
@pytest.mark.parametrize("order", [1, 2])
def test_order_of_convergence(path: NoisePath, times: TimeLaw, order: int) -> None:
    """Doubling the steps divides the error by 2^order; the fitted slope is within 0.15 of it."""
    reference, teacher = exact(path, times), Gaussian(MU, COV, path)
    counts = torch.tensor([65.0, 129.0, 257.0], dtype=F64)
    found = [Heun(times, int(n), order)(teacher, Z) for n in counts]
    errors = torch.stack([(x - reference).norm() for x in found])
    slope = (errors[0] / errors[-1]).log() / ((counts[-1] - 1) / (counts[0] - 1)).log()
    assert float(slope) == pytest.approx(order, abs=0.15)
    assert errors[-1] / reference.norm() < {1: 2e-2, 2: 2e-4}[order]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (VP(), "gaussian"),
        (VP(), "mixture"),
        (VP(1e-4, 0.02, schedule="linear"), "ring"),
    ],
    ids=repr,
)
def test_vp_converges_in_the_noise_level(path: NoisePath, name: str) -> None:
    """The log-SNR bends at timesteps, which is not seen: 50 steps are within .3 %, 400 in 1e-4.

    Against the exact flow, of mixtures by 1,000 steps that are 7e-6 off; in t itself it was up to
    .8 %, and 0.1 % at best with any number.
    """
    teacher, times = TEACHERS[name](path), Uniform(0.0, 999.0)
    top, bottom = (torch.tensor(t, dtype=F64) for t in (999.0, 0.0))
    start = path.sigma(top) * Z
    if name == "gaussian":
        ends = teacher.flow(start, 999.0, 0.0)
    else:
        x, ladder = start, torch.linspace(999.0, 0.0, 1001, dtype=F64)
        for t, s in pairwise(ladder):
            x0 = teacher(x, t)
            x = path.ddim(x, x0, t, s)
            x = path.heun(x, x0, teacher(x, s), t, s)
        ends = x
    exact = teacher(ends, bottom)
    few, some, many = (
        float((Heun(times, steps)(teacher, Z) - exact).norm() / exact.norm())
        for steps in (4, 50, 400)
    )
    assert few < 0.3
    assert some < 3e-3
    assert many < 1e-4
    assert float((Heun(times, 50, 1)(teacher, Z) - exact).norm() / exact.norm()) < 0.035


def test_four_steps_of_four_paths_are_alike() -> None:
    """Noise levels decide, not what t is called: the same ladder of them on every path.

    Then x / (alpha + sigma) is the same, which VE, whose scale is 1, shows for DDIM alone.
    """
    levels = torch.tensor([14.0, 5.0, 1.5, 0.4, 0.1], dtype=F64)
    times = {
        VE(): levels,
        Flow(): levels / (1 + levels),
        TrigFlow(): levels.atan(),
        VP(): torch.tensor([time_of(VP(), -2 * math.log(v)) for v in levels.tolist()]).double(),
    }
    for order in (1, 2):
        found = []
        for path, ladder in times.items():
            teacher = Gaussian(MU, COV, path)
            x = path.sigma(ladder[0]) * Z + path.alpha(ladder[0]) * MU
            for t, s in pairwise(ladder):
                x0 = teacher(x, t)
                x = path.ddim(x, x0, t, s)
                if order == 2:
                    x = path.heun(x, x0, teacher(x, s), t, s)
            found.append(teacher(x, ladder[-1]))
        for x in found[order - 1 :]:
            torch.testing.assert_close(x, found[-1], rtol=1e-6, atol=1e-6)
        assert order == 1 or (found[0] - found[-1]).abs().max() > 1e-3


def test_published_ladder_beats_euler_at_equal_cost() -> None:
    """35 calls from t = 80: Heun is 3.7 % off the exact flow, Euler 5.7 %."""
    teacher, reference = Gaussian(MU, COV), exact(VE(), Karras())
    heun, euler = (
        float((sampler(teacher, Z) - reference).norm() / reference.norm())
        for sampler in (Heun(), Heun(steps=35, order=1))
    )
    assert heun == pytest.approx(0.037, abs=1e-3)
    assert euler == pytest.approx(0.057, abs=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_calls_are_counted(sampler: Sampler) -> None:
    counted = Counted(Gaussian(MU, COV))
    sampler(counted, Z, None, Draws.range(0, 16))
    assert len(counted.times) == sampler.calls


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_course_is_what_a_denoiser_sees(sampler: Sampler) -> None:
    """The times of its calls, its first input at z = 1, and the noise that is drawn."""
    net = Counted(Gaussian(torch.zeros(1, dtype=F64), torch.eye(1, dtype=F64)))
    one, draws = torch.ones(1, 1, dtype=F64), Draws.range(0, 1)
    first = next(iter(sampler.states(net, one, torch.zeros(1), draws)))
    net.times.clear()
    sampler(net, one, torch.zeros(1), draws)
    expected = course(sampler, net.path)
    twice = sampler.calls // len(expected.times)
    assert net.times == pytest.approx([t for t in expected.times for _ in range(twice)])
    assert expected.start == float(first.xt)
    inner = sampler.sampler if isinstance(sampler, WithInput) else sampler
    several = isinstance(inner, Ancestral | JumpBack | ScaleWise)
    fresh = several or getattr(inner, "noise", "") == "fresh"
    assert expected.noises == (sampler.calls - 1 if fresh else 0)


def test_calls_by_hand() -> None:
    assert Heun().calls == 35
    assert Heun(order=1).calls == 18
    assert FewStep(steps=4).calls == 4


def test_heun_ladder() -> None:
    """Euler calls at every rung once; Heun at every inner rung twice."""
    counted = Counted(Gaussian(MU, COV))
    Heun(Uniform(1.0, 4.0), 4, 1)(counted, Z)
    assert counted.times == [4.0, 3.0, 2.0, 1.0]
    counted = Counted(Gaussian(MU, COV))
    Heun(Uniform(1.0, 4.0), 4)(counted, Z)
    assert counted.times == [4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(("path", "t"), [(VE(), 0.7), (Flow(), 1.0), (VP(), 625.0)])
def test_one_step_is_the_denoiser_at_pure_noise(path: NoisePath, t: float) -> None:
    """G(z) = f(sigma z; t) = mu + K (sigma z - alpha mu), K = alpha Sigma M^-1."""
    teacher, at = Gaussian(MU, COV, path), torch.tensor(t, dtype=F64)
    noise = path.sigma(at) * Z
    found = FewStep(t)(teacher, Z)
    assert torch.equal(found, teacher(noise, at))
    alpha, m = path.alpha(at), path.alpha(at) ** 2 * COV + path.sigma(at) ** 2 * EYE
    gain = alpha * COV @ torch.linalg.inv(m)
    by_hand = MU + (noise - alpha * MU) @ gain.T
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (FewStep(625.0), [625]),
        (FewStep(999.0, 4), [999, 749, 499, 249]),
        (FewStep(999.0, 3), [999, 666, 333]),
        (FewStep(625.0, 4), [625, 469, 312, 156]),
        (FewStep(998.0, 3), [998, 665, 332]),
        (FewStep(999.0, 2, rho=2.0), [999, 249]),
    ],
)
def test_timesteps_are_whole(sampler: FewStep, expected: list[int]) -> None:
    """t_init - floor((t_init + 1) k / steps) for rho = 1, as schedulers count them."""
    assert sampler.ladder(VP()) == expected
    if sampler.rho == 1:
        size = int(sampler.t_init) + 1
        by_hand = [size - 1 - size * k // sampler.steps for k in range(sampler.steps)]
        assert by_hand == expected


@pytest.mark.parametrize("sampler", [FewStep(2.5), FewStep(1000.0), FewStep(3.0, 4)])
def test_other_timesteps_are_refused(sampler: FewStep) -> None:
    with pytest.raises(ValueError, match="does not fit the times 0 to 999 of VP: t_init"):
        sampler(Gaussian(MU, COV, VP()), Z, None, Draws.range(0, 16))


@pytest.mark.parametrize(("path", "t"), [(VE(), 2.5), (Flow(), 1.0)])
@pytest.mark.parametrize("steps", [2, 4])
def test_few_steps_on_an_exact_gaussian(path: NoisePath, t: float, steps: int) -> None:
    """The affine recursion x <- mu + K_k (alpha x + sigma eps_k - alpha mu), unrolled by hand."""
    counted, draws = Counted(Gaussian(MU, COV, path)), Draws.range(0, 16, seed=2)
    found = FewStep(t, steps)(counted, Z, None, draws)
    assert counted.times == pytest.approx([t * (1 - k / steps) for k in range(steps)])
    x = torch.zeros_like(Z)
    for k in range(steps):
        at = torch.tensor(t * (1 - k / steps), dtype=F64)
        alpha, sigma = path.alpha(at), path.sigma(at)
        eps = Z if k == 0 else draws.normal(f"eps{k}", (2,), F64)
        gain = alpha * COV @ torch.linalg.inv(alpha**2 * COV + sigma**2 * EYE)
        x = MU + (alpha * x + sigma * eps - alpha * MU) @ gain.T
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


@dataclass
class Exact:
    """The exact flow map of a Gaussian; notes the jumps it was asked for."""

    teacher: Gaussian

    def __post_init__(self) -> None:
        self.path = self.teacher.path
        self.jumps: list[tuple[float, float]] = []

    def __call__(self, xt: Tensor, t: Tensor, cond: Any = None, *, s: Tensor) -> Tensor:
        """g with alpha_s g + sigma_s (x_t - alpha_t g) / sigma_t = x_s."""
        self.jumps.append((float(t[0]), float(s[0])))
        xs = self.teacher.flow(xt, float(t[0]), float(s[0]))
        alpha, sigma, alpha_s, sigma_s = (
            c(at)[:, None] for at in (t, s) for c in (self.path.alpha, self.path.sigma)
        )
        return (sigma * xs - sigma_s * xt) / (alpha_s * sigma - alpha * sigma_s)


@pytest.mark.parametrize(
    ("path", "top"), [(VE(), 80.0), (Flow(), 1.0), (TrigFlow(), 1.5), (VP(), 999.0)]
)
@pytest.mark.parametrize(("steps", "rho"), [(1, 1.0), (4, 1.0), (3, 2.0)])
def test_jumps_of_an_exact_flow_map(path: NoisePath, top: float, steps: int, rho: float) -> None:
    """In any number of steps the end of the flow; on timesteps, index 0 without its noise.

    That is g of the last jump, whose `ddim` to index 0 would be the flow's end there.
    """
    flow_map = Exact(Gaussian(MU, COV, path))
    states = list(Jumps(top, steps, rho).states(flow_map, Z))  # type: ignore[arg-type]
    ladder = [*FewStep(top, steps, rho=rho).ladder(path), 0.0]
    assert flow_map.jumps == list(pairwise(ladder))
    noise = path.sigma(torch.tensor(top, dtype=F64)) * Z
    for state, s in zip(states, ladder[1:-1], strict=False):
        exact = flow_map.teacher.flow(noise, top, s)
        torch.testing.assert_close(state.xs, exact, rtol=1e-9, atol=1e-9)
    last, end = states[-1], flow_map.teacher.flow(noise, top, 0.0)
    landed = path.ddim(last.xt, last.xs, last.t, last.s)
    torch.testing.assert_close(landed, end, rtol=1e-9, atol=1e-9)
    if isinstance(path, VP):
        assert 1e-3 < (last.xs - end).abs().max() < 0.1
    else:
        torch.testing.assert_close(last.xs, end, rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class Basis(Draws):
    """Draws of which eps_k is 1 for the k-th sample after the first, and 0 for others."""

    def normal(self, purpose: str, shape: Any, dtype: torch.dtype = F64) -> Tensor:
        k = int(purpose.removeprefix("eps"))
        return (self.index == k).double().reshape(-1, *[1] * len(shape)).expand(-1, *shape)


@dataclass
class Far:
    """The exact jump of N(0, 1/4) from t_k to t_(k+2), the last two of them to the data."""

    path: NoisePath
    times: list[float]

    def __call__(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        k = min(range(len(self.times)), key=lambda i: abs(self.times[i] - float(t[0])))
        now = t[:1]
        ends = self.path.alpha(now), self.path.sigma(now)
        before = ends[0] ** 2 / 4 + ends[1] ** 2
        if k + 2 >= len(self.times):
            return 0.5 / before.sqrt() * xt
        s = torch.full_like(now, self.times[k + 2])
        alpha_s, sigma_s = self.path.alpha(s), self.path.sigma(s)
        after = (alpha_s**2 / 4 + sigma_s**2) / before
        ratio = sigma_s / ends[1]
        return (after.sqrt() - ratio) / (alpha_s - ratio * ends[0]) * xt


@pytest.mark.parametrize(
    ("path", "top"), [(VE(), 80.0), (Flow(), 1.0), (TrigFlow(), 1.5), (VP(), 999.0)]
)
@pytest.mark.parametrize("steps", [2, 3, 6])
def test_a_jump_and_a_step_back_keep_the_law(path: NoisePath, top: float, steps: int) -> None:
    """Each state of exact jumps has the path's variance, and the sample that of the data.

    States are sums of z and the eps_k, with the numbers that the samples of a basis show.
    """
    sampler = JumpBack(top, steps, rho=1.5)
    times = sampler.ladder(path)
    z = torch.eye(steps, dtype=F64)[:, :1]
    start = torch.tensor([top], dtype=F64)
    law = path.alpha(start) ** 2 / 4 + path.sigma(start) ** 2
    z = z * law.sqrt() / path.sigma(start)  # the first state has the law exactly
    states = list(sampler.states(Far(path, times), z, None, Basis(torch.arange(steps))))
    for state in states:
        want = path.alpha(state.t) ** 2 / 4 + path.sigma(state.t) ** 2
        assert float((state.xt**2).sum()) == pytest.approx(float(want[0]), rel=1e-9)
    assert float((states[-1].x0 ** 2).sum()) == pytest.approx(0.25, rel=1e-9)
    assert [float(state.t[0]) for state in states] == times
    other = list(FewStep(top, steps, "ddim", 1.5).states(Far(path, times), z))  # the control
    assert steps == 2 or abs(float((other[-1].x0 ** 2).sum()) - 0.25) > 1e-2


def test_a_jump_back_by_hand() -> None:
    """0.8, 0.6, 0.4, 0.2 on Flow: from 0.8 to 0.4, up to 0.6; from 0.4 to the data, up to 0.2."""
    teacher, draws = Gaussian(MU, COV, Flow()), Draws.range(0, 16)
    states = list(JumpBack(0.8, 4).states(teacher, Z, None, draws))
    eps = [draws.normal(f"eps{k}", (2,), F64) for k in range(4)]
    x = Flow().ddim(0.8 * Z, teacher(0.8 * Z, states[0].t), states[0].t, torch.tensor(0.4))
    r = 0.4 / 0.6
    x = r * x + (0.6**2 - (r * 0.4) ** 2) ** 0.5 * eps[1]
    torch.testing.assert_close(states[1].xt, x, rtol=1e-6, atol=1e-6)
    last = states[2]
    torch.testing.assert_close(last.xs, 0.8 * last.x0 + 0.2 * eps[3], rtol=1e-9, atol=1e-9)
    assert torch.equal(states[3].xs, states[3].x0)
    with pytest.raises(ValueError, match="steps back by noise: pass draws"):
        JumpBack(0.8, 4)(teacher, Z)
    assert course(JumpBack(0.8, 4), Flow()).noises == 3


def test_gradients_flow_through_rollouts() -> None:
    """dG/dz of two steps on N(0, 1): 2 z shrunk by 1/5 at t = 2, and by 1/2 at t = 1."""
    teacher = Gaussian(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64))
    z = torch.ones(3, 1, dtype=F64, requires_grad=True)
    FewStep(2.0, 2)(teacher, z, None, Draws.range(0, 3)).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, torch.full((3, 1), 0.5 * 0.2 * 2, dtype=F64))


def test_impossible_samplers_are_refused() -> None:
    with pytest.raises(ValueError, match="renoises with fresh noise: pass draws"):
        FewStep(steps=2)(Gaussian(MU, COV), Z)
    for t_init, steps in ((2.5, 0), (0.0, 1)):
        for kind in (FewStep, Jumps):
            name = f"{kind.__name__} needs steps >= 1, t_init > 0 and rho > 0, got {kind.__name__}"
            with pytest.raises(ValueError, match=name):
                kind(t_init, steps)
    for steps, order in ((0, 2), (18, 3)):
        with pytest.raises(ValueError, match="Heun needs steps >= 1 and order 1 or 2"):
            Heun(steps=steps, order=order)


@pytest.mark.parametrize(
    ("path", "times", "runs"),
    [
        (Flow(), Uniform(0.0, 1.0), "from t = 1 to 0"),
        (VE(), LogNormal(), "from t = inf to 0"),
    ],
)
def test_a_ladder_without_noise_at_its_end_is_refused(
    path: NoisePath, times: TimeLaw, runs: str
) -> None:
    """Velocities divide by sigma: refused in a sentence, where it would have been NaN."""
    with pytest.raises(ValueError, match=f"must be finite and end where .* {runs}"):
        Heun(times=times, steps=5)(Gaussian(MU, COV, path=path), Z)


@pytest.mark.parametrize("kappa", [1.0, 0.0, -0.5, 3.5])
def test_guided_sampling_in_closed_form(kappa: float) -> None:
    """With one covariance f_kappa is the denoiser around mu_0 + kappa (mu_c - mu_0)."""
    means = torch.randn(CLASSES + 1, DIM, generator=torch.Generator().manual_seed(2)).double()
    covs = (0.3 * torch.eye(DIM, dtype=F64)).expand(CLASSES + 1, DIM, DIM)
    teacher, labels = Conditional(means, covs), torch.arange(16) % CLASSES
    z = Draws.range(0, 16).normal("z", (DIM,), F64)
    inner = Heun(Karras(0.02, 20.0), steps=6)
    sampler = CFG(inner, kappa)
    found = sampler(teacher, z, labels)
    moved = means[-1] + kappa * (means[:-1] - means[-1])
    expected = inner(Conditional(torch.cat([moved, means[-1:]]), covs), z, labels)
    assert (found - expected).abs().max() < 1e-11
    assert kappa == 1 or (found - inner(teacher, z, labels)).abs().max() > 0.1
    assert len(teacher.calls) == sampler.calls + (0 if kappa == 1 else inner.calls)
    with pytest.raises(ValueError, match="guidance needs conditions"):
        CFG(inner, 2.0)(teacher, z)
    with pytest.raises(ValueError, match=r"CFG\.kappa is a finite scale, got nan"):
        CFG(inner, float("nan"))


def test_times_of_ones_own_are_the_ladder() -> None:
    """The even ladder written out is the even ladder, to the bit, on every path; others differ."""
    for path in (VE(), TrigFlow(), VP()):
        even = FewStep(1.0 if not isinstance(path, VP) else 999.0, 4, "ddim")
        mine = FewStep(noise="ddim", times=tuple(even.ladder(path)))
        z = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        net = TEACHERS["ring"](path)
        assert mine.calls == 4
        assert torch.equal(mine(net, z), even(net, z))
        other = FewStep(noise="ddim", times=(*mine.times[:3], mine.times[3] / 2 // 1 or 0.1))
        assert not torch.allclose(other(net, z), even(net, z))
    assert eval(repr(mine), {"FewStep": FewStep}) == mine


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": (1.0, 2.0)}, "decrease"),
        ({"times": (2.0, 2.0)}, "decrease"),
        ({"times": (2.0, 1.0), "steps": 3}, "leave these out"),
        ({"times": (2.0, 1.0), "t_init": 1.0}, "leave these out"),
        ({"times": (2.0, 1.0), "rho": 2.0}, "leave these out"),
        ({"times": (2.0, -1.0)}, "decrease to 0 or a positive one"),
    ],
)
def test_times_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewStep(**settings)


def test_timesteps_of_ones_own_are_whole() -> None:
    with pytest.raises(ValueError, match="timesteps are whole"):
        FewStep(times=(999.0, 499.5)).ladder(VP())
    with pytest.raises(ValueError, match="does not fit the times"):
        FewStep(times=(1200.0, 400.0)).ladder(VP())


def test_a_number_that_all_calls_are_told() -> None:
    """Beside what the sampler itself tells, and one within another."""
    told: list[dict[str, float]] = []

    class Listening:
        path = VE()

        def __call__(self, xt: Tensor, t: Tensor, cond: Any = None, **named: Tensor) -> Tensor:
            told.append({name: value.flatten()[0].item() for name, value in named.items()})
            return xt

    WithInput(WithInput(Jumps(2.0, 2), "w", 7.5), "n", 3.0)(Listening(), Z)
    assert told == [{"n": 3.0, "w": 7.5, "s": 1.0}, {"n": 3.0, "w": 7.5, "s": 0.0}]
    assert ladder_of(WithInput(Jumps(2.0, 2), "w", 7.5), VE()) == [2.0, 1.0]
    assert ladder_of(Heun(), VE()) is None
    assert not WithInput(Heun(), "w", 1.0).trainable
    with pytest.raises(ValueError, match="finite"):
        WithInput(FewStep(), "w", float("nan"))
