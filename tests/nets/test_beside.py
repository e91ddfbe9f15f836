"""A network with a picture beside its input: it hears it, and says when there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import Bridge
from fewstep.nets.beside import Beside
from fewstep.nets.mlp import MLP
from fewstep.nets.patch_unet import PatchUNet
from tests.networks import stirred

X, START = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.2, 0.5, 0.8])
MODELS = {
    "mlp": Model(Beside(MLP(16, 1)), (1, 4, 4), path=Bridge()),
    "patches": Model(Beside(PatchUNet(8, (1,))), (1, 4, 4), 3, path=Bridge()),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_hears_the_picture(name: str) -> None:
    net: Any = stirred(MODELS[name].build())
    out = net(X, T, {"start": START})
    assert out.shape == X.shape
    assert float((net(X, T, {"start": START + 0.1}) - out).abs().min()) > 0
    assert net.data_conditions == {"start": (1, 4, 4)}


def test_it_is_the_network_inside_with_both() -> None:
    net: Any = stirred(MODELS["patches"].build())
    label = torch.tensor([0, 1, 2])
    both = torch.cat([X, START], 1)
    assert torch.equal(net.net(X, T, {"start": START}), net.net.net(both, T)[:, :1])
    labelled = net.net(X, T, {"start": START, "label": label})
    assert torch.equal(labelled, net.net.net(both, T, label)[:, :1])
    assert not torch.allclose(labelled, net.net(X, T, {"start": START}))


CONDS = {"none": None, "labels": torch.zeros(3), "empty": {}, "cut": {"start": START[:, :, :2]}}


@pytest.mark.parametrize("cond", CONDS.values(), ids=CONDS)
def test_without_a_picture_of_its_shape_it_says_so(cond: Any) -> None:
    net = MODELS["mlp"].build()
    with pytest.raises(ValueError, match=r'needs a picture .*"start" of the same shape, and got'):
        net(X, T, cond)
