"""Runs with moments of eight bits on the command line: stored, continued to the bit, refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fewstep.runs import runner
from fewstep.storage.checkpoint import find_checkpoints
from fewstep.storage.files import unpack
from fewstep.training import adam_8bit
from fewstep.training.optim import Optim
from tests.command import DISTIL, TEACH, fewstep, tree

EIGHT = ("--optim.bits", "8")
WIDE = ("--model.net.width", "64")
RUN = (*DISTIL, *WIDE, "--teacher", "run/teacher", "--out", "run")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of 64 units, and a run with moments of eight bits. Leave it."""
    pytest.importorskip("bitsandbytes")
    home = tmp_path_factory.mktemp("eight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert fewstep(*TEACH, *WIDE, "--steps", "2", "--out", "run/teacher").code == 0
        done = fewstep(*RUN, *EIGHT)
        assert done.code == 0, done.err
    return home


def test_a_checkpoint_holds_them(home: Path) -> None:
    """Bytes of both nets' moments: 2 + 8/256 a number of the large tensors."""
    for name in ("student", "fake"):
        path = find_checkpoints(home / "run" / "checkpoints")[-1]
        stored = unpack(path / f"optim-{name}.safetensors")
        whole = [t for t in unpack(path / "nets.safetensors").items() if t[0].startswith(name)]
        large = sum(t.numel() for _, t in whole if t.numel() >= adam_8bit.SMALLEST)
        eight = {k: t for k, t in stored.items() if t.dtype == torch.uint8}
        assert sum(t.nbytes for t in eight.values()) == 2 * large > 0
        largest = [t for k, t in stored.items() if k.endswith("_max")]
        assert sum(t.nbytes for t in largest) == 2 * large * 4 // 256
        assert all(len(t.unique()) > 99 for t in eight.values())


def test_a_stopped_run_goes_on_to_the_same_bits(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint of step 16 of 20: the student, and all of the last checkpoint."""
    shutil.copytree(home / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    last = "checkpoints/step-00000020"
    for path in ("student", last):
        shutil.rmtree(tmp_path / "run" / path)
    done = fewstep(*RUN, *EIGHT)
    assert "continuing from step 16 of 20" in done.err
    for path in ("student", last):
        assert tree(tmp_path / "run" / path) == tree(home / "run" / path)
    other = fewstep(*RUN)
    assert other.code == 2
    assert "other settings (run.optim.bits was 8, now 32)" in other.err


@pytest.mark.parametrize("flags", [EIGHT, ("--fake-optim", "Optim(bits=8)")])
def test_a_missing_library_is_told_before_the_teacher_is_loaded(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adam_8bit, "find_spec", lambda name: None)
    monkeypatch.setattr(runner, "load_teacher", lambda *_: pytest.fail("it was loaded"))
    done = fewstep(*RUN, *flags)
    sentence = "8-bit moments need bitsandbytes, which is not installed: "
    assert (done.code, done.err.splitlines()[-1]) == (
        2,
        f"fewstep: {sentence}pip install 'fewstep[lowmem]'",
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=sentence):
        Optim(bits=8).build([torch.nn.Parameter(torch.zeros(1))])


def test_other_bits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for flags, sentence in (
        (
            ("--optim.bits", "16"),
            "--optim.bits is one of 32, 8, written like --optim.bits 32; got '16'",
        ),
        (("--optim", "Optim(bits=4)"), "Optim.bits is 32 | 8, got 4"),
    ):
        done = fewstep(*RUN, *flags)
        assert done.code == 2
        assert sentence in done.err
