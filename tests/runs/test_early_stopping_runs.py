"""What a run keeps beside its newest checkpoints, when it ends early, and how it goes back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.data import picture_set
from fewstep.data.batches import Latents
from fewstep.runs.monitor import Monitor
from fewstep.storage import checkpoint
from fewstep.storage.files import unpack
from fewstep.storage.model_folder import load_student
from fewstep.training import distributed
from tests.cli.test_cli import interrupt
from tests.command import Result, bits, fewstep
from tests.picture_files import as_folder, encoded, noise

SMALL = ("--model.net.width", "16", "--model.net.blocks", "1", "--batch", "16")
RUN = ("distill", "mixture", *SMALL, "--steps", "24", "--save-every", "4")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def looks(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """Instead of gauges, what a look sees by step."""

    def look(self: Monitor, state: Any) -> dict[str, Any] | None:
        line = {"step": state.step, "quick": {"swd": values.get(state.step, 9.0)}}
        self.folder.append("gauges.jsonl", line)
        return line if distributed.rank() == 0 else None

    monkeypatch.setattr(Monitor, "look", look)


def stops(monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], *steps: int) -> Result:
    """The command, interrupted after some steps, and once more."""
    for step in steps:
        with monkeypatch.context() as patch:
            interrupt(patch, step, 15)
            assert fewstep(*args).code == 75
    return fewstep(*args)


def names(folder: str) -> list[int]:
    return [
        checkpoint.step_of(path)
        for path in checkpoint.find_checkpoints(Path(folder, "checkpoints"))
    ]


BEST = ("--sample-every", "2", "--best.metric", "quick.swd")
SEEN = {2: 5.0, 4: 3.0, 6: float("nan"), 8: 2.0, 10: 4.0, 12: 2.5, 14: 2.0, 16: 1.0, 24: 7.0}


def test_the_best_and_every_eighth_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 steps: the average as it was then, a model like any other; also when stopped."""
    looks(monkeypatch, SEEN)
    keep = ("--keep-every", "8")
    assert stops(monkeypatch, (*RUN, *BEST, *keep, "--out", "a")).code == 0
    assert stops(monkeypatch, (*RUN, *BEST, *keep, "--out", "b"), 7, 8, 17).code == 0
    assert names("a") == [8, 16, 20, 24]
    for folder in ("best", "student"):
        assert bits(Path("a", folder)) == bits(Path("b", folder))
    made = unpack(Path("a/best/model.safetensors"))
    then = unpack(Path("a/checkpoints/step-00000016/average.safetensors"))
    assert made.keys() == then.keys()
    assert all(torch.equal(made[name], then[name]) for name in made)
    best, student = load_student("a/best"), load_student("a")
    assert (best.card["steps"], best.card["quick.swd"]) == (16, 1.0)
    assert best.sampler == student.sampler
    assert fewstep("sample", "a/best", "--seeds", "0-3", "--out", "x.npz").code == 0
    assert fewstep("inspect", "a/best").out.startswith("what    finished model, digests correct")


def test_a_run_ends_when_no_look_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three after step 8; 14 is as good, which is not better. What remains is a finished run."""
    looks(monkeypatch, SEEN)
    flags = (*RUN, *BEST, "--best.patience", "3")
    done = fewstep(*flags, "--out", "a")
    assert done.code == 0
    told = "quick.swd was 2 at step 8 and not better in 3 looks since: ending"
    assert told in done.err.splitlines()
    assert names("a") == [12, 14]
    assert (load_student("a").card["steps"], load_student("a/best").card["steps"]) == (14, 8)
    assert stops(monkeypatch, (*flags, "--out", "b"), 5, 13).code == 0
    for folder in ("best", "student", "checkpoints/step-00000014"):
        assert bits(Path("a", folder)) == bits(Path("b", folder))
    assert "finished already" in fewstep(*flags, "--out", "a").err
    (Path("a/student") / "manifest.json").unlink()  # it died just then
    again = fewstep(*flags, "--out", "a")
    assert "continuing from step 14 of 24" in again.err
    assert bits(Path("a/student")) == bits(Path("b/student"))


def test_a_metric_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    looks(monkeypatch, SEEN)
    done = fewstep(*RUN, "--sample-every", "2", "--best.metric", "fid", "--out", "a")
    sentence = "fewstep: Run.best.metric is 'fid', but what this run looks at is quick.swd"
    assert (done.code, done.err.splitlines()) == (2, [sentence])
    done = fewstep(*RUN, "--keep-every", "6", "--out", "b")
    assert (done.code, done.err) == (
        2,
        "fewstep: Run.keep_every 6 is not a multiple of save_every 4\n",
    )
    assert not Path("b").exists()


def test_a_best_model_without_space_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, and a later look that is better than the last stored one is stored."""
    looks(monkeypatch, SEEN)
    from fewstep.runs import session

    write = session.save_model

    def full(folder: Path, *rest: Any) -> None:
        if folder.name == "best" and rest[3]["steps"] == 8:
            raise OSError(28, "No space left on device")
        write(folder, *rest)

    monkeypatch.setattr(session, "save_model", full)
    done = fewstep(*RUN, *BEST, "--out", "a")
    assert done.code == 0
    assert "the best model so far could not be written: No space left on device" in done.err
    assert load_student("a/best").card["steps"] == 16


SPIKES = ("--spikes.limit", "100", "--spikes.steps", "3", "--spikes.window", "10")
QUIET = ("--sample-every", "24", *SPIKES)


def poisoned(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """The noise of samples of these steps is a thousand times as large; finite, and harmful."""
    call = Latents.__call__

    def calling(self: Latents, draws: Any) -> Any:
        batch = call(self, draws)
        bad = (draws.index >= (first - 1) * 32) & (draws.index < last * 32)
        return batch._replace(z=torch.where(bad[:, None], 1000 * batch.z, batch.z))

    monkeypatch.setattr(Latents, "__call__", calling)


def test_the_checkpoint_before_a_spike_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 14 to 16 are far: 12 stays; what was trained is what a run without rules trains."""
    looks(monkeypatch, {})
    poisoned(monkeypatch, 14, 17)
    done = fewstep(*RUN, *QUIET, "--out", "a")
    assert done.code == 0
    (told,) = [line for line in done.err.splitlines() if "usual range" in line]
    assert told.endswith("left the usual range at step 14; the checkpoint of step 12 is kept")
    assert names("a") == [12, 20, 24]
    stops(monkeypatch, (*RUN, *QUIET, "--out", "b"), 9, 15, 16)
    assert bits(Path("a/checkpoints")) == bits(Path("b/checkpoints"))
    assert fewstep(*RUN, "--sample-every", "24", "--spikes.limit", "inf", "--out", "c").code == 0
    assert names("c") == [20, 24]
    assert bits(Path("a/student")) == bits(Path("c/student"))


def test_a_run_goes_back_before_a_spike(monkeypatch: pytest.MonkeyPatch) -> None:
    """To step 12, and on with samples that were not drawn before: the spike does not recur.

    Stopped within the spike, at its end and after the return, it does the same, to the bit.
    """
    looks(monkeypatch, {})
    poisoned(monkeypatch, 14, 16)
    flags = (*RUN, *QUIET, "--spikes.rollback", "--power.sigma-rel", "0.1")
    done = fewstep(*flags, "--out", "a")
    assert done.code == 0
    told = [line for line in done.err.splitlines() if "usual range" in line]
    assert len(told) == 1
    assert told[0].endswith("at step 14; gone back to step 12, and on with other samples")
    lines = [json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert max(abs(line["student/loss"]) for line in lines) < 100
    newest = json.loads(Path("a/checkpoints/step-00000024/manifest.json").read_text())
    assert newest["drawn"] == (24 + 4) * 32
    assert (newest["memory"]["kept"], newest["memory"]["rollbacks"]) == ([12.0], [1.0])
    stops(monkeypatch, (*flags, "--out", "b"), 15, 13, 14)
    for folder in ("student", "checkpoints", "averages"):
        assert bits(Path("a", folder)) == bits(Path("b", folder)), folder


def test_a_spike_that_recurs_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three returns, then a sentence; the checkpoint before it is there."""
    looks(monkeypatch, {})
    poisoned(monkeypatch, 14, 9999)
    done = fewstep(*RUN, *QUIET, "--spikes.rollback", "--out", "a")
    assert done.code == 1
    assert "left the usual range at step 13, after 3 returns to earlier" in done.err
    assert names("a") == [8, 12]


def test_a_picture_that_vanishes_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set that is not held in memory: named, exit 2; put back, the run goes on as if it had
    never been away. The batch of step 6 may have been read before the picture vanished."""
    as_folder(Path("set"), {f"{i}.png": encoded(x) for i, x in enumerate(noise(8, 8, 1))})
    monkeypatch.setattr(picture_set.load_pictures, "__defaults__", (0, 0))
    net = ("--model.shape", "1", "8", "8", "--model.classes", "0", *SMALL[:4], "--batch", "8")
    train = ("train", "digits_teacher", *net, "--domain", "Pictures('set')", "--steps", "8")
    train = (*train, "--save-every", "2", "--sample-every", "8")
    looks(monkeypatch, {})
    assert fewstep(*train, "--out", "a").code == 0
    log = Monitor.log

    def logging(self: Monitor, record: Any) -> None:
        log(self, record)
        if record.step == 5:
            Path("set/3.png").rename("3.png")

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log", logging)
        done = fewstep(*train, "--out", "b")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("fewstep: ")
    assert "3.png" in done.err.splitlines()[-1]
    Path("3.png").rename("set/3.png")
    again = fewstep(*train, "--out", "b")
    assert re.search("continuing from step [46] of 8", again.err)
    assert bits(Path("a/student")) == bits(Path("b/student"))
