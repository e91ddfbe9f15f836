"""Derivatives of a network along a direction of its inputs: x_t, t, s and others at once.

Flow maps are learnt by their derivatives. With X(x, t, s) the jump of a flow map g and v the
velocity of the probability flow,

    Lagrangian    dX/ds = v(X(x, t, s), s)                   direction (0, 0, 1)
    Eulerian      dX/dt + v(x, t) . grad_x X = 0             direction (v, 1, 0)

(Boffi et al. 2024, https://arxiv.org/abs/2406.07507). In sCM (Lu & Song 2024,
https://arxiv.org/abs/2410.11081) and MeanFlow (Geng et al. 2025, https://arxiv.org/abs/2505.13447)
such a derivative is a part of the target, through which no gradient flows; so `jvp` builds no
graph, and costs about two calls of the network.

Forward mode (`torch.func.jvp`) is exact. It does not know fused attention, in place of which the
products are written out, at a memory that grows with the square of the tokens. Where that is too
much, or a layer has no forward derivative, there is the difference

    (f(p + h v) - f(p - h v)) / 2 h,

of second order at the ends of a range too, where it is taken at p, p + h v and p + 2 h v. Its
error is that of the curve, which grows with h^2, and that of rounding, which grows with 1 / h. On
the networks of the tests, with random weights in float32 and the step of `difference_step`, it is
0.03 to 0.5 % of the derivative (0.9 % one-sided), where forward mode has 0.005 % at most. It is
set by the highest frequencies of the network's time embedding: at ten times that step NCSN++ and
the networks of diffusers are off by 9 to 32 %, and the others by 0.6 % at most. In bfloat16
rounding is all there is, so lower precisions are refused, and autocast is off within both modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.diffusion.noise_path import NoisePath, expand

Range = tuple[float | Tensor, float | Tensor]


@torch.no_grad()
def jvp(
    f: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | float],
    *,
    net: nn.Module | None = None,
    how: Literal["forward", "difference"] = "forward",
    h: float | Tensor | None = None,
    room: Range = (-math.inf, math.inf),
) -> tuple[Tensor, Tensor]:
    """f(p) and d/dr f(p + r v) at r = 0, neither with a graph.

    Args:
        f: a network, or a function that calls some: (B, *), (B,), ... -> (B, *).
        primals: p, the arguments of f, each (B, *), (B,) or (); others are f's own.
        tangents: v, one for each, of its shape or one number for all of it.
        net: the networks that f calls, by default f itself. They are in evaluation mode
            meanwhile, so without dropout, and are left in the mode that they were in.
        how: "forward" for forward-mode differentiation, "difference" for finite differences.
        h: the differences' step along v, one number or (B,); `difference_step` has one for times.
        room: how far along v, backwards (<= 0) and forwards (>= 0), f may be evaluated by the
            differences; each one number or (B,). Near an end they are one-sided.

    Returns: f(p) and its derivative, (B, *) both, in f's precision; autocast is off.

    Raises ValueError where tangents do not fit, for differences without a step, without room or in
    a lower precision than float32, and in forward mode for networks that write to their tensors.
    """
    if how not in ("forward", "difference"):
        raise ValueError(f"jvp's how is 'forward' or 'difference', got {how!r}")
    primals = tuple(_whole(p.detach()) for p in primals)
    directions = _directions(primals, tangents)
    if net is None and isinstance(f, nn.Module):
        net = f
    kind = primals[0].device.type
    off = torch.autocast("cpu" if kind == "meta" else kind, enabled=False)
    with off, _in_evaluation(net):
        if how == "difference":
            if h is None:
                raise ValueError("differences need a step h, such as difference_step(path, t)")
            return _difference(f, primals, directions, h, room)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                value, derivative = torch.func.jvp(f, primals, directions)  # type: ignore[misc]
        except RuntimeError as error:
            if "in-place operation" not in str(error):
                raise
            raise ValueError(
                "a network writes to its own tensors when it is called, as some do in training; "
                "pass it to jvp as net, which puts it into evaluation mode meanwhile"
            ) from error
    return value.detach(), derivative.detach()


def difference_step(path: NoisePath, t: Tensor, size: float = 1e-4) -> Tensor:
    """The h that is a share `size` of the path, in the network's time: t's shape -> the same.

    label(t) changes by `size` of all that it changes on the path, so one size serves all paths:
    by default h is 1e-4 on a flow, a tenth of a timestep of 1000, and 0.001 t in EDM's units.
    """
    t = _whole(t)
    _, slope = torch.func.jvp(path.label, (t,), (torch.ones_like(t),))  # type: ignore[misc]
    out: Tensor = (size * path.label_range / slope).abs()
    return out


def _directions(
    primals: Sequence[Tensor], tangents: Sequence[Tensor | float]
) -> tuple[Tensor, ...]:
    """`tangents` as tensors of the shapes of `primals`; ValueError where they do not fit."""
    if len(primals) != len(tangents):
        raise ValueError(f"jvp got {len(primals)} primals and {len(tangents)} tangents")
    out = []
    for i, (p, v) in enumerate(zip(primals, tangents, strict=True)):
        if isinstance(v, Tensor) and v.shape != p.shape:
            raise ValueError(
                f"tangent {i} has shape {tuple(v.shape)}, but its primal {tuple(p.shape)}"
            )
        v = v.detach().to(p) if isinstance(v, Tensor) else torch.full_like(p, v)
        out.append(_whole(v))
    return tuple(out)


def _whole(p: Tensor) -> Tensor:
    """p, of memory of its own where it was expanded, which forward mode refuses."""
    return p.contiguous() if 0 in p.stride() else p


@contextmanager
def _in_evaluation(net: nn.Module | None) -> Iterator[None]:
    """Within the block, all modules of `net` are in evaluation mode."""
    training = [] if net is None else [m for m in net.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _difference(
    f: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    directions: tuple[Tensor, ...],
    h: float | Tensor,
    room: Range,
) -> tuple[Tensor, Tensor]:
    """f(p), and the slope at 0 of the parabola through r = 0 and two other points."""
    like = max(primals, key=lambda p: p.ndim)
    value = f(*primals)
    if torch.finfo(value.dtype).bits < 32 or torch.finfo(like.dtype).bits < 32:
        raise ValueError(f"finite differences need float32, got {value.dtype}; use how='forward'")
    low, high, h = (torch.as_tensor(r, device=like.device).to(like.dtype) for r in (*room, h))
    h = torch.minimum(h, torch.maximum(high, -low) / 2)
    if like.device.type == "cpu" and bool((h <= 0).any()):  # no device is waited for
        raise ValueError("there is no room for differences; h is positive, and so is one side")
    central, forward = (low <= -h) & (high >= h), high >= 2 * h
    a = torch.where(central, -h, torch.where(forward, h, -h))
    b = torch.where(central, h, 2 * a)
    fa, fb = (
        f(*(p + _over(r, p) * v for p, v in zip(primals, directions, strict=True))) for r in (a, b)
    )
    a, b = expand(a, value), expand(b, value)
    slope = b / (a * (b - a)) * (fa - value) - a / (b * (b - a)) * (fb - value)
    return value, slope


def _over(r: Tensor, p: Tensor) -> Tensor:
    """r: (B,) or () ready to broadcast against p; a single time becomes one for each sample."""
    return expand(r, p) if p.ndim else r
