"""Students of several steps: which call is trained, what it sees, and where gradients flow."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Karras, TimeLaw, Uniform
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.guidance_scales import Unguided
from fewstep.distillation.method import Method, Nets
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.sim import SIM
from fewstep.teachers.gaussian import Gaussian

F64 = torch.float64
MU = torch.tensor([0.4, -0.7], dtype=F64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
DRAWS = Draws.range(0, 16, seed=2)
Z = DRAWS.normal("z", (2,), F64)
NOISES: Any = ("fresh", "fixed", "ddim")
each_noise = pytest.mark.parametrize("noise", NOISES)
METHODS: list[Any] = [SiD, SIM, DiffInstruct, SiDA]


class Bent(nn.Module):
    """A denoiser that is neither exact nor linear, and remembers the times it was called at."""

    def __init__(self, path: NoisePath = VE()) -> None:
        super().__init__()
        self.w, self.path = nn.Parameter(torch.tensor([0.9, -0.4], dtype=F64)), path
        self.times: list[float] = []

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.times.append(float(t[0]))
        return torch.tanh(self.w * xt) + 0.3 * torch.cos(t)[:, None] * self.w.flip(0)

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.w * xt

    def forward_with_features(
        self, xt: Tensor, t: Tensor, cond: Any = None
    ) -> tuple[Tensor, Tensor]:
        return self(xt, t, cond), self.encode(xt, t, cond)


def ks(steps: int, calls: int = 4) -> Tensor:
    """k of the first steps."""
    sampler = FewStep(2.5, calls)
    return torch.tensor([Rollout.at(step, sampler, "uniform").k for step in range(steps)])


def test_the_call_that_is_trained_is_a_function_of_the_step() -> None:
    """Of nothing else: not of the noise, the times, or what was drawn before."""
    first = ks(50)
    torch.manual_seed(1)
    others = [Rollout.at(step, FewStep(1.0, 4, "ddim", 2.0), "uniform").k for step in range(50)]
    assert others == first.tolist()
    assert Rollout.at(7, FewStep(2.5, 4), "uniform") == Rollout(FewStep(2.5, 4), int(first[7]))
    assert first.unique().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("calls", "bound"), [(2, 10.83), (4, 16.27), (7, 22.46)])
def test_every_call_is_trained_equally_often(calls: int, bound: float) -> None:
    """Chi-square of 2000 steps under its 99.9 % quantile, and the same of pairs of steps."""
    found = ks(2000, calls) - 1
    counts = torch.bincount(found, minlength=calls).double()
    expected = 2000 / calls
    assert float(((counts - expected) ** 2 / expected).sum()) < bound
    centred = found.double() - found.double().mean()
    neighbours = float((centred[1:] * centred[:-1]).mean() / centred.var())
    assert abs(neighbours) < 4 / 2000**0.5


def test_final_matching_trains_the_last_call() -> None:
    for calls in (1, 2, 4):
        for step in range(20):
            assert Rollout.at(step, FewStep(2.5, calls), "final").k == calls
    assert {Rollout.at(step, FewStep(), "uniform").k for step in range(20)} == {1}
    with pytest.raises(ValueError, match="matching is 'uniform' or 'final', got 'last'"):
        Rollout.at(0, FewStep(), "last")  # type: ignore[arg-type]


@pytest.mark.parametrize("matching", ["uniform", "final"])
@pytest.mark.parametrize("kind", METHODS)
def test_both_turns_of_a_step_end_with_the_same_call(kind: Any, matching: Any) -> None:
    """Seen from the student: calls 1 to k of the ladder, in either turn."""
    sampler = FewStep(2.5, 4)
    method: Method = kind(sampler, matching=matching)
    assert vars(method)["guidance"] == Unguided()
    seen = []
    for step in range(12):
        k = Rollout.at(step, sampler, matching).k
        for turn in method.turns(step):
            student = Bent()
            nets = Nets({"student": student, "fake": Bent()})
            turn.loss(nets, Gaussian(MU, COV), Batch(Z, None, Z.flip(0), DRAWS))
            assert student.times == pytest.approx(sampler.ladder(VE())[:k])
        seen.append(k)
    assert set(seen) == {4} if matching == "final" else len(set(seen)) >= 3


def by_hand(sampler: FewStep, k: int, net: Any, whole: bool = False) -> Tensor:
    """x^(k): every input but the last call's, or none (`whole`), without gradient."""
    x, eps = torch.zeros_like(Z), Z
    for j in range(1, k + 1):
        part = (1 - (j - 1) / sampler.steps) ** sampler.rho
        whole_t = isinstance(net.path, VP)  # timesteps are whole, of t_init + 1
        at = math.ceil((sampler.t_init + 1) * part) - 1 if whole_t else sampler.t_init * part
        t = torch.tensor(at, dtype=F64)
        alpha, sigma = net.path.alpha(t), net.path.sigma(t)
        if j > 1 and sampler.noise == "fresh":
            eps = DRAWS.normal(f"eps{j - 1}", (2,), F64)
        xt = alpha * (x if whole else x.detach()) + sigma * eps
        x = net(xt, t.expand(len(Z)))
        if sampler.noise == "ddim":
            eps = (xt - alpha * x) / sigma
            eps = eps if whole else eps.detach()
    return x


@each_noise
@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow(), VP()], ids=repr)
@pytest.mark.parametrize("rho", [1.0, 1.7])
def test_each_part_by_hand(noise: Any, path: NoisePath, rho: float) -> None:
    net = Bent(path)
    sampler = FewStep({VE: 2.5, VP: 625.0}.get(type(path), 0.9), 4, noise, rho)
    found = [sampler.part(k, net, Z, None, DRAWS) for k in range(1, 5)]
    for k, x in enumerate(found, 1):
        torch.testing.assert_close(x, by_hand(sampler, k, net), rtol=1e-12, atol=1e-12)
    assert torch.equal(found[-1], sampler(net, Z, None, DRAWS))
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(found[1:], found, strict=False))
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"has steps 1 to 4, got {k}"):
            sampler.part(k, net, Z, None, DRAWS)


@each_noise
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients_flow_through_the_last_call_alone(noise: Any, k: int) -> None:
    """As with every earlier output detached by hand; all calls together would give another."""
    sampler, net, z = FewStep(2.5, 4, noise), Bent(), Z.clone().requires_grad_()

    def gradient(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((x * Z.flip(0)).sum(), net.w)
        return g

    found = gradient(sampler.part(k, net, Z, None, DRAWS))
    torch.testing.assert_close(found, gradient(by_hand(sampler, k, net)), rtol=1e-12, atol=1e-12)
    whole = gradient(by_hand(sampler, k, net, whole=True))
    assert ((whole - found).norm() > 1e-2 * found.norm()) == (k > 1)
    if k == 4:  # an ordinary call is not cut
        every = gradient(sampler(net, Z, None, DRAWS))
        torch.testing.assert_close(every, whole, rtol=1e-12, atol=1e-12)
    sampler.part(k, net, z, None, DRAWS).sum().backward()
    assert z.grad is None


@pytest.mark.parametrize("path", [VE(), Flow(), TrigFlow(), VP()], ids=repr)
@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("steps", [2, 5])
def test_ddim_is_heun_of_order_one(path: NoisePath, rho: float, steps: int) -> None:
    """On the same ladder, to 1e-12."""
    if isinstance(path, VP):
        rho, top = 1.0, 999.0
        times: TimeLaw = Uniform(1000 / steps - 1, top)
        found = FewStep(top, steps, "ddim")(Gaussian(MU, COV, path), Z)
        euler = Heun(times, steps, order=1)(Gaussian(MU, COV, path), Z)
        torch.testing.assert_close(found, euler, rtol=1e-12, atol=1e-12)
        return
    top = 2.5 if path == VE() else 0.95
    low = top / steps**rho
    times = Uniform(low, top) if rho == 1 else Karras(low, top, rho)
    teacher = Gaussian(MU, COV, path)
    found = FewStep(top, steps, "ddim", rho)(teacher, Z)
    euler = Heun(times, steps, order=1)(teacher, Z)
    torch.testing.assert_close(found, euler, rtol=1e-12, atol=1e-12)
    for other in ("fresh", "fixed"):
        x = FewStep(top, steps, other, rho)(teacher, Z, None, DRAWS)  # type: ignore[arg-type]
        assert (x - euler).abs().max() > 1e-3


@pytest.mark.parametrize(("path", "top"), [(VE(), 2.5), (Flow(), 1.0), (VP(), 800.0)])
def test_fresh_noise_on_an_exact_gaussian(path: NoisePath, top: float) -> None:
    """Mean and covariance after each call, 4 standard errors of 100,000 samples.

    With G the gain of the denoiser, m <- mu + G alpha (m - mu), from m = 0 with alpha m = 0, and
    C <- G (alpha^2 C + sigma^2) G^T, from C = 0.
    """
    count, steps = 100_000, 4
    draws, teacher = Draws.range(0, count, seed=6), Gaussian(MU, COV, path)
    sampler, eye = FewStep(top, steps), torch.eye(2, dtype=F64)
    z = draws.normal("z", (2,), F64)
    mean, cov = torch.zeros(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
    for k in range(1, steps + 1):
        t = torch.tensor(top * (1 - (k - 1) / steps), dtype=F64)
        alpha, sigma = path.alpha(t), path.sigma(t)
        gain = alpha * COV @ torch.linalg.inv(alpha**2 * COV + sigma**2 * eye)
        mean = MU + gain @ (alpha * mean - alpha * MU)
        cov = gain @ (alpha**2 * cov + sigma**2 * eye) @ gain.T
        x = sampler.part(k, teacher, z, None, draws)
        spread = cov.diag()
        assert ((x.mean(0) - mean).abs() <= 4 * (spread / count).sqrt() + 1e-15).all()
        error = ((cov**2 + spread[:, None] * spread) / count).sqrt()
        assert ((x.T.cov() - cov).abs() <= 4 * error + 1e-15).all()
    assert torch.linalg.eigvalsh(COV - cov).min() > 0  # four steps are still narrower than data


TIGHT = "does not fit the times 0 to 999 of VP: t_init is one of them, a whole one, and there are "
TIGHT += "no more steps than timesteps below it"


@pytest.mark.parametrize(
    ("sampler", "path", "sentence"),
    [
        (FewStep(3.0, 4), VP(), TIGHT),
        (FewStep(1000.0), VP(), TIGHT),
        (FewStep(0.5), VP(), TIGHT),
        (FewStep(2.0, 3), VP(betas=(0.1, 0.2, 0.3)), TIGHT.replace("999", "2")),
        (FewStep(), Flow(), "does not fit the times 0.001 to 1 of Flow: t_init is one of them"),
    ],
    ids=repr,
)
def test_a_start_or_steps_beyond_the_times_of_a_path(
    sampler: FewStep, path: NoisePath, sentence: str
) -> None:
    """Where alpha would be negative, or two steps the same timestep: refused in a sentence."""
    for good, on in ((FewStep(999.0, 4), VP()), (FewStep(2.0, 2), VP(betas=(0.1, 0.2, 0.3)))):
        assert good(Gaussian(MU, COV, on), Z, None, DRAWS).isfinite().all()
    for call in (sampler, partial(sampler.part, 1)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
            call(Gaussian(MU, COV, path), Z, None, DRAWS)
        assert str(caught.value) == f"{sampler} {sentence}"


def test_impossible_rollouts_are_refused() -> None:
    with pytest.raises(ValueError, match="is 'fresh', 'fixed' or 'ddim', got 'none'"):
        FewStep(noise="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps >= 1, t_init > 0 and rho > 0, got FewStep"):
        FewStep(rho=0.0)
    with pytest.raises(ValueError, match=r"cannot be trained through Heun.*; use FewStep"):
        Heun().part(1, Gaussian(MU, COV), Z)
