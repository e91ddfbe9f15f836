"""Generalized adversarial solver (GAS, Oganov et al. 2025), https://arxiv.org/abs/2510.17699.

A solver of K calls that remembers everything it has seen,

    x_(n+1) = sum_(j <= n) a_nj x_j + c_nj f(x_j, u_j),

has all its numbers, and its times, fitted by gradient descent through all calls, so that it ends
where the teacher does from the same noise. It starts as DPM-Solver++(3M) (`LinearSolver`), whose
numbers A, C are computed from the present times at every step, with learned corrections:

    a_nj = A_nj + da_nj / (alpha_j + sigma_j),    c_nj = C_nj + dc_nj,    da = dc = 0 at the start.

Times are made by breaking a stick, t_1 fixed, t_(n+1) = t_min + (t_n - t_min) sigmoid(theta_n),
from those of the sampler; the network is told u_n = t_n e^(xi_n), xi = 0 at the start. Divided by
alpha + sigma, states of all sizes are served by one learning rate. The paper adds xi_n to t_n, and
its last step ends at t_min, where here it is the sample. Of the pairs (z, y) of the teacher,

    L = E d(x(z) - y) + gan E softplus(D(y', c) - D(x(z', c), c)),

with z', y' of different noise and of one condition c. D learns by the relativistic loss with R1
and R2, gamma = 0.2, as R3GAN. Published: d is LPIPS for pictures, and for latents the absolute
difference, which it is here; D is R3GAN's network, pretrained for pictures, and here one of its
own that starts as the teacher's encoder. With gan = 0 it is GS, the solver without adversary,
for which 1,400 pairs were enough, and 5,000 with one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import CFG, AtScale
from fewstep.diffusion.linear_solver import (
    LinearSolver,
    Number,
    Numbers,
    floats,
    is_pure_noise,
    rows_of_order,
    walk,
)
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.types import Batch, Cond, Denoiser, Sampler, device_of
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.method import Loss, Method, Nets, Product, Turn, need_network
from fewstep.distillation.pairs import Pairs, pair_of
from fewstep.losses.adversarial import GradientPenalty
from fewstep.losses.distance import Distance, SumOfAbsolutes, regression


class SolverNumbers(nn.Module):
    """What is learned of a solver of K calls: theta (K - 1), xi (K), da and dc (K, K).

    Args:
        solver: whose times and order it starts from.
        path: the noise path.
        dtype: of the parameters.
    """

    def __init__(self, solver: LinearSolver, path: NoisePath, dtype: torch.dtype) -> None:
        super().__init__()
        ladder = solver.ladder(path)
        self.path, self.order, self.top = path, solver.order, ladder[0]
        self.pure = is_pure_noise(path, ladder[0])
        count = len(ladder)
        above = torch.tensor(ladder, dtype=torch.float64) - path.t_min
        share = (above[1:] / above[:-1]).clamp(1e-4, 1 - 1e-4)
        self.theta = nn.Parameter(share.logit().to(dtype))
        self.xi = nn.Parameter(torch.zeros(count, dtype=dtype))
        self.da = nn.Parameter(torch.zeros(count, count, dtype=dtype))
        self.dc = nn.Parameter(torch.zeros(count, count, dtype=dtype))

    def times(self) -> Tensor:
        """t_1 > ... > t_K: (K,)."""
        low = self.path.t_min
        left = torch.cat([self.theta.new_ones(1), self.theta.sigmoid().cumprod(0)])
        return low + (self.top - low) * left

    def numbers(self) -> Numbers:
        """The solver's numbers, with a gradient."""
        path, times = self.path, self.times()
        told = (times * self.xi.exp()).clamp(path.t_min, path.t_max)
        a, c = rows_of_order(path, times, self.order, self.pure)
        size = path.alpha(times) + path.sigma(times)
        return Numbers(
            times.unbind(),
            told.unbind(),
            _added(a, self.da / size),
            _added(c, self.dc),
        )


def _added(rows: list[list[Number]], moves: Tensor) -> list[list[Number]]:
    """Rows of 1, ..., K numbers and the lower triangle of a matrix (K, K)."""
    return [[x + moves[n, j] for j, x in enumerate(row)] for n, row in enumerate(rows)]


@dataclass(frozen=True)
class GAS(Method):
    """GAS: a solver of few calls, fitted to the teacher's samples from the same noise.

    It needs a teacher that is a network, whose samples are made first, and no data. ValueError
    where the sampler is no `LinearSolver`, or the discriminator reads a fake score. Oganov et al.
    2025, https://arxiv.org/abs/2510.17699.
    """

    sampler: Sampler = LinearSolver(5, order=3)
    """A `LinearSolver`: the number of calls, and the times and order that it starts from."""
    pairs: Pairs = Pairs()
    """The teacher's samples that the solver is fitted to."""
    distance: Distance = SumOfAbsolutes()
    """d, divided by the number of a sample's dimensions."""
    gan: float = 0.1
    """Weight of the adversarial loss (published: 0.1, and 1 for Stable Diffusion); 0: GS."""
    judge: Discriminator = Discriminator(
        times=None,
        features="own",
        loss="relativistic",
        penalty=GradientPenalty(0.2, 0.2),
    )
    """Tells the solver's samples from the teacher's."""
    updates: int = 300
    """Steps of the run; published: 10,000, and 2,000 for Stable Diffusion, at a rate of 1e-3."""
    rate: float = 5.0
    """The solver's learning rate, as a multiple of the run's."""
    judge_rate: float = 0.05
    """The discriminator's, as a multiple of the run's (published: a hundredth of the solver's)."""
    kappa: float = 1.0
    """Guidance scale of the teacher while it is sampled by the solver, part of the result; the
    pairs are made by the teacher's own sampler (`pairs.sampler`), guided by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sampler, LinearSolver) or self.sampler.a:
            raise ValueError(
                f"GAS.sampler is a LinearSolver without numbers a and c, which are what is "
                f"learned; got {self.sampler}"
            )
        if self.gan < 0 or self.updates < 1 or min(self.rate, self.judge_rate) <= 0:
            raise ValueError(
                "GAS needs gan of 0 or more, updates of 1 or more and rates above 0, got "
                f"{self.gan:g}, {self.updates}, {self.rate:g} and {self.judge_rate:g}"
            )
        if self.judge.features == "fake":
            raise ValueError("GAS has no fake score to judge by: features are 'teacher' or 'own'")

    @property
    def couples_samples(self) -> bool:
        """As of the discriminator."""
        return self.gan > 0 and self.judge.couples_samples

    @property
    def length(self) -> int:
        """`updates`."""
        return self.updates

    def needs_pairs(self) -> Pairs:
        """The pairs."""
        return self.pairs

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """A "student" that is the solver's numbers, and a "discriminator" where there is one.

        ValueError where the teacher is no network, or the times do not fit its path.
        """
        known: Any = need_network(self, teacher)
        assert isinstance(self.sampler, LinearSolver)
        first = next((p.dtype for p in net.parameters()), torch.float32)
        dtype = torch.promote_types(first, torch.float32)
        numbers = SolverNumbers(self.sampler, known.path, dtype).to(device_of(net))
        nets = Nets({"student": numbers})
        if self.gan:
            judges = self.judge.equipped(Nets({"student": deepcopy(net)}), known)
            nets["discriminator"] = judges["discriminator"]
        return nets

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the discriminator, where there is one, and one of the solver."""
        solver = Turn("student", self.student_loss, self.rate)
        if not self.gan:
            return (solver,)
        return Turn("discriminator", self.judge_loss, self.judge_rate), solver

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """The teacher, sampled by the solver."""
        net: Any = need_network(self, teacher)
        solver: Any = average
        if solver.theta.is_meta:
            return Product(net, self.sampler)
        with torch.no_grad():
            found = solver.numbers()
        (times, told), (a, c) = floats(found[:2]), map(floats, found[2:])
        sampler = LinearSolver(times=times, told=told, a=a, c=c)
        return Product(net, sampler if self.kappa == 1 else CFG(sampler, self.kappa))

    def solved(self, nets: Nets, teacher: Denoiser, z: Tensor, cond: Cond) -> Tensor:
        """The solver's samples of z (B, *), with a gradient through all calls."""
        solver: Any = nets["student"]
        states = walk(solver.numbers(), AtScale(teacher, self.kappa), z, cond)
        return deque(states, maxlen=1).pop().x0

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The solver's loss.

        Args:
            nets: the "student", and the "discriminator" where there is one.
            teacher: the teacher's denoiser.
            batch: its pairs, and z for the adversarial loss.

        Returns: the mean over the batch; logs "distance", and "gan_loss" where there is one.

        Raises ValueError where the batch has no pairs.
        """
        pair = pair_of(self, batch)
        made = self.solved(nets, teacher, pair.z, pair.cond)
        apart = regression(self.distance, made, pair.x0).mean()
        if not self.gan:
            return Loss(apart, {"distance": apart})
        other = self.solved(nets, teacher, batch.z, pair.cond)
        noised = self.judge.noised(teacher.path, other, batch)
        real = batch._replace(x0=pair.x0, cond=pair.cond)
        fooled = self.judge.fool(nets, teacher, real, noised, pair.cond)
        total = apart + self.gan * fooled.total
        return Loss(total, {"distance": apart, "gan_loss": fooled.gan_loss})

    def judge_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The discriminator's loss, on the solver's samples of z and the teacher's of the pairs.

        Arguments and errors as of `student_loss`; logs as of `Discriminator.judge`.
        """
        pair = pair_of(self, batch)
        with torch.no_grad():
            made = self.solved(nets, teacher, batch.z, pair.cond)
        both = self.judge.pair(teacher.path, made, pair.x0, batch)
        return self.judge.judge(nets, teacher, batch, both, pair.cond)
