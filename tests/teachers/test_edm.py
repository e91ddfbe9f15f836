"""EDM and EDM2 networks: equal to recorded values of the official ones, and to themselves."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.encoder_features import HasEncoderFeatures
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.types import Denoiser
from fewstep.nets.edm2 import MPConv, Precond
from fewstep.nets.precond import Preconditioned
from tests.recorded_networks import NAMES, Recorded, recorded


@pytest.fixture(scope="module", params=NAMES)
def gold(request: pytest.FixtureRequest) -> Recorded:
    return recorded(request.param)


@pytest.fixture(scope="module")
def gold2() -> Recorded:
    return recorded("edm2")


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def grad_x(net: Preconditioned, gold: Recorded) -> Tensor:
    x, *rest = gold.inputs()
    x = x.clone().requires_grad_()
    return torch.autograd.grad((net(x, *rest) * gold.tensors["probe"]).sum(), x)[0]


def test_denoised_and_gradient_equal_the_recorded_ones(gold):
    net = gold.net()
    out = net(*gold.inputs())
    assert relative(out, gold.tensors["denoised"]) < 2e-5
    for mine, theirs in zip(out, gold.tensors["denoised"], strict=True):
        assert relative(mine, theirs) < 2e-5
    assert relative(grad_x(net, gold), gold.tensors["grad_x"]) < 1e-4
    if isinstance(net, Precond):
        logvar = net.logvar(gold.tensors["sigma"])
        assert logvar.shape == gold.tensors["logvar"].shape
        assert relative(logvar, gold.tensors["logvar"]) < 1e-5


def test_state_dict_is_the_recorded_one(gold):
    state = gold.net().state_dict()
    assert set(state) == set(gold.state)
    assert all(torch.equal(state[name], gold.state[name]) for name in state)


def test_every_weight_matters(gold):
    """The recorded values would notice a change of any single parameter."""
    net = gold.net()
    loss = (net(*gold.inputs()) * gold.tensors["probe"]).sum()
    if isinstance(net, Precond):
        loss = loss + net.logvar(gold.tensors["sigma"]).sum()
    loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_is_a_tapped_denoiser_in_evaluation_mode(gold):
    net = gold.net()
    denoiser: Denoiser = net
    assert isinstance(net, HasEncoderFeatures)
    assert denoiser.path == VE(0.002, 80.0)
    assert not net.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in net.parameters())


def test_weights_are_copies(gold):
    net = gold.net()
    before = {name: value.clone() for name, value in gold.state.items()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert all(torch.equal(gold.state[name], before[name]) for name in before)


def test_tap_is_the_last_encoder_block(gold):
    net, seen = gold.net(), []
    *_, last = net.body.enc.values()
    last.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    with torch.no_grad():
        features = net.encode(*gold.inputs())
        out, again = net.forward_with_features(*gold.inputs())
        alone = net(*gold.inputs())
    assert torch.equal(features, seen[0])
    assert torch.equal(features, again)
    assert torch.equal(out, alone)
    assert len(seen) == 3


def test_encode_does_not_run_the_decoder(gold):
    net, ran = gold.net(), []
    for block in net.body.dec.values():
        block.register_forward_hook(lambda module, args, out: ran.append(module))
    net.encode(*gold.inputs())
    assert ran == []


def test_gradients_through_tap_and_output_add_up(gold):
    net = gold.net()
    x, *rest = gold.inputs()
    x = x.clone().requires_grad_()

    def grad(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, x)[0]

    out, features = net.forward_with_features(x, *rest)
    joint = grad(out.square().sum() + features.square().sum())
    apart = grad(net(x, *rest).square().sum()) + grad(net.encode(x, *rest).square().sum())
    assert relative(joint, apart) < 1e-5


def test_channels_last_is_the_same(gold):
    net = gold.net()
    x, *rest = gold.inputs()
    expected, gradient = net(x, *rest), grad_x(net, gold)
    net = net.to(memory_format=torch.channels_last)
    moved = gold._replace(
        tensors=gold.tensors | {"x": x.contiguous(memory_format=torch.channels_last)}
    )
    assert relative(net(*moved.inputs()), expected) < 1e-5
    assert relative(grad_x(net, moved), gradient) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_adm", "edm2"])
def test_one_graph_holds_all_of_the_network(name):
    """torch.compile finds nothing it must leave to Python (fullgraph), nor other numbers."""
    gold = recorded(name)
    net = gold.net()
    expected, gradient = net(*gold.inputs()), grad_x(net, gold)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert relative(compiled(*gold.inputs()), expected) < 1e-6
    assert relative(grad_x(compiled, gold), gradient) < 1e-5


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_bodies_are_close(gold, dtype, close):
    net = gold.net(dtype=dtype)
    seen = []
    net.body.enc["16x16_block0"].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with torch.no_grad():
        out = net(*gold.inputs())
        assert seen == [dtype]
        assert out.dtype == torch.float32
        assert 1e-5 < relative(out, gold.tensors["denoised"]) < close
        assert net.encode(*gold.inputs()).dtype == torch.float32
        full = net(*gold.inputs(), force_fp32=True)
    assert seen[-1] == torch.float32
    assert relative(full, gold.tensors["denoised"]) < 2e-5


def test_use_fp16_leaves_a_cpu_in_float32(gold):
    net = gold.build(gold.kwargs | {"use_fp16": True}, gold.state)
    assert net.use_fp16
    assert torch.equal(net(*gold.inputs()), gold.net()(*gold.inputs()))


def test_double_precision_agrees(gold):
    net = gold.net()
    args = [None if a is None else a.double() for a in gold.inputs()]
    out = net(*args)
    assert out.dtype == torch.float64
    assert relative(out, gold.tensors["denoised"].double()) < 2e-5
    with pytest.raises(ValueError, match="t has batch 3 but x has batch 4"):
        net(args[0], args[1][:3])


def test_forward_mode_derivative_is_the_difference_quotient(gold):
    net = gold.net()
    x, sigma, labels, augment = (None if a is None else a.double() for a in gold.inputs())
    with torch.no_grad():
        out, rate = torch.func.jvp(
            lambda s: net(x, s, labels, augment), (sigma,), (torch.ones_like(sigma),)
        )
        ahead, behind = (net(x, sigma + h, labels, augment) for h in (1e-7, -1e-7))
        assert relative(out, net(x, sigma, labels, augment)) < 1e-9
    assert relative(rate, (ahead - behind) / 2e-7) < 1e-5


def test_scalar_time_is_the_batch_of_it(gold):
    net = gold.net()
    x, _, *rest = gold.inputs()
    out = net(x, torch.tensor(0.7), *rest)
    assert torch.equal(out, net(x, torch.full((4,), 0.7), *rest))


def test_integer_labels_are_one_hot_rows(gold):
    net = gold.net()
    x, sigma, *_ = gold.inputs()
    classes = net.label_dim
    labels = torch.tensor([1, 0, 7, 10])
    if not classes:
        assert torch.equal(net(x, sigma, labels), net(x, sigma))
        return
    rows = torch.eye(11)[labels, :10]
    assert torch.equal(net(x, sigma, labels), net(x, sigma, rows))
    assert torch.equal(net(x, sigma, labels)[3], net(x, sigma)[3])
    assert relative(net(x, sigma, labels)[0], net(x, sigma)[0]) > 1e-3
    assert torch.equal(net(x, sigma, rows[:1]), net(x, sigma, rows[:1].expand(4, -1)))
    for wrong, words in (
        (torch.tensor([0, 1, 2, 11]), "label 11 is outside 0 .. 10"),
        (torch.tensor([0, 1, 2, -1]), "label -1 is outside"),
        (torch.zeros(3, dtype=torch.long), r"cond has shape \(3,\)"),
        (torch.zeros(4, 9), r"cond has shape \(4, 9\)"),
        (torch.zeros(4), "integer labels"),
        ("cat", "got str"),
    ):
        with pytest.raises(ValueError, match=words):
            net(x, sigma, wrong)


def test_copies_share_nothing(gold):
    net = gold.net()
    twin = deepcopy(net)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert relative(net(*gold.inputs()), gold.tensors["denoised"]) < 2e-5


def rms(module: nn.Module) -> list[float]:
    convs = [m for m in module.modules() if isinstance(m, MPConv)]
    return [
        float(m.weight.detach().flatten(1).square().mean(1).sqrt().sub(1).abs().max())
        for m in convs
    ]


def test_edm2_weights_are_normalised_in_training_only(gold2):
    net = gold2.net()
    x, sigma, labels, _ = gold2.inputs()
    before = max(rms(net))
    net(x, sigma, labels)
    assert max(rms(net)) == before > 1e-2
    net.train()
    for _ in range(2):
        net(x, sigma, labels)
        net.logvar(sigma)
    assert max(rms(net)) < 1.1e-4  # normalisation adds 1e-4 to the divisor
    once = {name: value.clone() for name, value in net.state_dict().items()}
    net(x, sigma, labels)
    assert all(relative(v, once[n]) < 1e-6 for n, v in net.state_dict().items() if v.ndim > 1)


def test_edm2_output_does_not_depend_on_the_size_of_weights(gold2):
    net = gold2.net()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, MPConv):
                module.weight.mul_(3)
    assert relative(net(*gold2.inputs()), gold2.tensors["denoised"]) < 2e-3


def test_edm2_two_forwards_before_a_backward(gold2):
    """As a discriminator needs; the gradient is the sum of the gradients."""
    net = gold2.net().train()
    x, sigma, labels, _ = gold2.inputs()

    def gradients(*xs: Tensor) -> list[Tensor]:
        net.zero_grad()
        sum((net(x, sigma, labels).square().sum() for x in xs), torch.zeros(())).backward()
        return [p.grad.clone() for n, p in net.unet.named_parameters() if "logvar" not in n]

    gradients(x)
    joint, first, second = gradients(x, -x), gradients(x), gradients(-x)
    for j, a, b in zip(joint, first, second, strict=True):
        torch.testing.assert_close(j, a + b, rtol=1e-4, atol=1e-4 * float(j.abs().max()))
