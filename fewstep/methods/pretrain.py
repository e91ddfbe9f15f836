"""Denoising training of a teacher: EDM's, or flow matching.

E_t w_t |f(x_t) - x_0|^2 over real data (Karras et al. 2022, equation 2,
https://arxiv.org/abs/2206.00364). With a rectified-flow path, uniform or logit-normal times and
w = 1 / t^2 it is flow matching (Lipman et al. 2022, https://arxiv.org/abs/2210.02747): the error
of the velocity eps - x_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from fewstep.diffusion.samplers import Heun
from fewstep.diffusion.scale_wise import reduced
from fewstep.diffusion.time_distributions import LogNormal, TimeLaw
from fewstep.diffusion.types import Batch, Denoiser, Sampler
from fewstep.distillation.fake_score import add_noise
from fewstep.distillation.method import Loss, Method, Nets, Turn, need_data
from fewstep.losses.score import denoising
from fewstep.losses.weight import EDMWeight, Weight


@dataclass(frozen=True)
class Pretrain(Method):
    """Train a denoiser on real data: one update of nets["denoiser"] a step, without a teacher.

    The defaults are EDM's: log-normal times and the weight that evens out the targets. Karras et
    al. 2022, https://arxiv.org/abs/2206.00364.
    """

    needs_data: ClassVar[bool] = True
    output: ClassVar[str] = "denoiser"

    sampler: Sampler = Heun()
    times: TimeLaw = LogNormal()
    """Noise levels of the data."""
    weight: Weight = EDMWeight()
    """w, the weight of the loss by noise level."""
    scales: tuple[int, ...] = (1,)
    """How many times smaller the data of a step are, in turn: (1, 2) for all of two sizes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales or min(self.scales) < 1:
            raise ValueError(f"Pretrain.scales are 1 or more, at least one, got {self.scales}")

    def init(self, teacher: Denoiser | None, net: nn.Module) -> Nets:
        """A "denoiser", a copy of `net`; the teacher is not used."""
        return Nets({"denoiser": deepcopy(net)})

    def turns(self, step: int) -> Sequence[Turn]:
        """One update of the denoiser."""
        scale = self.scales[step % len(self.scales)]
        return (Turn("denoiser", partial(self.loss, scale)),)

    def loss(self, scale: int, nets: Nets, teacher: Denoiser | None, batch: Batch) -> Loss:
        """The denoising loss w |f(x_t) - x_0|^2 (equation 2), a mean over the batch.

        scale: how many times smaller the data are made; batch: x0 (B, *), cond and draws.
        `teacher` is not used. ValueError where the batch has no data or no draws.
        """
        x0 = reduced(need_data(self, batch), scale)
        net = nets["denoiser"]
        n = add_noise(net.path, x0, self.times, batch)  # type: ignore[arg-type]
        prediction = net(n.xt, n.t, batch.cond)
        return Loss(denoising(prediction, x0, self.weight(x0, x0, n.alpha, n.sigma)).mean())
