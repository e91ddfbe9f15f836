"""A student on the hub: a stand-in receives it, its card is fit to be read, and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fewstep.diffusion.samplers import FewStep
from fewstep.export.hub_upload import (
    Publication,
    Unreachable,
    agreed_licence,
    checked_name,
    published,
    require_login,
    upload,
)
from fewstep.storage.model_folder import save_model
from fewstep.teachers.diffusers.load import load_pipeline
from tests.command import fewstep
from tests.conftest import Folders
from tests.hub_server import StandIn, standing_in

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def home(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student of a pipeline that a hub's cache holds. Leave it as it is."""
    home = tmp_path_factory.mktemp("push")
    snapshot = home / "models--some--pipe" / "snapshots" / "0123abcd"
    shutil.copytree(folders("sd"), snapshot)
    teacher = load_pipeline(snapshot)
    state, card = teacher.denoiser.state_dict(), {"teacher": dict(teacher.card)}
    assert teacher.model is not None
    save_model(home / "student", state, teacher.model, FewStep(625.0), card)
    return home


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> StandIn:  # type: ignore[misc]
    """A stand-in that we are logged in to."""
    stand_in = StandIn()
    with standing_in(stand_in) as url:
        monkeypatch.setattr(hub.constants, "ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield stand_in


@pytest.fixture
def small(tmp_path: Path) -> Publication:
    """Something to upload."""
    folder = tmp_path / "fast"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# fast\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return Publication(folder, "me/fast", "model", "mit", "some/pipe")


def test_a_dry_run_and_a_push(home: Path, server: StandIn) -> None:
    """Nothing is sent by the one; the other sends what the one listed, and the card says it."""
    ask = ("push", str(home / "student"), "me/fast", "--licence", "openrail++")
    dry = fewstep(*ask, "--dry-run", "--private")
    assert dry.code == 0, dry.err
    assert (dry.out, server.asked) == ("", [])
    assert "licence openrail++, base some/pipe" in dry.err
    assert "nothing was sent; this would be me/fast, a private model" in dry.err
    done = fewstep(*ask)
    assert (done.code, done.out) == (0, f"{server.url}/me/fast\n"), done.err
    files = server.files["me/fast"]
    for name, data in files.items():
        assert name == ".gitattributes" or f"{len(data):>15,}  {name}" in dry.err
    listed = [line for line in dry.err.splitlines() if ".json" in line or ".safetensors" in line]
    assert all(line.split()[-1] in files for line in listed)
    assert {"unet/diffusion_pytorch_model.safetensors", "model_index.json"} <= files.keys()
    card = files["README.md"].decode()
    head = card.split("---\n")[1].splitlines()
    assert {"base_model: some/pipe", "license: openrail++", "library_name: diffusers"} <= {*head}
    assert '"me/fast"' in card
    assert "| licence | openrail++ |" in card
    assert str(home) not in card
    assert "# some/pipe in 1 step" in card
    again = fewstep(*ask)
    assert again.code == 2
    assert "me/fast has files already" in again.err
    assert "--replace" in again.err


def test_private_and_over_files_that_are_there(small: Publication, server: StandIn) -> None:
    assert upload(small, private=True) == f"{server.url}/me/fast"
    assert server.created[0]["visibility"] == "private"
    (small.folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"has files already, such as model\.safetensors"):
        upload(small)
    upload(small, replace=True)
    assert server.files["me/fast"]["model.safetensors"] == b"others"
    assert small.files == [("README.md", 28), ("model.safetensors", 6)]


REFUSED = {
    "no licence": ((), "the licence of the teacher is not known"),
    "no name": (("me",), "a repository is named ORG/NAME"),
    "two slashes": (("me/a/b",), "a repository is named ORG/NAME"),
    "another format": (("me/a", "--to", "gguf"), "there is no format 'gguf'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_on_the_command_line(home: Path, server: StandIn, name: str) -> None:
    flags, told = REFUSED[name]
    more = () if name == "no licence" else ("--licence", "mit")
    done = fewstep("push", str(home / "student"), *(flags or ("me/fast",)), *more)
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert len(done.err.splitlines()) == 1
    assert server.files == {}


def test_what_the_hub_refuses(
    small: Publication, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong token, and one that may not: to be mended; a failing and a silent hub: not."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="the hub does not know this token; log in anew"):
        upload(small)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    server.status = 403
    with pytest.raises(ValueError, match="may not write to me/fast; use one with the role"):
        upload(small)
    server.status = 418
    with pytest.raises(Unreachable, match="the hub failed with 418"):
        upload(small)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="the hub does not answer"):
        upload(small)


def test_nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="nobody is logged in to the hub; run 'hf auth login'"):
        require_login()


def test_licences() -> None:
    """That of the teacher's card; said where there is none; accepted aloud where it is gated."""
    custom = {"license": "other", "license_name": "stabilityai-ai-community"}
    assert agreed_licence({"license": "mit"}, "", False) == ("mit", {"license": "mit"})
    assert agreed_licence({"license": "mit"}, "mit", False)[0] == "mit"
    assert agreed_licence(custom, "", False) == ("stabilityai-ai-community", custom)
    assert agreed_licence(custom, "stabilityai-ai-community", True)[1] == custom
    assert agreed_licence({}, "openrail++", False) == ("openrail++", {"license": "openrail++"})
    assert agreed_licence({"licence": "CC BY-NC-SA 4.0"}, "", False)[1] == {"license": "other"}
    with pytest.raises(ValueError, match="is not known"):
        agreed_licence({}, "", False)
    with pytest.raises(ValueError, match=r"its licence is mit, and --licence says apache-2\.0"):
        agreed_licence({"license": "mit"}, "apache-2.0", False)
    with pytest.raises(ValueError, match="pass --licence stabilityai-ai-community to say that"):
        agreed_licence(custom, "", True)


def test_cards_name_no_place_of_this_machine() -> None:
    text = (
        "---\nlibrary_name: diffusers\nbase_model: pipe\nbase_model_relation: adapter\n"
        "license: mit\n---\n# pipe in 2 steps\n\nDistilled from `pipe` and\n| licence | mit (the "
        'teacher\'s) |\n```python\npipe = load("/home/me/pipe")\nload("fast")\n```\n'
    )
    licence = "mit", {"license": "mit"}
    found = published(text, "me/fast", "fast", licence, "some/pipe", "/home/me/pipe")
    assert found == (
        "---\nlibrary_name: diffusers\nlicense: mit\nbase_model: some/pipe\n"
        "base_model_relation: adapter\n---\n# some/pipe in 2 steps\n\nDistilled from `some/pipe` "
        'and\n| licence | mit |\n```python\npipe = load("some/pipe")\nload("me/fast")\n```\n'
    )
    with pytest.raises(ValueError, match="the card would name /home/me/pipe, which is on this"):
        published(text, "me/fast", "fast", licence, "", "/home/me/pipe")
    for wrong in ("fast", "me/", "/a", "me/a b", "me/a--b", "me/.a", "me/a.git", "ä/b"):
        with pytest.raises(ValueError, match="a repository is named ORG/NAME"):
            checked_name(wrong)
    assert checked_name("me/Fast_4-steps.v2") == "me/Fast_4-steps.v2"
