"""Solvers that are linear in all they have seen, states and predictions.

    x_(n+1) = sum_(j <= n) a_nj x_j + c_nj f(x_j, u_j),    x_1 = sigma_1 z,

is one call a step, and the last row gives the sample. DDIM and DPM-Solver++ are such solvers, with
numbers that follow from the noise path and the times t_1 > ... > t_K. With lambda = ln(alpha /
sigma), h = lambda_(n+1) - lambda_n, r_i h the distance in lambda between the calls n - i and
n - i - 1, phi_1 = e^-h - 1, phi_2 = phi_1 / h + 1, phi_3 = phi_2 / h - 1 / 2 and f_n the
prediction of call n,

    x_(n+1) = sigma_(n+1) / sigma_n x_n - alpha_(n+1) phi_1 f_n                          order 1
              - alpha_(n+1) phi_1 / 2 e_0                                                order 2
              + alpha_(n+1) (phi_2 (e_0 + r_0 d) - phi_3 d)              in its place,   order 3
    e_i = (f_(n-i) - f_(n-i-1)) / r_i,    d = (e_0 - e_1) / (r_0 + r_1).

Lu et al. 2022, https://arxiv.org/abs/2211.01095, equations of DPM-Solver++(2M) and (3M). Order 3
is as published: Taylor's formula has 2 phi_3, so that its order of convergence is 2. Others are
fitted to a teacher (`fewstep.methods.dode`, `fewstep.methods.gas`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VP, NoisePath, same_shape
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import PURE_NOISE
from fewstep.diffusion.types import Cond, Denoiser, Sampler, State

Number = float | Tensor
"""A float, or a tensor ()."""
Rows = Sequence[Sequence[Number]]
"""Row n has n + 1 numbers."""


class Numbers(NamedTuple):
    """Everything of a linear solver: times (K), told (K), the times that the network is told, and
    the rows a and c.
    """

    times: Sequence[Number]
    told: Sequence[Number]
    a: Rows
    c: Rows


@dataclass(frozen=True)
class LinearSolver(Sampler):
    """A solver of one call a step, linear in all states and predictions so far.

    Attributes:
        steps: K, the number of calls.
        t_init: t_1, the time of the first call; None: the largest of the path.
        shift: spacing of the times: they are even in v, with the noise level sigma / alpha =
            shift v / (1 - v); smaller values are closer near the data.
        order: of the solver whose numbers a and c follow from the times: 1 for DDIM, 2 and 3 for
            DPM-Solver++.
        times: t_1 > ... > t_K themselves, in place of steps, t_init and shift.
        told: the times that the network is told; () for those of the calls.
        a: what states are multiplied by, K rows of 1, 2, ..., K numbers; () for those of `order`.
        c: what predictions are multiplied by, as a.

    On a path of timesteps (VP) times that are not given are whole. Numbers a and c that are given
    hold for the path they were found on, and for no other.

    Raises ValueError for values out of range or rows of other lengths, and in a call where the
    times do not fit the path.
    """

    steps: int = 6
    t_init: float | None = None
    shift: float = 0.5
    order: int = 1
    times: tuple[float, ...] = ()
    told: tuple[float, ...] = ()
    a: tuple[tuple[float, ...], ...] = ()
    c: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        times = self.times
        if times:
            if list(times) != sorted(set(times), reverse=True) or times[-1] < 0:
                raise ValueError(f"LinearSolver.times decrease to 0 or above, got {times}")
            object.__setattr__(self, "steps", len(times))
            object.__setattr__(self, "t_init", times[0])
        if self.steps < 1 or self.shift <= 0 or self.order not in (1, 2, 3):
            raise ValueError(
                "LinearSolver needs steps >= 1, shift > 0 and order 1, 2 or 3; got "
                f"{self.steps}, {self.shift:g} and {self.order}"
            )
        triangle = tuple(range(1, self.steps + 1))
        lengths = [tuple(map(len, rows)) for rows in (self.a, self.c)]
        if lengths not in ([(), ()], [triangle, triangle]) or (self.a and not times):
            raise ValueError(
                f"LinearSolver.a and c are both empty, or have rows of 1 to {self.steps} numbers "
                f"beside its times; got rows of {lengths[0]} and {lengths[1]}"
            )
        if len(self.told) not in (0, self.steps) or (self.told and not times):
            raise ValueError(f"LinearSolver.told has one time for each of {times}")

    @property
    def calls(self) -> int:
        """K, the number of steps."""
        return self.steps

    @property
    def trainable(self) -> bool:
        """False: where a step leads is not up to its own call alone."""
        return False

    def ladder(self, path: NoisePath) -> list[float]:
        """The times t_1 > ... > t_K on this path; ValueError where they do not fit it."""
        return list(_ladder(self, path))

    def numbers(self, path: NoisePath) -> Numbers:
        """Its numbers on this path, floats; ValueError where the times do not fit it."""
        return _numbers(self, path)

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """K states from z (B, *), standard normal; `draws` is not used.

        The last one's x0 is the sample, and the others' are predictions.
        """
        return walk(self.numbers(denoiser.path), denoiser, z, cond)


def walk(numbers: Numbers, denoiser: Denoiser, z: Tensor, cond: Cond = None) -> Iterator[State]:
    """The states of a linear solver; its numbers may be tensors (), with a gradient.

    z: (B, *), standard normal. As of `LinearSolver.states`. ValueError where the denoiser gives
    another shape than it was given.
    """
    path, count = denoiser.path, z.shape[0]
    times = [_scalar(z, t) for t in (*numbers.times, 0.0)]
    told = [_scalar(z, t) for t in numbers.told]
    x, seen = path.sigma(times[0]) * z, list[Tensor]()
    before: list[Tensor] = []
    for n, (t, s) in enumerate(pairwise(times)):
        x0 = denoiser(x, told[n].expand(count), cond)
        same_shape(xt=x, x0=x0)
        before.append(x)
        seen.append(x0)
        ahead = partial(_row, numbers.a[n], numbers.c[n], tuple(before), tuple(seen))
        t, s = t.expand(count), s.expand(count)
        if n + 1 == len(told):
            yield State(path, t, s, x, ahead(None), _sample)
            return
        state = State(path, t, s, x, x0, ahead)
        yield state
        x = state.xs


def _scalar(z: Tensor, number: Number) -> Tensor:
    """A number as a tensor (), with dtype and device of z."""
    return number.to(z) if isinstance(number, Tensor) else z.new_full((), number)


def _row(
    a: Sequence[Number],
    c: Sequence[Number],
    states: Sequence[Tensor],
    predictions: Sequence[Tensor],
    _: State | None,
) -> Tensor:
    """sum_j a_j x_j + c_j f_j; what is the number 0 costs nothing."""
    numbers, tensors = (*a, *c), (*states, *predictions)
    terms = [
        k * x for k, x in zip(numbers, tensors, strict=True) if isinstance(k, Tensor) or k != 0
    ]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(states[-1])


def _sample(state: State) -> Tensor:
    return state.x0


def rows_of_order(
    path: NoisePath, times: Tensor, order: int, pure: bool
) -> tuple[list[list[Number]], list[list[Number]]]:
    """The rows a and c of DDIM (order 1) or DPM-Solver++ (2, 3), with a gradient in the times.

    Args:
        path: the noise path.
        times: (K,), decreasing.
        order: 1, 2 or 3; lower in the first steps, which know fewer calls.
        pure: whether the first time is one of pure noise, at which lambda is not finite: that
            call tells no slope.

    Returns: rows of 1, ..., K numbers, () tensors or 0; the last one is the last prediction.
    """
    alpha, sigma = path.alpha(times), path.sigma(times)
    rungs = (alpha / sigma).log()
    a: list[list[Number]] = []
    c: list[list[Number]] = []
    for n in range(len(times) - 1):
        ratio = sigma[n + 1] / sigma[n]
        gain = alpha[n + 1] - ratio * alpha[n]
        a.append([0.0] * n + [ratio])
        row: list[Number] = [0.0] * n + [gain]
        known = min(order, n + 1 - pure)
        if known > 1:
            h = rungs[n + 1] - rungs[n]
            slopes = [(rungs[n - i] - rungs[n - i - 1]) / h for i in range(known - 1)]
            moves = [gain / 2 / slopes[0]] if known == 2 else _third(alpha[n + 1], h, *slopes)
            for i, move in enumerate(moves):  # times f_(n-i) - f_(n-i-1)
                row[n - i] = row[n - i] + move
                row[n - i - 1] = row[n - i - 1] - move
        c.append(row)
    nothing: list[Number] = [0.0] * len(times)
    return [*a, nothing], [*c, [*nothing[1:], 1.0]]


def _third(alpha: Tensor, h: Tensor, r0: Tensor, r1: Tensor) -> list[Tensor]:
    """What the two last differences of predictions are multiplied by, to order 3 as published."""
    phi2 = torch.expm1(-h) / h + 1
    phi3 = phi2 / h - 0.5
    d = (phi2 * r0 - phi3) / (r0 + r1)
    return [alpha * (phi2 + d) / r0, -alpha * d / r1]


def is_pure_noise(path: NoisePath, t: float) -> bool:
    """Whether alpha / sigma at t is 0 to rounding."""
    at = torch.tensor(t, dtype=torch.float64)
    return float(path.alpha(at) / path.sigma(at)) < PURE_NOISE


@lru_cache(maxsize=64)
def _ladder(solver: LinearSolver, path: NoisePath) -> tuple[float, ...]:
    """The times; kept, as floats that a traced graph may ask for."""
    top = path.t_max if solver.t_init is None else solver.t_init
    if solver.times:
        ladder = solver.times
    else:
        tau = float(path.flow_time(torch.tensor(top, dtype=torch.float64)))
        first = tau / (tau + solver.shift * (1 - tau))
        v = first * torch.arange(solver.steps, 0, -1, dtype=torch.float64) / solver.steps
        even = path.time_of(solver.shift * v / (1 + (solver.shift - 1) * v))
        even = even.round() if isinstance(path, VP) else even
        ladder = (top, *even[1:].tolist())
    fits = path.t_max >= ladder[0] and float(path.sigma(torch.tensor(ladder[-1]))) > 0
    if not fits or any(t <= s for t, s in pairwise(ladder)):
        raise ValueError(
            f"LinearSolver from t = {top:g} in {solver.steps} steps does not fit the times "
            f"{path.t_min:g} to {path.t_max:g} of {type(path).__name__}: its times decrease, from "
            "one of them to where there is still noise"
        )
    return tuple(ladder)


@lru_cache(maxsize=64)
def _numbers(solver: LinearSolver, path: NoisePath) -> Numbers:
    ladder = _ladder(solver, path)
    told = solver.told or ladder
    if solver.a:
        return Numbers(ladder, told, solver.a, solver.c)
    times = torch.tensor(ladder, dtype=torch.float64)
    a, c = rows_of_order(path, times, solver.order, is_pure_noise(path, ladder[0]))
    return Numbers(ladder, told, floats(a), floats(c))


def floats(rows: Rows) -> tuple[tuple[float, ...], ...]:
    """Rows of tensors () as rows of numbers."""
    return tuple(tuple(float(number) for number in row) for row in rows)
