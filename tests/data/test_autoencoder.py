"""The autoencoder of latents: what EDM2 gives it and takes from it, and refusals in words."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.data import autoencoder
from fewstep.data.autoencoder import PART, Autoencoder, as_pictures, load_autoencoder
from fewstep.data.latents import standardised
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import to_uint8
from fewstep.diffusion.samplers import FewStep
from fewstep.nets.edm2 import Precond
from fewstep.storage.model_folder import load_student
from tests import snapshot_writer
from tests.cli.test_inspect import SMALL
from tests.command import fewstep

ARGUMENTS = SMALL | {"img_channels": 4, "channels_per_head": 8, "logvar_channels": 16}


class Linear:
    """An autoencoder whose posterior and pictures are known: mean 10 p, picture l / 10."""

    def encode(self, x: Tensor) -> Any:
        assert len(x) <= PART
        mean = 10 * torch.cat([x, x.mean(1, keepdim=True)], 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.ones_like(mean)))

    def decode(self, x: Tensor) -> Any:
        assert len(x) <= PART
        return SimpleNamespace(sample=x[:, :3] / 10)


def test_pictures_in_0_to_1_and_statistics_of_edm2() -> None:
    """By hand: black, grey and white become latents 0, 5 and 10, standardised; and back."""
    codec = Autoencoder(Linear(), "")
    x = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 2, 2)
    latents = codec.encode(x)
    raw = torch.tensor([0.0, 5.0, 10.0])[:, None, None, None].expand(3, 4, 2, 2)
    torch.testing.assert_close(latents, standardised(raw))
    assert float(latents[1, 0, 0, 0]) == pytest.approx((5 - 5.81) * 0.5 / 4.17)
    torch.testing.assert_close(codec.decode(latents), x, rtol=0, atol=1e-6)
    many = torch.rand(2 * PART + 1, 3, 2, 2) * 2 - 1
    torch.testing.assert_close(codec.decode(codec.encode(many)), many, rtol=0, atol=1e-6)
    beyond = standardised(torch.tensor([-30.0, 30.0])[:, None, None, None].expand(2, 4, 1, 1))
    assert codec.decode(beyond)[:, 0, 0, 0].tolist() == [-1, 1]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AutoencoderKL that halves pictures, random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("vae")
    net.save_pretrained(folder)
    return folder


def test_it_is_that_of_the_folder(vae: Path) -> None:
    """Against the network called by hand; mean of the posterior, not a draw."""
    from diffusers import AutoencoderKL

    net, found = AutoencoderKL.from_pretrained(vae).eval(), load_autoencoder(vae)
    weights = (vae / "diffusion_pytorch_model.safetensors").read_bytes()
    assert found.sha256 == hashlib.sha256(weights).hexdigest()
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        mean = net.encode((x + 1) / 2).latent_dist.mean
        plain = standardised(net.encode(x).latent_dist.mean)
        latents = found.encode(x)
        shown = 2 * net.decode(mean).sample.clamp(0, 1) - 1
    assert latents.shape == (2, 4, 4, 4)
    torch.testing.assert_close(latents, standardised(mean))
    torch.testing.assert_close(found.decode(latents), shown, rtol=1e-4, atol=1e-4)
    assert float((latents - plain).abs().max()) > 0.01  # Stable Diffusion's own range is another


def pictures_by_command(
    folder: str, sha256: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.delenv("FEWSTEP_VAE", raising=False)
    torch.manual_seed(0)
    Path("net.pkl").write_bytes(snapshot_writer.write(Precond(**ARGUMENTS), ARGUMENTS, "edm2"))
    assert fewstep("convert", "net.pkl", "net", "--student").code == 0
    sample = ("sample", "net", "--seeds", "0-3", "--out", "x.npz")
    refused = fewstep(*sample)
    assert (refused.code, refused.out) == (2, "")
    assert "this model makes latents (4, 8, 8): pass --vae FOLDER, or set FEWSTEP" in refused.err
    done = fewstep(*sample, "--vae", folder)
    assert done.code == 0, done.err
    student = load_student("net")
    codec = autoencoder.load_autoencoder(Path(folder), "cpu")
    x = codec.decode(student.sample(range(4)))
    assert np.array_equal(np.load("x.npz")["images"], to_uint8(x).numpy())
    Path("mine.py").write_text(
        "class Mean:\n    name, dim = 'mean', 3\n"
        "    def __call__(self, x):\n        return x.float().mean((1, 2)), None\n"
    )
    assert fewstep("stats", "x.npz", "--features", "mine.py:Mean", "--out", "r.npz").code == 0
    monkeypatch.setenv("FEWSTEP_VAE", folder)
    measure = ("evaluate", "net", "--protocol", "fid50k", "--reference", "r.npz", "--features")
    done = fewstep(*measure, "mine.py:Mean", "--samples", "20", "--runs", "1")
    assert done.code == 0, done.err
    report = json.loads(Path("net/evaluation/mean-20.json").read_text())
    assert report["vae"] == sha256
    again = fewstep(*measure, "mine.py:Mean", "--samples", "20", "--runs", "1")
    assert "10 of 10 parts are there" in again.err


def test_a_student_of_latents_by_command(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sample and evaluate decode; the score is stored with what decoded."""
    pictures_by_command(str(vae), load_autoencoder(vae).sha256, tmp_path, monkeypatch)


def test_the_same_with_a_known_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without diffusers too."""
    stub = Autoencoder(Linear(), "0" * 64)
    monkeypatch.setattr("fewstep.data.autoencoder.load_autoencoder", lambda folder, device: stub)
    pictures_by_command("somewhere", stub.sha256, tmp_path, monkeypatch)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last without diffusers."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    good = {"_class_name": "AutoencoderKL", "latent_channels": 4}
    config = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"config.json is missing"):
        load_autoencoder(tmp_path)
    config.write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="does not describe an AutoencoderKL"):
        load_autoencoder(tmp_path)
    config.write_text(json.dumps(good | {"latent_channels": 16}))
    with pytest.raises(ValueError, match="latents of 16 channels; EDM2's have 4"):
        load_autoencoder(tmp_path)
    config.write_text(json.dumps(good))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        load_autoencoder(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="decoded by diffusers; install it with: pip install"):
        load_autoencoder(tmp_path)
    generator = Generator(nn.Linear(1, 1), FewStep(2.5), (3, 8, 8))
    assert as_pictures(generator) == (generator, "")
    with pytest.raises(ValueError, match=r"makes \(3, 8, 8\), no latents: leave out --vae"):
        as_pictures(generator, "vae")


def test_weights_of_another_network(vae: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(vae, tmp_path / "vae"))
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    first = sorted(state)[0]
    del state[first]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"is not of its config\.json: {first}"):
        load_autoencoder(folder)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_autoencoder(folder)


def test_a_missing_key_and_an_index(vae: Path, tmp_path: Path) -> None:
    """The key has its class's default; diffusers would read the shards of an index instead."""
    folder = Path(shutil.copytree(vae, tmp_path / "vae"))
    facts = json.loads((folder / "config.json").read_text())
    assert facts.pop("latent_channels") == 4
    (folder / "config.json").write_text(json.dumps(facts))
    assert load_autoencoder(folder).sha256 == load_autoencoder(vae).sha256
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an index of shards beside"):
        load_autoencoder(folder)
