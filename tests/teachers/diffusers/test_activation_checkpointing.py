"""Networks of diffusers compute activations again by themselves, tap included."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fewstep.nets.activation_checkpointing import recompute
from fewstep.teachers.diffusers.load import load_pipeline
from tests.conftest import Folders


def gradients(denoiser: Any) -> tuple[list[Tensor], int]:
    """Of a loss on a prediction, its features, and features of another input; the bytes kept."""
    torch.manual_seed(0)
    shape = (2, denoiser.net.config.in_channels, 8, 8)
    x, other = torch.randn(shape, requires_grad=True), torch.randn(shape)
    t = torch.tensor([0.3, 0.6])
    t = t if denoiser.path.t_max <= 1 else 1000 * t
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    denoiser.requires_grad_(True)
    with saved_tensors_hooks(pack, lambda saved: saved):
        out, features = denoiser.forward_with_features(x, t)
        heard = denoiser.encode(other, t)
        loss = out.square().mean() + features.square().mean() + heard.square().mean()
    loss.backward()
    assert x.grad is not None
    found = [x.grad, *(p.grad for p in denoiser.parameters() if p.grad is not None)]
    return found, sum(kept.values())


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixart", "sana"])
def test_gradients_are_the_same_and_less_is_kept(folders: Folders, kind: str) -> None:
    """A tap that stops in the middle leaves nothing behind."""
    denoiser = load_pipeline(folders(kind)).denoiser
    lean: Any = deepcopy(denoiser)
    recompute(lean)
    (whole, much), (again, little) = gradients(denoiser), gradients(deepcopy(lean))
    assert len(whole) == len(again) > 20
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert little < 0.8 * much
