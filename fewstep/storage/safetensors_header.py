"""The header of a safetensors file: names, types and shapes, without a tensor's value.

    8 bytes: the length n of the header    n bytes of JSON    the tensors, one after the other

The reader of safetensors compares the header with the size of the file, so a file that is cut
short, has something behind its end or is something else altogether is found here, in milliseconds,
and not after hours by whoever needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from fewstep.storage.bounded_reading import tensors_header
from fewstep.storage.files import Damaged, spelled

POINTER = b"version https://git-lfs"
"""What a file begins with whose content was left on the server by git."""


class Tensors(NamedTuple):
    """The content of a header: types and shapes by name, and metadata."""

    types: Mapping[str, str]
    """Name of a tensor -> its type under safetensors' name, such as "BF16"."""
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def header(path: Path) -> Tensors:
    """The header of the file `path`; `Damaged` where it is no whole safetensors file."""
    if not path.is_file():
        raise Damaged(f"{path} is {'not a regular file' if path.exists() else 'missing'}")
    fetched(path)
    types, shapes = {}, {}
    try:
        tensors_header(path)
        with spelled(path) as named, safe_open(named, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                types[name], shapes[name] = part.get_dtype(), tuple(part.get_shape())
            return Tensors(types, shapes, file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise Damaged(f"{path} is not a safetensors file ({error})") from None


def fetched(path: Path) -> None:
    """`Damaged` where `path` is a pointer of git-lfs in place of the file."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise Damaged(
                f"{path} is a pointer of git-lfs, not the file itself; run 'git lfs pull' in its "
                "repository, or fetch the file otherwise"
            )
