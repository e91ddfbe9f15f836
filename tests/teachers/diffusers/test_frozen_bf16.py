"""Networks of diffusers with weights held in bfloat16: the same bits under autocast."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.nets.lora import LAYERS
from fewstep.teachers.diffusers.load import load_pipeline
from fewstep.training.precision import Precision, autocast_products, store_in_bf16
from tests.conftest import Folders

pytestmark = pytest.mark.slow

KINDS = ("sd", "sdxl", "sd3", "pixart_sized", "sana", "flux_guided", "flux2", "qwen_image")


def answered(denoiser: Any, precision: Precision) -> list[Tensor]:
    """The denoised and the gradient at x_t."""
    generator = torch.Generator().manual_seed(2)
    shape = denoiser.net.sample_shape
    xt = torch.randn(2, *shape, generator=generator, requires_grad=True)
    t = torch.tensor([0.3, 0.6]) * (1 if denoiser.path.t_max <= 1 else 1000)
    with autocast_products(precision, torch.device("cpu")):
        out = denoiser(xt, t)
    (slope,) = torch.autograd.grad(out.square().mean(), xt)
    return [out.detach(), slope]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_bits_under_autocast_and_the_rounded_network_without(
    folders: Folders, kind: str
) -> None:
    """Control: the weights were no round numbers."""
    denoiser: Any = load_pipeline(folders(kind)).denoiser
    low, exact = (answered(denoiser, precision) for precision in ("bf16", "fp32"))  # type: ignore[arg-type]
    held = deepcopy(denoiser)
    store_in_bf16(held)
    assert all(map(torch.equal, answered(held, "bf16"), low))
    for layer in denoiser.modules():
        if isinstance(layer, LAYERS):
            layer.weight.data = layer.weight.data.bfloat16().float()
    found = answered(held, "fp32")
    assert all(map(torch.equal, found, answered(denoiser, "fp32")))
    assert 1e-4 < float((found[0] - exact[0]).norm() / exact[0].norm()) < 0.02
