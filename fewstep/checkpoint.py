"""Checkpoints: everything a run needs to continue, in safetensors and JSON.

    checkpoints/step-00000500/
        nets.safetensors  average.safetensors  optim-student.safetensors  ...  manifest.json

A checkpoint is written under another name and renamed when complete; its manifest holds the
digest of every file, checked before a weight is used. At least two are kept, so that a damaged
newest one is set aside and the one before it serves.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core import Method
from fewstep.files import Damaged, pack, read_folder, unpack, write_folder
from fewstep.optim import Optim
from fewstep.training import State

COUNTERS = ("step", "images", "drawn", "skipped", "streak")


def save(folder: Path, state: State, method: Method, keep: int = 2) -> Path:
    """Write `state` under folder/step-N and drop all but the newest `keep`; the new path.

    What a killed process left half-written goes too: a run folder has one writer.
    """
    files = {
        "nets.safetensors": pack(state.nets.state_dict()),
        "average.safetensors": pack(state.average.state_dict()),
    }
    for name, optimizer in state.optimizers.items():
        files[f"optim-{name}.safetensors"] = pack(_flatten(optimizer))
    facts: dict[str, Any] = {key: getattr(state, key) for key in COUNTERS}
    facts["method"] = repr(method)
    target = folder / f"step-{state.step:08d}"
    write_folder(target, files, facts)
    for old in [*find(folder)[:-keep], *folder.glob(".step-*.partial-*")]:
        shutil.rmtree(old)
    return target


def find(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.suffix == "")


def resume(
    folder: Path, state: State, method: Method, optim: Mapping[str, Optim]
) -> tuple[Path | None, list[str]]:
    """Load the newest sound checkpoint of `folder` into `state`; (its path, what went wrong).

    Damaged ones are renamed to *.damaged and reported. None where there are no checkpoints at
    all; `Damaged` where there are some and none is sound: a run never starts over silently.
    """
    notes: list[str] = []
    for path in reversed(find(folder)):
        try:
            load(path, state, method, optim)
        except Damaged as error:
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            notes.append(f"{error}; set aside as {aside.name}")
            continue
        return path, notes
    if any(folder.glob("step-*.damaged")):
        why = "; ".join(notes) or "all were set aside as damaged"
        raise Damaged(
            f"no checkpoint in {folder} is sound ({why}); "
            "choose another --out folder to start anew"
        )
    return None, notes


def load(path: Path, state: State, method: Method, optim: Mapping[str, Optim]) -> None:
    """Check `path` by digest, then load it into `state`."""
    facts = read_folder(path)
    if facts.get("method") != repr(method):
        raise ValueError(
            f"{path} was written by {facts.get('method')}, not by {method!r}; resume with the "
            "same settings or choose another --out folder"
        )
    load_weights(state.nets, unpack(path / "nets.safetensors"), path)
    load_weights(state.average, unpack(path / "average.safetensors"), path)
    for name in (n[6:-12] for n in facts["sha256"] if n.startswith("optim-")):
        optimizer = optim[name].build(state.nets[name].parameters())
        _unflatten(optimizer, unpack(path / f"optim-{name}.safetensors"))
        state.optimizers[name] = optimizer
    for key in COUNTERS:
        setattr(state, key, int(facts[key]))


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], origin: Path) -> None:
    """Load strictly; the first few differences in names or shapes are named."""
    wanted = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    came = {name: tuple(t.shape) for name, t in tensors.items()}
    if wanted != came:
        differences = [
            f"{name}: expected {wanted.get(name, 'nothing')}, found {came.get(name, 'nothing')}"
            for name in sorted(wanted.keys() | came.keys())
            if wanted.get(name) != came.get(name)
        ]
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{origin} does not fit: {'; '.join(differences[:3])}{more}")
    net.load_state_dict(dict(tensors))


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments and step counts as "<parameter index>.<name>"."""
    return {
        f"{index}.{key}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        states.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
