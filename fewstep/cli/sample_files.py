"""What `fewstep sample` writes: a grid (.png), arrays (.npz), or a folder of pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.captioned_grid import captioned_grid
from fewstep.data.captions import FILE
from fewstep.data.image_grid import grid, png
from fewstep.data.png_text import png_with
from fewstep.diffusion.pixels import to_uint8
from fewstep.export.atomic_output import new_output
from fewstep.storage.files import require_vacant, write


@dataclass(frozen=True)
class Asked:
    """N pictures that were asked for."""

    seeds: Sequence[int]
    labels: Sequence[int]
    """Of each picture; () for a model without classes."""
    texts: Sequence[str]
    """The prompt of each picture; () for a model that takes none."""
    columns: int | None
    """Of their grid."""
    captions: bool
    """Whether the grid has what was asked under each picture."""
    settings: Mapping[str, Any]
    """What all have in common, for a folder."""


def refuse_place(out: Path) -> None:
    """Raise ValueError unless `out` can be written: a .png, an .npz, or a folder."""
    if out.suffix not in (".png", ".npz") and not is_folder(out):
        raise ValueError(
            f"--out ends in .png for a grid or in .npz for arrays, or is a folder, got {out}"
        )
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} to write {out.name} to")
    if out.suffix not in (".png", ".npz"):
        require_vacant(out)
    elif out.is_dir():
        raise ValueError(f"{out} is a folder; name a file in it, or a folder without {out.suffix}")


def is_folder(out: Path) -> bool:
    """Whether pictures go to a folder: one that is there, or a name without a suffix."""
    return out.is_dir() or not out.suffix


def write_pictures(out: Path, parts: Iterable[Tensor], asked: Asked) -> None:
    """Write samples, which come in parts (B, *), in the form that `out` names.

    A folder is new or empty, and in place only when all is written: a PNG for each sample with its
    settings in it, and where there are prompts a metadata.jsonl that `Captions` reads. ValueError
    for samples that are no pictures, in a folder.
    """
    if out.suffix not in (".png", ".npz"):
        with new_output(out) as partial:
            _folder(partial, parts, asked)
        return
    x = torch.cat(list(parts))
    if out.suffix == ".npz":
        write(out, arrays(x, asked))
    elif asked.captions:
        notes = [f"seed {seed}" for seed in asked.seeds]
        write(out, png(captioned_grid(x, asked.texts, notes, asked.columns)))
    else:
        write(out, png(grid(x, asked.columns)))


def arrays(x: Tensor, asked: Asked) -> bytes:
    """An .npz of `images` (uint8), or `x` of what is no picture, seeds, labels and prompts."""
    content: dict[str, np.ndarray] = {
        **({"images": to_uint8(x).numpy()} if _pictures(x) else {"x": x.numpy()}),
        "seeds": np.array(asked.seeds),
    }
    if asked.labels:
        content["labels"] = np.array(asked.labels)
    if asked.texts:
        content["prompts"] = np.array(asked.texts)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **content)  # type: ignore[arg-type]
    return buffer.getvalue()


def _pictures(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[1] in (1, 3)


def _folder(home: Path, parts: Iterable[Tensor], asked: Asked) -> None:
    """Write each part as it comes, so that one part is held at a time."""
    home.mkdir()
    place, rows = 0, []
    for x in parts:
        if not _pictures(x):
            raise ValueError(
                f"samples of shape {tuple(x.shape[1:])} are no pictures: let --out end in .npz, "
                "or in .png for a look at them"
            )
        for picture in to_uint8(x).numpy():
            settings = _settings(asked, place, picture.shape)
            name = f"{place:05}-seed-{asked.seeds[place]}.png"
            shown = Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
            (home / name).write_bytes(png_with(shown, settings))
            rows.append({"file_name": name, "text": settings.get("prompt", ""), **settings})
            place += 1
    if asked.texts:
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        (home / FILE).write_text(lines, encoding="utf-8")


def _settings(asked: Asked, place: int, shape: Sequence[int]) -> dict[str, Any]:
    """All settings of one picture, the prompt first."""
    prompt = {"prompt": asked.texts[place]} if asked.texts else {}
    label = {"label": int(asked.labels[place])} if asked.labels else {}
    size = {"size": f"{shape[1]}x{shape[0]}"}
    return {**prompt, **asked.settings, "seed": asked.seeds[place], **label, **size}
