"""DMD2's direction against Gaussians in closed form, and its adversarial term by hand.

Without weight the direction is the gradient of KL(student || teacher). The published normaliser
1 / mean |x - f_phi| depends on the sample; but for Gaussians and an affine student, (x - f_phi,
f_psi - f_phi, z) are jointly Gaussian, so that the mean given y = x - f_phi is known and three
dimensions are left to integrate, here on a grid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.noise_path import VP
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete, Karras, Whole
from fewstep.diffusion.types import Batch
from fewstep.distillation.fake_score import add_noise
from fewstep.distillation.guidance_scales import Guidance, Kappas, Unguided, ZeroCFG
from fewstep.distillation.method import Nets
from fewstep.domains.captions import Captions
from fewstep.losses.weight import L1, Power
from fewstep.methods.diff_instruct import DiffInstruct
from fewstep.methods.dmd2 import DMD2
from fewstep.recipes.registry import every
from fewstep.training.optim import Optim
from tests.conditional import CLASSES, DIM, F64, Scene, scene

PARTS, PART = 40, 4000
GUIDED = Kappas(1.0, 2.0, 1.0, 3.0)


def method(at: Scene, **more: Any) -> DMD2:
    """One call at t and all losses at t; logits are means, as these nets have no head."""
    base = DMD2(FewStep(at.t), Discrete((at.t,)))
    fake = replace(base.fake, times=Discrete((at.t,)), pool="channels")
    return replace(base, fake=fake, **more)


def batch(start: int, count: int) -> Batch:
    draws = Draws.range(start, count, seed=4)
    return Batch(draws.normal("z", (DIM,), F64), draws.index % CLASSES, None, draws)


def sampled(dmd2: DMD2, at: Scene) -> tuple[Tensor, Tensor]:
    """The student's gradient, D times the loss, and its standard error."""
    nets = Nets({"student": at.student, "fake": at.fake})
    loss, found = dmd2.turns(0)[-1].loss, []
    for part in range(PARTS):
        (DIM * loss(nets, at.teacher, batch(part * PART, PART)).total).backward()
        found.append(at.student.gradient())
    each = torch.stack(found)
    return each.mean(0), each.std(0) / PARTS**0.5


def normalised(at: Scene, kappas: tuple[float, float, float], nodes: int = 90) -> Tensor:
    """E d / mean |y| and E d z^T / mean |y|, d = f_psi - f_phi and y = x - f_phi."""
    line = torch.linspace(-5.5, 5.5, nodes, dtype=F64)
    unit = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, DIM)
    mass = (-(unit**2).sum(1) / 2).exp()
    first, second = [], []
    for c in range(CLASSES):
        s = at.setting(c)
        delta, fake, _ = at.maps(c, kappas)
        real = delta.a + fake.a, delta.b + fake.b
        w_x = torch.cat([s.b, torch.zeros_like(s.b)], 1)  # of w = (z, eps)
        w_xt = torch.cat([s.alpha * s.b, s.sigma * s.eye()], 1)
        w_y, y0 = w_x - real[0] @ w_xt, s.a - real[0] @ (s.alpha * s.a) - real[1]
        w_d, d0 = -delta.a @ w_xt, -(delta.a @ (s.alpha * s.a) + delta.b)
        root = torch.linalg.cholesky(w_y @ w_y.T)
        gain = torch.linalg.solve(root, w_y)  # E[w | y] = gain^T root^-1 (y - y0)
        w = unit @ gain
        y = unit @ root.T + y0
        share = mass / y.abs().mean(1)
        d, z = w @ w_d.T + d0, w[:, :DIM]
        left = (w_d @ (torch.eye(2 * DIM, dtype=F64) - gain.T @ gain))[:, :DIM]
        first.append((share[:, None] * d).sum(0) / mass.sum())
        moments = share[:, None, None] * (d[:, :, None] * z[:, None] + left)
        second.append(moments.sum(0).flatten() / mass.sum())
    return torch.cat([*first, *second]) / CLASSES


def agrees(dmd2: DMD2, at: Scene, reference: Tensor) -> None:
    mean, error = sampled(dmd2, at)
    assert ((mean - reference).abs() / error).max() <= 4
    assert (mean - reference).norm() <= 3e-2 * reference.norm()


@pytest.mark.parametrize("guidance", [Unguided(), GUIDED], ids=repr)
def test_without_its_normaliser_it_is_the_gradient_of_kl(guidance: Guidance) -> None:
    at = scene()
    scales = (2.0, 1.0, 3.0) if guidance == GUIDED else (1.0, 1.0, 1.0)
    plain = method(at, weight=Power(2, -2), gan=0.0, guidance=guidance)
    agrees(plain, at, at.gradient("kl", scales) / at.t**2)


@pytest.mark.parametrize("guidance", [Unguided(), GUIDED], ids=repr)
def test_the_normalised_direction(guidance: Guidance) -> None:
    """The published weight; a coarser grid agrees with the finer to a thousandth."""
    at = scene()
    scales = (2.0, 1.0, 3.0) if guidance == GUIDED else (1.0, 1.0, 1.0)
    reference = normalised(at, scales)
    coarse = normalised(at, scales, nodes=60)
    assert (coarse - reference).norm() < 1e-3 * reference.norm()
    agrees(method(at, gan=0.0, guidance=guidance), at, reference)


def test_control_another_normaliser() -> None:
    """1 / mean |x - f_psi| and no normaliser are told apart from the published one."""
    at = scene()
    right = normalised(at, (1.0, 1.0, 1.0))
    swapped = normalised(at._replace(teacher=at.fake, fake=at.teacher), (1.0, 1.0, 1.0))
    plain = at.gradient("kl", (1.0, 1.0, 1.0))
    for wrong in (-swapped, plain * (right.norm() / plain.norm())):
        assert (wrong - right).norm() > 0.1 * right.norm()


def test_no_graph_in_the_networks() -> None:
    """The direction on x is a constant: the same per sample as by hand, and zero at the teacher.

    With a graph through x_t, as SiD has one, the gradient would be another.
    """
    at, b = scene(), batch(0, 6)
    dmd2 = method(at, gan=0.0)
    nets = Nets({"student": at.student, "fake": at.fake})
    dmd2.turns(0)[-1].loss(nets, at.teacher, b).total.backward()
    found = at.student.gradient()
    t = torch.full((6,), at.t, dtype=F64)
    x = at.student(at.t * b.z, t, b.cond)
    n = add_noise(at.teacher.path, x, dmd2.times, b)
    real, fake = (net(n.xt, n.t, b.cond) for net in (at.teacher, at.fake))
    size = (x - real).abs().mean(1, keepdim=True)
    (((fake - real) / size).detach() * x).mean().backward(retain_graph=True)
    assert torch.allclose(found, at.student.gradient(), rtol=1e-12)
    (((fake - real) / size.detach()) * x).mean().backward()
    wrong = at.student.gradient()
    assert (wrong - found).norm() > 0.1 * found.norm()
    equal = Nets({"student": at.student, "fake": at.teacher})
    dmd2.turns(0)[-1].loss(equal, at.teacher, b).total.backward()
    assert not at.student.gradient().any()


@pytest.mark.parametrize("guidance", [Unguided(), ZeroCFG()], ids=repr)
def test_the_adversarial_term_by_hand(guidance: Guidance) -> None:
    """softplus(-l) of the fake score's features at a level and with noise of their own.

    The features of the tapped fake are x_t plus the number of its condition, "none" being one.
    """
    at, b = scene(), batch(3, 5)
    assert b.draws is not None
    dmd2 = method(at, gan=0.7, guidance=guidance)
    nets = Nets({"student": at.student, "fake": at.fake})
    loss = dmd2.turns(0)[-1].loss(nets, at.teacher, b)
    without = replace(dmd2, gan=0.0).turns(0)[-1].loss(nets, at.teacher, b)
    t = torch.full((5,), at.t, dtype=F64)
    x = at.student(at.t * b.z, t, b.cond)
    eps = b.draws.under("gan").normal("eps", (DIM,)).double()
    heard = torch.full((5,), CLASSES) if guidance == ZeroCFG() else b.cond
    logit = (x + at.t * eps + heard[:, None]).mean(1)
    gan_loss = F.softplus(-logit).mean()
    assert float(loss.logs["gan_loss"].detach()) == pytest.approx(
        float(gan_loss.detach()), rel=1e-12
    )
    total = without.total + 0.7 * gan_loss
    assert torch.allclose(loss.total, total, rtol=1e-12)
    loss.total.backward()
    found = at.student.gradient()
    total.backward()
    assert torch.allclose(found, at.student.gradient(), rtol=1e-12)
    shared = F.softplus(-(x + at.t * b.draws.normal("eps", (DIM,)).double()).mean(1)).mean()
    assert abs(float((shared - gan_loss).detach())) > 1e-3  # not the noise of the score loss


def test_two_time_scales_and_published_numbers() -> None:
    """Five updates of the fake score, then the student; levels 20 to 980 of EDM's thousand."""
    dmd2 = DMD2()
    assert [turn.net for turn in dmd2.turns(0)] == ["fake"] * 5 + ["student"]
    ladder = Karras().quantile(torch.linspace(0, 1, 1000, dtype=F64))
    low, high = dmd2.times.quantile(torch.tensor([0.0, 1.0], dtype=F64)).tolist()
    assert low == pytest.approx(float(ladder[19]), rel=2e-3)
    assert high == pytest.approx(float(ladder[979]), rel=2e-3)
    assert (dmd2.sampler, dmd2.weight, dmd2.gan) == (FewStep(80.0), L1(), 3e-3)
    assert dmd2.fake.scale / (64 * 64 * 3) / 2 == pytest.approx(0.01)
    assert dmd2.fake.pool == "learned"
    with pytest.raises(ValueError, match=r"DMD2.ratio is 1 or more, got 0"):
        DMD2(ratio=0)
    with pytest.raises(ValueError, match=r"DMD2.gan is 0 or more, got -1"):
        DMD2(gan=-1.0)


def test_the_published_runs() -> None:
    """Table of the paper's code: 40 x 7 samples, AdamW at 2e-6, norms clipped at 10, bfloat16."""
    run = every()["dmd2_imagenet64"]()
    optim = Optim(2e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, clip=10.0)
    assert (run.method, run.optim, run.fake_optim) == (DMD2(), optim, None)
    assert (run.batch, run.batch // run.accumulate, run.precision) == (280, 40, "bf16")
    assert run.steps * 5 == 200_000
    assert run.ema.decay(280, 10**6) == 0.0  # no average
    assert (run.model.shape, run.model.classes) == ((3, 64, 64), 1000)
    sdxl = every()["dmd2_sdxl"]()
    method: Any = sdxl.method
    assert method.sampler.ladder(VP()) == [999, 749, 499, 249]
    assert (method.ratio, method.gan, method.guidance) == (5, 5e-3, Kappas(real=8.0))
    assert (method.times, method.weight) == (Whole(20, 980), L1())
    assert (method.fake.times, method.fake.weight) == (Whole(0, 999), Power(2, -2))
    assert (method.fake.judging, method.fake.average) == (Power(), "sample")
    assert method.fake.pool == "learned"
    assert method.fake.scale / (4 * 128 * 128) / 2 == pytest.approx(0.01)
    assert (sdxl.batch, sdxl.batch // sdxl.accumulate, sdxl.optim.lr) == (128, 2, 5e-7)
    assert replace(sdxl.optim, lr=2e-6) == optim


TABLE = """
dmd2_sd15     1e-5 39000 DiffInstruct 0    0
dmd2_sd15_gan 5e-7  2000 DMD2         1e-3 0.01
"""
PHASES = {name: cells for name, *cells in map(str.split, TABLE.split("\n")[1:-1])}


@pytest.mark.parametrize("name", PHASES)
def test_the_published_phases_of_stable_diffusion(name: str) -> None:
    """lr, updates of the fake score, method, weights of the student's and the critic's GAN loss.

    In both: 64 x 32 samples, ten updates to one, guidance 1.75 of the teacher alone, eps-losses,
    x_0 predicted from pure noise at timestep 999, and no average.
    """
    lr, updates, kind, gan, judging = PHASES[name]
    run = every()[name]()
    method: Any = run.method
    assert (type(method).__name__, run.steps * method.ratio) == (kind, int(updates))
    assert [turn.net for turn in method.turns(0)] == ["fake"] * 10 + ["student"]
    optim = Optim(float(lr), (0.9, 0.999), eps=1e-8, weight_decay=0.01, clip=10.0)
    assert (run.optim, run.fake_optim, run.ema.decay(2048, 10**6)) == (optim, None, 0.0)
    assert (run.batch, run.batch // run.accumulate) == (2048, 32)
    assert (run.precision, run.recompute) == ("bf16", True)
    assert (method.sampler, method.sampler.ladder(VP())) == (FewStep(999.0, unit=True), [999])
    assert (method.times, method.weight) == (Whole(20, 980), L1())
    kappas = method.guidance.scales(batch(0, 2))
    assert (kappas.fake_loss, kappas.fake, kappas.real) == (1.0, 1.0, 1.75)
    assert (method.fake.times, method.fake.weight) == (Whole(0, 999), Power(2, -2))
    assert method.needs_data == (run.domain == Captions()) == (kind == "DMD2")
    assert getattr(method, "gan", 0.0) == float(gan)
    if kind == "DMD2":
        assert method.fake.scale / (4 * 64 * 64) / 2 == pytest.approx(float(judging))
        assert (method.fake.judging, method.fake.average) == (Power(), "sample")
        assert method.fake.pool == "learned"


@pytest.mark.parametrize("guidance", [Unguided(), GUIDED], ids=repr)
def test_without_its_gan_it_is_diff_instruct_on_two_time_scales(guidance: Guidance) -> None:
    """The same bits of the student's loss and gradient; only one of the two reads pictures."""
    at, b = scene(), batch(0, 6)
    nets = Nets({"student": at.student, "fake": at.fake})
    dmd2 = method(at, gan=0.0, guidance=guidance, ratio=3)
    plain = DiffInstruct(dmd2.sampler, dmd2.times, L1(), ratio=3, guidance=guidance)
    assert [turn.net for turn in plain.turns(0)] == [turn.net for turn in dmd2.turns(0)]
    found = []
    for one in (dmd2, plain):
        loss = one.turns(0)[-1].loss(nets, at.teacher, b).total
        loss.backward()
        found.append(torch.cat([loss.detach()[None], at.student.gradient()]))
    assert torch.equal(*found)
    assert dmd2.needs_data
    assert not plain.needs_data
    with pytest.raises(ValueError, match=r"DiffInstruct.ratio is 1 or more, got 0"):
        DiffInstruct(ratio=0)
