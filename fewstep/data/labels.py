"""Labels: from dataset.json as in the data sets of StyleGAN and EDM, or from class folders.

    {"labels": [["00000/img00000000.png", 6], ["00000/img00000001.png", 9], ...]}

A list without entries, null, or no list at all means no labels; "classes", a list of names, may
stand beside it. Vectors in place of numbers are refused: no network here takes them.

The file lies beside the pictures, or in the folder that holds all of them, as where a folder was
zipped with its name; names in it are relative to its own place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.errors import Problems, Unfit
from fewstep.data.zip_archive import ZipArchive
from fewstep.storage import bounded_reading

FILE = "dataset.json"
LIMIT = 256 << 20
"""Bytes of dataset.json, about seven million labels."""
CLASSES = 1_000_000
"""Labels are smaller: as many classes as a network here can have, and as can be counted."""
BYTES, VALUES = 4096, 8
"""Of dataset.json for each picture, far more than its name and label take."""
SPARE_BYTES, SPARE_VALUES = 1 << 20, 200_000
"""The same for what else stands there, such as names of classes."""


def parse_labels(data: bytes, origin: object, count: int) -> tuple[list[Any] | None, list[str]]:
    """A dataset.json's pairs of name and label, None if it has no labels; names of classes.

    `count` is the number of pictures: a file of far too many values for them is not parsed.
    """
    try:
        parsed = bounded_reading.json_value(data, SPARE_VALUES + VALUES * count)
    except ValueError as error:
        raise ValueError(f"{origin}: {FILE} is not readable JSON ({error})") from None
    pairs = parsed.get("labels") if isinstance(parsed, dict) else parsed
    if not isinstance(parsed, dict) or not (pairs is None or isinstance(pairs, list)):
        raise ValueError(
            f'{origin}: {FILE} is not of the form {{"labels": [[name, number], ...]}}'
        )
    classes = parsed.get("classes")
    words = classes if isinstance(classes, list) else []
    return pairs or None, words if all(isinstance(word, str) for word in words) else []


def assign_labels(pairs: Sequence[Any], names: Sequence[str], origin: object) -> Tensor:
    """(N,) int64 labels of the pictures `names`; a ValueError names all that do not match."""
    problems = Problems(origin)
    known = set(names)
    assigned: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            problems.add(f"in {FILE} not of the form [name, number]", f"entry {number}")
            continue
        name, label = pair[0].replace("\\", "/"), pair[1]
        if name in assigned:
            problems.add(f"with two labels in {FILE}", name)
        elif name not in known:
            problems.add(f"in {FILE}, but missing", name)
        elif type(label) is not int or not 0 <= label < CLASSES:
            problems.add("with a label that is no class number", name, str(label)[:20])
        assigned[name] = label
    for name in names:
        if name not in assigned:
            problems.add(f"without a label in {FILE}", name)
    problems.refuse()
    return torch.tensor([assigned[name] for name in names], dtype=torch.int64)


def folder_labels(names: Sequence[str]) -> tuple[Tensor, list[str]] | None:
    """Labels by first folder, and the folders' names in their order.

    Names that are whole numbers come first, by their value ("2" before "10"), then words. A folder
    that holds all the others is passed over. None where pictures lie beside the folders, or all
    in one.
    """
    names = [name.removeprefix(shared(names)) for name in names]
    if not all("/" in name for name in names):
        return None
    firsts = [name.partition("/")[0] for name in names]
    classes = sorted(set(firsts), key=_rank)
    if len(classes) < 2:
        return None
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[name] for name in firsts], dtype=torch.int64), classes


def _rank(name: str) -> tuple[bool, int, str, str]:
    """Where a folder's name comes among others; of any length, as numbers in names may be."""
    number = name.isascii() and name.isdigit()
    digits = name.lstrip("0") if number else ""
    return not number, len(digits), digits, name


def shared(names: Sequence[str]) -> str:
    """The folder that all pictures lie in, "" or with its slash: "set/" or "set/train/"."""
    # what the first and the last in order share, all between them do
    ends = (name.split("/")[:-1] for name in (min(names), max(names)))
    same = takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))
    return "".join(f"{folder}/" for folder, _ in same)


def place(found: Iterable[str], names: Sequence[str]) -> str | None:
    """Which of the dataset.json files `found` is that of the pictures; None if none is."""
    top, there = shared(names), set(found)
    homes = ["", *(top[: i + 1] for i, letter in enumerate(top) if letter == "/")]
    return next((home + FILE for home in homes if home + FILE in there), None)


def content(path: Path, count: int) -> bytes:
    """What is in a file of the form of dataset.json for `count` pictures."""
    _fitting(bounded_reading.size_of(path), count, path)
    return bounded_reading.content(path, LIMIT)


def _fitting(size: int, count: int, origin: object) -> None:
    """A ValueError where so many bytes cannot be labels of so few pictures."""
    if size > (limit := min(LIMIT, SPARE_BYTES + BYTES * count)):
        raise ValueError(
            f"{origin} is larger than {bounded_reading.in_words(limit)}, too large for the labels "
            f"of {count:,} pictures"
        )


def member(archive: ZipArchive, name: str, count: int) -> bytes:
    """What is in the dataset.json `name` of a zip file with `count` pictures."""
    _fitting(archive.members[name].file_size, count, f"{archive.path}: {name}")
    try:
        return archive.read(name)
    except Unfit as error:
        raise ValueError(f"{archive.path}: {name} is {error}") from None


def from_file(path: Path, names: Sequence[str]) -> Tensor | None:
    """The labels that a file of the form of dataset.json gives the pictures `names`."""
    pairs, _ = parse_labels(content(path, len(names)), path, len(names))
    return None if pairs is None else assign_labels(pairs, names, path)
