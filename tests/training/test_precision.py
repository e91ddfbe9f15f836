"""Lower precision reaches the networks' products and nothing else; loss scales by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, coefficients
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Sampler
from fewstep.distillation.method import Loss, Method, Nets, Turn
from fewstep.losses.distance import NormPower, PseudoHuber, SquaredL2, SumOfPowers
from fewstep.losses.score import denoising, kl, sid, sim
from fewstep.losses.weight import L1, EDMWeight, Power
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.loop import Diverged, Record, State, train
from fewstep.training.optim import Optim
from fewstep.training.precision import PATIENCE, Precision, Scale, autocast_products

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16
LOW: tuple[tuple[Precision, torch.dtype], ...] = (("bf16", BF16), ("fp16", FP16))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, REAL, FAKE = (normal(5, 3, seed=k) for k in range(3))
SIGMA = torch.tensor([0.1, 0.5, 1.0, 5.0, 80.0])[:, None]
ONE = torch.ones(5, 1)
ISLANDS: dict[str, Callable[[], Tensor]] = {
    "denoising": lambda: denoising(REAL, X, SIGMA),
    "sid": lambda: sid(X, REAL, FAKE, 1.2, SIGMA),
    "kl": lambda: kl(X, REAL, FAKE, SIGMA),
    **{
        f"sim {distance}": lambda distance=distance: sim(X, REAL, FAKE, distance)  # type: ignore
        for distance in (SquaredL2(), NormPower(), SumOfPowers(), PseudoHuber())
    },
    **{
        f"weight {weight}": lambda weight=weight: weight(X, REAL, ONE, SIGMA)  # type: ignore
        for weight in (L1(), EDMWeight(), Power())
    },
    "exact teacher": lambda: GaussianMixture.ring(3)(X[:, :2], SIGMA[:, 0]),
}


@pytest.mark.parametrize("name", ISLANDS)
@pytest.mark.parametrize(("precision", "dtype"), LOW)
def test_losses_and_weights_are_computed_in_float32(
    name: str, precision: Precision, dtype: torch.dtype
) -> None:
    """To the bit; a product in the same place is lowered."""
    expected = ISLANDS[name]()
    with autocast_products(precision, CPU):
        assert torch.equal(ISLANDS[name](), expected)
        assert (X @ REAL.T).dtype == dtype
    with autocast_products("fp32", CPU):
        assert (X @ REAL.T).dtype == torch.float32


@pytest.mark.parametrize(("precision", "dtype"), LOW)
def test_what_surrounds_a_network_is_computed_in_float32(
    precision: Precision, dtype: torch.dtype
) -> None:
    """EDM's formula around a network whose output is checked to be low."""
    denoiser: Any = Model(MLP(16, 1), (2,), sigma_data=0.7).build()
    nn.init.normal_(denoiser.net.last.weight, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    denoiser.net.register_forward_hook(lambda module, inputs, output: seen.append(output))
    xt, t = normal(5, 2), SIGMA[:, 0]
    with autocast_products(precision, CPU):
        found = denoiser(xt, t)
    assert (seen[0].dtype, found.dtype) == (dtype, torch.float32)
    _, sigma = coefficients(VE(), xt, t)
    norm = (0.7**2 + sigma**2).sqrt()
    expected = 0.7**2 / norm**2 * xt + sigma * 0.7 / norm * seen[0].float()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    exact = denoiser(xt, t)
    assert 1e-5 < (found - exact).abs().max() / exact.abs().max() < 0.02


def gradients(precision: Precision) -> Tensor:
    """Half of those of the first step of SiD: Adam's first moment with beta_1 = 1/2."""
    teacher, model = GaussianMixture.ring(3), Model(MLP(32, 2), (2,), sigma_data=0.7)
    settings: Any = {"batch": 256, "optim": Optim(1e-6, (0.5, 0.9)), "precision": precision}
    net = model.build(1)
    (record,) = train(SiD(alpha=1.0), teacher, net, Latents((2,)), steps=1, **settings)
    tensors = [*record.state.nets.parameters(), *record.state.average.parameters()]
    moments = [s["exp_avg"] for o in record.state.optimizers.values() for s in o.state.values()]
    assert {t.dtype for t in [*tensors, *moments]} == {torch.float32}
    return torch.cat([m.flatten() for m in moments])


def test_gradients_are_nearly_those_of_float32() -> None:
    """Relative errors of 0.3 % in bfloat16 (8 bits) and 0.04 % in float16 (11 bits)."""
    exact = gradients("fp32")
    errors = {p: float((gradients(p) - exact).norm() / exact.norm()) for p, _ in LOW}
    assert 1e-4 < errors["bf16"] < 0.02
    assert 1e-5 < errors["fp16"] < 0.003


def test_a_net_seen_without_gradients_first_still_gets_them() -> None:
    """Casts of weights are kept within a context; one made under no_grad must not serve later."""
    net = nn.Linear(2, 1)
    with autocast_products("bf16", CPU):
        with torch.no_grad():
            target = net(normal(4, 2))
        (net(normal(4, 2, seed=1)) - target).square().mean().backward()
    assert net.weight.grad is not None
    assert net.weight.grad.abs().min() > 0


def test_a_scale_by_hand() -> None:
    scale = Scale(4.0, clean=7)
    assert [scale.absorbs(False) for _ in range(3)] == [True, True, False]
    assert (scale.value, scale.clean) == (1.0, 0)
    assert not any(scale.absorbs(True) for _ in range(PATIENCE - 1))
    assert (scale.value, scale.clean) == (1.0, PATIENCE - 1)
    scale.absorbs(True)
    assert (scale.value, scale.clean) == (2.0, 0)


class Slope(nn.Module):
    """A number that goes through one product."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 1))


@dataclass(frozen=True)
class Descend(Method):
    """The loss steep * w: its gradient overflows float16 beyond 65504 / steep."""

    sampler: Sampler = FewStep()
    steep: float = 3.0
    loss_too: bool = False

    def init(self, teacher: object, net: nn.Module) -> Nets:
        return Nets({"student": net})

    def turns(self, step: int) -> Sequence[Turn]:
        return (Turn("student", self.loss),)

    def loss(self, nets: Nets, teacher: object, batch: Batch) -> Loss:
        w: Any = nets["student"].get_parameter("w")
        y = F.linear(torch.ones(1, 1), w).float() * self.steep
        return Loss(y.sum() * (float("nan") if self.loss_too else 1.0))


def descend(steps: int, precision: Precision, method: Method = Descend()) -> list[Record]:
    settings: Any = {"batch": 2, "optim": Optim(0.5, (0.0, 0.0), eps=1.0), "patience": 2}
    settings["precision"] = precision
    return list(train(method, None, Slope(), Latents((2,)), steps=steps, **settings))


def test_a_loss_scale_finds_its_size() -> None:
    """3 * 2^16 and 3 * 2^15 overflow, 3 * 2^14 does not; then the numbers are float32's.

    Two skipped updates in a row do not use up the patience of two.
    """
    records = descend(7, "fp16")
    logs = [record.logs for record in records]
    assert [log["student/scale"] for log in logs] == [2.0**16, 2.0**15, *[2.0**14] * 5]
    assert [log["skipped"] for log in logs] == [1, 2, 2, 2, 2, 2, 2]
    assert [log["student/grad_norm"] for log in logs[2:]] == [3.0] * 5
    state: State = records[-1].state
    assert state.scales == {"student": Scale(2.0**14, 5)}
    assert (state.images, state.streak) == (10, 0)
    w: Any = state.nets["student"].get_parameter("w")
    assert w.item() == pytest.approx(-5 * 0.5 * 3 / 4)
    plain = descend(5, "fp32")
    assert plain[-1].state.scales == {}
    assert "student/scale" not in plain[0].logs
    assert torch.equal(plain[-1].state.nets["student"].get_parameter("w"), w)


def test_what_no_scale_mends_uses_up_patience() -> None:
    """A gradient beyond float16 at scale 1, and a loss that is not a number at any."""
    with pytest.raises(Diverged, match="student: grad_norm not finite in 2 updates"):
        descend(99, "fp16", Descend(steep=1e5))
    with pytest.raises(Diverged, match=r"loss and grad_norm .* up to step 2"):
        descend(99, "fp16", Descend(loss_too=True))
    known: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    for precision in known:
        assert descend(1, precision)[0].logs["skipped"] == 0
