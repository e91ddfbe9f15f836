"""Noise consistency training (Luo et al. 2025), https://arxiv.org/abs/2506.19741.

A finished one-step generator f(z) is given a control c without its teacher: a number that is read
off its own pictures, c ~ p(c | x) with x = f(z). The student f(z, c) starts as f and does not hear
c at first. Between z and noise that knows nothing of it lies a path in the space of noises,

    z_k = cos(theta_k) z + sin(theta_k) eps,    theta_k = (pi / 2) k / K,

each z_k being standard normal. The student makes of z_k, told c, what it makes of z_{k-1},

    L = K E_k d(f(z_k, c), f^-(z_{k-1}, c)) + lambda d(f(z, c), x),

f^- without a gradient: from the pair (z, c), of which the second term knows the picture, to eps
that is independent of c. The student is not told k. lambda is a dual variable for the constraint
d(f(z, c), x) <= bound: after each step

    lambda <- max(0, lambda + rate (d(f(z, c), x) - bound)),

with the mean over the whole batch. It is kept with the networks.

How far it goes is known for f = s z, c = x + tau n and a student u z + w c, with K large and d a
square:

    w = s^2 / (s^2 + lambda tau^2),    u = s (1 - w).

At lambda = 1 the mean is that of the posterior, and the spread u is smaller than its
s (1 - w)^(1/2), 0.331 for 0.407 at s = 0.5 and tau = 0.7: samples of one control are too much
alike. Without the constraint (lambda = 0) the student ends at a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import expand, same_shape
from fewstep.diffusion.samplers import FewStep, WithInput
from fewstep.diffusion.types import Batch, Denoiser, Sampler, device_of
from fewstep.distillation.call_inputs import first_state
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn, need_draws
from fewstep.distillation.named_inputs import model_with, net_with
from fewstep.distillation.pictures import Reward, rewards_of
from fewstep.losses.distance import Distance, SquaredL2, rms_distance


class Dual(nn.Module):
    """The dual variable lambda, a buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value: Tensor
        self.register_buffer("value", torch.tensor(value))


@dataclass(frozen=True)
class NCT(Method):
    """Noise consistency training: one update of a one-step student that is told a control.

    It starts from a finished one-step student (`--init`), whose sampler it has to be given, and
    needs neither data nor scores of the teacher. The control is an input "c" of the student, and
    what the sampler says is what it is told when it is sampled. The published rates (1e-4 or 1e-5
    of AdamW) are of adapters, `--lora`. Logs: "consistency", "boundary", "lambda". ValueError for
    another sampler, and for values out of range. Luo et al. 2025,
    https://arxiv.org/abs/2506.19741.
    """

    sampler: Sampler = WithInput(FewStep(2.5), "c", 0.0)
    control: Reward = field(kw_only=True)
    """What is read off pictures, one number each, such as `Thickness`; no gradient is used."""
    blur: float = 0.0
    """Standard deviation tau of the noise that is added to what is read."""
    levels: int = 32
    """K, the steps of the path from z to noise that knows nothing of it."""
    strength: float = 1.0
    """lambda at the start, the weight of staying at the picture that the control was read off."""
    bound: float = 0.0
    """Distance d(f(z, c), x) from that picture which is allowed; lambda rises above it."""
    rate: float = 0.01
    """How fast lambda changes, per step and unit of distance; 0: it stays as it is."""
    distance: Distance = SquaredL2()
    """d, of root mean squares; the paper's are this one and `PseudoHuber`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        told = self.sampler
        if not isinstance(told, WithInput) or told.name != "c" or told.calls != 1:
            raise ValueError(
                "NCT.sampler is of one call and says c, as WithInput(FewStep(2.5), 'c', 0.0) does;"
                f" got {told}"
            )
        if min(self.blur, self.bound, self.rate, self.strength) < 0 or self.levels < 1:
            raise ValueError(
                "NCT needs blur, strength, bound and rate of 0 or more, and levels >= 1; got "
                f"{self.blur:g}, {self.strength:g}, {self.bound:g}, {self.rate:g} and "
                f"{self.levels}"
            )

    @property
    def frozen(self) -> frozenset[str]:
        """The generator, and lambda where it has no rate."""
        return frozenset({"generator"} if self.rate else {"generator", "dual"})

    def result(self, model: Model) -> Model:
        """`model` that is told c."""
        return model_with(model, "c")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """The student, a copy of `net` that does not hear c yet, the generator, and lambda."""
        start = {"student": net_with(net, "c"), "generator": deepcopy(net)}
        return Nets({**start, "dual": Dual(self.strength).to(device_of(net))})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the student."""
        return (Turn("student", self.student_loss),)

    def after_step(self, step: Step) -> None:
        """lambda rises where the constraint is not met, and falls where it is."""
        if self.rate and "boundary" in step.sums:
            dual: Any = step.nets["dual"]
            missed = step.sums["boundary"] / step.sums["count"] - self.bound
            dual.value.copy_((dual.value + self.rate * missed.to(dual.value)).clamp_min(0))

    def student_loss(self, nets: Nets, teacher: Denoiser, batch: Batch) -> Loss:
        """The student's loss: consistency along noises, and the constraint.

        Args:
            nets: the "student", the "generator" and "dual".
            teacher: asked for its decoder alone.
            batch: z (B, *), cond and draws.

        Returns: the mean over the batch; logs as of the class.

        Raises ValueError where the batch has no draws, or samples are no pictures.
        """
        draws, z, dual = need_draws(batch), batch.z, nets["dual"]
        with torch.no_grad():
            x = self.made(nets["generator"], z, batch)
            c = rewards_of(self.control, teacher, x, batch.cond)
            c = c + self.blur * draws.normal("control", ()).to(c)
            eps = draws.normal("noise", z.shape[1:]).to(z)
            k = draws.integers("level", self.levels).to(z)
            near = self.made(nets["student"], self.between(z, eps, k), batch, c=c)
        far = self.made(nets["student"], self.between(z, eps, k + 1), batch, c=c)
        same_shape(prediction=far, x0=near)
        own = self.made(nets["student"], z, batch, c=c)
        same_shape(prediction=own, x0=x)
        consistency = self.levels * rms_distance(self.distance, far - near)
        boundary = rms_distance(self.distance, own - x)
        strength: Any = dual.value
        total = (consistency + strength.to(boundary) * boundary).mean()
        logs = {"consistency": consistency.mean(), "boundary": boundary.mean()}
        logs["lambda"] = strength.clone()
        apart = boundary.detach()
        sums = {"boundary": apart.sum(), "count": torch.ones_like(apart).sum()}
        return Loss(total, logs, sums)

    def between(self, z: Tensor, eps: Tensor, k: Tensor) -> Tensor:
        """z_k of noises z and eps, both (B, *), at levels k (B,) from 0 to K."""
        theta = expand(math.pi / 2 * k / self.levels, z)
        return theta.cos() * z + theta.sin() * eps

    def made(self, net: Any, z: Tensor, batch: Batch, **told: Tensor) -> Tensor:
        """What a network makes of noise z (B, *) in its one call."""
        assert isinstance(self.sampler, WithInput)
        xt, t = first_state(self.sampler.sampler, net.path, z)
        out: Tensor = net(xt, t, batch.cond, **told)
        return out
