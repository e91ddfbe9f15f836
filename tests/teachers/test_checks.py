"""Arguments and states that do not describe a published network are refused in one sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fewstep.teachers import edm, edm2
from tests.recorded_networks import recorded

REFUSED_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"model_chanels": 16}, "has no argument 'model_chanels'; did you mean 'model_channels'"),
    ({"colour": 1}, "has no argument 'colour'"),
    ({"in_channels": 3}, "has no argument 'in_channels'"),
    (
        {"model_channels": "16"},
        "model_channels should be a whole number from 1 to 16384, got '16'",
    ),
    ({"model_channels": 10**9}, "model_channels should be"),
    ({"model_channels": True}, "model_channels should be"),
    ({"num_blocks": -1}, "num_blocks should be"),
    ({"num_blocks": 10**6}, "num_blocks should be"),
    ({"channel_mult": []}, "channel_mult should be a list of 1 to 14"),
    ({"channel_mult": 2}, "channel_mult should be a list"),
    ({"channel_mult": [1] * 10}, "levels do not fit img_resolution 16"),
    ({"dropout": math.nan}, "dropout should be a number from 0 to 1"),
    ({"sigma_data": -1.0}, "sigma_data should be"),
    ({"use_fp16": 1}, "use_fp16 should be True or False"),
    ({"img_resolution": None}, "img_resolution should be"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED_ARGUMENTS, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm2"])
def test_wrong_arguments_are_refused(name, change, words):
    gold = recorded(name)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        gold.build(gold.kwargs | change, gold.state)


def test_wrong_names_are_refused():
    gold = recorded("edm_ddpmpp")
    for change in ({"model_type": "UNet"}, {"model_type": ["SongUNet"]}, {"encoder_type": "fast"}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is one of"):
            edm.build(gold.kwargs | change, gold.state)
    with pytest.raises(ValueError, match="class_name is one of EDMPrecond"):
        edm.build(gold.kwargs, gold.state, class_name="Precond")
    with pytest.raises(ValueError, match="needs the argument 'img_channels'"):
        edm.build({"img_resolution": 16}, gold.state)


@pytest.mark.parametrize("name", ["edm_adm", "edm2"])
def test_wrong_states_are_refused(name):
    gold = recorded(name)
    key, value = next((k, v) for k, v in gold.state.items() if v.ndim == 4)
    bad = value.clone()
    bad[0, 0, 0, 0] = math.nan
    for state, words in (
        ({k: v for k, v in gold.state.items() if k != key}, f"1 missing .{key}."),
        ({}, r"missing .*, \.\.\."),
        (gold.state | {"model.extra": value}, "1 unexpected .model.extra."),
        (gold.state | {key: value[:1]}, "has shape .1, .*expected"),
        (gold.state | {key: bad}, f"{key} holds values that are not finite"),
        (gold.state | {key: bad.nan_to_num(math.inf)}, "not finite"),
        (gold.state | {key: value.long()}, "holds torch.int64"),
        (gold.state | {key: value.numpy()}, "not a dense tensor"),
        (gold.state | {key: value.to_sparse()}, "not a dense tensor"),
        (gold.state | {key: value.to("meta")}, "not a dense tensor"),
    ):
        with pytest.raises(ValueError, match=words):
            gold.build(gold.kwargs, state)


def test_half_precision_states_are_widened():
    gold = recorded("edm2")
    half = {name: value.half() for name, value in gold.state.items()}
    net = edm2.build(gold.kwargs, half)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    out = net(*gold.inputs())
    assert float((out - gold.tensors["denoised"]).detach().abs().max()) < 0.02
