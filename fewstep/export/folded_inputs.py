"""A student with further inputs as a plain network: numbers that never change become weights.

What a network is told beside the time is added to its time embedding (`ExtraInputs`),

    e' = W h + b + sum_name E_name(u_name),

and a stock network has no place for it. But a guidance scale is the same in all calls, and so is
the second time of a flow map that makes one: s = 0. Then the sum is one vector, which is part of
the bias b, exactly. The jump of a flow map is a deterministic step, so `Jumps` of such a student
are a `FewStep` with noise "ddim", which stock schedulers follow. (TCDScheduler, written for maps
that jump, would follow none: it ends at the noise of timestep 0, and how much noise comes back is
an argument of its calls, which pipelines do not pass.)

A flow map of several calls is told another distance in each, which no bias can be. It is refused,
unless its timesteps are divided evenly.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.extra_inputs import ExtraInputs, time_embedding
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise_path import NoisePath
from fewstep.diffusion.samplers import FewStep, Jumps, WithInput
from fewstep.diffusion.types import Sampler
from fewstep.export.traced_generator import examples

SAME = 1e-6
"""Largest difference of what is added in two calls that counts as rounding, relative."""
TOLERANCE = 1e-5
"""Largest difference of a prediction of x_0 by the plain network, relative."""

Told = tuple[float, dict[str, float]]
"""The time of a call, and what it is told by name."""


def plain(student: Generator, run: Path, instead: str = "") -> Generator:
    """The student without further inputs; itself where it has none.

    Args:
        student: what is exported; its weights are shared, but one bias.
        run: where it is from, for messages.
        instead: what else can be done, for messages.

    Raises ValueError where a call is told something else than another, and where the network has
    no bias to hold it.
    """
    denoiser, model = student.denoiser, student.model
    if not isinstance(denoiser, ExtraInputs) or model is None:
        return student
    sampler, calls = without_inputs(student.sampler, denoiser.path)

    def refused(why: str) -> ValueError:
        names = ", ".join(model.inputs)
        return ValueError(
            f"{run} has further inputs ({names}), which {why}, and which the networks of stock "
            f"pipelines do not take{instead}"
        )

    with torch.no_grad():
        vectors = [_added(denoiser, *call) for call in calls]
        first = vectors[0]
        if any(float((v - first).abs().max()) > SAME * float(first.abs().max()) for v in vectors):
            raise refused(f"differ between its {len(calls)} calls")
        net = _with_bias(denoiser.net, first)
        if net is None:
            raise refused("no bias of its time embedding can hold")
        made = replace(student, denoiser=net, sampler=sampler, model=replace(model, inputs=()))
        difference = max(_difference(student, made, *call) for call in calls)
    if not difference <= TOLERANCE:
        raise refused(f"as a bias change what it predicts by {difference:.1e}")
    return made


def without_inputs(sampler: Sampler, path: NoisePath) -> tuple[Sampler, list[Told]]:
    """The same steps by a sampler that tells a network nothing more, and what each call is told.

    A number that is the same in all calls is listed with the first of them alone.
    """
    named: dict[str, float] = {}
    while isinstance(sampler, WithInput):
        named = {sampler.name: sampler.value, **named}
        sampler = sampler.sampler
    if isinstance(sampler, Jumps):
        ladder = [*sampler.ladder(path), 0.0]
        steps = FewStep(sampler.t_init, sampler.steps, "ddim", sampler.rho)
        return steps, [(t, {**named, "s": s}) for t, s in pairwise(ladder)]
    return sampler, [(path.t_max, named)]


def _added(denoiser: ExtraInputs, t: float, named: dict[str, float]) -> Tensor:
    """What is added to the time embedding: (width,)."""
    like = next(denoiser.parameters())
    x, time = like.new_zeros(1, 1), torch.full((1,), t, device=like.device)
    told = {name: torch.tensor(value, device=like.device) for name, value in named.items()}
    out = denoiser.added(x, time, told)
    return like.new_zeros(time_embedding(denoiser.net).width) if out is None else out[0]


def _with_bias(net: Any, vector: Tensor) -> Any:
    """`net` with `vector` in the last bias of its time embedding, all else shared; or None."""
    linear = _last_linear(net)
    if linear is None or linear.bias is None or linear.bias.shape != vector.shape:
        return None
    held = linear.bias
    shared = {id(t): t for t in (*net.parameters(), *net.buffers()) if t is not held}
    made = deepcopy(net, shared)
    last: Any = _last_linear(made)
    last.bias.add_(vector.to(held))
    return made


def _last_linear(net: Any) -> nn.Linear | None:
    """The last linear layer of the time embedding, if it has one."""
    layers = [m for m in time_embedding(net).module.modules() if isinstance(m, nn.Linear)]
    return layers[-1] if layers else None


def _difference(student: Generator, made: Generator, t: float, named: dict[str, float]) -> float:
    """The largest difference of their predictions from noise at t, relative."""
    inputs = examples(student, 1)
    z = inputs.pop("z")
    inputs.pop("noise", None)
    cond = inputs.pop("label", None) if "label" in inputs else (inputs or None)
    xt, time = student.denoiser.path.sigma(torch.tensor(t)).to(z) * z, torch.full((1,), t).to(z)
    told = {name: torch.tensor(value, device=z.device) for name, value in named.items()}
    theirs, ours = made.denoiser(xt, time, cond), student.denoiser(xt, time, cond, **told)
    return float((theirs - ours).abs().max() / ours.abs().max())
