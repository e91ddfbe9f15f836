"""Pictures back to noise: with an exact flow map, exactly; then generated, they are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.inversion import invert
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Jumps, WithInput
from tests.gaussians import GaussianFlowMap
from tests.instances import TEACHERS
from tests.quadrature import F64

STARTS: dict[str, tuple[NoisePath, float]] = {
    "ve": (VE(t_min=1e-6), 2.5),
    "flow": (Flow(t_min=1e-6), 1.0),
    "trig": (TrigFlow(t_min=1e-6), 1.5),
    "vp": (VP(), 999.0),
}
X = Draws.range(0, 9).normal("x", (2,), F64)


def exact(path: NoisePath) -> Any:
    teacher: Any = TEACHERS["gaussian"](path)
    return GaussianFlowMap(teacher)


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("steps", [1, 3])
def test_encoded_pictures_are_generated_again(name: str, steps: int) -> None:
    """To 1e-4; on timesteps, whose first is noise of 0.03 already, to that."""
    path, start = STARTS[name]
    net, sampler = exact(path), Jumps(start, steps, 2.0)
    z = invert(net, sampler, X)
    torch.testing.assert_close(sampler(net, z), X, rtol=0, atol=0.1 if name == "vp" else 1e-4)
    t = torch.full((9,), start, dtype=F64)
    direct = net.jump(path.alpha(t * 0 + path.t_min)[:, None] * X, 0 * t + path.t_min, t)
    torch.testing.assert_close(z, direct / path.sigma(t)[:, None], rtol=1e-9, atol=1e-9)
    assert (sampler(net, z.flip(0)) - X).abs().max() > 0.1


def test_what_the_student_is_told() -> None:
    """No guidance where pictures are encoded; their own conditions; times upwards."""
    seen: list[tuple[Any, ...]] = []

    class Listening:
        path = VE()

        def __call__(self, xt: Tensor, t: Tensor, cond: Any = None, **named: Tensor) -> Tensor:
            seen.append((float(t[0]), float(named["s"][0]), float(named["w"]), cond))
            return xt

    sampler = WithInput(Jumps(2.0, 2), "w", 3.0)
    invert(Listening(), sampler, X, "label")
    assert seen == [
        (pytest.approx(0.002), 1.0, 0.0, "label"),
        (1.0, 2.0, 0.0, "label"),
    ]
    with pytest.raises(ValueError, match="along the times of a Jumps, got FewStep"):
        invert(Listening(), FewStep(2.5), X)
