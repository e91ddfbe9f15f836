"""The same sampler in another number of steps, or from the middle of the path.

    in_steps(FewStep(2.5), 4)                    FewStep(2.5, 4)
    from_share(Heun(), VE(), 0.5)                Heun's times below sigma = 1, and that one
    last_calls(FewStep(2.5, 4), VE(), 0.5)       the last two of the four calls

A student is at its best in the steps it was trained for; what it does in others is worth seeing.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VP, NoisePath
from fewstep.diffusion.samplers import FewStep, Heun, MultiStep
from fewstep.diffusion.time_distributions import Discrete
from fewstep.diffusion.types import Sampler


def in_steps(sampler: Sampler, steps: int) -> Sampler:
    """`sampler` with another number of steps; the one within where it holds another.

    Times that were given one by one become even ones from the first of them. ValueError where it
    has a course of its own (times of several sizes, numbers that were fitted), or cannot have so
    many steps.
    """
    inner = getattr(sampler, "sampler", None)
    if isinstance(inner, Sampler):
        return _changed(sampler, sampler=in_steps(inner, steps))
    if getattr(sampler, "steps", None) == steps:
        return sampler
    if not _free(sampler):
        raise ValueError(
            f"this model is sampled in steps of its own, by {type(sampler).__name__}, in "
            f"{sampler.calls} calls; leave out the number of steps"
        )
    return _changed(sampler, steps=steps, **_without_times(sampler))


def from_share(sampler: Sampler, path: NoisePath, share: float) -> Sampler:
    """`sampler` from a noise share on: its first call is where sigma / (alpha + sigma) = share.

    share: in (0, 1); where it is beyond the sampler's own start, it starts as ever. Students make
    as many steps as before, from there; solvers of an ODE make those of their own times that are
    below it. "fixed" noise, which would be that of the start, is drawn anew in place of it.
    ValueError where the sampler has a course of its own.
    """
    inner = getattr(sampler, "sampler", None)
    kind: Any = sampler
    if isinstance(inner, Sampler):
        return _changed(sampler, sampler=from_share(inner, path, share))
    t = float(path.time_of(torch.tensor(share, dtype=torch.float64)))
    if isinstance(sampler, Heun | MultiStep):
        own: list[float] = sampler.grid(torch.empty(0, dtype=torch.float64)).tolist()
        t = min(t, own[0])
        times = sorted({time for time in own if time < t} | {t})
        return replace(sampler, times=Discrete(tuple(times)), steps=len(times))
    if not _free(sampler) or not hasattr(sampler, "t_init"):
        raise ValueError(f"{type(sampler).__name__} starts at its own times alone")
    t = min(t, path.t_max if kind.t_init is None else kind.t_init)
    if isinstance(path, VP):
        t = float(max(round(t), kind.steps))
    changes = {**_without_times(sampler), "t_init": t}
    if isinstance(sampler, FewStep) and sampler.noise == "fixed":
        changes["noise"] = "fresh"
    return _changed(sampler, **changes)


def last_calls(sampler: Sampler, path: NoisePath, strength: float) -> Sampler:
    """The last of a sampler's calls: a share `strength` of its times, as img2img has it.

    strength: in (0, 1]. Of N times int(N strength) are left on timesteps, and on other paths N
    less int(N - N strength): so diffusers' pipelines of Stable Diffusion, and those of flows,
    count them. "fixed" noise, which would be that of the start, is drawn anew in place of it.
    ValueError where no call is left, or the sampler has a course of its own.
    """
    inner = getattr(sampler, "sampler", None)
    kind: Any = sampler
    if isinstance(inner, Sampler):
        return _changed(sampler, sampler=last_calls(inner, path, strength))
    if not 0 < strength <= 1:
        raise ValueError(f"the strength is above 0, and at most 1, got {strength:g}")
    own = _times_of(sampler, path)
    count, share = len(own), len(own) * strength
    left = min(int(share), count) if isinstance(path, VP) else count - int(max(count - share, 0))
    if not left:
        raise ValueError(
            f"a strength of {strength:g} leaves none of {count} steps; {1 / count:.2g} leaves one"
        )
    times = tuple(own[count - left :])
    if isinstance(sampler, Heun | MultiStep):
        return replace(sampler, times=Discrete(tuple(reversed(times))), steps=left)
    changes: dict[str, Any] = {"noise": "fresh"} if kind.noise == "fixed" else {}
    even = {"t_init": times[0], "steps": left, "rho": 1.0}
    return _changed(sampler, **even, times=times, **changes)


def _times_of(sampler: Sampler, path: NoisePath) -> list[float]:
    """The times of a sampler that can start at any of them; ValueError for others."""
    if isinstance(sampler, Heun | MultiStep):
        grid: list[float] = sampler.grid(torch.empty(0, dtype=torch.float64)).tolist()
        return grid
    if not isinstance(sampler, FewStep):
        raise ValueError(
            f"{type(sampler).__name__} starts at its own times alone; a picture to start from is "
            "for teachers, and for students of FewStep"
        )
    return sampler.ladder(path)


def first_time(sampler: Sampler, path: NoisePath, like: Tensor) -> Tensor:
    """The time () of a sampler's first call, with dtype and device of `like`; without a call."""
    inner = innermost(sampler)
    ladder, grid = getattr(inner, "ladder", None), getattr(inner, "grid", None)
    if ladder is not None:
        return like.new_tensor(ladder(path)[0])
    assert grid is not None
    first: Tensor = grid(like)[0]
    return first


def starting(sampler: Sampler, path: NoisePath, x0: Tensor, eps: Tensor) -> Tensor:
    """The z (B, *) with which the sampler's first input is alpha x0 + sigma eps.

    x0, eps: (B, *), data and standard normal noise; alpha and sigma are those of its first time.
    """
    t = first_time(sampler, path, eps)
    alpha, sigma = path.alpha(t), path.sigma(t)
    whole = alpha * x0.to(eps) + sigma * eps
    inner = innermost(sampler)
    return whole if isinstance(inner, FewStep) and inner.unit else whole / sigma


def innermost(sampler: Sampler) -> Sampler:
    """The sampler that others wrap; itself where it wraps none."""
    inner = getattr(sampler, "sampler", None)
    return innermost(inner) if isinstance(inner, Sampler) else sampler


def _changed(sampler: Any, /, **changes: Any) -> Sampler:
    """`replace` of a sampler, all of which are dataclasses."""
    changed: Sampler = replace(sampler, **changes)
    return changed


def _free(sampler: Sampler) -> bool:
    """Whether its times follow from a number of steps."""
    names = {field.name for field in fields(sampler)}  # type: ignore[arg-type]
    return "steps" in names and not getattr(sampler, "a", ())


def _without_times(sampler: Sampler) -> dict[str, Any]:
    """The change that leaves out times that were given one by one."""
    given = isinstance(getattr(sampler, "times", None), tuple)
    return {name: () for name in ("times", "told") if given and hasattr(sampler, name)}
