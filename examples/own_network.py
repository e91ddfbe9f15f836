"""A teacher and a network of one's own: any nn.Module that predicts noise, velocity, v or x_0.

The module below predicts the velocity of a rectified flow. `Velocity` makes a denoiser of it once;
from there on it is trained, sampled and distilled as any other.
Run: python examples/own_network.py
"""

import torch
from torch import Tensor, nn

from fewstep import (
    FewStep,
    Flow,
    GaussianMixture,
    Heun,
    Images,
    Latents,
    Optim,
    Pretrain,
    SiD,
    train,
)
from fewstep.diffusion.denoisers import Velocity
from fewstep.diffusion.time_distributions import Uniform
from fewstep.distillation.fake_score import FakeScore
from fewstep.losses.weight import Power

RING = GaussianMixture.ring(count=6, std=0.2)


class Field(nn.Module):
    """v(x_t, t): (B, 2), (B,) -> (B, 2)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)),
        )
        self.register_buffer("frequencies", 2.0 ** torch.arange(4))

    def forward(self, xt: Tensor, t: Tensor, cond: None = None) -> Tensor:
        angle = t.reshape(-1, 1) * self.frequencies
        return self.body(torch.cat([xt, angle.sin(), angle.cos()], 1))


def fit(x: Tensor) -> float:
    """Mean log-likelihood of samples (B, 2) under the exact mixture; -2.0 is a smeared ring."""
    return float(RING.log_prob(x, torch.tensor(1e-3)).mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    times = Uniform(0.02, 0.98)
    net, data = Velocity(Field(), Flow()), Images(RING.sample(20_000))
    method = Pretrain(times=times, weight=Power(0, -2))
    optim = Optim(lr=2e-3, betas=(0.9, 0.99), decay="cosine")
    *_, taught = train(method, None, net, data, batch=512, steps=1500, optim=optim)
    teacher = taught.state.average

    method = SiD(FewStep(t_init=0.95), alpha=1.0, times=times, fake=FakeScore(times, Power(0, -2)))
    optim = Optim(lr=1e-3, betas=(0.0, 0.99), warmup=50, decay="linear")
    *_, last = train(method, teacher, teacher, Latents((2,)), batch=512, steps=600, optim=optim)

    z = torch.randn(10_000, 2)
    with torch.no_grad():
        print(f"exact samples: {fit(RING.sample(10_000)):.2f}")
        print(f"teacher, 39 network calls: {fit(Heun(times, steps=20)(teacher, z)):.2f}")
        print(f"student, one call: {fit(method.sampler(last.state.average, z)):.2f}")
