"""Teachers by name: which files are asked for, and what is said where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewstep.teachers.diffusers.hub import local
from tests.command import fewstep

hub = pytest.importorskip("huggingface_hub")

FILES = {  # of a published repository: whether it is wanted
    "model_index.json": True,
    "README.md": True,
    "unet/config.json": True,
    "unet/diffusion_pytorch_model.safetensors": True,
    "text_encoder/model.safetensors": True,
    "tokenizer/merges.txt": True,
    "tokenizer_3/spiece.model": True,
    "unet/diffusion_pytorch_model.fp16.safetensors": False,
    "unet/diffusion_pytorch_model.non_ema.safetensors": False,
    "unet/diffusion_pytorch_model.bin": False,
    "safety_checker/model.safetensors": False,
    "v1-5-pruned.safetensors": False,
    "v1-5-pruned.ckpt": False,
    "pipeline.py": False,
}


class Hub:
    """Stands in for the network."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[tuple[str, Any, list[str]]]()

    def __call__(self, name: str, *, revision: Any, **patterns: Any) -> str:
        given = hub.utils.filter_repo_objects(FILES, **patterns)
        self.asked.append((name, revision, sorted(given)))
        return str(self.folder)


def test_what_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in = Hub(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", stand_in)
    assert local("hub:some/pipe") == local("hub:some/pipe@0123abcd") == str(tmp_path)
    wanted = sorted(name for name, there in FILES.items() if there)
    assert stand_in.asked == [("some/pipe", None, wanted), ("some/pipe", "0123abcd", wanted)]
    assert local("some/pipe") == "some/pipe"  # a folder of that name
    assert len(stand_in.asked) == 2


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
