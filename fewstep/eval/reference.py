"""Reference statistics of real pictures: computed once, and read in the formats of EDM and EDM2.

EDM: an .npz with mu (D,) and sigma (D, D) in float64, Inception's. EDM2: a pickle
{"num_images", "fid": {mu, sigma}, "fd_dinov2": {mu, sigma}}, read as data. What is written here is
EDM's format with three more arrays: features (their name), count (of pictures), and kept (K, D),
the features of a random subset, for the scores that compare pictures one by one.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.npz import LIMIT, array
from fewstep.data.zip_archive import ZipArchive
from fewstep.eval.features import Features, family
from fewstep.eval.frechet import FeatureMoments, MomentSum
from fewstep.safe_pickle.state_dicts import read_arrays
from fewstep.storage.files import digest, write


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of real pictures, which samples are compared with."""

    moments: FeatureMoments
    count: int | None = None
    """Pictures behind it, None where the file does not say."""
    kept: Tensor | None = None
    """(K, D) float32 features of single pictures, where there are any."""
    sha256: str = ""
    """Of the file."""


@dataclass
class Gatherer:
    """Moments of all pictures, and the features of a uniform random subset of `keep` of them.

    The subset is a reservoir (Vitter 1985, algorithm R) with a fixed seed, so it depends on the
    order of the pictures alone, not on the batches.
    """

    features: Features
    keep: int = 0
    gather: MomentSum = field(default_factory=MomentSum)
    kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)

    def run(self, batches: Iterable[Tensor]) -> Iterator[int]:
        """Measure batches of uint8 (B, H, W, C); yields the number of pictures so far."""
        for batch in batches:
            x, _ = self.features(batch)
            before = self.gather.count
            self.gather.add(x)
            if self.keep:
                self._choose(x.float().cpu(), before)
            yield self.gather.count

    def _choose(self, x: Tensor, before: int) -> None:
        for number, row in enumerate(x, before):
            if len(self.kept) < self.keep:
                self.kept.append(row.clone())
                continue
            place = int(torch.randint(number + 1, (1,), generator=self.random))
            if place < self.keep:
                self.kept[place] = row.clone()

    def save(self, path: Path) -> None:
        """Write the statistics as an .npz file."""
        moments = self.gather.moments()
        arrays = {
            "mu": moments.mu.numpy(),
            "sigma": moments.sigma.numpy(),
            "features": np.array(self.features.name),
            "count": np.array(self.gather.count),
        }
        if self.kept:
            arrays["kept"] = torch.stack(self.kept).numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write(path, buffer.getvalue())


def read_reference(path: Path, features: Features) -> Reference:
    """Reference statistics from a file, checked to be those of `features`.

    Arguments:
        path: .npz as written here or by EDM, or .pkl of EDM2, which is read as data.
        features: the feature network that samples are measured with.
    Returns moments in float64 on the CPU, the features `kept` of single pictures if there are any,
    and the file's digest.
    Raises ValueError where the file is missing or damaged, is of other features, or holds no
    finite mean (D,) and symmetric covariance (D, D).
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    arrays = _pickled(path, features) if path.suffix == ".pkl" else _arrays(path, features)
    statistics = {name: arrays.get(name) for name in ("mu", "sigma", "kept", "count")}
    for name, tensor in statistics.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} holds values that are not finite")
    mu, sigma, kept, count = statistics.values()
    dim = features.dim
    if mu is None or sigma is None or mu.shape != (dim,) or sigma.shape != (dim, dim):
        shapes = [None if x is None else tuple(x.shape) for x in (mu, sigma)]
        raise ValueError(
            f"{path}: {features.name} needs mu ({dim},) and sigma ({dim}, {dim}), got "
            f"{shapes[0]} and {shapes[1]}"
        )
    sigma = sigma.double()
    if not torch.allclose(sigma, sigma.T, rtol=1e-6, atol=1e-9) or bool((sigma.diag() < 0).any()):
        raise ValueError(f"{path}: sigma is no covariance: it is not symmetric, or negative")
    if kept is not None and (kept.ndim != 2 or kept.shape[1] != dim):
        raise ValueError(f"{path}: kept has shape {tuple(kept.shape)}, expected (K, {dim})")
    return Reference(
        FeatureMoments(mu.double(), sigma),
        None if count is None else int(count),
        None if kept is None else kept.float(),
        digest(path),
    )


def _arrays(path: Path, features: Features) -> dict[str, Tensor]:
    """The arrays of an .npz file by name."""
    try:
        archive = ZipArchive(path, limit=LIMIT)
        stored = {
            name: array(archive, name)
            for name in ("mu", "sigma", "features", "count", "kept")
            if f"{name}.npy" in archive.members
        }
    except (ValueError, OSError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path} is no readable .npz file ({why})") from None
    whose = str(stored.pop("features", ""))
    if whose and whose != features.name:
        raise ValueError(
            f"{path} has statistics of {whose!r}, but the features are {features.name!r}"
        )
    if not whose and family(features) != "fid":
        raise ValueError(
            f"{path} does not say whose features it has, so they are Inception's as in EDM; "
            f"the features are {features.name!r}"
        )
    numbers = {name: value for name, value in stored.items() if value.dtype.kind in "fiu"}
    return {name: torch.from_numpy(np.array(value)) for name, value in numbers.items()}


def _pickled(path: Path, features: Features) -> dict[str, Tensor]:
    """The statistics of one family of features in EDM2's pickle."""
    stored = read_arrays(path)
    groups = {name: value for name, value in stored.items() if isinstance(value, dict)}
    if family(features) not in groups:
        raise ValueError(
            f"{path} has statistics of {', '.join(groups) or 'nothing'}, none of "
            f"{family(features)} for the features {features.name!r}"
        )
    values: dict[str, Any] = groups[family(features)]
    arrays = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if isinstance(stored.get("num_images"), int):
        arrays["count"] = torch.tensor(stored["num_images"])
    return arrays
