"""Teachers by name: which files are fetched, how the hub's cache is read, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.hub import local, name_of
from fewstep.teachers.diffusers.load import load_pipeline
from tests.command import fewstep
from tests.conftest import Folders

hub = pytest.importorskip("huggingface_hub")

UNET = "unet/diffusion_pytorch_model"
BESIDE = (
    "README.md",
    f"{UNET}.non_ema.safetensors",
    f"{UNET}.bin",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt",
    "pipeline.py",
)
"""Further files of a published repository."""


class Hub:
    """Stands in for the network: a repository of files, and the hub's own kind of cache."""

    def __init__(self, source: Path, cache: Path) -> None:
        files = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*.*")}
        self.files = dict.fromkeys(BESIDE, b"{}") | files
        self.cache, self.fetched, self.offline = cache / "models--some--pipe", list[str](), False

    def rename(self, to: Callable[[str], str]) -> None:
        """Other names for the files."""
        self.files = {to(name): data for name, data in self.files.items()}

    def list_repo_files(self, name: str, revision: str) -> list[str]:
        """What the repository holds."""
        assert (name, revision) == ("some/pipe", "0123abcd")
        if self.offline:
            raise RuntimeError("no route")
        return list(self.files)

    def snapshot_download(self, name: str, revision: str | None, **patterns: Any) -> str:
        """Blobs by their digest, and links to them in the snapshot."""
        assert name == "some/pipe"
        assert revision in (None, "0123abcd")
        home = self.cache / "snapshots" / "0123abcd"
        for file in hub.utils.filter_repo_objects(self.files, **patterns):
            blob = self.cache / "blobs" / hashlib.sha256(self.files[file]).hexdigest()
            link = home / file
            if self.offline or link.exists():
                continue
            self.fetched.append(file)
            for folder in (blob.parent, link.parent):
                folder.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(self.files[file])
            link.symlink_to(Path(*[".."] * (file.count("/") + 2), "blobs", blob.name))
        return str(home)


@pytest.fixture
def repository(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A published Stable Diffusion."""
    stand_in = Hub(folders("sd"), tmp_path)
    for name in ("list_repo_files", "snapshot_download"):
        monkeypatch.setattr(hub, name, getattr(stand_in, name))
    return stand_in


def weights(repository: Hub) -> list[str]:
    """The weights that were fetched."""
    return sorted(name for name in repository.fetched if name.endswith(".safetensors"))


def pictures(folder: Path | str) -> torch.Tensor:
    """What a teacher makes."""
    teacher = load_pipeline(folder)
    assert teacher.text is not None
    return teacher.sample(range(2), cond=teacher.text(["a red cube", "a"]))


def half(name: str) -> str:
    """The name of a weight file of the variant fp16."""
    stem, kind, rest = name.rpartition(".safetensors")
    return f"{stem}.fp16.safetensors{rest}" if kind and "/" in name else name


def test_plain_weights_are_fetched(repository: Hub, folders: Folders) -> None:
    """With halves beside them, once, and read through the links of the cache."""
    plain = dict(repository.files)
    repository.rename(half)
    repository.files |= plain
    folder = local("hub:some/pipe")
    needed = {p.relative_to(folders("sd")).as_posix() for p in folders("sd").rglob("*.*")}
    assert sorted(repository.fetched) == sorted(needed | {"README.md"})
    assert Path(folder, f"{UNET}.safetensors").is_symlink()
    assert "blobs" in str(Path(folder, f"{UNET}.safetensors").resolve())
    assert name_of(Path(folder)) == "some/pipe"
    assert torch.equal(pictures(folder), pictures(folders("sd")))
    repository.fetched.clear()
    assert local("hub:some/pipe@0123abcd") == folder
    repository.offline = True
    assert local("hub:some/pipe") == folder
    assert repository.fetched == []
    assert local("some/pipe") == "some/pipe"  # a folder of that name


def test_a_repository_of_halves_alone(repository: Hub, folders: Folders) -> None:
    """The variant that completes all parts; what is plain everywhere stays plain."""
    repository.rename(lambda name: half(name) if not name.startswith("vae/") else name)
    folder = local("hub:some/pipe")
    read = [f"{UNET}.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert weights(repository) == ["text_encoder/model.fp16.safetensors", *read]
    assert open_folder(folder).variant == "fp16"
    assert torch.equal(pictures(folder), pictures(folders("sd")))
    assert fewstep("inspect", folder).code == 0


def test_shards_that_an_index_names(repository: Hub, folders: Folders, tmp_path: Path) -> None:
    """Of the variant that is read alone, for which the index is needed first."""
    state = load_file(folders("sd") / f"{UNET}.safetensors")
    names, places = sorted(state), {}
    for i in range(2):
        shard = f"diffusion_pytorch_model.fp16-0000{i + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in names[i::2]}, tmp_path / "shard")
        repository.files[f"unet/{shard}"] = (tmp_path / "shard").read_bytes()
        places |= dict.fromkeys(names[i::2], shard)
    repository.files["unet/diffusion_pytorch_model-00001-of-00001.safetensors"] = b"another"
    index = json.dumps({"metadata": {}, "weight_map": places}).encode()
    repository.files[f"{UNET}.safetensors.index.fp16.json"] = index
    for name in (f"{UNET}.safetensors", f"{UNET}.non_ema.safetensors"):
        del repository.files[name]
    folder = local("hub:some/pipe")
    shards = [f"{UNET}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    others = ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert weights(repository) == [others[0], *shards, others[1]]
    assert torch.equal(pictures(folder), pictures(folders("sd")))


def test_nothing_is_fetched_that_is_not_read(repository: Hub) -> None:
    """Pickles alone, and a pipeline that is not known: refused before a weight is fetched."""
    for name in (f"{UNET}.safetensors", f"{UNET}.non_ema.safetensors"):
        del repository.files[name]
    code, _, err = fewstep("plan", "hub:some/pipe", "--gpus", "1x24GB")
    assert code == 2
    assert "unet holds no diffusion_pytorch_model.safetensors (but diffusion_pytorch" in err
    assert "since pickles are never opened" in err
    assert weights(repository) == []
    index = json.loads(repository.files["model_index.json"])
    repository.files["model_index.json"] = json.dumps(index | {"_class_name": "Other"}).encode()
    (repository.cache / "snapshots" / "0123abcd" / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"is a Other; fewstep knows"):
        local("hub:some/pipe")
    assert weights(repository) == []


def test_a_cache_without_its_blobs(repository: Hub) -> None:
    """Links that lead nowhere are no weights."""
    folder = Path(local("hub:some/pipe"))
    (folder / f"{UNET}.safetensors").resolve().unlink()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors is missing"):
        open_folder(folder)


def test_what_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def nothing(name: str, **more: Any) -> str:
        raise hub.errors.LocalEntryNotFoundError("the hub does not answer\nand so on")

    monkeypatch.setattr(hub, "snapshot_download", nothing)
    told = "hub:some/pipe could not be fetched: the hub does not answer; a folder that was fetched"
    with pytest.raises(ValueError, match=told):
        local("hub:some/pipe")
    code, _, err = fewstep("distill", "t2i", "--teacher", "hub:some/pipe")
    assert code == 2
    assert told in err
    code, _, err = fewstep("plan", "hub:pipe", "--gpus", "1x24GB")
    assert code == 2
    assert "is named hub:ORG/NAME[@REVISION], got hub:pipe" in err
    assert list(tmp_path.iterdir()) == []
