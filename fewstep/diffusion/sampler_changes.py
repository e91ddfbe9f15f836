"""The same sampler in another number of steps, or from the middle of the path.

    in_steps(FewStep(2.5), 4)                    FewStep(2.5, 4)
    from_share(Heun(), VE(), 0.5)                Heun's times below sigma = 1, and that one

A student is at its best in the steps it was trained for; what it does in others is worth seeing.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

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
