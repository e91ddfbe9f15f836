"""Inception against a second construction of its graph, published counts, and known traps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fewstep.eval import features as module
from fewstep.eval.features import KnownWeights, metric_title
from fewstep.eval.inception import InceptionV3, resize
from fewstep.eval.load_features import load_features

SIDES = {
    **{"Conv2d_1a_3x3": (32, 149), "Conv2d_2a_3x3": (32, 147), "Conv2d_2b_3x3": (64, 147)},
    **{"Conv2d_3b_1x1": (80, 73), "Conv2d_4a_3x3": (192, 71)},
    **{"Mixed_5b": (256, 35), "Mixed_5c": (288, 35), "Mixed_5d": (288, 35)},
    **{f"Mixed_6{x}": (768, 17) for x in "abcde"},
    **{"Mixed_7a": (1280, 8), "Mixed_7b": (2048, 8), "Mixed_7c": (2048, 8)},
}
"""Channels and side of each map, after figure 5 and table 1 of the paper."""
BRANCHES = {
    "A": "branch1x1 | branch5x5_1 branch5x5_2 | branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
    " | avg branch_pool",
    "B": "branch3x3/2 | branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2 | max/2",
    "C": "branch1x1 | branch7x7_1 branch7x7_2 branch7x7_3 | branch7x7dbl_1 branch7x7dbl_2"
    " branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5 | avg branch_pool",
    "D": "branch3x3_1 branch3x3_2/2 | branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2"
    " | max/2",
    "E": "branch1x1 | branch3x3_1 branch3x3_2a+branch3x3_2b"
    " | branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a+branch3x3dbl_3b | avg branch_pool",
}
LAST = BRANCHES["E"].replace("avg", "max")
STEM = "Conv2d_1a_3x3/2! Conv2d_2a_3x3! Conv2d_2b_3x3 max/2 Conv2d_3b_1x1 Conv2d_4a_3x3! max/2"
BLOCKS = {f"Mixed_5{x}": "A" for x in "bcd"} | {"Mixed_6a": "B"}
BLOCKS |= {f"Mixed_6{x}": "C" for x in "bcde"} | {"Mixed_7a": "D"}


def state(seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep the size of what flows, with statistics unlike 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in InceptionV3().state_dict().items()}
    out = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            x = 0.5 + x.abs()
        elif name.endswith(("bn.weight", "bn.bias", "running_mean")):
            x = 0.1 * x + float(name.endswith("bn.weight"))
        else:
            x = x * (2 / max(1, x[0].numel())) ** 0.5
        out[name] = x
    return out


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return state()


@pytest.fixture(scope="module")
def net(weights: dict[str, Tensor]) -> InceptionV3:
    net = InceptionV3()
    net.load_state_dict(weights)
    return net.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1


def windows(x: Tensor, fill: float) -> Tensor:
    """The nine 3x3 neighbours of every pixel: (9, B, C, H, W)."""
    wide, (h, w) = F.pad(x, (1, 1, 1, 1), value=fill), x.shape[2:]
    return torch.stack([wide[..., i : i + h, j : j + w] for i in range(3) for j in range(3)])


def unit(weights: dict[str, Tensor], x: Tensor, name: str, stride: int, valid: bool) -> Tensor:
    """A unit with its normalisation folded into the convolution."""
    w = weights[f"{name}.conv.weight"]
    names = ("weight", "bias", "running_mean", "running_var")
    g, b, m, v = (weights[f"{name}.bn.{n}"] for n in names)
    scale = g / (v + 0.001).sqrt()
    padding = (0, 0) if valid or stride == 2 else (w.shape[2] // 2, w.shape[3] // 2)
    return F.conv2d(x, w * scale[:, None, None, None], b - m * scale, stride, padding).clamp_min(0)


def step(weights: dict[str, Tensor], x: Tensor, prefix: str, word: str) -> Tensor:
    """One word of a table: "max/2", "max", "avg", a unit ("/2": every other pixel; "!": no
    padding), or two units beside each other."""
    name, stride, valid = word.rstrip("!").removesuffix("/2"), 1 + ("/2" in word), "!" in word
    if name == "avg":
        return windows(x, 0.0).sum(0) / windows(torch.ones_like(x), 0.0).sum(0)
    if name == "max":
        largest = windows(x, -torch.inf).amax(0)
        return largest if stride == 1 else largest[..., 1:-1:2, 1:-1:2]
    both = [unit(weights, x, prefix + n, stride, valid) for n in name.split("+")]
    return torch.cat(both, 1)


def chain(weights: dict[str, Tensor], x: Tensor, prefix: str, words: str) -> Tensor:
    for word in words.split():
        x = step(weights, x, prefix, word)
    return x


def second(weights: dict[str, Tensor], x: Tensor, last: str = LAST) -> Tensor:
    """Features (B, 2048) by the tables above."""
    x = chain(weights, x, "", STEM)
    for name, kind in [*BLOCKS.items(), ("Mixed_7b", "E"), ("Mixed_7c", "last")]:
        table = last if kind == "last" else BRANCHES[kind]
        x = torch.cat([chain(weights, x, f"{name}.", b) for b in table.split("|")], 1)
    return F.avg_pool2d(x, 8).flatten(1)


def test_the_network_has_the_published_count() -> None:
    """Two published counts of the paper's network, both turned into this one's.

    With 1000 classes, without auxiliary head: 23,834,568 (27,161,264 less 3,326,696). Without
    head and without the 17,216 scales, statistics counted: 21,802,784.
    """
    with torch.device("meta"):
        net = InceptionV3()
    count = sum(p.numel() for p in net.parameters())
    assert count == 23_850_960
    assert count == 23_834_568 + 8 * 2049
    assert count == 21_802_784 - 17_216 * 3 + 17_216 * 2 + 1008 * 2049
    assert len([n for n in net.state_dict() if n.endswith("running_var")]) == 94


def test_every_map_has_its_published_size(net: InceptionV3, x: Tensor) -> None:
    found = {}
    hooks = [
        child.register_forward_hook(lambda m, i, y, name=name: found.update({name: y.shape}))
        for name, child in net.named_children()
        if name != "fc"
    ]
    assert net(x[:1]).shape == (1, 2048)
    for hook in hooks:
        hook.remove()
    assert found == {name: (1, c, side, side) for name, (c, side) in SIDES.items()}
    assert list(found) == list(SIDES)


def test_it_is_the_second_construction(
    net: InceptionV3, weights: dict[str, Tensor], x: Tensor
) -> None:
    """Pools by hand, normalisation folded in: 1e-5 of the size of the features."""
    features = net(x)
    size = features.square().mean().sqrt()
    assert 0.05 < size < 50
    error = (second(weights, x[:1]) - features[:1]).abs().max() / size
    assert error < 1e-5
    logits = features @ weights["fc.weight"].T
    torch.testing.assert_close(net.logits(features), logits)
    assert torch.equal(net(x), features)
    torch.testing.assert_close(net(x[1:]), features[1:], rtol=1e-5, atol=float(1e-5 * size))


def test_the_traps_are_seen(
    net: InceptionV3, weights: dict[str, Tensor], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding counted in averages, and the paper's average in the last block: other features."""
    features = net(x[:1])
    size = features.square().mean().sqrt()
    paper = second(weights, x[:1], last=BRANCHES["E"])
    assert (paper - features).abs().max() > 0.05 * size
    with monkeypatch.context() as patch:
        pool = F.avg_pool2d
        patch.setattr(F, "avg_pool2d", lambda x, *a, count_include_pad, **k: pool(x, *a, **k))
        assert (net(x[:1]) - features).abs().max() > 0.05 * size


def test_resize_by_hand() -> None:
    """Row i lies at i H / size: 0, 1/2, 1, and 3/2, which is beyond the last row."""
    x = torch.tensor([[0.0, 10.0], [20.0, 50.0]])[None, None]
    rows = [[0, 5, 10, 10], [10, 20, 30, 30], [20, 35, 50, 50], [20, 35, 50, 50]]
    assert torch.equal(resize(x, 4)[0, 0], torch.tensor(rows).float())
    line = torch.arange(5.0).expand(1, 1, 1, 5)
    near = resize(line, 2)[0, 0, 0]  # 0 and 5/2: no smoothing
    assert near.tolist() == [0.0, 2.5]
    same = torch.rand(1, 3, 299, 299)
    assert torch.equal(resize(same), same)
    other = F.interpolate(x, (4, 4), mode="bilinear", align_corners=False)[0, 0]
    assert not torch.allclose(other, torch.tensor(rows).float(), atol=1.0)


@pytest.mark.parametrize("height", [32, 64, 512])
def test_resize_is_the_sampling_of_the_published_program(height: int) -> None:
    """That program shifts a grid of half-pixel centres by 1/W - 1/299: the same places."""
    x = torch.rand(1, 3, height, 48, generator=torch.Generator().manual_seed(0)) * 255
    theta = torch.tensor([[[1.0, 0.0, 1 / 48 - 1 / 299], [0.0, 1.0, 1 / height - 1 / 299]]])
    grid = F.affine_grid(theta, [1, 3, 299, 299], align_corners=False)
    there = F.grid_sample(x, grid, "bilinear", "border", align_corners=False)
    assert (resize(x) - there).abs().max() < 0.02  # of 255; the grid is in float32
    plain = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    assert (plain - there).abs().max() > 10


def pictures(count: int = 1, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (count, 32, 32, channels)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_weights_load_from_each_kind_of_file(
    net: InceptionV3, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the published file: 566 entries, counters among them, in torch.save's older format."""
    full = dict(weights)
    for name in weights:
        if name.endswith("running_var"):
            full[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    assert len(full) == 566
    older, other = tmp_path / "older.pth", tmp_path / "other.safetensors"
    torch.save(full, older, _use_new_zipfile_serialization=False)
    save_file(full, other)
    wanted = net((resize(pictures().permute(0, 3, 1, 2).float()) - 128) / 128)
    for path in (older, other):
        found = load_features(str(path))
        features, logits = found(pictures())
        torch.testing.assert_close(features, wanted)
        assert logits is not None
        torch.testing.assert_close(logits, net.logits(wanted))
        assert found.name == f"inception-{found.sha256[:8]}"  # type: ignore[attr-defined]
        assert metric_title("FD", found, 50_000) == f"FD({found.name}, 50000)"
    grey = pictures(channels=1)
    assert torch.equal(found(grey)[0], found(grey.expand(-1, -1, -1, 3))[0])
    known = KnownWeights("FID", "other.safetensors")
    monkeypatch.setitem(module.KNOWN, found.sha256, known)  # type: ignore[attr-defined]
    assert found.name == "inception"
    assert metric_title("FD", found, 50_000) == "FID"
    assert metric_title("IS", found, 50_000) == "IS"
    assert metric_title("FD", found, 5000) == "FD(inception, 5000)"
    assert metric_title("FD", found, 50_001) == "FD(inception, 50001)"
    assert (
        metric_title("FD", found, 50_000, 15_803)
        == metric_title("FD", found, 50_000, 10_000)
        == "FID"
    )
    assert metric_title("FD", found, 50_000, 9_999) == "FD(inception, 50000 against 9999)"
    assert (
        metric_title("KID", found, 50_000, 50_000) == metric_title("KID", found, 50_000) == "KID"
    )
    assert metric_title("KID", found, 50_000, 20) == "KID(inception, 50000 against 20)"
    for score in ("precision", "recall", "density", "coverage"):  # published in VGG-16's
        assert metric_title(score, found, 50_000) == f"{score}(inception, 50000)"
    monkeypatch.setenv("FEWSTEP_INCEPTION", str(other))
    assert load_features().name == "inception"
