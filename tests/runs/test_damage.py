"""What a person meets when something stored is broken, foreign or from another version."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.config import encode
from fewstep.diffusion.samplers import FewStep
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.storage import checkpoint
from fewstep.storage.files import Damaged, _manifest, pack, read_folder, unpack, write_folder
from fewstep.storage.model_folder import KIND, load_student, save_student
from tests.storage.test_checkpoint import (
    METHOD,
    MODEL,
    OPTIMS,
    advance,
    content,
    damage,
    everything,
    fresh,
    saved,
)

DIGEST = "is damaged: its SHA-256 is not the recorded one"


def test_the_checkpoint_before_a_damaged_one_serves(tmp_path: Path) -> None:
    """It is told in words, set aside, and the run ends in the bits of an undisturbed one."""
    saved(tmp_path, 4, 8)
    newest = tmp_path / "step-00000008"
    damage(newest / "average.safetensors", 500, 1)
    state = fresh(seed=1)
    path, notes = checkpoint.resume_newest(tmp_path, state, METHOD, OPTIMS)
    assert path == tmp_path / "step-00000004"
    assert notes == [
        f"{newest / 'average.safetensors'} {DIGEST}; set aside as {newest.name}.damaged"
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{newest.name}.damaged"]
    assert state.step == 4
    assert everything(advance(state)) == everything(advance(fresh()))
    checkpoint.save(tmp_path, state, METHOD)  # the folder goes on working
    assert checkpoint.resume_newest(tmp_path, fresh(), METHOD, OPTIMS)[1] == []


def test_a_run_without_sound_checkpoints_never_starts_over_silently(tmp_path: Path) -> None:
    assert checkpoint.resume_newest(tmp_path, fresh(), METHOD, OPTIMS) == (None, [])
    saved(tmp_path, 4, 8)
    damage(tmp_path / "step-00000008" / "nets.safetensors", 9, 255)
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    state = fresh(seed=1)
    before = everything(state)
    with pytest.raises(Damaged) as caught:
        checkpoint.resume_newest(tmp_path, state, METHOD, OPTIMS)
    assert str(caught.value) == (
        f"no checkpoint in {tmp_path} is sound ("
        f"{tmp_path}/step-00000008/nets.safetensors {DIGEST}; "
        "set aside as step-00000008.damaged; "
        f"{tmp_path}/step-00000004/manifest.json is missing; "
        "set aside as step-00000004.damaged); choose another --out folder to start anew"
    )
    with pytest.raises(Damaged, match=r"sound \(all were set aside as damaged\); choose another"):
        checkpoint.resume_newest(tmp_path, state, METHOD, OPTIMS)  # and asking again does not help
    assert everything(state) == before
    assert len(content(tmp_path)) == 9


def refused(folder: Path, method: SiD = METHOD) -> str:
    """The sentence with which `resume` refuses the newest checkpoint; nothing is touched."""
    before, state = content(folder), fresh()
    with pytest.raises(ValueError, match=r"step-") as caught:
        checkpoint.resume_newest(folder, state, method, OPTIMS)
    assert content(folder) == before
    assert not isinstance(caught.value, Damaged)
    return str(caught.value)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    other = replace(METHOD, alpha=1.2)
    assert refused(tmp_path, other) == (
        f"{tmp_path}/step-00000004 was written by {METHOD!r}, not by {other!r}; resume with the "
        "same settings or choose another --out folder"
    )


def test_another_network_is_refused_by_shapes(tmp_path: Path) -> None:
    state = saved(tmp_path, 4)
    wide = replace(MODEL, net=MLP(width=20, blocks=1)).build()
    state.nets["fake"] = wide
    with pytest.raises(ValueError, match=r"does not fit") as caught:
        checkpoint.load_checkpoint(tmp_path / "step-00000004", state, METHOD, OPTIMS)
    text = str(caught.value)
    assert text.startswith(
        f"{tmp_path}/step-00000004 does not fit: fake.net.blocks.0.inner.bias: "
    )
    assert "expected (20,), found (16,); " in text
    assert text.endswith(" more")
    del state.nets["fake"]
    with pytest.raises(ValueError, match=r"inner\.bias: expected nothing, found \(16,\); fake"):
        checkpoint.load_checkpoint(tmp_path / "step-00000004", state, METHOD, OPTIMS)


def test_a_sound_checkpoint_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, 3, 4)
    path = tmp_path / "step-00000004"
    files = {n: d for n, d in content(path).items() if n != "manifest.json"}
    write_folder(path, files, {**read_folder(path), "format": 2})
    assert refused(tmp_path) == f"{path} has format 2; this version of fewstep reads 1"


def test_names_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    folder = tmp_path / "a"
    folder.mkdir()
    for name in ("../secret", str(tmp_path / "secret")):
        facts = {"format": 1, "sha256": {name: hashlib.sha256(b"x").hexdigest()}}
        (folder / "manifest.json").write_text(_manifest(facts))
        with pytest.raises(Damaged, match=r"secret is missing$"):
            read_folder(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_tensors_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    x = (100 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    tensors = {"x": x, "turned": x.T, "scalar": x[0, 0], "empty": x[:0]}
    (tmp_path / "t").write_bytes(pack(tensors))
    again = unpack(tmp_path / "t")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], value) for key, value in tensors.items())
    assert all(again[key].dtype == dtype for key in again)


def model(folder: Path) -> Path:
    """A finished model in a run folder."""
    save_student(folder / "student", fresh(seed=3).average, MODEL, METHOD, {"seed": 7})
    return folder / "student"


def test_a_finished_model_comes_back_whole(tmp_path: Path) -> None:
    """From its own folder, from the run's, as text; its samples are its network's."""
    folder = model(tmp_path)
    expected = load_student(folder).sample(range(5))
    for where in (tmp_path, str(tmp_path), folder):
        student = load_student(where)
        assert torch.equal(student.sample(range(5)), expected)
        assert (student.model, student.sampler, student.shape) == (MODEL, METHOD.sampler, (2,))
        assert student.card == {"method": repr(METHOD), "seed": 7}
        assert not any(p.requires_grad for p in student.denoiser.parameters())
    average, loaded = fresh(seed=3).average.state_dict(), student.denoiser.state_dict()
    assert all(torch.equal(average[name], loaded[name]) for name in average)
    assert torch.equal(student.sample([3]), expected[3:4])


def test_any_damage_of_a_finished_model_is_seen(tmp_path: Path) -> None:
    good, bad = model(tmp_path), tmp_path / "bad"
    for name in ("model.safetensors", "model.json", "manifest.json"):
        for seed in range(12):
            shutil.copytree(good, bad)
            rng, size = random.Random(seed), (good / name).stat().st_size
            if seed < 9:
                damage(bad / name, rng.randrange(size), rng.randrange(1, 256))
            elif seed < 11:
                os.truncate(bad / name, rng.randrange(size))
            else:
                (bad / name).unlink()
            with pytest.raises(
                Damaged, match=f"{re.escape(str(bad))}.*(damaged|missing|not|holds)"
            ):
                load_student(bad)
            shutil.rmtree(bad)


class Trap:
    """Unpickling it would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    """Every file with a right digest, so that only its meaning is wrong."""
    good, mark = model(tmp_path / "run"), tmp_path / "ran"
    files = content(good)
    files.pop("manifest.json")
    wide = pack(replace(MODEL, net=MLP(width=20, blocks=1)).build().state_dict())
    text = json.loads(files["model.json"])
    unknown = {**text, "model": {**text["model"], "net": {"type": "Transformer"}}}
    swapped = {**text, "sampler": encode(MODEL)}
    cases = {
        r"does not fit: net\.blocks\.0\.inner\.bias: expected \(16,\), found \(20,\)": {
            "model.safetensors": wide
        },
        r"model\.safetensors is not a safetensors file": {
            "model.safetensors": pickle.dumps(Trap(mark))
        },
        r"^there is no 'Transformer'; "
        r"choose from Beside, DiffusersNet, Experts, MLP, OfTeacher, PatchUNet, Routed, "
        r"SnapshotNet$": {"model.json": json.dumps(unknown).encode()},
        r"^expected a Sampler, got Model$": {"model.json": json.dumps(swapped).encode()},
        r"model\.json does not describe a model$": {"model.json": b"[]"},
        r"model\.json is not readable JSON": {"model.json": pickle.dumps(Trap(mark))},
    }
    for sentence, change in cases.items():
        write_folder(tmp_path / "bad", {**files, **change}, {"kind": KIND})
        with pytest.raises(ValueError, match=sentence):
            load_student(tmp_path / "bad")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()  # the trap works
    write_folder(tmp_path / "bad", {"model.json": files["model.json"]}, {"kind": KIND})
    with pytest.raises(Damaged, match=r"model\.safetensors is missing$"):
        load_student(tmp_path / "bad")


def test_other_folders_are_no_models(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    path = tmp_path / "step-00000004"
    with pytest.raises(Damaged) as caught:
        load_student(path)
    assert str(caught.value) == f"{path} is a checkpoint or something else, not a finished model"
    nowhere = tmp_path / "nowhere"
    for empty in (tmp_path, nowhere, path / "manifest.json"):
        with pytest.raises(Damaged) as caught:
            load_student(empty)
        said = f"{empty} holds no finished model (no manifest.json in it)"
        assert str(caught.value) == (
            f"there is no file or folder {nowhere}" if empty == nowhere else said
        )


def test_few_step_students_are_stored_with_their_sampler(tmp_path: Path) -> None:
    method = SiD(FewStep(2.0, steps=3))
    save_student(tmp_path, fresh(seed=3).average, MODEL, method, {})
    assert load_student(tmp_path).sampler == FewStep(2.0, steps=3)
    assert load_student(tmp_path).sampler.calls == 3
