"""Runs with adapters on the command line: what is stored, continued, finished and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.nets.lora import LoRA, pairs
from fewstep.storage import files
from fewstep.storage.checkpoint import find_checkpoints
from fewstep.storage.files import unpack, write_folder
from fewstep.storage.model_folder import load_student
from tests.command import DISTIL, bits, fewstep, tree

pytestmark = pytest.mark.slow

LORA = ("--lora", "LoRA(4, alpha=2, targets=('inner', 'outer', 'first'))")
KEPT = ("--power.sigma-rel", "0.1", "--best.metric", "quick.fd_digits")
RUN = (*DISTIL, *LORA, "--teacher", "run/teacher", *KEPT)
WEIGHTS = "student/model.safetensors"


@pytest.fixture(scope="module")
def trained(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, and a run of adapters: runs/lora. Leave it as it is."""
    home = tmp_path_factory.mktemp("lora")
    shutil.copytree(finished / "runs" / "teacher", home / "run" / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        before = tree(home / "run" / "teacher")
        done = fewstep(*RUN, "--out", "run")
        assert done.code == 0, done.err
        assert tree(home / "run" / "teacher") == before
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, which is where we are."""
    shutil.copytree(trained / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_checkpoints_and_averages_hold_adapters_alone(trained: Path) -> None:
    run = trained / "run"
    for path in (*find_checkpoints(run / "checkpoints"), *(run / "averages").iterdir()):
        for file in path.glob("*.safetensors"):
            if not file.name.startswith("optim"):
                names = unpack(file).keys()
                assert all(name.endswith((".up", ".down.weight")) for name in names)


def test_a_finished_student_is_whole(home: Path) -> None:
    """W + (alpha / r) B A of the stored adapters; it needs no teacher and can be one."""
    lora = LoRA(4, 2.0)
    teacher = load_student("run/teacher").denoiser.state_dict()
    adapters = load_file("run/student/lora.safetensors")
    expected = lora.merged(teacher, adapters)
    shutil.move("run/teacher", "elsewhere")
    student = load_student("run")
    found = student.denoiser.state_dict()
    assert found.keys() == teacher.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])
        adapted = name.removesuffix(".weight") in pairs(adapters)
        assert torch.equal(tensor, teacher[name]) != adapted
    best = load_student("run/best").denoiser.state_dict()
    kept = lora.merged(teacher, load_file("run/best/lora.safetensors"))
    assert all(torch.equal(best[name], tensor) for name, tensor in kept.items())
    card = student.card["lora"]
    assert (card["rank"], card["alpha"], len(card["teacher"])) == (4, 2.0, 64)
    assert fewstep("sample", "run", "--seeds", "0-3", "--out", "a.png").code == 0
    again = [*DISTIL, *LORA, "--teacher", "run", "--steps", "2", "--out", "next"]
    assert fewstep(*again).code == 0


def test_a_stopped_run_goes_on_to_the_same_bits(trained: Path, home: Path) -> None:
    """From the second checkpoint but last; student, adapters, averages and gauges."""
    run = home / "run"
    for path in ("student", "checkpoints/step-00000020"):
        shutil.rmtree(run / path)
    again = fewstep(*RUN, "--out", "run")
    assert "continuing from step 16 of 20" in again.err
    for name in (WEIGHTS, "student/lora.safetensors", "gauges.jsonl"):
        assert (run / name).read_bytes() == (trained / "run" / name).read_bytes(), name
    assert bits(run / "averages") == bits(trained / "run" / "averages")


def test_another_average_of_adapters(home: Path) -> None:
    """`fewstep ema` merges it with the teacher, which has to be the same."""
    done = fewstep("ema", "run", "--sigma-rel", "0.1", "--out", "longer")
    assert done.code == 0, done.err
    teacher = load_student("run/teacher").denoiser.state_dict()
    adapters = unpack(Path("longer/lora.safetensors"))
    kept = unpack(Path("run/averages/step-00000020/sigma-0.1.safetensors"))
    for name, tensor in kept.items():
        torch.testing.assert_close(adapters[name], tensor, rtol=1e-4, atol=1e-5)
    expected = LoRA(4, 2.0).merged(teacher, adapters)
    found = load_student("longer").denoiser.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    altered(home)
    done = fewstep("ema", "run", "--sigma-rel", "0.1", "--out", "other")
    assert done.code == 2
    assert "no longer holds the teacher of run (digests.weights was " in done.err


def altered(home: Path) -> None:
    """The same teacher with one other weight, sound in itself."""
    folder = home / "run" / "teacher" / "student"
    state = load_file(folder / "model.safetensors")
    state["net.first.bias"][0] += 1.0
    save_file(state, home / "model.safetensors")
    facts = json.loads((folder / "manifest.json").read_text())
    files = {
        "model.json": (folder / "model.json").read_bytes(),
        "model.safetensors": (home / "model.safetensors").read_bytes(),
    }
    write_folder(folder, files, {"kind": facts["kind"]})


def test_the_teacher_is_hashed_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is loaded, and not before for the digest that the run records."""
    hashed: list[Path] = []
    digest = files.digest
    monkeypatch.setattr(files, "digest", lambda path: hashed.append(path) or digest(path))
    assert fewstep(*RUN[:-2], "--steps", "1", "--out", "new").code == 0
    weights = home / "run" / "teacher" / "student" / "model.safetensors"
    assert [path.resolve() for path in hashed].count(weights.resolve()) == 1
    facts = json.loads(Path("new/run.json").read_text())
    assert facts["run"]["lora"]["teacher"] == digest(weights)


def test_another_teacher_under_the_same_name_is_refused(home: Path) -> None:
    altered(home)
    shutil.rmtree(home / "run" / "student")
    before = tree(home / "run")
    done = fewstep(*RUN, "--out", "run")
    assert done.code == 2
    assert "in use by a run with other settings (run.lora.teacher was" in done.err
    assert tree(home / "run") == before


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "rank 0": (("--lora", "LoRA(0)"), "LoRA.rank is 1 or more, got 0"),
    "no attention": (
        ("--lora", "LoRA(4)"),
        "this network has none; say which layers with targets",
    ),
    "misspelt": (
        ("--lora", "LoRA(4, targets=('inner', 'autre'))"),
        "LoRA: no layer of this network is named 'autre'; did you mean 'outer'?",
    ),
    "no field": (("--lora", "LoRA(4, dropout=0.1)"), "LoRA has no field 'dropout'"),
    "another digest": (
        ("--lora", "LoRA(4, targets=('*',), teacher='0123')"),
        "the adapters belong to a teacher with the digest 0123..., and this one has",
    ),
    "not LoRA": (("--lora", "SiD()"), "expected a LoRA, got SiD"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_in_a_sentence(home: Path, case: str) -> None:
    args, message = WRONG[case]
    done = fewstep(*DISTIL, "--teacher", "run/teacher", *args, "--out", "new")
    assert done.code == 2, done.err
    assert message in done.err.splitlines()[-1]
    assert not (home / "new" / "run.json").exists()


def test_lora_needs_a_network_for_a_teacher(home: Path) -> None:
    done = fewstep("train", "digits_teacher", *LORA, "--out", "new")
    assert done.code == 2
    assert "LoRA adapts the network of a teacher, and this run trains one" in done.err
    done = fewstep("distill", "mixture", "--lora", "LoRA(4, targets=('*',))", "--out", "new")
    assert done.code == 2
    assert "LoRA adapts a network, and this teacher is none" in done.err


def test_the_cost_counts_the_base_once(home: Path) -> None:
    """Trained numbers: two roles' adapters of three layers."""
    done = fewstep(*RUN, "--dry-run")
    assert done.code == 0, done.err
    adapters = load_file("run/student/lora.safetensors")
    count = 2 * sum(t.numel() for t in adapters.values())
    assert f"trained parameters: {count:,} " in done.out
