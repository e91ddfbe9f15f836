"""Samplers: few-step rollouts for students, the probability-flow ODE for teachers.

    FewStep      students: denoise, renoise, denoise, ...
    Ancestral    students: denoise, and draw the next state given both
    JumpBack     students: a step of twice the length, and noise to the time between
    Jumps        flow maps: from time to time, in one call each
    Heun         teachers: one call a step (DDIM), or two, to second order
    MultiStep    teachers: one call a step, to order two or three by the calls before it
    WithInput    any of them, of a denoiser that is told one more number

A sampler is a frozen dataclass and a pure function of (denoiser, z, cond, draws). None of them
disables gradients: a method may train through a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fewstep.diffusion.choices import require_choices
from fewstep.diffusion.constants import constant
from fewstep.diffusion.noise_path import VP, NoisePath, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.time_distributions import Karras, TimeLaw
from fewstep.diffusion.types import Cond, Denoiser, Sampler, State

PURE_NOISE = 2.0**-23
"""alpha / sigma below this is 0: TrigFlow has cos(pi / 2) = 6e-17."""


@dataclass(frozen=True)
class FewStep(Sampler):
    """The student's rollout: x^(0) = 0; x^(k) = f(alpha x^(k-1) + sigma eps_k, t_k).

    Attributes:
        t_init: t_1, the time of the first call, in units of the path.
        steps: K, the number of calls.
        noise: what noise calls after the first get: drawn anew ("fresh"), z again ("fixed"), or
            that which the last input and output imply ("ddim").
        rho: spacing of the times; 1 is even, larger values are closer near the data.
        unit: whether the first input is z itself, not sigma z; for VP paths.
        times: t_1 > ... > t_K themselves, in place of t_init, steps and rho.

    t_k = t_init (1 - (k - 1) / steps)^rho and eps_1 = z. One step is SiD's generator
    G(z) = f(sigma_init z; sigma_init), Zhou et al. 2024, https://arxiv.org/abs/2404.04057; several
    are few-step SiD, https://arxiv.org/abs/2505.12674.

    On a path of timesteps (VP) they are whole, ceil((t_init + 1) (1 - (k - 1) / steps)^rho) - 1,
    as networks and stock schedulers know them: from 999 in four steps 999, 749, 499, 249, which is
    DMD2's ladder (Yin et al. 2024, https://arxiv.org/abs/2405.14867).

    Raises ValueError for values out of range, and in a call where the times do not fit the path or
    fresh noise is needed and `draws` is None.
    """

    t_init: float = 2.5
    steps: int = 1
    noise: Literal["fresh", "fixed", "ddim"] = "fresh"
    """The noise of later steps: drawn anew, z again, or the noise that x^(k-1) was found in."""
    rho: float = 1.0
    """How the times are spaced: evenly, or (rho > 1) more closely near the data."""
    unit: bool = False
    """Whether the first input is z itself, not sigma z, as stock schedulers of several steps have
    it (a path of timesteps only; elsewhere sigma is 1, or the path has no unit)."""
    times: tuple[float, ...] = ()
    """The times of the calls, from the noisiest on; () for even ones from t_init."""

    def __post_init__(self) -> None:
        if self.times:
            self._take_times()
        _check(self)
        require_choices(self)

    @property
    def calls(self) -> int:
        """K, the number of steps."""
        return self.steps

    def _take_times(self) -> None:
        """Set t_init and steps from `times`; ValueError where they say otherwise."""
        times = self.times
        if list(times) != sorted(set(times), reverse=True) or times[-1] < 0:
            raise ValueError(f"FewStep.times decrease to 0 or a positive one; got {times}")
        if (
            self.t_init not in (FewStep.t_init, times[0])
            or self.steps not in (1, len(times))
            or self.rho != 1
        ):
            raise ValueError(
                f"FewStep.times {times} are in place of t_init, steps and rho; leave these out"
            )
        object.__setattr__(self, "t_init", times[0])
        object.__setattr__(self, "steps", len(times))

    def ladder(self, path: NoisePath) -> list[float]:
        """The times t_1 > ... > t_K on this path; ValueError where they do not fit it."""
        if self.times and isinstance(path, VP) and any(t % 1 for t in self.times):
            raise ValueError(f"timesteps are whole, got {self}")
        even = _ladder(self, path)
        return list(self.times) or even

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """K states from z (B, *), standard normal; x^(k) is the prediction of the k-th."""
        path, ladder = denoiser.path, [*self.ladder(denoiser.path), 0.0]
        if self.unit and not isinstance(path, VP):
            raise ValueError(f"{self}: unit noise is for timesteps, not for {path}")
        t = _times(z, ladder[0])
        xt = z if self.unit else perturb(path, torch.zeros_like(z), z, t)
        for k in range(1, self.steps + 1):
            x0 = denoiser(xt, t, cond)
            step = partial(self._renoised, k, z, draws) if k < self.steps else _data
            state = State(path, t, _times(x0, ladder[k]), xt, x0, step)
            yield state
            t, xt = state.s, state.xs

    def _renoised(self, k: int, z: Tensor, draws: Draws | None, state: State) -> Tensor:
        """The input of call k, counted from 0, after the state of the call before."""
        if self.noise == "ddim":
            return _ddim(state)
        if self.noise == "fresh":
            if draws is None:
                raise ValueError(f"{self} renoises with fresh noise: pass draws")
            z = draws.normal(f"eps{k}", state.x0.shape[1:], state.x0.dtype)
        return perturb(state.path, state.x0, z, state.s)


@dataclass(frozen=True)
class OnLadder(Sampler):
    """A sampler whose calls are at the times of a ladder, spaced as those of `FewStep`.

    Attributes:
        t_init: t_1, the time of the first call, in units of the path.
        steps: K, the number of calls.
        rho: spacing of the times; 1 is even, larger values are closer near the data.

    Raises ValueError for values out of range.
    """

    t_init: float
    steps: int = 1
    rho: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def calls(self) -> int:
        """K, the number of steps."""
        return self.steps

    def ladder(self, path: NoisePath) -> list[float]:
        """The times t_1 > ... > t_K on this path; ValueError where they do not fit it."""
        return _ladder(self, path)


@dataclass(frozen=True)
class Ancestral(OnLadder):
    """Ancestral sampling: x_s drawn given x_t and the prediction (`NoisePath.ancestral`).

    Attributes:
        t_init: t_1, the time of the first call, in units of the path.
        steps: K, the number of calls.
        rho: spacing of the times; 1 is even, larger values are closer near the data (`FewStep`).

    Of states with the law of noised data, predictions drawn from the law of x_0 given x_t make
    such states again. Ho et al. 2020, https://arxiv.org/abs/2006.11239, algorithm 2.

    Raises ValueError for values out of range, and in a call where the times do not fit the path or
    noise is needed and `draws` is None.
    """

    def at(self, path: NoisePath, share: Tensor) -> Tensor:
        """The time at a share of the ladder, 1 for t_1; the call k is at 1 - (k - 1) / K.

        share: in [0, 1], any shape -> the same shape, at least the path's t_min.
        """
        _ladder(self, path)
        if not isinstance(path, VP):
            return (self.t_init * share**self.rho).clamp(min=path.t_min)
        return ((self.t_init + 1) * share**self.rho - 1e-6).ceil().sub(1).clamp(min=0)

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """K states from z (B, *), standard normal."""
        path, ladder = denoiser.path, [*self.ladder(denoiser.path), 0.0]
        t = _times(z, ladder[0])
        xt = perturb(path, torch.zeros_like(z), z, t)
        for k in range(1, self.steps + 1):
            x0 = denoiser(xt, t, cond)
            step = partial(self._drawn, k, draws) if k < self.steps else _data
            state = State(path, t, _times(x0, ladder[k]), xt, x0, step)
            yield state
            t, xt = state.s, state.xs

    def _drawn(self, k: int, draws: Draws | None, state: State) -> Tensor:
        """The input of call k, counted from 0, after the state of the call before."""
        if draws is None:
            raise ValueError(f"{self} draws its states: pass draws")
        eps = draws.normal(f"eps{k}", state.x0.shape[1:], state.x0.dtype)
        return state.path.ancestral(state.xt, state.x0, eps, state.t, state.s)


@dataclass(frozen=True)
class JumpBack(OnLadder):
    """One deterministic step of twice the length, then noise for one step back.

        y = path.ddim(x_t, f(x_t, t_k), t_k, t_(k+2)),
        x_(k+1) = path.bridge(y, eps_k, t_(k+2), t_(k+1))

    Attributes:
        t_init: t_1, the time of the first call, in units of the path.
        steps: K, the number of calls.
        rho: spacing of the times; 1 is even, larger values are closer near the data (`FewStep`).

    The sampler of guided students by Meng et al. 2022, https://arxiv.org/abs/2210.03142, section
    3.3, after Karras et al. 2022. Calls are made at all K times, but a step from t_k is that of a
    student of K / 2 calls, so the student has to be trained for those at both parities
    (`ProgressiveDistillation` with this sampler). The step back gives x_(k+1) the law of the path
    at t_(k+1), if y has it. The last two steps lead to the data, and the last one stays there.

    Raises ValueError for values out of range, and in a call where the times do not fit the path or
    noise is needed and `draws` is None.
    """

    steps: int = 2

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """K states from z (B, *), standard normal."""
        path, ladder = denoiser.path, [*self.ladder(denoiser.path), 0.0]
        t = _times(z, ladder[0])
        xt = perturb(path, torch.zeros_like(z), z, t)
        for k in range(1, self.steps + 1):
            x0 = denoiser(xt, t, cond)
            far = _times(x0, ladder[k + 1]) if k + 1 < self.steps else None
            step = partial(self._back, k, far, draws) if k < self.steps else _data
            state = State(path, t, _times(x0, ladder[k]), xt, x0, step)
            yield state
            t, xt = state.s, state.xs

    def _back(self, k: int, far: Tensor | None, draws: Draws | None, state: State) -> Tensor:
        """The input of call k, counted from 0; far: where the step before ends, None for data."""
        if draws is None:
            raise ValueError(f"{self} steps back by noise: pass draws")
        path = state.path
        eps = draws.normal(f"eps{k}", state.x0.shape[1:], state.x0.dtype)
        if far is None:
            return perturb(path, state.x0, eps, state.s)
        return path.bridge(path.ddim(state.xt, state.x0, state.t, far), eps, far, state.s)


@dataclass(frozen=True)
class Jumps(OnLadder):
    """Jumps of a flow map along its ladder: x_s = path.ddim(x_t, g(x_t, t, s=s), t, s).

    Attributes:
        t_init: t_1, the time of the first call, in units of the path.
        steps: K, the number of calls.
        rho: spacing of the times; 1 is even, larger values are closer near the data (`FewStep`).

    g is a denoiser that takes the second time s by name (`Denoiser`). The last jump is to s = 0,
    and its g is the sample: on a path of timesteps, whose index 0 still carries noise, that leaves
    the noise out, as the last call of every sampler does, where `path.ddim` would keep it.
    Flow maps: Boffi et al. 2024, https://arxiv.org/abs/2406.07507.

    `part` returns g of call k; where the jump leads is the `xs` of its state.

    Raises ValueError for values out of range, and in a call where the times do not fit the path.
    """

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """K states from z (B, *), standard normal; `draws` is not used."""
        path, ladder = denoiser.path, [*self.ladder(denoiser.path), 0.0]
        flow_map: Any = denoiser
        t = _times(z, ladder[0])
        xt = perturb(path, torch.zeros_like(z), z, t)
        for k in range(1, self.steps + 1):
            s = _times(z, ladder[k])
            x0 = flow_map(xt, t, cond, s=s)
            state = State(path, t, s, xt, x0, _ddim if k < self.steps else _data)
            yield state
            t, xt = s, state.xs


@dataclass(frozen=True)
class Heun(Sampler):
    """The probability-flow ODE by Heun's method, Karras et al. 2022, algorithm 1.

    Attributes:
        times: the law whose quantiles on an even grid are the ladder t_1 > ... > t_n.
        steps: n, the number of times.
        order: 2 for Heun's method, 1 for DDIM (`NoisePath.ddim` between the times).

    Order 2 makes two calls between times and a last one that denoises from t_n: 2 steps - 1 in all
    (18 steps, 35 calls); order 1 makes `steps` calls. Flows are integrated in the noise level
    (`NoisePath.scale`), never in t itself, so that timesteps are as good as sigma.

    Raises ValueError for values out of range, and in a call where the ladder is not finite or ends
    at sigma = 0. https://arxiv.org/abs/2206.00364
    """

    times: TimeLaw = Karras()
    steps: int = 18
    order: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1 or self.order not in (1, 2):
            raise ValueError(f"Heun needs steps >= 1 and order 1 or 2, got {self}")

    @property
    def calls(self) -> int:
        """2 steps - 1 for order 2, `steps` for order 1."""
        return self.order * (self.steps - 1) + 1

    @property
    def trainable(self) -> bool:
        """Of order 1 alone, whose calls each have a time of their own."""
        return self.order == 1

    def grid(self, like: Tensor) -> Tensor:
        """The ladder of times: (steps,), decreasing, with dtype and device of `like`."""
        return constant(_grid(self), like)

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """From z (B, *), standard normal; `draws` is not used.

        Order 2 has two states between times: the step of DDIM, and at its end the correction.
        """
        path, grid = denoiser.path, self.grid(z)
        _check_ends(self, path)
        xt = perturb(path, torch.zeros_like(z), z, grid[0])
        for t, s in pairwise(grid):
            first = _state(path, t, s, xt, denoiser(xt, t, cond), partial(_to, t, s))
            yield first
            xt = first.xs
            if self.order == 2:
                step = partial(_corrected, first.x0, t, s)
                second = _state(path, s, s, xt, denoiser(xt, s, cond), step)
                yield second
                xt = second.xs
        t = grid[-1]
        yield _state(path, t, torch.zeros_like(t), xt, denoiser(xt, t, cond), _data)


@dataclass(frozen=True)
class MultiStep(Sampler):
    """The probability-flow ODE in one call a step, to higher order by the calls before it.

    Attributes:
        times: the law whose quantiles on an even grid are the ladder t_1 > ... > t_n, as
            of `Heun`.
        steps: n, the number of calls.
        kind: "dpm++" is DPM-Solver++(2M), Lu et al. 2022, https://arxiv.org/abs/2211.01095,
            algorithm 2; "unipc" is UniPC with B_2(h), Zhao et al. 2023,
            https://arxiv.org/abs/2302.04867, algorithms 5 and 6.
        order: of the solver: 2, or for "unipc" 2 or 3.

    In lambda = ln(alpha / sigma) a step of size h is that of DDIM, with x_0 moved to where the
    predictions x_i of other calls, at lambda_i, say that it goes:

        x_s = path.ddim(x_t, x_0 + sum_i rho_i (x_i - x_0) / r_i, t, s),
        r_i = (lambda_i - lambda_t) / h.

    One other call has rho = 1/2, several solve, with phi_1(x) = (e^x - 1) / x and
    phi_(k+1)(x) = (phi_k(x) - 1 / k!) / x,

        sum_i rho_i r_i^(k-1) = k! phi_(k+1)(-h) / phi_1(-h),    k = 1, 2, ...

    The other calls are the order - 1 before t. UniPC, once it knows the prediction at x_s, takes
    the step again with that among them (r = 1): no further call, but a better start of the next
    step. Of order 1 are the first step and one that has nothing but calls on pure noise before it;
    the step to t_n is of order 2 at most, and the last call's prediction is the sample.

    Raises ValueError for values out of range, and in a call where the ladder is not finite, does
    not decrease, or ends at sigma = 0.
    """

    times: TimeLaw
    steps: int
    kind: Literal["dpm++", "unipc"]
    order: int = 2

    def __post_init__(self) -> None:
        require_choices(self)
        if self.steps < 1 or self.order not in ((2,) if self.kind == "dpm++" else (2, 3)):
            raise ValueError(f"MultiStep needs steps >= 1 and order 2, or 3 of unipc, got {self}")

    @property
    def calls(self) -> int:
        """n, the number of steps."""
        return self.steps

    @property
    def trainable(self) -> bool:
        """False: where a step leads is not up to its own call alone."""
        return False

    def grid(self, like: Tensor) -> Tensor:
        """The ladder of times: (steps,), decreasing, with dtype and device of `like`."""
        return constant(_grid(self), like)

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """n states from z (B, *), standard normal; `draws` is not used.

        Their xt are what the denoiser is given: UniPC corrects them after the call.
        """
        path, grid = denoiser.path, self.grid(z)
        _check_ends(self, path)
        rungs = _log_ratios(self, path)
        before = xt = perturb(path, torch.zeros_like(z), z, grid[0])
        known: list[tuple[float, Tensor]] = []
        for k in range(self.steps - 1):
            t, s = grid[k], grid[k + 1]
            x0 = denoiser(xt, t, cond)
            x = xt
            if k > 0 and self.kind == "unipc":
                x = path.ddim(before, _moved(known, rungs[k], x0), grid[k - 1], t)
            known = [(rungs[k], x0), *known][: min(self.order, self.steps - k)]
            step = partial(_onward, x, known, rungs[k + 1], t, s)
            state = _state(path, t, s, xt, x0, step)
            yield state
            xt, before = state.xs, x
        t = grid[-1]
        yield _state(path, t, torch.zeros_like(t), xt, denoiser(xt, t, cond), _data)


@dataclass(frozen=True)
class WithInput(Sampler):
    """Sample a denoiser that is told one more number by name, the same in all calls.

    Attributes:
        sampler: the sampler that calls it.
        name: that of the input, such as "w" (`fewstep.diffusion.extra_inputs`).
        value: the number that the denoiser is told, in all calls.

    Raises ValueError where the value is not finite.
    """

    sampler: Sampler
    name: str
    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"WithInput.value is a finite number, got {self.value:g}")

    @property
    def calls(self) -> int:
        """Those of the sampler."""
        return self.sampler.calls

    @property
    def trainable(self) -> bool:
        """Whether the sampler is."""
        return self.sampler.trainable

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """The states of the sampler, one for each call of the denoiser so told."""
        return self.sampler.states(_Told(denoiser, self.name, self.value), z, cond, draws)


class _Told:
    """A denoiser with one input set."""

    def __init__(self, denoiser: Any, name: str, value: float) -> None:
        self.denoiser, self.named, self.path = denoiser, {name: value}, denoiser.path

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond = None, **named: Tensor) -> Tensor:
        mine = {
            name: torch.full((), value, device=xt.device) for name, value in self.named.items()
        }
        out: Tensor = self.denoiser(xt, t, cond, **mine, **named)
        return out


_Laddered: TypeAlias = FewStep | OnLadder
"""Samplers whose times follow from t_init, steps and rho."""


def ladder_of(sampler: Sampler, path: NoisePath) -> list[float] | None:
    """The times of a sampler's calls, from the noisiest on; None where it has no such ladder.

    ValueError where they do not fit the path.
    """
    while isinstance(sampler, WithInput):
        sampler = sampler.sampler
    ladder = getattr(sampler, "ladder", None)
    return None if ladder is None else list(ladder(path))


def _check(sampler: _Laddered) -> None:
    """Refuse fields that make no ladder."""
    if sampler.steps < 1 or sampler.t_init <= 0 or sampler.rho <= 0:
        name = type(sampler).__name__
        raise ValueError(f"{name} needs steps >= 1, t_init > 0 and rho > 0, got {sampler}")


def _ladder(sampler: _Laddered, path: NoisePath) -> list[float]:
    """t_k = t_init (1 - (k - 1) / steps)^rho on this path; ValueError where they do not fit."""
    parts = [(1 - k / sampler.steps) ** sampler.rho for k in range(sampler.steps)]
    whole = isinstance(path, VP)
    uneven = whole and (sampler.t_init % 1 or sampler.steps > sampler.t_init)
    if sampler.t_init > path.t_max or uneven:
        more = ", a whole one, and there are no more steps than timesteps below it"
        raise ValueError(
            f"{sampler} does not fit the times {path.t_min:g} to {path.t_max:g} of "
            f"{type(path).__name__}: t_init is one of them" + (more if whole else "")
        )
    if not whole:
        return [sampler.t_init * part for part in parts]
    return [float(math.ceil((sampler.t_init + 1) * part - 1e-6) - 1) for part in parts]


@lru_cache(maxsize=64)
def _grid(sampler: Heun | MultiStep) -> tuple[float, ...]:
    """The ladder of times, in double precision.

    Kept, as what follows from it is: numbers, that a traced graph may ask for.
    """
    u = torch.linspace(1, 0, sampler.steps, dtype=torch.float64)
    return tuple(sampler.times.quantile(u).tolist())


@lru_cache(maxsize=64)
def _check_ends(sampler: Heun | MultiStep, path: NoisePath) -> None:
    """Refuse a ladder that a solver would divide by zero on."""
    grid = torch.tensor(_grid(sampler))
    if not (float(path.sigma(grid[-1])) > 0 and bool(grid.isfinite().all())):
        raise ValueError(
            f"the ladder of {sampler} must be finite and end where there is still noise; it runs "
            f"from t = {float(grid[0]):g} to {float(grid[-1]):g}, so raise the law's lower end"
        )


def _times(x: Tensor, t: float) -> Tensor:
    """t for each sample of x: (B,)."""
    return x.new_full((x.shape[0],), t)  # not len(x), which a traced graph would keep


def _state(
    path: NoisePath, t: Tensor, s: Tensor, xt: Tensor, x0: Tensor, step: Callable[[State], Tensor]
) -> State:
    """A state whose t and s, both (), are those of all samples."""
    return State(path, t.expand(xt.shape[0]), s.expand(xt.shape[0]), xt, x0, step)


def _data(state: State) -> Tensor:
    """x_0: where the last call leads."""
    return state.x0


def _ddim(state: State) -> Tensor:
    return state.path.ddim(state.xt, state.x0, state.t, state.s)


def _to(t: Tensor, s: Tensor, state: State) -> Tensor:
    """As `_ddim`, with times that are (): numbers of one sample are not computed for each."""
    return state.path.ddim(state.xt, state.x0, t, s)


def _corrected(x0: Tensor, t: Tensor, s: Tensor, state: State) -> Tensor:
    """x_s to second order, after the call at it; x0: the prediction at t."""
    return state.path.heun(state.xt, x0, state.x0, t, s)


@lru_cache(maxsize=64)
def _log_ratios(sampler: MultiStep, path: NoisePath) -> list[float]:
    """lambda = ln(alpha / sigma) at the times of the ladder; -inf where alpha is 0 to rounding."""
    grid = torch.tensor(_grid(sampler), dtype=torch.float64)
    ratio = path.alpha(grid) / path.sigma(grid)
    rungs: list[float] = torch.where(ratio > PURE_NOISE, ratio.log(), -math.inf).tolist()
    if any(a >= b for a, b in pairwise(rungs)):
        raise ValueError(f"the noise should decrease along the ladder of {sampler}")
    return rungs


Known = Sequence[tuple[float, Tensor]]
"""Calls that were made, the last one first: (lambda, prediction (B, *))."""


def _onward(x: Tensor, known: Known, rung: float, t: Tensor, s: Tensor, state: State) -> Tensor:
    """x_s from x at t; rung: lambda_s."""
    return state.path.ddim(x, _moved(known, rung), t, s)


def _moved(known: Known, rung: float, at_end: Tensor | None = None) -> Tensor:
    """x_0 + sum_i rho_i (x_i - x_0) / r_i for a step from the last call to lambda = `rung`.

    at_end: (B, *), the prediction there, where it is known.
    """
    (start, x0), *before = known
    h = rung - start
    others = [((at - start) / h, x) for at, x in before if at > -math.inf]
    if at_end is not None:
        others.append((1.0, at_end))
    moved = x0
    for rho, (r, x) in zip(_rhos([r for r, _ in others], h), others, strict=True):
        moved = moved + rho / r * (x - x0)
    return moved


def _rhos(ratios: Sequence[float], h: float) -> list[float]:
    """The weights of `MultiStep` for calls at these r_i."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    first = phi = math.expm1(-h) / -h
    moments = []
    for k in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(k)) / -h
        moments.append(math.factorial(k) * phi / first)
    powers = np.vander(ratios, increasing=True).T
    solution: list[float] = np.linalg.solve(powers, moments).tolist()
    return solution


@dataclass(frozen=True)
class _Noted(Draws):
    """Draws that note what normal noise is asked for, and give zeros."""

    purposes: dict[str, None] = field(default_factory=dict)

    def normal(
        self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        self.purposes[self.prefix + purpose] = None
        return torch.zeros(len(self.index), *shape, dtype=dtype)

    def bits(self, purpose: str, count: int) -> Tensor:
        raise ValueError(f"the sampler draws other numbers than normal noise, for {purpose!r}")


@dataclass
class _Idle:
    """A denoiser that returns its input, by as many heads as it is asked for."""

    path: NoisePath
    head_count = None

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond = None, **named: Any) -> Tensor:
        return xt


class Course(NamedTuple):
    """What a sampler does whatever its denoiser says: the `course` of its calls."""

    times: list[float]
    """t of each state; of a guided one twice as many calls are made."""
    start: float
    """The first input of the denoiser, in units of z."""
    noises: int
    """How often noise is drawn beside z, as many numbers as a sample has each time."""


def course(sampler: Sampler, path: NoisePath) -> Course:
    """The course of a sampler on a path, found by a denoiser that costs nothing.

    ValueError where its times do not fit the path, and where it draws other numbers than normal
    noise.
    """
    z, draws = torch.ones(1, 1, dtype=torch.float64), _Noted(torch.zeros(1, dtype=torch.int64))
    states = list(sampler.states(_Idle(path), z, torch.zeros(1, dtype=torch.int64), draws))
    times = [float(state.t) for state in states]
    return Course(times, float(states[0].xt), len(draws.purposes))
