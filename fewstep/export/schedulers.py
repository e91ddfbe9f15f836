"""A few-step trajectory as the configuration of a stock scheduler.

A few-step model is spoilt by the wrong timesteps more often than by its weights, and stock
pipelines know `num_inference_steps` alone. So the trajectory is put where they look: a scheduler
whose betas *end* at t_init counts down from there by itself.

    one step              EulerDiscreteScheduler on betas[: t_init + 1], "trailing"
    fresh noise, unit     LCMScheduler on them, every timestep one of its own
    "ddim", unit          DDIMScheduler on them, "trailing"
    flow, one step        FlowMatchEulerDiscreteScheduler without shift
    flow, fresh           the same, stochastic, its ladder stretched to end at 1 / steps
    flow, "ddim"          the same, not stochastic

Euler's scheduler alone begins at sigma z, which is where a one-step student of SiD begins; the
others begin at z, hence several steps on betas need `FewStep(unit=True)`. So does one step of
PixArt, whose pipeline asks its scheduler for something that Euler's does not return.

What is linear in states and predictions, but stock schedulers do not follow (times that are not
even, numbers of its own), is a scheduler of its own file, `fewstep.export.fewstep_solver`, which
an exported pipeline brings along.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fewstep.diffusion.linear_solver import LinearSolver
from fewstep.diffusion.noise_path import VP, Flow, NoisePath
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Sampler
from fewstep.teachers.diffusers.network import require_library

Config = dict[str, Any]
_PREDICTION = {"eps": "epsilon", "v": "v_prediction"}


def stock_scheduler(
    sampler: FewStep, path: NoisePath, predicts: str, pipeline: str
) -> tuple[str, Config]:
    """(class of the scheduler, its configuration) for this trajectory; a ValueError if none is."""
    if sampler.noise == "fixed" and sampler.steps > 1:
        raise ValueError(
            "no stock scheduler repeats the same noise; students for export are trained with "
            "FewStep(noise='fresh') or 'ddim'"
        )
    if sampler.ladder(path) != FewStep(sampler.t_init, sampler.steps).ladder(path):
        raise ValueError(f"stock schedulers space their times evenly; {sampler} does not")
    if isinstance(path, Flow):
        return "FlowMatchEulerDiscreteScheduler", _flow(sampler)
    if not isinstance(path, VP) or predicts not in _PREDICTION:
        raise ValueError(f"no stock scheduler is known for {predicts} on {path}")
    if not sampler.unit and (sampler.steps > 1 or pipeline.startswith("PixArt")):
        raise ValueError(
            f"the schedulers of {pipeline} in {sampler.steps} steps start at unit noise, which "
            f"{sampler} does not; students for export are trained with FewStep(unit=True)"
        )
    ladder = sampler.ladder(path)
    count = int(ladder[0]) + 1
    config: Config = {
        "num_train_timesteps": count,
        "trained_betas": betas(path)[:count],
        "prediction_type": _PREDICTION[predicts],
        "steps_offset": 1,
    }
    if not sampler.unit:
        return "EulerDiscreteScheduler", {**config, "timestep_spacing": "trailing"}
    if sampler.noise == "ddim":
        more = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
        return "DDIMScheduler", {**config, **more}
    # c_skip of a consistency model goes to zero with its scaling: x_0 as it is predicted
    more = {"original_inference_steps": count, "timestep_scaling": 1e6}
    return "LCMScheduler", {**config, **more}


def own_scheduler(sampler: Sampler, path: NoisePath, predicts: str) -> Config | None:
    """The configuration of a `fewstep_solver` that makes the sampler's steps; None if none does.

    It makes those of a `LinearSolver`, and of a `FewStep` whose later noise is "ddim".
    """
    unit = isinstance(sampler, FewStep) and sampler.unit
    if isinstance(sampler, FewStep) and (sampler.noise == "ddim" or sampler.steps == 1):
        sampler = LinearSolver(times=tuple(sampler.ladder(path)))
    if not isinstance(sampler, LinearSolver):
        return None
    kinds = {**_PREDICTION, "velocity": "flow_prediction"}
    flow = isinstance(path, Flow)
    if (
        not isinstance(path, VP | Flow)
        or predicts not in kinds
        or flow != (predicts == "velocity")
    ):
        return None
    numbers = sampler.numbers(path)
    told, first = (torch.tensor(t, dtype=torch.float64) for t in (numbers.told, numbers.times[0]))
    return {
        "timesteps": (told * (1000 if flow else 1)).tolist(),
        "alphas": path.alpha(told).tolist(),
        "sigmas": path.sigma(told).tolist(),
        "a": [list(row) for row in numbers.a],
        "c": [list(row) for row in numbers.c],
        "start": 1.0 if unit else float(path.sigma(first)),
        "prediction_type": kinds[predicts],
        "num_train_timesteps": 1000 if flow else int(path.t_max) + 1,
    }


def _flow(sampler: FewStep) -> Config:
    if sampler.t_init != 1:
        raise ValueError(f"stock schedulers of flows start at t = 1; {sampler} does not")
    return {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "stochastic_sampling": sampler.noise == "fresh" and sampler.steps > 1,
        "shift_terminal": 1 / sampler.steps if sampler.steps > 1 else None,
    }


def betas(path: VP) -> list[float]:
    """beta_t of every timestep, 1 - abar_t / abar_{t - 1}."""
    t = torch.arange(int(path.t_max) + 1, dtype=torch.float64)
    abar = path.alpha(t) ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    return [float(beta) for beta in 1 - abar / before]


def call(kind: str, config: Config) -> str:
    """Python that makes the scheduler for a pipeline `pipe` which still has its teacher's.

    What the class has by default is left out. Betas are up to a thousand numbers, and the first
    of those that `pipe` has; its last may be 1, of pure noise, where the path stays below.
    """
    takes = inspect.signature(getattr(require_library("diffusers"), kind).__init__).parameters
    changed = {key: repr(value) for key, value in config.items() if value != takes[key].default}
    if "trained_betas" in changed:
        trained, last = config["trained_betas"], config["trained_betas"][-1]
        below = f".clamp(max={last!r})" if last > 0.5 else ""
        changed["trained_betas"] = f"pipe.scheduler.betas[:{len(trained)}]{below}.tolist()"
    lines = "".join(f"    {key}={value},\n" for key, value in changed.items())
    return f"{kind}(\n{lines})"
