"""The preconditioning of EDM, and of the earlier families in its form.

With s = sigma and sd the data's standard deviation, table 1 of Karras et al. 2022
(https://arxiv.org/abs/2206.00364) reads

    |       | c_skip            | c_out               | c_in                | c_noise            |
    |-------|-------------------|---------------------|---------------------|--------------------|
    | EDM   | sd^2/(sd^2+s^2)   | s sd/sqrt(sd^2+s^2) | 1/sqrt(sd^2+s^2)    | ln(s)/4            |
    | VP    | 1                 | -s                  | 1/sqrt(1+s^2)       | (M-1) t(s)         |
    | VE    | 1                 | s                   | 1                   | ln(s/2)            |
    | iDDPM | 1                 | -s                  | 1/sqrt(1+s^2)       | index nearest to s |

so that networks trained for any of them are denoisers on one path, t = sigma, which runs over the
noise levels they were trained for. VP and VE: Song et al. 2021, https://arxiv.org/abs/2011.13456;
iDDPM: Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672. Constructors take the published
arguments; what they do not know themselves goes to the body, named by `model_type`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import VE
from fewstep.nets.edm_unets import DhariwalUNet, SongUNet
from fewstep.nets.precond import Preconditioned, Scaling, edm_scaling
from fewstep.nets.unet import EncoderFeatureUNet

BODIES: dict[str, type[SongUNet] | type[DhariwalUNet]] = {
    "SongUNet": SongUNet,
    "DhariwalUNet": DhariwalUNet,
    "SongUNet_EncoderDecoder": SongUNet,
    "DhariwalUNet_EncoderDecoder": DhariwalUNet,
}
"""The published values of `model_type`; SiDA's two are the same networks."""


class _EDMFamily(Preconditioned):
    """A body called `model`, chosen by the name of its published class."""

    def __init__(
        self,
        path: VE,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool,
        model_type: str,
        model_kwargs: dict[str, Any],
        outputs: int = 1,
    ) -> None:
        super().__init__()
        if model_type not in BODIES:
            raise ValueError(f"model_type is one of {', '.join(BODIES)}, got {model_type!r}")
        self.path = path
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.model: EncoderFeatureUNet = BODIES[model_type](
            img_resolution, img_channels, outputs * img_channels, label_dim, **model_kwargs
        )

    @property
    def body(self) -> EncoderFeatureUNet:
        """F, the network of the published class."""
        return self.model


class EDMPrecond(_EDMFamily):
    """Networks trained with EDM's preconditioning (Karras et al. 2022).

    The path spans the sampler's 0.002 .. 80 where sigma_min and sigma_max allow more.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ) -> None:
        path = VE(max(sigma_min, 0.002), min(sigma_max, 80.0))
        base = img_resolution, img_channels, label_dim, use_fp16, model_type, model_kwargs
        super().__init__(path, *base)
        self.sigma_data = sigma_data

    def scaling(self, sigma: Tensor) -> Scaling:
        """EDM's coefficients (`edm_scaling`) at sigma: (B,)."""
        return edm_scaling(sigma, self.sigma_data)


class VPPrecond(_EDMFamily):
    """Networks trained for the VP SDE (Song et al. 2021), beta(t) = beta_d t + beta_min."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ) -> None:
        ends = [math.sqrt(math.expm1(beta_d * t * t / 2 + beta_min * t)) for t in (epsilon_t, 1)]
        base = img_resolution, img_channels, label_dim, use_fp16, model_type, model_kwargs
        super().__init__(VE(*ends), *base)
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M

    def scaling(self, sigma: Tensor) -> Scaling:
        """t(s) solves s^2 = exp(beta_d t^2/2 + beta_min t) - 1."""
        root = (self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt()
        t = (root - self.beta_min) / self.beta_d
        return Scaling(1.0, -sigma, 1 / (1 + sigma**2).sqrt(), (self.M - 1) * t)


class VEPrecond(_EDMFamily):
    """Networks trained for the VE SDE (Song et al. 2021)."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ) -> None:
        base = img_resolution, img_channels, label_dim, use_fp16, model_type, model_kwargs
        super().__init__(VE(sigma_min, sigma_max), *base)

    def scaling(self, sigma: Tensor) -> Scaling:
        """c_skip = 1, c_out = sigma, c_in = 1, c_noise = ln(sigma / 2) at sigma: (B,)."""
        return Scaling(1.0, sigma, 1.0, (sigma / 2).log())


class iDDPMPrecond(_EDMFamily):
    """Networks trained on M discrete levels u_j with the improved DDPM's cosine schedule.

    u_M = 0, u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1), with
    abar_j = sin^2(pi/2 j / (M (C_2 + 1))): equation 168 of Karras et al. 2022. The body also
    predicts a variance, which is dropped. c_noise has no derivative in sigma.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ) -> None:
        levels = _iddpm_levels(C_1, C_2, M)
        base = img_resolution, img_channels, label_dim, use_fp16, model_type, model_kwargs
        super().__init__(VE(levels[M - 1], levels[0]), *base, outputs=2)
        self.M = M
        self.u: Tensor
        self.register_buffer("u", torch.tensor(levels))

    def scaling(self, sigma: Tensor) -> Scaling:
        """c_skip = 1, c_out = -sigma, c_in = 1 / (1 + sigma^2)^(1/2) at sigma: (B,).

        c_noise is M - 1 less the index of the nearest level u_j.
        """
        index = (sigma[:, None] - self.u.to(sigma)).abs().argmin(1)
        noise = (self.M - 1 - index).to(sigma.dtype)
        return Scaling(1.0, -sigma, 1 / (1 + sigma**2).sqrt(), noise)


def _iddpm_levels(c1: float, c2: float, count: int) -> list[float]:
    """u_0 .. u_count, falling to zero."""
    abar = [math.sin(math.pi / 2 * j / count / (c2 + 1)) ** 2 for j in range(count + 1)]
    levels = [0.0] * (count + 1)
    for j in range(count, 0, -1):
        ratio = max(abar[j - 1] / abar[j], c1)
        levels[j - 1] = math.sqrt((levels[j] ** 2 + 1) / ratio - 1)
    return levels
