"""Feature networks from files: whose names are earned, and what is refused."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.diffusion.pixels import to_uint8
from fewstep.eval import features as module, inception_torchscript
from fewstep.eval.features import KnownWeights, PublishedFeatures, metric_title, retitled
from fewstep.eval.load_features import Inception, load_features

OWN = '''
import torch

class Means:
    """The mean of each channel."""

    name, dim = "means", 3

    def __call__(self, pictures):
        return pictures.float().mean((1, 2)).expand(-1, 3), None

ready = Means()

class Unnamed:
    dim = 3
    def __call__(self, pictures): ...

class Proud(Means):
    name = "inception"

class Shouting(Means):
    name = "FID"

class Idle:
    name, dim = "idle", 3
'''


class Scripted(nn.Module):
    """A stand-in for NVIDIA's program: one that resizes and scales by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(2048, 1008)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        means = ((x - 128) / 128).mean(dim=[1, 2, 3])
        features = means[:, None] * torch.arange(2048.0)
        return features if return_features else self.output(features)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "inception-2015-12-05.pt"
    torch.manual_seed(0)
    torch.jit.script(Scripted()).save(str(path))
    return path


def test_stored_names_are_those_of_today() -> None:
    """Bare ones of published features and counts alone."""
    for count in (20, 49_999, 50_001, None, "50000"):
        assert retitled("FID", "inception", count) == f"FD(inception, {count})"
        assert retitled("IS", "inception", count) == f"IS(inception, {count})"
    for name in ("FID", "IS", "KID", "FD(mine, 7)", "recall(mine, 50000)"):
        assert retitled(name, "inception", 50_000) == name
    assert retitled("precision", "inception", 50_000) == "precision(inception, 50000)"


def test_a_program_is_run_only_if_it_is_the_known_one(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", forbidden)
        with pytest.raises(ValueError, match="a TorchScript file runs its own program, so only"):
            load_features(str(script))
    sha256 = hashlib.sha256(script.read_bytes()).hexdigest()
    monkeypatch.setattr(inception_torchscript, "SHA256", sha256)
    monkeypatch.setitem(module.KNOWN, sha256, KnownWeights("FID", script.name))
    found = load_features(str(script))
    assert (found.name, found.dim) == ("inception", 2048)
    features, logits = found(torch.full((2, 8, 8, 1), 192, dtype=torch.uint8))
    torch.testing.assert_close(features, torch.arange(2048.0).expand(2, -1) / 2)
    assert isinstance(found, Inception)
    assert isinstance(found.net, inception_torchscript.ScriptedInception)
    weight = found.net.module.output.weight
    assert logits is not None
    torch.testing.assert_close(logits, features @ weight.T)


def test_the_known_digests() -> None:
    """Two files carry the name, whatever they are called; the PyTorch port's name says so too."""
    assert [known.title for known in module.KNOWN.values()] == ["FID", "FID"]
    port = next(sha for sha, known in module.KNOWN.items() if known.file.endswith(".pth"))
    assert module.KNOWN[port].file == f"pt_inception-2015-12-05-{port[:8]}.pth"


def test_ones_own_network_measures_but_is_no_fid(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    for name in ("Means", "ready"):
        found = load_features(f"{file}:{name}")
        assert metric_title("FD", found, 50_000) == "FD(means, 50000)"
        assert metric_title("IS", found, 100) == "IS(means, 100)"
        pictures = torch.arange(24, dtype=torch.uint8).view(2, 2, 2, 3)
        assert found(pictures)[0].tolist() == [[4.5, 5.5, 6.5], [16.5, 17.5, 18.5]]
    found.sha256 = next(iter(module.KNOWN))  # type: ignore[attr-defined]
    assert metric_title("FD", found, 50_000) == "FD(means, 50000)"  # not even with a known digest


def test_names_of_dinov2_are_not_those_of_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its digest were known: 50,000 pictures give FD-DINOv2, but no plain KID."""

    class Stand(PublishedFeatures):
        family, label, dim = "fd_dinov2", "dinov2", 1024

        def __call__(self, pictures: Tensor) -> tuple[Tensor, None]:
            raise NotImplementedError

    found = Stand("abcdef0123456789")
    assert metric_title("FD", found, 50_000) == "FD(dinov2-abcdef01, 50000)"
    monkeypatch.setitem(module.KNOWN, found.sha256, KnownWeights("FD-DINOv2", "model.safetensors"))
    names = {score: metric_title(score, found, 50_000) for score in ("FD", "KID")}
    assert names == {"FD": "FD-DINOv2", "KID": "KID(dinov2, 50000)"}
    assert metric_title("FD", found, 49_999) == "FD(dinov2, 49999)"


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_INCEPTION", raising=False)
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "w.pth").write_bytes(b"hello")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "empty").mkdir()
    cases = {
        "": "a feature network is needed: --features PATH, or set FEWSTEP_INCEPTION",
        "no.pth": "no.pth is no feature network: expected Inception's weights",
        "inception-2015-12-05.pkl": "inception-2015-12-05.pkl is no feature network",
        "w.pth": "w.pth: neither a pickle nor an archive",
        "a.safetensors": "a.safetensors: the state does not fit the arguments: 472 missing",
        "mine.py:Nothing": "mine.py has no Nothing",
        "mine.py:Unnamed": "Unnamed.name should be small letters, digits and dashes, got None",
        "mine.py:Shouting": "Shouting.name should be small letters, digits and dashes, got 'FID'",
        "mine.py:Proud": "Proud.name 'inception' is that of a published network; choose another",
        "mine.py:Idle": "Idle is no feature network: it needs name, dim and a call",
        "other.py:Means": "there is no file other.py",
    }
    monkeypatch.chdir(tmp_path)
    for path, message in cases.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            load_features(path)
    with pytest.raises(ValueError, match=r"are uint8 \(B, H, W, 1 or 3\), got float32 \(1, 2\)"):
        module.channels_first(torch.ones(1, 2), "cpu")


def test_pictures_are_quantised_as_files_are() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(5, 1, 1, 1)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255]
    levels = torch.arange(256.0).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels / 127.5 - 1)[0, :, :, 0].float(), levels[0, 0])
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
    with pytest.raises(ValueError, match=r"^pictures are .* got \(4, 2\)"):
        to_uint8(torch.zeros(4, 2))


def test_dinov2_without_transformers_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="DINOv2 needs transformers; install it with: pip"):
        load_features(str(tmp_path))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with the published patches and table of positions, random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    model = transformers.Dinov2Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("dino")
    model.save_pretrained(folder)
    return folder


def test_dinov2_is_the_class_token_of_resized_pictures(dino: Path) -> None:
    """Against the model called by hand; without DINOv2's own positions it is another number."""
    from transformers import Dinov2Model

    found = load_features(str(dino))
    sha256 = hashlib.sha256((dino / "model.safetensors").read_bytes()).hexdigest()
    assert (found.name, found.dim) == (f"dinov2-{sha256[:8]}", 16)
    assert metric_title("FD", found, 50_000) == f"FD({found.name}, 50000)"
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 40, 32, 3), generator=generator, dtype=torch.uint8)
    model = Dinov2Model.from_pretrained(dino).eval()
    table = model.embeddings.position_embeddings.detach()
    x = pictures.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True) / 255
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean.view(3, 1, 1)) / spread.view(3, 1, 1)
    with torch.no_grad():
        plain = model(x).last_hidden_state[:, 0]
        grid = table[0, 1:].T.reshape(1, 16, 37, 37)
        fine = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic").flatten(2).mT
        assert fine.shape == (1, 256, 16)
        model.embeddings.position_embeddings = nn.Parameter(torch.cat([table[:, :1], fine], 1))
        wanted = model(x).last_hidden_state[:, 0]
    features, logits = found(pictures)
    assert logits is None
    torch.testing.assert_close(features, wanted)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(features, plain)


def test_dinov2_refusals(dino: Path, tmp_path: Path) -> None:
    config = (dino / "config.json").read_text()
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="does not describe a DINOv2"):
        load_features(str(tmp_path))
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load_features(str(tmp_path))
    save_file({"layernorm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is not of its config\.json"):
        load_features(str(tmp_path))
