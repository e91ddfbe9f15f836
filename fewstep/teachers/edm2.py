"""EDM2 networks from their published constructor arguments and weights.

Karras et al. 2024 (https://arxiv.org/abs/2312.02696) publish networks that denoise latents of
Stable Diffusion's autoencoder (4 x 64 x 64) or pixels, conditional on ImageNet labels; their
weights are stored in float16. They become a `Denoiser` on the path t = sigma, with encoder
features (`fewstep.diffusion.encoder_features`) and the log-variance head `logvar(t)`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.without_values import without_values
from fewstep.nets.edm2 import MPStyle, Precond, UNet
from fewstep.teachers.checks import check_arguments, load_state

_SKIP = {"unet_kwargs", "block_kwargs", "emb_channels", "taps"}


def build(
    init_kwargs: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> Precond:
    """The denoiser, in evaluation mode, with float32 copies of `state` as parameters.

    Args:
        init_kwargs: the constructor arguments of the published class `Precond`.
        state: its state dict.
        dtype: precision of the body everywhere; None: float16 on an accelerator where the
            arguments say use_fp16 (the default), else that of the input. Preconditioning is
            computed in float32 at least.

    Returns: a `Denoiser` of (B, C, S, S) on the path t = sigma, with encoder features and
    `logvar(t)`.

    Raises ValueError for arguments and tensors that do not belong to such a network. Karras et al.
    2024, https://arxiv.org/abs/2312.02696.
    """
    with without_values():
        net = new_network(init_kwargs)
    load_state(net, state, "Precond")
    net.body_dtype = dtype
    return net.eval()


def new_network(init_kwargs: Mapping[str, Any]) -> Precond:
    """The network with new random weights; ValueError for arguments that do not belong to it."""
    parameters = inspect.signature(Precond).parameters
    known = [*parameters, *inspect.signature(UNet).parameters]
    known += [field.name for field in dataclasses.fields(MPStyle)]
    known = [name for name in dict.fromkeys(known) if name not in _SKIP]
    required = ("img_resolution", "img_channels", "label_dim")
    check_arguments("Precond", init_kwargs, known, required)
    return Precond(**init_kwargs)
