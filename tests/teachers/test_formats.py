"""Kinds of teachers: each is found by what it is, and answers as what it was made of."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.samplers import FewStep
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.nets.mlp import MLP
from fewstep.runs.inspection import inspect_model
from fewstep.runs.teacher import digests_of, notes_on
from fewstep.storage.model_folder import save_model
from fewstep.teachers import formats
from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.load import describe_network, load_pipeline
from fewstep.teachers.formats import (
    FORMATS,
    ModelFolders,
    Pipelines,
    Snapshots,
    TeacherFormat,
    format_of,
)
from tests import snapshot_writer
from tests.conftest import Folders

ARGUMENTS = {
    **{"img_resolution": 8, "img_channels": 1, "label_dim": 0, "model_type": "SongUNet"},
    **{"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    described = Model(MLP(width=8, blocks=1), shape=(2,), path=VE())
    card = {"teacher": {"folder": "x", "text": "t", "vae": "v"}}
    state = described.build(3).state_dict()
    save_model(tmp_path / "model", state, described, FewStep(2.5), card, {})
    return tmp_path / "model"


def test_a_model_folder(model: Path) -> None:
    """What it was distilled from is part of what it computes with."""
    kind = format_of(model)
    assert type(kind) is ModelFolders
    made = kind.load(model, "cpu")
    assert kind.describe(model) == made.model
    assert torch.equal(
        made.denoiser.state_dict()["net.first.weight"],
        made.model.build(3).state_dict()["net.first.weight"],
    )  # type: ignore[union-attr]
    assert digests_of(model) == {"weights": kind.weights_digest(model), "text": "t", "vae": "v"}
    assert notes_on(model) == []


def test_a_snapshot_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "net.pkl"
    file.write_bytes(snapshot_writer.write(EDMPrecond(**ARGUMENTS), ARGUMENTS, "edm"))
    kind = format_of(file)
    assert type(kind) is Snapshots
    assert kind.describe(file) == kind.load(file, "cpu").model
    assert digests_of(file) == {"weights": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_a_pipeline_comes_before_a_model(folders: Folders) -> None:
    folder = folders("sd")
    kind = format_of(folder)
    assert type(kind) is Pipelines
    opened = open_folder(folder)
    assert kind.describe(folder) == describe_network(opened)
    found, stock = kind.load(folder, "cpu").denoiser, load_pipeline(folder).denoiser
    assert all(torch.equal(t, stock.state_dict()[name]) for name, t in found.state_dict().items())
    assert digests_of(folder).keys() == {"weights", "text", "vae"}
    assert digests_of(folder)["vae"] == opened.vae_digest


def test_what_is_nothing_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"no finished model|no file or folder"):
            format_of(path).load(path, "cpu")
    kinds = [type(one) for one in FORMATS]
    assert kinds[-1] is ModelFolders, "it takes what no other does: the others come before it"
    assert kinds.index(Pipelines) < kinds.index(Snapshots)
    single = tmp_path / "sd.ckpt"
    single.write_bytes(b"x")
    with pytest.raises(
        ValueError, match="is a pickle, which is not opened, and a pipeline as teacher is a folder"
    ):
        format_of(single).load(single, "cpu")


def test_a_new_kind_is_a_class_and_an_entry(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened, described, digested and inspected by what its class says."""

    class Renamed(ModelFolders):
        """A model folder whose name ends so, told by what every kind has."""

        facts = TeacherFormat.facts

        def matches(self, path: Path | str) -> bool:
            return str(path).endswith(".renamed")

    renamed = model.rename(model.with_suffix(".renamed"))
    before = inspect_model(renamed)
    assert before["what"].startswith("finished model")
    monkeypatch.setattr(formats, "FORMATS", (Renamed(), *FORMATS))
    facts = inspect_model(renamed)
    assert facts == {
        "what": "teacher of the kind Renamed",
        "path": str(renamed),
        "model": before["model"],
        "sha256 of the weights": before["files"]["model.safetensors"]["sha256"],
        "sha256 of text": "t",
        "sha256 of vae": "v",
    }
    assert digests_of(renamed)["weights"] == facts["sha256 of the weights"]
