"""The order of convolutions' weights, on a CPU that stands in for a GPU: numbers are the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch
from fewstep.domains.pictures import Pictures
from fewstep.methods.sid import SiD
from fewstep.nets.edm_layers import Conv2d
from fewstep.nets.lora import LoRA
from fewstep.nets.patch_unet import PatchUNet
from fewstep.plan.meta_step import prepared
from fewstep.runs.run import Run
from fewstep.training import adam, convolutions
from fewstep.training.convolutions import prepare_convolutions
from fewstep.training.loop import State, train
from tests.networks import stirred

CPU = torch.device("cpu")
MODEL = Model(PatchUNet(8, (1, 2)), (1, 8, 8), 3)


@pytest.fixture(autouse=True)
def settings_put_back() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "DEVICES", frozenset({"cpu"}))


def by_pixels(net: nn.Module) -> list[bool]:
    """Of each convolution with a window, whether its weights lie channel by channel."""
    weights = [m.weight for m in net.modules() if isinstance(m, Conv2d) and m.weight is not None]
    return [
        w.is_contiguous(memory_format=torch.channels_last) for w in weights if w[0, 0].numel() > 1
    ]


def test_a_cpu_is_left_alone() -> None:
    torch.backends.cudnn.benchmark = False
    net = MODEL.build()
    prepare_convolutions(net, CPU, "bf16")
    assert not any(by_pixels(net))
    assert torch.backends.cudnn.benchmark is False


@pytest.mark.usefixtures("stand_in")
def test_float32_keeps_its_order() -> None:
    torch.backends.cudnn.benchmark = False
    net = MODEL.build()
    prepare_convolutions(net, CPU, "fp32")
    assert not any(by_pixels(net))
    assert torch.backends.cudnn.benchmark is True


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("lora", [None, LoRA(2, targets=("*",))], ids=["whole", "adapters"])
def test_all_networks_of_a_run_lie_so(lora: LoRA | None) -> None:
    """Copies too, and adapters still share the teacher's memory."""
    work = prepared(Run(SiD(), MODEL, Pictures("none"), 2, batch=4, precision="bf16", lora=lora))
    state = work.init()
    nets: list[Any] = [work.denoiser, *state.nets.values(), state.average]
    for net in nets:
        assert len(by_pixels(net)) > 5
        assert all(by_pixels(net))
    weights = [next(m for m in net.modules() if isinstance(m, Conv2d)).weight for net in nets]
    assert len({w.data_ptr() for w in weights}) == (4 if lora is None else 1)


def after_two_steps(turned: bool) -> Tensor:
    teacher, net = (stirred(MODEL.build(seed)).double() for seed in (1, 2))
    for each in (teacher, net) if turned else ():
        prepare_convolutions(each, CPU, "bf16")
    state = State.init(SiD(), teacher, net)

    def data(draws: Draws) -> Batch:
        labels = draws.integers("label", 4)
        return Batch(draws.normal("z", MODEL.shape, torch.float64), labels, None, draws)

    for _ in train(SiD(), teacher, net, data, batch=2, steps=2, state=state):
        pass
    assert all(by_pixels(state.nets["student"])) == turned
    return torch.cat([t.flatten() for t in state.nets.state_dict().values()])


@pytest.mark.usefixtures("stand_in")
def test_steps_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding; and gradients lie as their weights do, so that the fused optimiser has them."""
    plain = after_two_steps(False)
    monkeypatch.setattr(adam, "_update", None)
    turned = after_two_steps(True)
    assert not torch.equal(plain, turned)  # another order of sums: it was another way
    assert torch.allclose(plain, turned, rtol=1e-7, atol=1e-9)
