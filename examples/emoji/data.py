"""Captioned emoji: pictures, their Unicode names, and words that several pictures share.

The file holds `images` (N, 32, 32, 3) uint8 on white, `captions`, `keywords` ("a|b|c"), `labels`
with `label_names`, `split` (0: train), `skin_tone` and `duplicate_of` (-1: none).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NEEDED = {
    *("images", "captions", "keywords", "labels", "label_names"),
    *("split", "skin_tone", "duplicate_of"),
}
SHARED = 3
"""A keyword is learnt where so many pictures have it."""


@dataclass(frozen=True)
class Emoji:
    """N pictures (N, 3, 32, 32) in [-1, 1] and what each may be called."""

    pictures: Tensor
    names: list[str]
    """One each, all different."""
    words: list[list[str]]
    """Those of its keywords that others have too; may be empty."""

    @property
    def shared(self) -> list[str]:
        """The words, each once, the commonest first."""
        return [word for word, _ in Counter(w for some in self.words for w in some).most_common()]

    @property
    def texts(self) -> list[str]:
        """Everything a picture may be called, each once: the prompts."""
        return list(dict.fromkeys([*self.names, *self.shared]))

    def having(self, word: str) -> list[int]:
        """Which pictures have a word."""
        return [i for i, some in enumerate(self.words) if word in some]


def load(path: Path | str, groups: Sequence[str], limit: int) -> Emoji:
    """At most `limit` training pictures of Unicode's `groups`, without skin tones and doubles."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}; name the .npz of emoji with EMOJI=")
    try:
        with np.load(path, allow_pickle=False) as file:
            table = {name: file[name] for name in file.files}
    except (ValueError, EOFError, BadZipFile):
        raise ValueError(f"{path} is not readable as an .npz of arrays") from None
    missing = NEEDED - table.keys()
    if missing:
        raise ValueError(f"{path} is no file of emoji: it has no {', '.join(sorted(missing))}")
    strange = sorted(set(groups) - set(table["label_names"].tolist()))
    if strange:
        raise ValueError(f"{path} has no group {strange[0]!r} of emoji")
    chosen = np.isin(table["label_names"][table["labels"]], groups)
    chosen &= (table["skin_tone"] == 0) & (table["split"] == 0) & (table["duplicate_of"] < 0)
    rows = np.flatnonzero(chosen)
    rows = rows[np.arange(min(limit, len(rows))) * len(rows) // min(limit, len(rows))]
    x = torch.from_numpy(table["images"][rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
    names = table["captions"][rows].tolist()
    keywords = [text.split("|") for text in table["keywords"][rows].tolist()]
    count = Counter(word for some in keywords for word in set(some))
    common = {w for w, n in count.items() if n >= SHARED and w not in names}
    if not common:
        raise ValueError(f"{path}: no keyword is shared by {SHARED} of the {len(rows)} pictures")
    return Emoji(x, names, [sorted(set(some) & common) for some in keywords])


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) flipped or not, and shifted by up to two pixels over white."""
    flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    wide = F.pad(torch.where(flip, x.flip(3), x), (2, 2, 2, 2), value=1.0)
    across, down = torch.randint(5, (2, len(x)), generator=generator).tolist()
    height, width = x.shape[2:]
    parts = zip(wide, across, down, strict=True)
    return torch.stack([p[:, j : j + height, i : i + width] for p, i, j in parts])


def views(x: Tensor, count: int) -> list[Tensor]:
    """`count` times the pictures x, each moved anew; always the same."""
    generator = torch.Generator().manual_seed(3)
    return [moved(x, generator) for _ in range(count)]
