"""Runs whose frozen weights are held in bfloat16, on the command line.

The student of such a run has the bits of one that holds float32: training computes the same, and
adapters are merged with the teacher's own weights, not with the rounded ones.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fewstep.nets.lora import LoRA
from fewstep.runs import runner
from fewstep.storage.checkpoint import find_checkpoints
from fewstep.storage.files import unpack
from fewstep.storage.model_folder import load_student
from fewstep.training import precision
from tests.command import DISTIL, bits, fewstep
from tests.runs.test_lora_runs import altered

pytestmark = pytest.mark.slow

ADAPT = ("--lora", "LoRA(4, targets=('*',))", "--power.sigma-rel", "0.1")
LOW = (
    *DISTIL,
    "--sample-every",
    "20",
    "--teacher",
    "run/teacher",
    "--precision",
    "bf16",
    "--out",
    "run",
)
HELD = (*LOW, "--frozen", "bf16")
STUDENT = "student/model.safetensors"


@pytest.fixture(scope="module")
def trained(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders whole, held, adapters and held adapters, each with run and run/teacher."""
    home = tmp_path_factory.mktemp("held")
    for name, args in (
        ("whole", LOW),
        ("held", HELD),
        ("adapters", (*LOW, *ADAPT)),
        ("held adapters", (*HELD, *ADAPT)),
    ):
        shutil.copytree(finished / "runs" / "teacher", home / name / "run" / "teacher")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(home / name)
            calls = []
            patch.setattr(
                runner,
                "store_in_bf16",
                lambda net, calls=calls: calls.append(precision.store_in_bf16(net)),
            )
            done = fewstep(*args)
            assert done.code == 0, done.err
            assert len(calls) == ("held" in name)
    return home


@pytest.mark.parametrize("kind", ["", " adapters"])
def test_the_student_is_the_same(trained: Path, kind: str) -> None:
    """And all of the last checkpoint; what looks see is the rounded teacher's."""
    whole, held = (trained / name / "run" for name in (kind.strip() or "whole", f"held{kind}"))
    assert (whole / STUDENT).read_bytes() == (held / STUDENT).read_bytes()
    ours, theirs = (find_checkpoints(run / "checkpoints")[-1] for run in (whole, held))
    assert bits(ours) == bits(theirs)
    assert (whole / "gauges.jsonl").read_text() != (held / "gauges.jsonl").read_text()


def test_merging_with_rounded_weights_would_be_seen(trained: Path) -> None:
    """Negative control: W rounded and B A is another student, by 2^-9 of a weight at most."""
    run = trained / "held adapters" / "run"
    teacher = load_student(run / "teacher").denoiser
    adapters = unpack(run / "student" / "lora.safetensors")
    stored = unpack(run / STUDENT)
    exact = LoRA(4).merged(teacher.state_dict(), adapters)
    assert all(torch.equal(stored[name], t) for name, t in exact.items())
    precision.store_in_bf16(teacher)
    other = LoRA(4).merged(teacher.state_dict(), adapters)
    names = [name for name, t in teacher.state_dict().items() if t.dtype == torch.bfloat16]
    assert names
    assert not any(torch.equal(stored[name], other[name].float()) for name in names)


def test_it_goes_on_and_has_other_averages(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 16 of 20 to the same bits; another average is merged as the student is."""
    shutil.copytree(trained / "held adapters", tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    for path in ("student", "checkpoints/step-00000020"):
        shutil.rmtree(Path("run") / path)
    done = fewstep(*HELD, *ADAPT)
    assert "continuing from step 16 of 20" in done.err
    assert bits(Path("run/student")) == bits(trained / "held adapters" / "run" / "student")
    assert fewstep("ema", "run", "--sigma-rel", "0.1", "--out", "here").code == 0
    monkeypatch.chdir(trained / "adapters")
    assert fewstep("ema", "run", "--sigma-rel", "0.1", "--out", f"{tmp_path}/there").code == 0
    ours, theirs = (tmp_path / p / "model.safetensors" for p in ("home/here", "there"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_teacher_that_changes_meanwhile_is_noticed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are read again when the student is merged."""
    shutil.copytree(trained / "held adapters", tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    for path in ("student", "checkpoints/step-00000020"):
        shutil.rmtree(Path("run") / path)
    prepare = runner.prepare

    def then_altered(*args: object) -> object:
        work = prepare(*args)  # type: ignore[arg-type]
        altered(tmp_path / "home")
        return work

    monkeypatch.setattr(runner, "prepare", then_altered)
    done = fewstep(*HELD, *ADAPT)
    assert done.code == 2
    assert "say where it is with --teacher" in done.err
    assert not Path("run/student").exists()


def test_without_autocast_it_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained / "whole")
    done = fewstep(*DISTIL, "--teacher", "run/teacher", "--frozen", "bf16", "--out", "new")
    sentence = "frozen weights are held in bf16 where a teacher is distilled in --precision bf16"
    assert (done.code, done.err) == (2, f"fewstep: {sentence}, and this run is in fp32\n")
    exact = ("distill", "mixture", "--precision", "bf16", "--frozen", "bf16", "--out", "new")
    done = fewstep(*exact)
    assert done.code == 2
    assert "GaussianMixture has no linear layers or convolutions whose weights" in done.err
    assert not Path("new").exists()
