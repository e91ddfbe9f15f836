"""Losses that learn their own size, on a small EDM2 network with its log-variance head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import LogNormal
from fewstep.diffusion.types import Batch
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import FakeScore, Rollout, add_noise, kl_direction, predict
from fewstep.distillation.guidance_scales import Unguided
from fewstep.losses.adversarial import cross_entropy, logits
from fewstep.losses.score import denoising, sid
from fewstep.losses.weight import L1, EDMWeight
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.teachers import edm2

KWARGS = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_channels": 16}
KWARGS |= {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "logvar_channels": 8}


def scene() -> tuple[Any, Any, Batch]:
    """Three different networks, whose heads answer with something else than zero."""
    nets = []
    for seed in range(3):
        with torch.random.fork_rng(devices=[]):  # its Fourier features are drawn
            torch.manual_seed(seed)
            net = edm2.new_network(KWARGS).eval()
        generator = torch.Generator().manual_seed(seed)
        for p in net.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator)
        nets.append(net)
    draws = Draws.range(0, 6)
    z, x0 = draws.normal("z", (1, 8, 8)), draws.normal("x0", (1, 8, 8))
    batch = Batch(z, draws.integers("label", 3), x0, draws)
    return {"student": nets[0], "fake": nets[1]}, nets[2], batch


def test_the_fake_score_weighs_its_loss_and_pays_for_it() -> None:
    nets, teacher, batch = scene()
    fake, rollout = nets["fake"], Rollout(FewStep(2.5), 1)
    x = FewStep(2.5)(nets["student"], batch.z, batch.cond).detach()
    n = add_noise(teacher.path, x, LogNormal(), batch)
    u = fake.logvar(n.t).reshape(-1, 1, 1, 1)
    assert u.std() > 0.1
    weight = EDMWeight()(x, x, n.alpha, n.sigma) * (-u).exp()
    expected = denoising(fake(n.xt, n.t, batch.cond), x, weight).mean() + u.mean()
    alone = FakeScore(logvar=True).turn(rollout).loss(nets, teacher, batch).total
    torch.testing.assert_close(alone, expected)
    without = FakeScore().turn(rollout).loss(nets, teacher, batch).total
    assert abs(float((without - expected).detach())) > 1e-3
    assert batch.x0 is not None
    m = add_noise(teacher.path, batch.x0, LogNormal(), batch)
    maps = [logits(fake.encode(at.xt, at.t, batch.cond)) for at in (m, n)]
    judged = weight.mean() * cross_entropy(*maps).mean()
    both = Critic(logvar=True, scale=100.0).turn(rollout, Unguided()).loss(nets, teacher, batch)
    torch.testing.assert_close(both.total, expected + 100 / 64 * judged)
    (slope,) = torch.autograd.grad(both.logs["discriminator"], u_parameter(fake))
    assert slope.abs().sum() > 0  # as published, the head hears the discriminator too


def u_parameter(net: Any) -> Tensor:
    """The weight of the log-variance head."""
    (name,) = [name for name, _ in net.named_parameters() if "logvar_linear" in name]
    found: Tensor = net.get_parameter(name)
    return found


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_student_trusts_what_is_certain(adversarial: bool) -> None:
    nets, teacher, batch = scene()
    critic = Critic(logvar=True)
    methods = (SiDA(fake=critic, share=0.0), SiD(fake=FakeScore(logvar=True), alpha=1.0))
    method = methods[0] if adversarial else methods[1]
    x = FewStep(2.5)(nets["student"], batch.z, batch.cond)
    p = predict(nets, teacher, batch, x, method.times, logvar=True)
    n = add_noise(teacher.path, x, method.times, batch)
    trust = (-nets["fake"].logvar(n.t)).exp().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(p.precision_weight, trust)
    weight = method.weight(x, p.real, p.alpha, p.sigma) * trust
    expected = sid(x, p.real, p.fake, 1.0, weight).mean()
    found = method.turns(0)[1].loss(nets, teacher, batch).total
    torch.testing.assert_close(found, expected)


def test_the_kl_direction_is_pushed_on_the_samples_alone() -> None:
    """w (f_psi - f_phi) / (B D) at the noised samples, whose way there has no part in it."""
    nets, teacher, batch = scene()
    assert batch.x0 is not None
    x, graphs = batch.x0.clone().requires_grad_(), []
    for net in (nets["fake"], teacher):
        net.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    kl_direction(nets, teacher, batch, x, LogNormal(), L1()).backward()
    assert graphs == [False, False]
    with torch.no_grad():
        n = add_noise(teacher.path, x, LogNormal(), batch)
        fake, real = (net(n.xt, n.t, batch.cond) for net in (nets["fake"], teacher))
        push = L1()(x, real, n.alpha, n.sigma) * (fake - real)
    torch.testing.assert_close(x.grad, push / x.numel())


class Headless(nn.Module):
    """A denoiser that says nothing of its own loss."""

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt


def test_a_network_without_the_head_is_refused() -> None:
    nets, teacher, batch = scene()
    nets["fake"] = Headless()
    with pytest.raises(ValueError, match=r"^Headless has no log-variance head; say logvar=False$"):
        predict(nets, teacher, batch, batch.z, LogNormal(), logvar=True)
