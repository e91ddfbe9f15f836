"""fewstep push: what is asked before anything is sent, the dry run, and exit codes.

What the hub receives, and what it refuses, is in tests/export/test_hub_upload.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewstep.export import hub_upload
from fewstep.export.hub_upload import Publication, Unreachable
from tests.command import fewstep

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Exports in place of real ones: what they were asked for."""
    asked: list[tuple[Any, ...]] = []

    def made(run: Path, repository: str, out: Path, *rest: str) -> Publication:
        asked.append((run, repository, *rest))
        out.mkdir()
        (out / "README.md").write_text("# fast")
        (out / "model.safetensors").write_bytes(b"0" * 1234)
        return Publication(out, repository, "model", rest[1] or "mit", "some/pipe")

    monkeypatch.setattr(hub_upload, "prepared", made)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    return asked


def test_a_dry_run_lists_and_sends_nothing(
    prepared: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to be logged in; files, sizes, licence and base model are told."""
    monkeypatch.setattr(hub, "get_token", lambda: None)

    def never(*args: Any) -> str:
        raise AssertionError("sent")

    monkeypatch.setattr(hub_upload, "upload", never)
    done = fewstep("push", str(tmp_path), "me/fast", "--dry-run", "--to", "lora")
    assert (done.code, done.out) == (0, "")
    assert [line.split() for line in done.err.splitlines()[:2]] == [
        ["6", "README.md"],
        ["1,234", "model.safetensors"],
    ]
    assert "1,240 bytes in 2 files; licence mit, base some/pipe" in done.err
    assert done.err.endswith("nothing was sent; this would be me/fast, a public model\n")
    assert prepared == [(tmp_path, "me/fast", "lora", "", "")]


def test_what_is_asked_is_passed_on(
    prepared: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def upload(publication: Publication, *flags: bool) -> str:
        sent.append((publication.repository, *flags))
        return "https://hub/me/fast"

    monkeypatch.setattr(hub_upload, "upload", upload)
    more = ("--licence", "openrail++", "--base-model", "none", "--private", "--replace")
    done = fewstep("push", str(tmp_path), "me/fast", *more)
    assert (done.code, done.out) == (0, "https://hub/me/fast\n")
    assert prepared == [(tmp_path, "me/fast", "diffusers", "openrail++", "none")]
    assert sent == [("me/fast", True, True)]


def test_exit_codes(
    prepared: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 for what a person can mend, before an export is made; 1 for a hub that is away."""
    done = fewstep("push", str(tmp_path), "fast")
    assert done.code == 2
    assert "a repository is named ORG/NAME" in done.err
    with monkeypatch.context() as patch:
        patch.setattr(hub, "get_token", lambda: None)
        done = fewstep("push", str(tmp_path), "me/fast")
    assert done.code == 2
    assert "nobody is logged in to the hub; run 'hf auth login' once" in done.err
    assert prepared == []

    def away(*args: Any) -> str:
        raise Unreachable("the hub does not answer: no route")

    monkeypatch.setattr(hub_upload, "upload", away)
    done = fewstep("push", str(tmp_path), "me/fast")
    assert (done.code, done.out) == (1, "")
    assert "the hub does not answer: no route; run the same command again" in done.err
