"""Distil an exact mixture of eight Gaussians to one network call, in seconds on a CPU.

The teacher is known in closed form, so there is nothing to train but the student, and its
distance to the truth can be measured. Run: python examples/one_step_gaussian.py
"""

import torch

from fewstep import EMA, MLP, GaussianMixture, Latents, Model, Optim, SiD, train
from fewstep.eval.metrics import sliced_wasserstein

torch.manual_seed(0)
teacher = GaussianMixture.ring(count=8, radius=1.0, std=0.1)
truth, more_truth = teacher.sample(10_000), teacher.sample(10_000)

method = SiD(alpha=1.0)
net = Model(MLP(width=128, blocks=2), shape=(2,)).build(seed=0)
optim = Optim(lr=1e-3, betas=(0.0, 0.99), warmup=50, decay="linear")
z = torch.randn(10_000, 2)

for record in train(
    method, teacher, net, Latents((2,)), batch=256, steps=600, optim=optim, ema=EMA(20_000)
):
    if record.step % 100 == 0:
        with torch.no_grad():
            x = method.sampler(record.state.average, z)
        distance = sliced_wasserstein(x, truth)
        print(f"step {record.step:5d}  sliced Wasserstein distance to the truth {distance:.4f}")

print(
    f"one network call: {distance:.4f}; exact samples: {sliced_wasserstein(more_truth, truth):.4f}"
)
