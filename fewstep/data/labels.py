"""Labels: from dataset.json as in the data sets of StyleGAN and EDM, or from class folders.

    {"labels": [["00000/img00000000.png", 6], ["00000/img00000001.png", 9], ...]}

A list without entries, null, or no list at all means no labels; "classes", a list of names, may
stand beside it. Vectors in place of numbers are
refused: no network here takes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.archive import Archive
from fewstep.data.problems import Problems, Unfit

FILE = "dataset.json"
LIMIT = 256 << 20
"""Bytes of dataset.json, about seven million labels."""
CLASSES = 2**31


def parse(data: bytes, origin: object) -> tuple[list[Any] | None, list[str]]:
    """A dataset.json's pairs of name and label, None if it has no labels; names of classes."""
    try:
        told = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: {FILE} is not readable JSON ({error})") from None
    pairs = told.get("labels") if isinstance(told, dict) else told
    if not isinstance(told, dict) or not (pairs is None or isinstance(pairs, list)):
        raise ValueError(
            f'{origin}: {FILE} is not of the form {{"labels": [[name, number], ...]}}'
        )
    classes = told.get("classes")
    words = classes if isinstance(classes, list) else []
    return pairs or None, words if all(isinstance(word, str) for word in words) else []


def assign(pairs: Sequence[Any], names: Sequence[str], origin: object) -> Tensor:
    """(N,) int64 labels of the pictures `names`; a ValueError names all that do not match."""
    problems = Problems(origin)
    known = set(names)
    found: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            problems.add(f"in {FILE} not of the form [name, number]", f"entry {number}")
            continue
        name, label = pair[0].replace("\\", "/"), pair[1]
        if name in found:
            problems.add(f"with two labels in {FILE}", name)
        elif name not in known:
            problems.add(f"in {FILE}, but missing", name)
        elif type(label) is not int or not 0 <= label < CLASSES:
            problems.add("with a label that is no class number", name, str(label)[:20])
        found[name] = label
    for name in names:
        if name not in found:
            problems.add(f"without a label in {FILE}", name)
    problems.refuse()
    return torch.tensor([found[name] for name in names], dtype=torch.int64)


def folders(names: Sequence[str]) -> tuple[Tensor, list[str]] | None:
    """Labels by first folder, in the order of their names, and those names.

    None where pictures lie beside the folders, or all in one.
    """
    if not all("/" in name for name in names):
        return None
    firsts = [name.partition("/")[0] for name in names]
    classes = sorted(set(firsts))
    if len(classes) < 2:
        return None
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[name] for name in firsts], dtype=torch.int64), classes


def content(path: Path) -> bytes:
    """What is in a file of the form of dataset.json, at most `LIMIT` bytes."""
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path} is larger than {LIMIT >> 20} MiB")
    return path.read_bytes()


def member(archive: Archive) -> bytes:
    """What is in the dataset.json of a zip file that has one."""
    try:
        return archive.read(FILE)
    except Unfit as error:
        raise ValueError(f"{archive.path}: {FILE} is {error}") from None


def from_file(path: Path, names: Sequence[str]) -> Tensor | None:
    """The labels that a file of the form of dataset.json gives the pictures `names`."""
    pairs, _ = parse(content(path), path)
    return None if pairs is None else assign(pairs, names, path)
