"""Every published constructor argument builds and matters; layers meet their definitions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewstep.nets import edm2 as mp
from fewstep.nets.attention import attend, split_heads
from fewstep.nets.edm_layers import Conv2d, FourierEmbedding, Init, PositionalEmbedding
from fewstep.nets.edm_precond import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from fewstep.nets.edm_unets import DhariwalUNet, SongUNet
from fewstep.nets.precond import Preconditioned
from fewstep.teachers import edm

SMALL: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 3,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
SONG = [
    {"model_type": "SongUNet", "encoder_type": e, "decoder_type": d, "embedding_type": m,
     "resample_filter": f, "label_dim": c, "augment_dim": a}
    for e, d, m, f, (c, a) in itertools.product(
        ("standard", "skip", "residual"), ("standard", "skip"), ("positional", "fourier"),
        ([1, 1], [1, 3, 3, 1]), ((0, 0), (4, 9)),
    )
]  # fmt: skip
ADM = [
    {"model_type": "DhariwalUNet", "label_dim": c, "augment_dim": a, "model_channels": m,
     "channel_mult": k, "num_blocks": n}
    for (c, a), (m, k), n in itertools.product(
        ((0, 0), (4, 9)), ((8, [1, 2]), (64, [1, 2]), (64, [1])), (1, 2)
    )
]  # fmt: skip
EDM2 = [
    {"label_dim": c, "model_channels": m, "channel_mult_noise": n, "channel_mult_emb": n,
     "channels_per_head": h, "clip_act": k, "label_balance": b, "concat_balance": b,
     "res_balance": b, "attn_balance": b, "resample_filter": f}
    for c, (m, h), n, k, b, f in itertools.product(
        (0, 4), ((8, 8), (8, 64), (16, 8)), (None, 3), (None, 256), (0.3, 0.6),
        ([1, 1], [1, 3, 3, 1]),
    )
]  # fmt: skip


def perturbed(net: nn.Module, seed: int = 0) -> nn.Module:
    """Networks start with zeros in places; here every weight is random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return net


def check(net: Preconditioned) -> None:
    """Runs; notices noise level, label, augmentation; every parameter has a gradient."""
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 4.0])
    augment = torch.randn(2, 9)
    out = net(x, t, torch.tensor([1, 3]), augment)
    assert out.shape == x.shape
    assert bool(out.isfinite().all())
    assert torch.equal(net(x, t, torch.tensor([1, 2]), augment), out) != bool(net.label_dim)
    assert not torch.equal(net(x, t * 2, torch.tensor([1, 3]), augment), out)
    takes_augment = getattr(net.body, "map_augment", None) is not None
    assert torch.equal(net(x, t, torch.tensor([1, 3])), out) != takes_augment
    out.square().sum().backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in idle if "logvar" not in name] == []


@pytest.mark.parametrize("options", SONG + ADM, ids=str)
def test_every_edm_option_builds_and_uses_all_it_has(options):
    torch.manual_seed(0)
    check(perturbed(EDMPrecond(**SMALL | options)).eval())


@pytest.mark.parametrize("options", EDM2, ids=str)
def test_every_edm2_option_builds_and_uses_all_it_has(options):
    torch.manual_seed(0)
    check(perturbed(mp.Precond(**SMALL | options)).eval())


@pytest.mark.parametrize("cls", [EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond])
@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_every_preconditioning_builds(cls, model_type):
    torch.manual_seed(0)
    net = perturbed(cls(**SMALL, model_type=model_type, label_dim=4, dropout=0.0)).eval()
    check(net)
    rebuilt = edm.build(
        SMALL | {"model_type": model_type, "label_dim": 4},
        net.state_dict(),
        class_name=cls.__name__,
    )
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 4.0]), torch.tensor([0, 4])
    assert torch.equal(rebuilt(x, t, y), net(x, t, y))
    assert rebuilt.path == net.path


def test_vp_time_inverts_its_sigma():
    net = VPPrecond(**SMALL)
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    sigma = torch.expm1(19.9 * t**2 / 2 + 0.1 * t).sqrt()
    scale = net.scaling(sigma)
    torch.testing.assert_close(scale.noise, 999 * t)
    torch.testing.assert_close(scale.out, -sigma)
    torch.testing.assert_close(scale.into, (1 + sigma**2).rsqrt())
    assert net.path.t_max == pytest.approx(152.166, rel=1e-5)


def test_ve_and_edm_scaling():
    sigma = torch.tensor([0.02, 0.5, 80.0], dtype=torch.float64)
    ve = VEPrecond(**SMALL)
    assert (ve.path.t_min, ve.path.t_max) == (0.02, 100.0)
    torch.testing.assert_close(ve.scaling(sigma).noise, (sigma / 2).log())
    scale = EDMPrecond(**SMALL, sigma_data=0.7).scaling(sigma)
    spread = (0.49 + sigma**2).sqrt()
    torch.testing.assert_close(scale.into, 1 / spread)
    torch.testing.assert_close(scale.skip, 0.49 / spread**2)
    torch.testing.assert_close(scale.out, 0.7 * sigma / spread)


def test_iddpm_levels_are_the_cosine_schedule():
    net = iDDPMPrecond(**SMALL)
    j = torch.arange(1001, dtype=torch.float64)
    abar = (math.pi / 2 * j / 1000 / 1.008).sin() ** 2
    wanted = (
        (abar[-1] / abar - 1) / 1
    ).sqrt()  # u^2 + 1 = abar_M / abar_j where nothing is clipped
    torch.testing.assert_close(net.u[32:].double(), wanted[32:], rtol=1e-5, atol=1e-6)
    assert bool((net.u.diff() < 0).all())
    assert (net.path.t_min, net.path.t_max) == pytest.approx((float(net.u[999]), float(net.u[0])))
    near = net.u[[0, 500, 999, 1000]] * 1.0001
    assert net.scaling(near).noise.tolist() == [999.0, 499.0, 0.0, -1.0]
    assert net.model.out_conv.weight.shape[0] == 6


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 2, 1, 3]])
@pytest.mark.parametrize("fused", [False, True])
def test_resampling_layers_against_their_definition(taps, fused):
    """Downsampling by a filter is a correlation; upsampling is its adjoint, times four."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    f = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    pad = (len(taps) - 1) // 2
    down = Conv2d(2, 2, 0, None, "down", taps).double()
    wide = F.pad(x, (pad,) * 4)
    wanted = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    for i, j in itertools.product(range(len(taps)), repeat=2):
        wanted += f[i] * f[j] * wide[:, :, i : i + 8 : 2, j : j + 8 : 2][:, :, :4, :4]
    torch.testing.assert_close(down(x), wanted)
    y = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    up = Conv2d(2, 2, 0, None, "up", taps).double()
    torch.testing.assert_close((up(y) * x).sum(), 4 * (y * down(x)).sum())
    conv = Conv2d(2, 3, 3, Init("xavier_uniform"), "down", taps, fused=fused).double()
    plain = Conv2d(2, 3, 3).double()
    plain.load_state_dict({"weight": conv.weight, "bias": conv.bias})
    if fused:
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        torch.testing.assert_close(
            conv(x)[inner], Conv2d(3, 3, 0, None, "down", taps).double()(plain(x))[inner]
        )
        assert conv(x).shape == (1, 3, 4, 4)
    else:
        torch.testing.assert_close(conv(x), plain(down(x)))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("size", [(3, 5), (16, 17)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_against_its_definition(heads, size, layout):
    """Small maps and large ones, which take another way."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 24, *size, dtype=torch.float64)
    out = attend(split_heads(qkv, heads), torch.empty(2, 8, *size, memory_format=layout))
    assert out.is_contiguous(memory_format=layout)
    width = 8 // heads
    for b, h in itertools.product(range(2), range(heads)):
        part = qkv[b].flatten(1)[3 * width * h : 3 * width * (h + 1)]
        q, k, v = part[0::3], part[1::3], part[2::3]
        weight = (q.T @ k / math.sqrt(width)).softmax(1)
        seen = out[b, width * h : width * (h + 1)].flatten(1)
        torch.testing.assert_close(seen, v @ weight.T)


def test_embeddings_against_their_definition():
    t = torch.tensor([0.0, 1.5])
    for endpoint, last in ((True, 1e-4), (False, 1e-4 ** (3 / 4))):
        emb = PositionalEmbedding(8, endpoint)(t)
        torch.testing.assert_close(emb[0], torch.tensor([1.0] * 4 + [0.0] * 4))
        assert emb[1, [0, 4]].tolist() == pytest.approx([math.cos(1.5), math.sin(1.5)])
        assert float(emb[1, 7]) == pytest.approx(math.sin(1.5 * last), rel=1e-5)
    fourier = FourierEmbedding(8)
    fourier.freqs.copy_(torch.tensor([0.0, 1.0, 0.25, 2.0]))
    torch.testing.assert_close(
        fourier(torch.tensor([1.0]))[0, [2, 6]], torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0
    )


def test_labels_and_augmentation_join_the_embedding():
    """DDPM++ scales one-hot rows to unit variance and adds before its layers, ADM after them."""
    torch.manual_seed(0)
    t, labels, augment = torch.randn(2), torch.eye(4)[:2], torch.randn(2, 9)
    sizes: dict[str, Any] = {"label_dim": 4, "augment_dim": 9, "model_channels": 8}
    song = perturbed(SongUNet(8, 3, 3, **sizes))
    cos, sin = song.map_noise(t).chunk(2, 1)
    h = torch.cat([sin, cos], 1) + song.map_label(labels * 2) + song.map_augment(augment)
    h = F.silu(song.map_layer1(F.silu(song.map_layer0(h))))
    torch.testing.assert_close(song.embed(t, labels, augment), h)
    adm = perturbed(DhariwalUNet(8, 3, 3, **sizes))
    h = adm.map_noise(t) + adm.map_augment(augment)
    h = F.silu(adm.map_layer1(F.silu(adm.map_layer0(h))) + adm.map_label(labels))
    torch.testing.assert_close(adm.embed(t, labels, augment), h)


def test_edm2_attention_is_of_unit_vectors():
    """q, k and v of every head have unit magnitude; the branch joins with balance 0.4."""
    torch.manual_seed(0)
    style = mp.MPStyle(4, channels_per_head=4, attn_balance=0.4, clip_act=0.9)
    block = perturbed(mp.Block(8, 8, style, "dec", attention=True))
    x, emb = torch.randn(2, 8, 3, 3), torch.randn(2, 4)
    out = block(x, emb)
    gain = (block.emb_linear(emb, block.emb_gain) + 1)[:, :, None, None]
    y = block.conv_res1(mp.mp_silu(block.conv_res0(mp.mp_silu(x)) * gain))
    h = (0.7 * x + 0.3 * y) / 0.58**0.5
    parts = block.attn_qkv(h).reshape(2, 2, 4, 3, 9)
    parts = parts / (parts.square().mean(2, keepdim=True).sqrt() + 1e-4)
    q, k, v = parts.unbind(3)
    weight = (torch.einsum("bhcq,bhck->bhqk", q, k) / 2).softmax(3)
    seen = torch.einsum("bhqk,bhck->bhcq", weight, v).reshape(2, 8, 3, 3)
    joined = (0.6 * h + 0.4 * block.attn_proj(seen)) / 0.52**0.5
    assert float(joined.detach().abs().max()) > 0.9
    torch.testing.assert_close(out, joined.clamp(-0.9, 0.9), rtol=1e-4, atol=1e-5)


def test_magnitude_preservation():
    """Every operation of EDM2 keeps unit magnitude (to sampling error)."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 512), torch.randn(64, 256)
    magnitude = lambda x: float(x.detach().square().mean().sqrt())  # noqa: E731
    assert magnitude(mp.mp_silu(a)) == pytest.approx(1, abs=0.02)
    assert magnitude(mp.mp_sum(a, torch.randn(64, 512), 0.3)) == pytest.approx(1, abs=0.02)
    joined = mp.mp_cat(a, b, 0.5)
    assert magnitude(joined) == pytest.approx(1, abs=0.02)
    assert magnitude(joined[:, :512]) * 2**0.5 == pytest.approx(
        magnitude(joined[:, 512:]), rel=0.02
    )
    assert magnitude(mp.MPConv(512, 256)(a)) == pytest.approx(1, abs=0.02)
    assert magnitude(mp.MPFourier(512)(torch.randn(64))) == pytest.approx(1, abs=0.03)
    assert magnitude(mp.normalize(5 * a)) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(mp.normalize(a * 7), mp.normalize(a), rtol=1e-3, atol=0)


@pytest.mark.parametrize("cls", [SongUNet, DhariwalUNet])
def test_label_dropout_in_training_only(cls):
    torch.manual_seed(0)
    net = perturbed(cls(8, 3, 3, 4, model_channels=8, channel_mult=[1], num_blocks=1,
                        attn_resolutions=[], dropout=0.0, label_dropout=0.5))  # fmt: skip
    labels = torch.eye(4)[torch.zeros(64, dtype=torch.long)]
    x, noise = torch.randn(1, 3, 8, 8).expand(64, -1, -1, -1), torch.zeros(64)
    kept, lost = net.eval()(x[:1], noise[:1], labels[:1]), net(x[:1], noise[:1], 0 * labels[:1])
    out = net.train()(x, noise, labels)
    is_kept = (out - kept).abs().amax((1, 2, 3)) < 1e-5
    is_lost = (out - lost).abs().amax((1, 2, 3)) < 1e-5
    assert bool((is_kept ^ is_lost).all())
    assert 16 < int(is_kept.sum()) < 48
