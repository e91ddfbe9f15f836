"""Parameterisations: a network that outputs its own true target gives x_0 back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.denoisers import EDM, Eps, V, Velocity
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, TrigFlow, perturb, rates
from fewstep.nets.mlp import MLP
from tests.instances import PARAMETERISATIONS, PATHS

F64 = torch.float64
SD = 0.7
WRAPPERS: dict[str, Any] = {
    "edm": lambda net, path: EDM(net, path, SD),
    "eps": Eps,
    "v": V,
    "velocity": Velocity,
}


class Oracle(nn.Module):
    """Returns a prepared answer and remembers the question."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        self.x, self.label, self.cond = x, label, cond
        return self.answer


def pair(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x0, eps = torch.randn(2, count, 3, 2, dtype=F64, generator=generator)
    return x0, eps


def target(name: str, path: NoisePath, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network of each kind is trained to predict, by hand."""
    alpha, sigma, d_alpha, d_sigma = (c[:, None, None] for c in rates(path, t))
    if name == "eps":
        return eps
    if name == "v":
        return alpha * eps - sigma * x0
    if name == "velocity":
        return d_alpha * x0 + d_sigma * eps
    # c_skip and c_out of EDM in one line: F = (x_0 - c_skip x_t) / c_out, of unit variance
    norm = ((alpha * SD) ** 2 + sigma**2).sqrt()
    return (x0 * sigma - alpha * SD**2 * eps) / (SD * norm)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("name", PARAMETERISATIONS)
def test_true_target_gives_x0_back(name: str, path: NoisePath) -> None:
    x0, eps = pair()
    top = min(path.t_max, 900.0)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=F64) * top
    xt = perturb(path, x0, eps, t)
    oracle = Oracle(target(name, path, x0, eps, t))
    found = WRAPPERS[name](oracle, path)(xt, t, "cond")
    torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)
    assert torch.equal(oracle.label, path.label(t))
    assert oracle.cond == "cond"
    norm = ((path.alpha(t) * SD) ** 2 + path.sigma(t) ** 2).sqrt()[:, None, None]
    torch.testing.assert_close(oracle.x, xt / norm if name == "edm" else xt)


def test_edm_preconditioning_by_hand() -> None:
    """Table 1 of Karras et al. at sigma = 2, sd = 0.5: c_skip, c_out, c_in, c_noise."""
    x = torch.tensor([[3.0]], dtype=F64)
    oracle = Oracle(torch.tensor([[0.9]], dtype=F64))
    t = torch.tensor([2.0], dtype=F64)
    found = EDM(oracle, VE())(x, t)
    total = 0.25 + 4
    assert found.item() == pytest.approx(0.25 / total * 3 + 2 * 0.5 / total**0.5 * 0.9)
    assert oracle.x.item() == pytest.approx(3 / total**0.5)
    assert oracle.label.item() == pytest.approx(0.6931471805599453 / 4)


@pytest.mark.parametrize("path", [Flow(), TrigFlow()], ids=repr)
@pytest.mark.parametrize("name", ["edm", "v", "velocity"])
def test_pure_noise_is_exact(name: str, path: NoisePath) -> None:
    """At alpha = 0 every parameterisation but eps still gives x_0 back."""
    x0, eps = pair()
    t = torch.full((4,), path.t_max, dtype=F64)
    found = WRAPPERS[name](Oracle(target(name, path, x0, eps, t)), path)(eps, t)
    torch.testing.assert_close(found, x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PARAMETERISATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_time_for_all_is_the_same_as_a_time_each(name: str, dtype: torch.dtype) -> None:
    path = VP()
    predicts: Any = name
    model = Model(MLP(32, 1), (3, 2), classes=2, path=path, predicts=predicts).build(1)
    for parameter in model.parameters():  # the last layer starts at zero
        nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(0))
    model = model.to(dtype)
    x, t = pair()[0].to(dtype), torch.tensor(300.0).to(dtype)
    one, each = model(x, t, None), model(x, t.repeat(4), torch.full((4,), 2))
    assert torch.equal(one, each)
    assert one.dtype == dtype
    assert one.isfinite().all()


def test_models_are_functions_of_their_seed_and_keep_the_global_state() -> None:
    model, state = Model(MLP(32, 1), (2,)), torch.random.get_rng_state()
    a, b, c = (model.build(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)
    with pytest.raises(
        ValueError, match="predicts is one of edm, eps, v, velocity, denoiser, got"
    ):
        Model(MLP(32, 1), (2,), predicts="x0").build()  # type: ignore[arg-type]


def test_untrained_edm_is_the_best_linear_denoiser() -> None:
    """The last layer starts at zero, hence D = c_skip x_t, exact for N(0, sd^2)."""
    x, t = pair()[0], torch.tensor(1.5, dtype=F64)
    model = Model(MLP(32, 1), (3, 2), sigma_data=SD).build().double()
    torch.testing.assert_close(model(x, t), SD**2 / (SD**2 + 2.25) * x)
