"""Defaults of methods, which are EDM's noise levels, as times of another teacher's path.

Methods have the published settings of EDM, where the time is the noise level: a first call at 2.5,
log-normal levels. The times of Stable Diffusion are whole, from 0 to 999, and those of a flow go
from 0 to 1, so that the same numbers mean something else there, or nothing. What a person has left
at its default is therefore moved to the times of equal noise level sigma / alpha; what they have
written stays as it is.

Samplers of one fresh call start at an equal level, as SiD does (2.5 is about timestep 625 of
Stable Diffusion, https://arxiv.org/abs/2406.01561). Others, which follow a trajectory or renoise,
start at the noisiest time, with even steps, as published ones do; on timesteps from z itself, as
stock schedulers have it.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from fewstep.diffusion.noise_path import VE, VP, Bridge, NoisePath
from fewstep.diffusion.samplers import PURE_NOISE, FewStep
from fewstep.diffusion.time_distributions import Discrete, Karras, LogNormal, OfLevel, TimeLaw
from fewstep.diffusion.types import Sampler
from fewstep.distillation.method import Method

M = TypeVar("M", bound=Method)

EDMS = (Karras, LogNormal, Discrete)
"""Laws that defaults state in noise levels; the others are of shares or of flow times."""


def with_times_of(method: M, path: NoisePath) -> M:
    """`method` with its defaults in units of `path`.

    Returns it unchanged on EDM's own path (`VE`), on bridges, for methods of one kind of path
    (`Method.paths`), whose defaults are of that, and where nothing with a unit was left at its
    default. Doing it twice changes nothing.
    """
    if isinstance(path, VE | Bridge) or method.paths:
        return method
    moved: M = _part(method, path, method.of_levels)
    last = torch.tensor(path.t_max, dtype=torch.float64, device="cpu")
    pure = float(path.alpha(last)) <= PURE_NOISE * float(path.sigma(last))
    if method.needs_signal and pure and moved.sampler is not method.sampler:
        return replace(moved, sampler=_below_noise(moved.sampler, path))
    return moved


def _part(part: Any, path: NoisePath, kept: frozenset[str] = frozenset()) -> Any:
    """A part that was written out: those of its fields that are at their defaults, moved."""
    if not _holds_times(part):
        return part
    changes = {}
    for f in fields(part):
        value = getattr(part, f.name)
        if not f.init or f.name in kept:
            continue
        new = _whole(value, path) if value == _default(f) else _written(value, path)
        if new is not value:
            changes[f.name] = new
    return replace(part, **changes) if changes else part


def _written(value: Any, path: NoisePath) -> Any:
    """A value that is not its field's default."""
    if isinstance(value, Method):
        return _part(value, path, value.of_levels)
    if isinstance(value, Sampler):
        if hasattr(value, "sampler"):
            return _inside(value, _written(value.sampler, path))
        timed = [f for f in fields(value) if f.name in ("t_init", "times")]  # type: ignore[arg-type]
        left = all(getattr(value, f.name) == _default(f) for f in timed)
        return _sampler(value, path) if left else value
    return _part(value, path)


def _whole(value: Any, path: NoisePath) -> Any:
    """A value that is its field's default: all that has a unit in it, moved."""
    if isinstance(value, EDMS):
        return OfLevel(value, path)
    if isinstance(value, Sampler):
        return _sampler(value, path)
    if not _holds_times(value):
        return value
    new = {f.name: _whole(getattr(value, f.name), path) for f in fields(value) if f.init}
    changes = {name: v for name, v in new.items() if v is not getattr(value, name)}
    return replace(value, **changes) if changes else value


def _sampler(sampler: Any, path: NoisePath) -> Any:
    """A sampler from EDM's levels, on the path."""
    if hasattr(sampler, "sampler"):
        return _inside(sampler, _sampler(sampler.sampler, path))
    times = getattr(sampler, "times", ())
    if isinstance(times, TimeLaw):
        return replace(sampler, times=_whole(times, path))
    if isinstance(times, tuple) and times:
        return replace(sampler, times=(path.t_max, *(_time(t, path) for t in times[1:])))
    if getattr(sampler, "t_init", None) is None:
        return sampler
    if isinstance(sampler, FewStep) and sampler.steps == 1 and sampler.noise == "fresh":
        return replace(sampler, t_init=_time(sampler.t_init, path), rho=1.0)
    more = {"unit": True} if isinstance(sampler, FewStep) and isinstance(path, VP) else {}
    return replace(sampler, t_init=path.t_max, rho=1.0, **more)


def _below_noise(sampler: Any, path: NoisePath) -> Any:
    """A moved sampler, from the noisiest level of EDM instead of from pure noise."""
    if hasattr(sampler, "sampler"):
        return _inside(sampler, _below_noise(sampler.sampler, path))
    return replace(sampler, t_init=min(sampler.t_init, _time(VE().t_max, path)))


def _inside(sampler: Any, inner: Any) -> Any:
    return sampler if inner is sampler.sampler else replace(sampler, sampler=inner)


def _time(level: float, path: NoisePath) -> float:
    """The time of a noise level: a whole one on timesteps."""
    tau = torch.tensor(level / (1 + level), dtype=torch.float64, device="cpu")
    t = float(path.time_of(tau))
    return float(round(t)) if isinstance(path, VP) else t


def _holds_times(value: Any) -> bool:
    """Whether a value is a part of a method with fields of its own to look at."""
    plain = isinstance(value, type | TimeLaw | NoisePath)
    return is_dataclass(value) and not plain


def _default(f: Field[Any]) -> Any:
    """The default of a field; what equals nothing where it has none."""
    return f.default_factory() if f.default_factory is not MISSING else f.default
