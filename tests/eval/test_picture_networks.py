"""Frozen networks that losses look through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from fewstep import config
from fewstep.data.digits import load_digits
from fewstep.distillation.pictures import feature_distance
from fewstep.eval.digit_features import features_and_labels, shipped
from fewstep.eval.picture_networks import (
    DigitFeatures,
    Ink,
    LabelReward,
    Thickness,
    VisionFeatures,
)
from fewstep.methods.dmd import DMD


@pytest.mark.parametrize(("name", "side"), [("digits", 8), ("mnist", 16)])
def test_the_last_layer_is_what_metrics_are_computed_on(name: str, side: int) -> None:
    x = torch.rand(5, 1, side, side) * 2 - 1
    features = DigitFeatures(name)  # type: ignore[arg-type]
    assert torch.equal(features(x)[-1], features_and_labels(name, x)[0])
    assert len(features(x)) == len(shipped(name).layout.convs) + 1
    with pytest.raises(
        ValueError, match=rf"reads pictures \(1, {side}, {side}\), got \(3, 9, 9\)"
    ):
        features(torch.zeros(2, 3, 9, 9))


def test_its_gradient_is_that_of_finite_differences() -> None:
    x = (torch.rand(2, 1, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    y = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    features = DigitFeatures()
    assert torch.autograd.gradcheck(lambda x: feature_distance(features, x, y), x)
    assert not any(p.requires_grad for p in shipped("digits").parameters())
    assert shipped("digits").hidden.weight.dtype == torch.float32


def test_a_method_names_it_on_the_command_line() -> None:
    method = config.parse("DMD(distance=DigitFeatures('mnist'))", DMD)
    assert method.distance == DigitFeatures("mnist")
    assert config.decode(config.encode(method)) == method


def test_a_label_is_worth_its_log_probability() -> None:
    """By the classifier that counts label accuracy; gradients reach the pictures alone."""
    x = (torch.rand(4, 1, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    labels = torch.tensor([3, 0, 9, 3])
    worth = LabelReward()(x, labels)
    every = torch.stack([LabelReward()(x, torch.full((4,), digit)) for digit in range(10)])
    torch.testing.assert_close(every.exp().sum(0), torch.ones(4, dtype=torch.float64))
    assert torch.equal(worth, every[labels, range(4)])
    assert torch.equal(every.argmax(0), features_and_labels("digits", x.detach().float())[1])
    assert torch.autograd.gradcheck(lambda x: LabelReward()(x, labels), x)
    with pytest.raises(ValueError, match=r"^LabelReward needs labels: take a teacher that was"):
        LabelReward()(x, None)
    with pytest.raises(ValueError, match=r"^LabelReward\('mnist'\) reads pictures \(1, 16, 16\)"):
        LabelReward("mnist")(x, labels)


def test_thickness_is_ink_in_standard_deviations() -> None:
    """Of the digits themselves: mean 0 and deviation 1, of each by hand."""
    x = load_digits()[0].x0
    found = Thickness()(x, None)
    assert float(found.mean()) == pytest.approx(0, abs=0.05)
    assert float(found.std()) == pytest.approx(1, abs=0.05)
    ink = (x[7].mean() + 1) / 2
    torch.testing.assert_close(found[7], (ink - 0.305) / 0.034)
    with pytest.raises(ValueError, match=r"Thickness.width is positive, got -1"):
        Thickness(width=-1.0)


def test_ink_is_a_mean_brightness_of_its_own() -> None:
    """By hand: half of the pixels are white; two widths from the target is -2."""
    x = torch.full((3, 1, 2, 2), -1.0)
    x[0, 0, 0] = 1.0
    x[2] = 0.0
    assert Ink(0.4, 0.05)(x, None).tolist() == pytest.approx([-2.0, -32.0, -2.0], rel=1e-5)
    assert Ink(0.5, 0.05)(x, None).tolist() == pytest.approx([0.0, -50.0, 0.0], rel=1e-5)
    with pytest.raises(ValueError, match=r"Ink.width is positive, got 0"):
        Ink(width=0.0)


def dinov2(folder: Path, seed: int = 0) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28}
    transformers.Dinov2Model(transformers.Dinov2Config(**size, patch_size=14)).save_pretrained(
        folder
    )
    return folder


def test_a_vision_network_is_read_at_several_blocks(tmp_path: Path) -> None:
    """Against the stock model on the same input; its digest is kept and compared."""
    import transformers

    from fewstep.eval.dinov2 import DEVIATION, MEAN, load_dinov2

    folder = str(dinov2(tmp_path / "vit"))
    features = VisionFeatures(folder, (0, 2))
    x = (torch.rand(1, 1, 224, 224) * 2 - 1).requires_grad_()
    first, last = features(x)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    stock = load_dinov2(Path(folder)).model
    assert isinstance(stock, transformers.Dinov2Model)
    seen = stock(((x + 1) / 2 - mean) / deviation, output_hidden_states=True).hidden_states
    torch.testing.assert_close(first, seen[1].mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, seen[3].mT, rtol=1e-4, atol=1e-4)
    assert (first - last).abs().max() > 1e-2
    last.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="has blocks 0 to 2, not 3"):
        VisionFeatures(folder, (3,))(x)
    settled = features.settled()
    assert isinstance(settled, VisionFeatures)
    assert settled.settled() == settled
    dinov2(tmp_path / "vit", seed=1)
    with pytest.raises(ValueError, match="holds another network than this run was started with"):
        settled.settled()
    assert replace(settled, sha256="").settled() != settled


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_the_shapes_of_digit_features(name: Literal["digits", "mnist"]) -> None:
    """As heads are made for, and as they come."""
    features, side = DigitFeatures(name), {"digits": 8, "mnist": 16}[name]
    made = features(torch.zeros(2, 1, side, side))
    assert [tuple(f.shape[1:]) for f in made] == list(features.shapes)
