"""EDM networks from their published constructor arguments and weights.

Karras et al. 2022 (https://arxiv.org/abs/2206.00364) publish DDPM++, NCSN++ and ADM networks
under EDM, VP, VE and iDDPM preconditioning; SiD (https://arxiv.org/abs/2404.04057) and SiDA
(https://arxiv.org/abs/2410.14919) publish one-step generators of the same form. Each is a class
name, constructor arguments and named tensors; here these become a `Denoiser` on the path t =
sigma, with encoder features (`fewstep.diffusion.encoder_features`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.without_values import without_values
from fewstep.nets.edm_precond import BODIES, EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from fewstep.nets.precond import Preconditioned
from fewstep.teachers.checks import check_arguments, load_state

CLASSES: dict[str, type[EDMPrecond | VPPrecond | VEPrecond | iDDPMPrecond]] = {
    "EDMPrecond": EDMPrecond,
    "EDMPrecond_EncoderDecoder": EDMPrecond,
    "VPPrecond": VPPrecond,
    "VEPrecond": VEPrecond,
    "iDDPMPrecond": iDDPMPrecond,
}
"""The published class names."""

_SET_BY_PRECOND = {"self", "img_resolution", "in_channels", "out_channels", "label_dim"}


def build(
    init_kwargs: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    class_name: str = "EDMPrecond",
    dtype: torch.dtype | None = None,
) -> Preconditioned:
    """The denoiser, in evaluation mode, with float32 copies of `state` as parameters.

    Args:
        init_kwargs: the constructor arguments of the published class.
        state: its state dict.
        class_name: the published class, one of `CLASSES`.
        dtype: precision of the body everywhere; None: float16 on an accelerator where the
            arguments say use_fp16, else that of the input. Preconditioning is computed in float32
            at least.

    Returns: a `Denoiser` of (B, C, S, S) on the path t = sigma, with encoder features.

    Raises ValueError for arguments and tensors that do not belong to such a network. Karras et al.
    2022, https://arxiv.org/abs/2206.00364.
    """
    with without_values():
        net = new_network(init_kwargs, class_name)
    load_state(net, state, class_name)
    net.body_dtype = dtype
    return net.eval()


def new_network(init_kwargs: Mapping[str, Any], class_name: str = "EDMPrecond") -> Preconditioned:
    """The network with new random weights; ValueError for arguments that do not belong to it."""
    if class_name not in CLASSES:
        raise ValueError(f"class_name is one of {', '.join(CLASSES)}, got {class_name!r}")
    cls = CLASSES[class_name]
    parameters = inspect.signature(cls).parameters
    model_type = init_kwargs.get("model_type", parameters["model_type"].default)
    if model_type not in tuple(BODIES):
        raise ValueError(f"model_type is one of {', '.join(BODIES)}, got {model_type!r}")
    body = [
        p for p in inspect.signature(BODIES[model_type]).parameters if p not in _SET_BY_PRECOND
    ]
    known = [name for name in parameters if name != "model_kwargs"] + body
    check_arguments(class_name, init_kwargs, known, ("img_resolution", "img_channels"))
    try:
        return cls(**init_kwargs)
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"{class_name}: no network has these arguments ({error})") from None
