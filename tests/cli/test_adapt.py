"""fewstep adapt: a fine-tune carried over to a distilled student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.data.digits import load_digits
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.runner import prepare
from fewstep.runs.teacher import adapted_of, resolve_run
from fewstep.storage.files import read_json, unpack
from fewstep.storage.model_folder import load_student
from fewstep.storage.user_code import decoded
from tests.command import DISTIL, TEACH, fewstep
from tests.conftest import Folders

LORA = "LoRA(2, targets=('inner', 'outer'))"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its fine-tune on inverted digits, and a student of the base."""
    home = tmp_path_factory.mktemp("home")
    digits, _ = load_digits()
    np.savez(home / "inverted.npz", x=(-digits.x0).numpy(), labels=digits.labels.numpy())
    assert fewstep(*TEACH, "--out", str(home / "base")).code == 0
    domain = f"Arrays({str(home / 'inverted.npz')!r})"
    told = (*TEACH, "--domain", domain, "--init", str(home / "base"), "--out", str(home / "tuned"))
    assert fewstep(*told).code == 0
    method = "DiffInstruct(sampler=FewStep(t_init=2.5, steps=2))"
    args = ("--teacher", str(home / "base"), "--out", str(home / "student"), "--method", method)
    assert fewstep(*DISTIL, *args).code == 0
    return home


def adapt(home: Path, out: str, *more: str) -> Path:
    args = ("--tuned", str(home / "tuned"), "--out", str(home / out), "--steps", "6", *more)
    found = fewstep("adapt", str(home / "student"), *args)
    assert found.code == 0, found.err
    return home / out


def test_training_may_start_from_other_weights(home: Path) -> None:
    """A fine-tune: its recorded start is the base, and the first weights are near those."""
    facts = read_json(home / "tuned" / "run.json")
    assert facts["init"] == str(home / "base")
    base, tuned = (unpack(home / n / "student" / "model.safetensors") for n in ("base", "tuned"))
    away = max((base[name] - tuned[name]).abs().max().item() for name in base)
    assert 0 < away < 0.2


def test_three_networks_start_where_they_should(home: Path) -> None:
    """The student as the distilled one, the fake score as the base."""
    out = adapt(home, "adapted")
    facts = RunFolder(out).facts()
    for key, name in (("teacher", "tuned"), ("init", "student"), ("fake_init", "base")):
        assert facts[key] == str(home / name)
        assert facts["digests"][key]["weights"]
    run: Run = decoded(facts["run"], Run, out)
    assert run.method.sampler.calls == 2
    run = resolve_run(run, facts["teacher"], facts["init"])
    work = prepare(run, "digits", facts["teacher"], "cpu", facts["init"], facts["fake_init"])
    nets = work.init().nets
    for net, name in (("student", "student"), ("fake", "base")):
        stored = load_student(home / name).denoiser.state_dict()
        assert all(torch.equal(t, stored[key]) for key, t in nets[net].state_dict().items())
    assert load_student(out).sampler == load_student(home / "student").sampler


@pytest.mark.slow
def test_it_continues_to_the_bit(home: Path) -> None:
    whole = adapt(home, "whole", "--steps", "8", "--save-every", "4")
    part = adapt(home, "part", "--steps", "8", "--save-every", "4")
    for folder in (part / "student", part / "checkpoints" / "step-00000008"):
        for path in sorted(folder.iterdir()):
            path.unlink()
        folder.rmdir()
    adapt(home, "part", "--steps", "8", "--save-every", "4")
    model = "model.safetensors"
    assert (part / "student" / model).read_bytes() == (whole / "student" / model).read_bytes()


def test_adapters_lie_on_the_student(home: Path) -> None:
    """The result is the student and what was trained; not one number of the base is in it."""
    out = adapt(home, "lora", "--lora", LORA)
    assert adapted_of(RunFolder(out)) == str(home / "student")
    card = read_json(out / "student" / "model.json")["card"]
    assert card["adapts"] == str(home / "student")
    before = unpack(home / "student" / "student" / "model.safetensors")
    after = unpack(out / "student" / "model.safetensors")
    adapters = unpack(out / "student" / "lora.safetensors")
    layers = {name.removesuffix(".up") for name in adapters if name.endswith(".up")}
    assert layers
    for name, tensor in after.items():
        adapted = name.removesuffix(".weight") in layers
        assert torch.equal(tensor, before[name]) != adapted


def test_another_base_is_refused_later(home: Path) -> None:
    out = adapt(home, "twice")
    told = ("--tuned", str(home / "tuned"), "--out", str(out), "--steps", "6")
    found = fewstep("adapt", str(home / "student"), *told, "--base", str(home / "tuned"))
    assert found.code == 2
    assert "fake_init" in found.err or "no longer holds" in found.err


def test_wrong_input_is_one_sentence(home: Path, tmp_path: Path) -> None:
    student, tuned = str(home / "student"), ("--tuned", str(home / "tuned"))
    for args, words in (
        ((), "adapt needs a student"),
        ((student,), "adapt needs the fine-tune: --tuned FOLDER, or --tune LORA.safetensors"),
        ((str(tmp_path), *tuned), "is no run folder: say by which recipe"),
        ((student, *tuned, "--base", str(tmp_path)), "holds no finished model"),
        ((student, *tuned, "--method", "PairRegression()"), "has no fake score, so it cannot"),
        ((student, "--tune", str(tmp_path / "x.safetensors")), "is no pipeline folder"),
        (
            (student, *tuned, "--tune", "x"),
            "--tune and --tuned contradict each other: leave one of them out",
        ),
    ):
        found = fewstep("adapt", *args, "--out", str(tmp_path / "run"))
        assert found.code == 2, (args, found)
        assert words in found.err, found.err
        assert len(found.err.strip().splitlines()) == 1
    told = ("--method", "PairRegression(pairs=Pairs(8))", "--fake-init", student)
    place = ("--teacher", str(home / "base"), "--out", str(tmp_path / "r"))
    found = fewstep(*DISTIL, *told, *place)
    assert found.code == 2
    assert "PairRegression has no fake score: leave out --fake-init" in found.err


def test_help_teaches(home: Path) -> None:
    assert "without losing its few steps" in " ".join(fewstep("adapt", "--help").out.split())
    assert "--method.sampler" in fewstep("adapt", str(home / "student"), "--help").out


def test_dry_run_tells_the_cost(home: Path, tmp_path: Path) -> None:
    told = ("--tuned", str(home / "tuned"), "--out", str(tmp_path / "none"), "--dry-run")
    found = fewstep("adapt", str(home / "student"), *told)
    assert found.code == 0, found.err
    assert json.loads(found.out[: found.out.rindex("}") + 1])["steps"] == 300
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_lora_of_a_pipeline_becomes_one_of_its_student(folders: Folders, tmp_path: Path) -> None:
    """The file that is exported belongs to the few-step student, and stock diffusers reads it."""
    from fewstep.export.lora import FILE, to_kohya
    from tests.export.test_lora import adapted

    base, user = folders("sd"), tmp_path / "user.safetensors"
    to_kohya(adapted(base, tmp_path / "of-user", "sd"), user)
    few = tmp_path / "few"
    shutil.copytree(base, few)  # a distilled pipeline, from elsewhere
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\na blue ball\n")
    out = tmp_path / "run"
    told = ("--recipe", "t2i", "--base", str(base), "--tune", str(user), "--out", str(out))
    sizes = ("--steps", "2", "--batch", "2", "--accumulate", "1", "--lora", "LoRA(2)")
    sizes += ("--domain.no-check",)  # its weights are noise
    found = fewstep("adapt", str(few), *told, *sizes, "--prompts", str(prompts))
    assert found.code == 0, found.err
    facts = RunFolder(out).facts()
    assert facts["teacher"] == str(tmp_path / "run-teacher")
    assert (facts["init"], facts["fake_init"]) == (str(few), str(base))
    made = fewstep("export", str(out), str(tmp_path / "lora"), "--to", "lora")
    assert made.code == 0, made.err
    assert (tmp_path / "lora" / FILE).is_file()
    assert str(few) in (tmp_path / "lora" / "README.md").read_text()
    drawn = fewstep("sample", str(out), "--prompts", "a cat", "--out", str(tmp_path / "x.png"))
    assert drawn.code == 0, drawn.err
