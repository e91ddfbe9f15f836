"""Published networks as configuration: text and back, and refusals in words."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from fewstep.config import decode, encode, parse
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.nets.mlp import MLP
from fewstep.teachers.network_config import SnapshotNet, describe
from tests.cli.test_inspect import SONG


def test_the_description_of_a_published_network() -> None:
    net = SnapshotNet("EDMPrecond", json.dumps(SONG))
    model = Model(net, (1, 8, 8), 10, VE(), "denoiser")
    assert decode(json.loads(json.dumps(encode(model)))) == parse(repr(model)) == model
    assert isinstance(model.build(), EDMPrecond)
    one, same, other = (model.build(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    words = "EDMPrecond of these arguments is for (1, 8, 8) with 10 classes, got Model.shape "
    wrong = {
        Model(net, (3, 8, 8), 10, VE(), "denoiser"): words + "(3, 8, 8) with 10",
        Model(net, (1, 8, 8), 0, VE(), "denoiser"): words + "(1, 8, 8) with 0",
        Model(
            net, (1, 8, 8), 10, VE(1.0), "denoiser"
        ): "SnapshotNet is a whole denoiser: it needs "
        f"Model.predicts 'denoiser' and Model.path {VE()}, got 'denoiser' and {VE(1.0)}",
        Model(net, (1, 8, 8), 10): "SnapshotNet is a whole denoiser: it needs Model.predicts "
        f"'denoiser' and Model.path {VE()}, got 'edm' and {VE()}",
        Model(MLP(8, 0), (2,), predicts="denoiser"): "MLP is no whole denoiser; Model.predicts "
        "says what it predicts",
        Model(SnapshotNet("Net", "{}"), (2,)): "the class Net is not known; fewstep builds "
        "EDMPrecond, EDMPrecond_EncoderDecoder, VPPrecond, VEPrecond, iDDPMPrecond, Precond",
        Model(SnapshotNet("Precond", "[1]"), (2,)): "SnapshotNet.arguments is a JSON object, got "
        "'[1]'",
        Model(
            SnapshotNet("Precond", "{"), (2,)
        ): "SnapshotNet.arguments is a JSON object, got '{'",
    }
    for description, words in wrong.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            description.build()
        assert str(caught.value) == words


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "math range error": ("VPPrecond", {"epsilon_t": 1e9}),
    "division by zero": ("iDDPMPrecond", {"C_1": 0}),
    "NoneType": ("EDMPrecond", {"channel_mult_emb": None}),
    "sigma_max should be": ("EDMPrecond", {"sigma_max": math.nan}),
    "img_resolution should be": ("EDMPrecond", {"img_resolution": "8"}),
}


@pytest.mark.parametrize("words", BAD)
def test_arguments_that_fit_no_network(words: str) -> None:
    name, more = BAD[words]
    with pytest.raises(ValueError, match=words):
        describe(name, SONG | {"augment_dim": 9} | more)
