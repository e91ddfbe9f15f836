"""What is told while a run prepares its data, and what a stop does then."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.cli.progress_bar import Bar
from fewstep.data.embeddings import Embeddings
from fewstep.training.progress import listen
from tests.command import fewstep
from tests.conftest import Folders


def encoder(prompts: Sequence[str]) -> dict[str, Tensor]:
    return {"prompt": torch.zeros(len(prompts), 2)}


def test_encoding_tells_how_far_it_is(tmp_path: Path) -> None:
    """Of what is missing, before each batch; nobody is told after the block."""
    heard: list[tuple[str, int, int]] = []
    names = [f"p{i}" for i in range(300)]
    with listen(lambda *progress: heard.append(progress)):
        list(Embeddings(tmp_path).fill(names, encoder, batch=100))
        list(Embeddings(tmp_path).fill([*names, "q"], encoder, what="pictures"))
    list(Embeddings(tmp_path).fill([*names, "r"], encoder))
    done = [("encoding prompts", i, 300) for i in (0, 100, 200, 256)]
    assert heard == [*done, ("encoding pictures", 0, 1)]


def test_the_time_left_is_of_the_work_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten seconds a step after an hour of preparation: 80 s for eight steps."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    bar = Bar("sid", 10)
    for second, done in ((1800.0, 50), (3000.0, 90)):
        now[0] = second
        bar.beside("encoding prompts", done, 100)
    for step in (1, 2):
        now[0] = 3600.0 + 10 * step
        bar.update(step)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "encoding prompts: 90/100, 300 s left"
    assert lines[-1] == "sid: 2/10, 80 s left"


def test_a_stop_does_not_wait_for_the_first_step(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards that are finished stay; the same command goes on."""
    pytest.importorskip("diffusers")
    from fewstep.teachers.diffusers.text_and_vae import TextAndVAE

    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(f"a ball of size {i}" for i in range(300)))
    command = (
        *("distill", "t2i", "--teacher", str(folders("sd")), "--steps", "1", "--batch", "2"),
        *("--domain", "Prompts('prompts.txt', check=False)", "--accumulate", "1", "--out", "run"),
    )
    encode, heard, stops = TextAndVAE.prompts, list[str](), [True]

    def prompts(self: TextAndVAE, texts: Sequence[str]) -> dict[str, Tensor]:
        heard.extend(texts)
        if len(heard) > 256 and stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, texts)

    monkeypatch.setattr(TextAndVAE, "prompts", prompts)
    done = fewstep(*command)
    assert done.code == 75, done.err
    assert "stopped before the first step; the same command continues" in done.err
    assert len(heard) == 288  # of the second shard's 44, one batch of 32
    assert not Path("run/checkpoints").is_dir()
    heard.clear()
    stops.clear()
    done = fewstep(*command)
    assert done.code == 0, done.err
    assert len(set(heard)) == 44
