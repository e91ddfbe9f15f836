"""Distilled ODE solvers (D-ODE, Kim et al. 2023), https://arxiv.org/abs/2309.16421.

The predictions of a teacher along one trajectory are nearly parallel, so a few calls know where
the next predictions lie. To each step of a solver of K calls one number is added,

    x_(n+1) = step(x_n, f_n) + w_n (f_n - f_(n-1)),                                  n = 2, ..., K,

the one for which the step ends nearest to the teacher's trajectory X, a fine solution from the
same noise: with r_n = X_(n+1) - step(x_n, f_n) and e_n = f_n - f_(n-1),

    w_n = E <e_n, r_n> / E <e_n, e_n>.

DPM-Solver++(2M) is the member w_n = alpha_(n+1) (1 - e^-h) / (2 r_0) of this family over DDIM. The
paper adds w_n (f_n - f_(n-1)) to the prediction itself; multiplied by the step's own factor that
is the same family, of x_0 as of eps. The last step, to the data, has a number too.

Nothing is trained. The states x_n are those of the solver that is already corrected, so its
numbers are found one after another, each from noise of its own: step n of the run measures both
means over its batch. What is shipped is the teacher with that solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import CFG, AtScale
from fewstep.diffusion.linear_solver import LinearSolver, Number, Numbers, floats, walk
from fewstep.diffusion.types import Batch, Denoiser, Sampler, device_of
from fewstep.distillation.method import (
    Loss,
    Method,
    Nets,
    Product,
    Step,
    Turn,
    need_network,
)


class Scalars(nn.Module):
    """Sums of <e, r> and <e, e> for each of K steps, `products` (K, 2): a buffer."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.products: Tensor
        self.register_buffer("products", torch.zeros(calls, 2))

    def weights(self) -> Tensor:
        """w_n of each step, (K,); 0 where nothing was measured."""
        above, below = self.products.unbind(1)
        return torch.where(below > 0, above / torch.where(below > 0, below, 1), 0)


@dataclass(frozen=True)
class DODE(Method):
    """D-ODE: one least-squares number a step makes a solver follow the teacher's trajectory.

    It needs a teacher that is a network, and no data. ValueError for sizes out of range. Kim et
    al. 2023, https://arxiv.org/abs/2309.16421.
    """

    sampler: Sampler = LinearSolver(6)
    """A `LinearSolver`: the solver that is corrected, DDIM by default, with its K times."""
    fine: int = 10
    """Steps of the teacher for each of the solver's, even in the noise share sigma / (alpha +
    sigma); published: 10."""
    order: Literal[1, 2] = 2
    """Order of the teacher's steps: 1 is DDIM (published), 2 Heun's method, of twice the calls."""
    batches: int = 1
    """Steps of the run for each number; published: 1."""
    kappa: float = 1.0
    """Guidance scale of the teacher, part of the result; 1: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.sampler, LinearSolver) or self.sampler.calls < 2:
            raise ValueError(
                f"DODE.sampler is a LinearSolver of 2 steps or more, got {self.sampler}"
            )
        if min(self.fine, self.batches) < 1:
            raise ValueError(
                f"DODE needs fine and batches of 1 or more, got {self.fine} and {self.batches}"
            )

    @property
    def length(self) -> int:
        """`batches` for each number."""
        return (self.sampler.calls - 1) * self.batches

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """A "student" that is the numbers alone; ValueError where the teacher is no network."""
        need_network(self, teacher)
        return Nets({"student": Scalars(self.sampler.calls).to(device_of(net))})

    def turns(self, step: int) -> Sequence[Turn]:
        """One turn, which measures the number of one step."""
        n = min(1 + step // self.batches, self.sampler.calls - 1)
        return (Turn("student", partial(self.measure, n)),)

    def after_step(self, step: Step) -> None:
        """Add the sums of the step's samples."""
        if "products" in step.sums:
            scalars: Any = step.nets["student"]
            scalars.products += step.sums["products"].to(scalars.products)
            step.restart("student")

    def product(self, nets: Nets, average: nn.Module, teacher: Denoiser | None) -> Product:
        """The teacher, sampled by the corrected solver."""
        net: Any = need_network(self, teacher)
        scalars: Any = average
        weights = scalars.weights()
        if weights.is_meta:
            weights = torch.zeros(self.sampler.calls)
        found = self.corrected(net, weights.double())
        rows = (floats(found.a), floats(found.c))
        times = tuple(float(t) for t in found.times)
        told = tuple(float(t) for t in found.told)
        sampler = LinearSolver(times=times, told=told, a=rows[0], c=rows[1])
        return Product(net, sampler if self.kappa == 1 else CFG(sampler, self.kappa))

    def corrected(self, teacher: Denoiser, weights: Tensor) -> Numbers:
        """The solver's numbers with w_n (K,) added to its steps."""
        assert isinstance(self.sampler, LinearSolver)
        base = self.sampler.numbers(teacher.path)
        c: list[list[Number]] = [list(row) for row in base.c]
        for n in range(1, len(c)):
            c[n][n] = c[n][n] + weights[n]
            c[n][n - 1] = c[n][n - 1] - weights[n]
        return base._replace(c=c)

    @torch.no_grad()
    def measure(self, n: int, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """<e_n, r_n> and <e_n, e_n> of the samples of a batch.

        Args:
            n: the number of the step, from 0; its own number is left out.
            nets: the "student", whose earlier numbers are used.
            teacher: the teacher's denoiser.
            batch: its z (B, *) and cond are used.

        Returns: no total; logs "error", the mean of r_n^2; sums "products", (K, 2).
        """
        scalars: Any = nets["student"]
        guide = AtScale(teacher, self.kappa)
        weights = scalars.weights().clone()
        weights[n] = 0
        numbers = self.corrected(teacher, weights.to(batch.z))
        before, state = islice(walk(numbers, guide, batch.z, batch.cond), n - 1, n + 1)
        # The prediction of the last call is not in its state, which holds the sample.
        last = guide(state.xt, state.t, batch.cond) if n + 1 == self.sampler.calls else state.x0
        change = last - before.x0
        apart = self.trajectory(guide, batch, numbers, n) - state.xs
        pairs = torch.stack([(change * apart).sum(), (change * change).sum()])
        products = torch.zeros(self.sampler.calls, 2, dtype=pairs.dtype, device=pairs.device)
        products[n] = pairs
        return Loss(None, {"error": (apart**2).mean()}, {"products": products})

    def trajectory(self, teacher: Denoiser, batch: Batch, numbers: Numbers, n: int) -> Tensor:
        """X_(n+1), (B, *): where the teacher's fine steps from the noise lead after n + 1 steps.

        Beyond the last time they go on to the path's t_min, whose prediction is the sample.
        """
        path, ends = teacher.path, [*numbers.times[: n + 2]]
        last = n + 1 == len(numbers.times)
        ends += [path.t_min] if last else []
        knots = path.flow_time(torch.tensor(ends, dtype=torch.float64))
        x = path.sigma(batch.z.new_tensor(ends[0])) * batch.z
        for here, there in pairwise(knots):
            for t, s in pairwise(self.between(teacher, here, there, batch.z)):
                x0 = teacher(x, t.expand(len(x)), batch.cond)
                before, x = x0, path.ddim(x, x0, t, s)
                if self.order == 2:
                    x = path.heun(x, before, teacher(x, s.expand(len(x)), batch.cond), t, s)
        if last:
            x = teacher(x, x.new_full((len(x),), path.t_min), batch.cond)
        return x

    def between(self, teacher: Denoiser, tau: Tensor, end: Tensor, like: Tensor) -> Tensor:
        """The teacher's times from a noise share to a smaller one: (fine + 1,)."""
        shares = torch.linspace(0, 1, self.fine + 1, dtype=torch.float64)
        return teacher.path.time_of(tau + (end - tau) * shares).to(like)
