"""Routed networks: each sample meets the network of its label, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.nets.mlp import MLP
from fewstep.nets.patch_unet import PatchUNet
from fewstep.nets.routed import Routed, RoutedNet
from tests.networks import stirred

MODEL = Model(Routed(MLP(16, 1), 3), (2,), 5)
X = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
T = torch.linspace(0.3, 2.0, 7)
LABELS = torch.tensor([4, 0, 5, 1, 3, 3, 2])
"""Of numbers 1, 0, 2, 1, 0, 0 and 2, the label for none among them."""


def net(model: Model = MODEL) -> Any:
    return stirred(model.build())


def test_each_sample_is_answered_by_the_network_of_its_label() -> None:
    whole = net()
    out = whole(X, T, LABELS)
    for i, label in enumerate(LABELS.tolist()):
        alone = net()
        alone.net = alone.net.nets[label % 3]
        torch.testing.assert_close(out[i : i + 1], alone(X[i : i + 1], T[i : i + 1], LABELS[[i]]))
        other = net()
        other.net = other.net.nets[(label + 1) % 3]
        assert not torch.allclose(out[i], other(X[[i]], T[[i]], LABELS[[i]])[0], atol=1e-3)


def test_a_network_has_no_gradient_from_labels_of_another() -> None:
    whole = net()
    (whole(X, T, LABELS)[LABELS % 3 == 1] ** 2).sum().backward()
    sizes = [sum(float(p.grad.abs().sum()) for p in n.parameters()) for n in whole.net.nets]
    assert sizes[0] == sizes[2] == 0
    assert sizes[1] > 0


@pytest.mark.parametrize(
    "model",
    [MODEL, Model(Routed(PatchUNet(4, (1,), patch=1)), (1, 4, 4), 5)],
    ids=["mlp", "patches"],
)
def test_labels_of_one_network_alone(model: Model) -> None:
    """The others are called with nothing."""
    x, t = torch.ones(3, *model.shape), torch.ones(3)
    assert net(model)(x, t, torch.tensor([0, 0, 0])).shape == x.shape
    with torch.device("meta"):
        meta = model.build()
        x, t, label = torch.ones(3, *model.shape), torch.ones(3), torch.zeros(3, dtype=torch.int64)
        assert meta(x, t, label).shape == x.shape


def test_a_traced_graph_gives_the_same() -> None:
    whole = net()
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(whole, (X, T, LABELS), dynamic_shapes=(batch,) * 3)
    for count in (7, 3):
        args = X[:count], T[:count], LABELS[:count]
        torch.testing.assert_close(program.module()(*args), whole(*args))


def test_whole_denoisers_keep_their_path() -> None:
    class Whole(nn.Module):
        path = VE(0.1, 3.0)

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return xt * t.reshape(-1, 1)

    routed = RoutedNet([Whole(), Whole()])
    assert routed.path == VE(0.1, 3.0)
    assert torch.equal(routed(X, torch.tensor(2.0), LABELS), 2 * X)


def test_what_has_no_labels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need Model\.classes; this model has none"):
        Model(Routed(MLP(16, 1)), (2,)).build()
    for cond in (None, {"prompt": X}):
        with pytest.raises(ValueError, match=r"give the batch labels \(B,\)"):
            net()(X, T, cond)
    with pytest.raises(ValueError, match=r"Routed\.students is 1 or more, got 0"):
        Routed(MLP(), 0)
