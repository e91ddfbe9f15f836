"""The protocol of published numbers: 50,000 pictures a run, several runs, all of them reported.

Run r makes the pictures of seeds r n, ..., (r + 1) n - 1, with label = seed modulo the number of
classes, rounds them to 8 bits, and measures their features. The work is cut into ten parts a run,
each kept in a folder with digests: an interrupted evaluation continues where it was, and another
reference needs no pictures made again.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import to_uint8
from fewstep.eval import neighbours
from fewstep.eval.features import SAMPLES, Features, metric_title
from fewstep.eval.frechet import MomentSum, frechet_distance
from fewstep.eval.metrics import (
    NEIGHBOURS,
    ClassProbabilities,
    density_coverage,
    inception_score,
    kid,
    precision_recall,
)
from fewstep.eval.reference import Reference
from fewstep.storage.files import Damaged, pack, read_folder, unpack, write_folder

PARTS = 10
"""Parts of a run, which are those of the inception score too."""


@dataclass(frozen=True)
class Part:
    """A tenth of a run: samples `first`, ..., `last` - 1."""

    run: int
    number: int
    first: int
    last: int

    @property
    def size(self) -> int:
        """Number of samples."""
        return self.last - self.first


@dataclass(frozen=True, eq=False)
class Protocol:
    """The 50k evaluation of one generator in one kind of features.

    `make` each of the `missing` parts, then read the `scores` of each run; parts stay in `folder`,
    so an interrupted evaluation continues where it was.

    Arguments:
        generator: what is measured.
        features: the feature network, which names the scores.
        folder: where parts are kept.
        model: digest that identifies the generator; parts of another are made again.
        samples: pictures in a run, at least 20; 50,000 in published numbers.
        runs: number of runs, each with its own seeds.
        batch: pictures sampled at once.
    Raises ValueError for fewer samples, runs or pictures than these.
    """

    generator: Generator
    features: Features
    folder: Path
    """Where parts are kept."""
    model: str
    """What identifies the generator: the digest of its manifest. Parts of another are redone."""
    samples: int = SAMPLES
    runs: int = 3
    batch: int = 100

    def __post_init__(self) -> None:
        if self.samples < 2 * PARTS or self.runs < 1 or self.batch < 1:
            raise ValueError(
                f"an evaluation needs at least {2 * PARTS} samples and one run, got "
                f"{self.samples} and {self.runs}"
            )

    def parts(self) -> list[Part]:
        """All parts of all runs."""
        ends = [part * self.samples // PARTS for part in range(PARTS + 1)]
        return [
            Part(run, i, run * self.samples + ends[i], run * self.samples + ends[i + 1])
            for run in range(self.runs)
            for i in range(PARTS)
        ]

    def missing(self) -> list[Part]:
        """The parts that do not exist yet, are damaged, or belong to another model or features."""
        return [part for part in self.parts() if not self._there(part)]

    def make(self, part: Part) -> Iterator[int]:
        """Sample, measure and store one part; yields the number of pictures in each batch."""
        features, predictions = [], None
        for first in range(part.first, part.last, self.batch):
            seeds = range(first, min(first + self.batch, part.last))
            x = self.generator.sample(seeds, batch=self.batch)
            measured, logits = self.features(to_uint8(x))
            features.append(measured.float().cpu())
            if logits is not None:
                here = ClassProbabilities.of(logits)
                predictions = here if predictions is None else predictions + here
            yield len(seeds)
        tensors = {"features": torch.cat(features)}
        if predictions is not None:
            certainty = torch.tensor(predictions.certainty, dtype=torch.float64)
            tensors |= {"certainty": certainty, "total": predictions.total}
        write_folder(self._place(part), {"part.safetensors": pack(tensors)}, self._facts(part))

    def found(self, run: int) -> Tensor:
        """The stored features of a run: (samples, dim)."""
        parts = self.parts()[run * PARTS : (run + 1) * PARTS]
        return torch.cat(
            [unpack(self._place(part) / "part.safetensors")["features"] for part in parts]
        )

    def scores(self, run: int, reference: Reference, device: torch.device | str) -> dict[str, Any]:
        """All scores of a run whose parts are stored.

        Arguments:
            run: number of the run, from 0.
            reference: statistics of real pictures in the same features.
            device: where distances are computed.
        Returns scores under the names that `metric_title` gives them, and the first and last of
        "seeds".
        """
        gather, features, predictions = MomentSum(), [], []
        for part in self.parts()[run * PARTS : (run + 1) * PARTS]:
            stored = unpack(self._place(part) / "part.safetensors")
            features.append(stored["features"])
            gather.add(stored["features"].to(device))
            if "total" in stored:
                certainty = float(stored["certainty"])
                predictions.append(ClassProbabilities(part.size, certainty, stored["total"]))
        out: dict[str, Any] = {"seeds": [run * self.samples, (run + 1) * self.samples - 1]}

        def add(score: str, value: float, count: int | None = None) -> None:
            out[metric_title(score, self.features, self.samples, count)] = value

        add("FD", frechet_distance(gather.moments(), reference.moments), reference.count)
        if predictions:
            mean, spread = inception_score(predictions)
            add("IS", mean)
            add("IS std", spread)
            add("IS of all", inception_score([sum(predictions[1:], predictions[0])])[0])
        if reference.kept is not None:
            real, fake = reference.kept.to(device), torch.cat(features).to(device)
            add("KID", kid(real, fake), len(real))
            for name, value in neighbourhoods(real, fake).items():
                add(name, value)
        return out

    def _place(self, part: Part) -> Path:
        return self.folder / f"run-{part.run}" / f"part-{part.number}"

    def _facts(self, part: Part) -> dict[str, Any]:
        """What a part is of; stored beside it."""
        return {
            "kind": "features of samples",
            "features": self.features.name,
            "model": self.model,
            "seeds": [part.first, part.last - 1],
        }

    def _there(self, part: Part) -> bool:
        try:
            facts = read_folder(self._place(part))
        except (Damaged, ValueError):
            return False
        return all(facts.get(key) == value for key, value in self._facts(part).items())


def neighbourhoods(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage; real: (N, D), fake: (M, D).

    Density and coverage are left out where there are too few real points for a fifth neighbour.
    """
    known = neighbours.Reference(real, (NEIGHBOURS,))
    scores = dict(zip(("precision", "recall"), precision_recall(known, fake), strict=True))
    if len(real) > NEIGHBOURS:
        scores |= zip(("density", "coverage"), density_coverage(known, fake), strict=True)
    return scores


def summarise_draws(
    runs: Sequence[Mapping[str, Any]], lead: str, highest: bool = False
) -> dict[str, Any]:
    """The best run by the score `lead` (lowest, or `highest`), the means and the deviations."""
    sign = -1 if highest else 1
    best = min(range(len(runs)), key=lambda run: sign * float(runs[run][lead]))
    names = [name for name in runs[0] if name != "seeds"]
    values = {name: [float(run[name]) for run in runs] for name in names}
    return {
        "best run": best,
        "best": {name: values[name][best] for name in names},
        "mean": {name: statistics.fmean(values[name]) for name in names},
        "std": {name: statistics.stdev(values[name]) if len(runs) > 1 else 0.0 for name in names},
    }


def results_table(report: Mapping[str, Any]) -> str:
    """All runs, the best, the mean and its deviation, as aligned text."""
    rows = {f"run {i}": run for i, run in enumerate(report["runs"])}
    rows |= {f"best ({report['best run']})": report["best"], "mean": report["mean"]}
    rows |= {"std": report["std"]}
    names = list(report["best"])
    width = max(len(name) for name in names)
    lines = [" " * width + "".join(f"{row:>12}" for row in rows)]
    for name in names:
        cells = "".join(f"{values[name]:>12.5g}" for values in rows.values())
        lines.append(f"{name:{width}}{cells}")
    return "\n".join(lines)
