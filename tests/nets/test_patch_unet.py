"""The patch U-Net: equal to its formulas written out, and to itself through the tap."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.denoisers import EDM
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.nets.patch_unet import PatchUNet

SMALL = PatchUNet(width=8, mults=(1, 2), patch=2)
SETTINGS = (
    SMALL,
    PatchUNet(width=4, mults=(1,), blocks=0, patch=4),
    PatchUNet(width=8, mults=(1, 1, 2), blocks=2, attention=(8,), patch=1),
)
CLASSES = 3
F64 = torch.float64


def body(config: PatchUNet = SMALL, classes: int = CLASSES) -> Any:
    """A network in float64 whose layers are all random: as built, many start at zero."""
    net = config.build((2, 8, 8), classes).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0, 0.2, generator=generator)
    return net


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 8, 8, generator=generator, dtype=F64)
    return x, torch.tensor([-1.2, -0.3, 0.1, 0.9], dtype=F64), torch.tensor([0, 2, 3, 1])


class Formulas:
    """The network written out once more, for its weights w; no layer of the package is used."""

    def __init__(self, w: Mapping[str, Tensor]) -> None:
        self.w = w

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), x.shape[1] // 4, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
        flat = ((groups - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return flat * weight[:, None, None] + bias[:, None, None]

    def resample(self, name: str, x: Tensor) -> Tensor:
        if name.endswith("_down"):
            return F.avg_pool2d(x, 2)
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if name.endswith("_up") else x

    def block(self, name: str, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv0", self.resample(name, F.silu(self.norm(f"{name}.norm0", x))))
        scale, shift = self.linear(f"{name}.affine", emb)[:, :, None, None].chunk(2, 1)
        h = self.norm(f"{name}.norm1", h) * (1 + scale) + shift
        h = self.conv(f"{name}.conv1", F.silu(h))
        x = self.resample(name, x)
        h = h + (self.conv(f"{name}.skip", x) if f"{name}.skip.weight" in self.w else x)
        if f"{name}.qkv.weight" not in self.w:
            return h
        q, k, v = (
            self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", h))
            .flatten(2)
            .reshape(len(h), h.shape[1], 3, -1)
            .unbind(2)
        )
        seen = v @ (q.mT @ k / math.sqrt(h.shape[1])).softmax(2).mT
        return h + self.conv(f"{name}.proj", seen.reshape(h.shape))

    def __call__(self, x: Tensor, label: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """(F, features) of the net SMALL."""
        octaves = torch.linspace(-4, 3, 4)
        phase = (2 * math.pi * 2.0**octaves).to(F64) * label[:, None]
        emb = F.silu(self.linear("map_noise", torch.cat([phase.cos(), phase.sin()], 1)))
        emb = F.silu(self.linear("map_both", emb + self.w["map_label.weight"][cond]))
        patches = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 2)
        h = self.conv("enc.4x4_conv", patches.flatten(1, 2))
        left = [h]
        for name in ("enc.4x4_block0", "enc.2x2_down", "enc.2x2_block0"):
            h = self.block(name, h, emb)
            left.append(h)
        features = h
        for name in ("dec.2x2_in0", "dec.2x2_in1", "dec.2x2_block0", "dec.2x2_block1"):
            h = self.block(name, torch.cat([h, left.pop()], 1) if "block" in name else h, emb)
        for name in ("dec.4x4_up", "dec.4x4_block0", "dec.4x4_block1"):
            h = self.block(name, torch.cat([h, left.pop()], 1) if "block" in name else h, emb)
        out = self.conv("out_conv", F.silu(self.norm("out_norm", h)))
        whole = torch.empty_like(x)
        for i in (0, 1):
            for j in (0, 1):
                whole[..., i::2, j::2] = out[:, 2 * i + j :: 4]
        return whole, features


def test_is_what_its_formulas_say() -> None:
    net = body()
    with torch.no_grad():
        out, features = net.forward_with_features(*inputs())
        expected, expected_features = Formulas(net.state_dict())(*inputs())
    torch.testing.assert_close(features, expected_features, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert float(out.std()) > 0.1


@pytest.mark.parametrize("config", SETTINGS, ids=repr)
def test_the_tap_is_exact_and_runs_no_decoder(config: PatchUNet) -> None:
    net, seen, ran = body(config), [], []
    [*net.enc.values()][-1].register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    with torch.no_grad():
        out, features = net.forward_with_features(*inputs())
        assert torch.equal(net(*inputs()), out)
        for block in net.dec.values():
            block.register_forward_hook(lambda *_: ran.append(1))
        assert torch.equal(net.encode(*inputs()), features)
    assert not ran
    assert len(seen) == 3
    assert all(torch.equal(value, features) for value in seen)
    size = 8 // config.patch >> (len(config.mults) - 1)
    assert features.shape[2:] == (size, size)


@pytest.mark.parametrize("config", SETTINGS, ids=repr)
def test_every_weight_matters(config: PatchUNet) -> None:
    net = body(config)
    net(*inputs()).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_labels_and_their_absence() -> None:
    net, (x, label, cond) = body(), inputs()
    with torch.no_grad():
        null, out = net(x, label), net(x, label, cond)
        assert torch.equal(null, net(x, label, torch.full((4,), CLASSES)))
        differs = (out - null).abs().amax((1, 2, 3)) > 1e-3
        assert differs.tolist() == [True, True, False, True]  # the third label is none
        free = body(classes=0)
        assert torch.equal(free(x, label, cond), free(x, label))


def test_every_sample_has_its_own_noise_level_and_label() -> None:
    net, (x, label, cond) = body(), inputs()
    with torch.no_grad():
        whole, same = net(x, label, cond), net(x, label[:1].expand(4), cond)
        for i in range(4):
            one = net(x[i : i + 1], label[i : i + 1], cond[i : i + 1])
            torch.testing.assert_close(whole[i : i + 1], one, rtol=1e-10, atol=1e-10)
    changed = (whole - same).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, True, True, True]


def test_untrained_edm_is_the_best_linear_denoiser() -> None:
    """F = 0 before training, hence D = c_skip x_t: sd^2 / (sd^2 + t^2) = 0.1 at t = 3 sd."""
    net = Model(PatchUNet(), (1, 16, 16), 10).build()
    x = inputs()[0][:, :1].float().repeat(1, 1, 2, 2)
    torch.testing.assert_close(net(x, torch.tensor(1.5), torch.arange(4)), 0.1 * x)


def test_edm_hands_the_tap_on() -> None:
    """Features are the body's at c_in x_t = x_t / (sd^2 + t^2)^(1/2) and c_noise = ln(t) / 4."""
    net, (x, _, cond) = body(), inputs()
    t = torch.tensor([0.1, 0.5, 1.5, 10.0], dtype=F64)
    with torch.no_grad():
        denoiser = EDM(net, VE(), 0.5)
        x0, features = denoiser.forward_with_features(x, t, cond)
        assert torch.equal(x0, denoiser(x, t, cond))
        assert torch.equal(features, denoiser.encode(x, t, cond))
        into = x / (0.25 + t**2).sqrt()[:, None, None, None]
        torch.testing.assert_close(features, net.encode(into, t.log() / 4, cond))


def test_dropout_acts_in_training_alone() -> None:
    net = body(PatchUNet(width=8, mults=(1, 2), dropout=0.5))
    with torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(net(*inputs()), net(*inputs()))
        assert torch.equal(net.eval()(*inputs()), body()(*inputs()))
        assert torch.equal(body()(*inputs()), body()(*inputs()))


REFUSED: dict[str, dict[str, Any]] = {
    "PatchUNet needs width >= 4, blocks >= 0, patch >= 1 and dropout in [0, 1), got PatchUNet("
    "width=48, mults=(1, 1), blocks=1, attention=(), patch=0, dropout=0.0)": {"patch": 0},
    "PatchUNet.mults are positive whole numbers, got (1, 0)": {"mults": (1, 0)},
    "PatchUNet with patch 2 and 4 levels needs square pictures (C, S, S) with S a multiple of 16, "
    "got (2, 8, 8)": {"mults": (1, 1, 1, 1)},
    "34 channels do not split into min(32, channels // 4) groups": {"width": 34},
}


@pytest.mark.parametrize(("sentence", "fields"), REFUSED.items())
def test_refusals(sentence: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        PatchUNet(**fields).build((2, 8, 8), CLASSES)
