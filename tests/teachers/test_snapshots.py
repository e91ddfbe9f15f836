"""A published file as the teacher, as it is: the same bits as from its converted folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.config import encode
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.runs.teacher import describe_model
from fewstep.storage.model_folder import load_student
from fewstep.teachers.snapshots import load_snapshot, stored_description
from tests import snapshot_writer
from tests.cli.test_inspect import SONG
from tests.command import fewstep
from tests.pickle_assembler import call, pickled

ARGUMENTS = SONG | {"model_channels": 4, "attn_resolutions": [], "dropout": 0.0}
DISTIL = ("distill", "digits", "--steps", "2", "--batch", "4", "--sample-every", "2", "--teacher")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    net = EDMPrecond(**ARGUMENTS)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    (tmp_path / "net.pkl").write_bytes(snapshot_writer.write(net, ARGUMENTS, "edm"))
    (tmp_path / "hostile.pkl").write_bytes(pickled({"ema": call("os", "system", "touch canary")}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_snapshot_is_used_as_it_is(home: Path) -> None:
    """The recipe's network becomes the teacher's; file and folder give the same student.

    Then the run is measured and reported, and the file sampled.
    """
    assert fewstep("convert", "net.pkl", "folder").code == 0
    for teacher, out in ((("net.pkl",), "a"), (("folder", "--init", "net.pkl"), "b")):
        done = fewstep(*DISTIL, *teacher, "--out", out)
        assert done.code == 0, done.err
    a, b = load_student("a"), load_student("b")
    assert (
        a.model
        == b.model
        == stored_description("net.pkl")
        == describe_model("folder")
        == describe_model("a")
    )
    state = b.denoiser.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in a.denoiser.state_dict().items())
    start = load_snapshot("net.pkl").denoiser.state_dict()
    assert not all(torch.equal(value, state[key]) for key, value in start.items())
    again = fewstep(*DISTIL, "net.pkl", "--out", "a")
    assert (again.code, "finished already" in again.err) == (0, True)
    assert json.loads(Path("a/run.json").read_text())["run"]["model"] == encode(a.model)
    assert fewstep("evaluate", "a", "--samples", "100", "--draws", "1").code == 0
    assert {"teacher", "student"} <= json.loads(Path("a/metrics.json").read_text()).keys()
    assert fewstep("report", "a").code == 0
    assert "The teacher is not shown" not in Path("a/report.html").read_text(encoding="utf-8")
    for source in ("net.pkl", "folder"):
        assert fewstep("sample", source, "--seeds", "0-3", "--out", f"{source}.npz").code == 0
    x, y = (np.load(f"{name}.npz", allow_pickle=False)["images"] for name in ("net.pkl", "folder"))
    assert np.array_equal(x, y)


def test_wrong_teachers(home: Path) -> None:
    cases = {
        "hostile.pkl": "hostile.pkl: the name 'os.system' is not allowed",
        "none.pkl": "there is no file or folder none.pkl",
        "net.pkl --model.classes 0": "the student's classes is 0, but its teacher in net.pkl "
        "has 10; ",
    }
    for args, words in cases.items():
        done = fewstep(*DISTIL, *args.split(), "--out", "run")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"fewstep: {words}")
    assert not Path("run").exists()
    assert not Path("canary").exists()
