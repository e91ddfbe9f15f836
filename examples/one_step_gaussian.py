"""Distil a mixture of six Gaussians to one network call, in seconds on a CPU.

The teacher is exact, so the distance of the student to the truth can be measured. As always in
score distillation the student starts as a network that can already denoise.
Run: python examples/one_step_gaussian.py
"""

import torch

from fewstep import MLP, GaussianMixture, Images, Latents, Model, Optim, Pretrain, SiD, train
from fewstep.eval.metrics import sliced_wasserstein

torch.manual_seed(0)
teacher = GaussianMixture.ring(count=6, radius=1.0, std=0.2)
truth, more_truth, data = teacher.sample(30_000).split(10_000)
net = Model(MLP(width=128, blocks=2), shape=(2,), sigma_data=0.7).build(seed=0)

optim = Optim(lr=2e-3, betas=(0.9, 0.99), decay="cosine")
*_, last = train(Pretrain(), None, net, Images(data), batch=256, steps=600, optim=optim)
denoiser = last.state.average


def fit(x: torch.Tensor) -> float:
    """Mean log-likelihood: it sees samples between the components, which distances overlook."""
    return float(teacher.log_prob(x, torch.tensor(1e-3)).mean())


print("sliced Wasserstein distance to the truth, mean log-likelihood")
method, z = SiD(alpha=1.0), torch.randn(10_000, 2)
optim = Optim(lr=1e-3, betas=(0.0, 0.99), warmup=50, decay="linear")
steps = train(method, teacher, denoiser, Latents((2,)), batch=256, steps=800, optim=optim)
for record in steps:
    if record.step % 200 == 0:
        with torch.no_grad():
            x = method.sampler(record.state.average, z)
        print(f"step {record.step}: {sliced_wasserstein(x, truth):.3f}, {fit(x):.3f}")

print(f"exact samples: {sliced_wasserstein(more_truth, truth):.3f}, {fit(more_truth):.3f}")
