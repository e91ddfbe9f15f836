"""fewstep evaluate --prompts: a model that takes prompts, measured on a file of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.cli.evaluate_fid50k import about, make_parts
from fewstep.cli.progress_bar import Bar, say
from fewstep.cli.sampling import Sampling
from fewstep.data.prompts import read_prompts
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.types import Cond
from fewstep.eval.clip import Aligned, text_vectors
from fewstep.eval.features import Features, metric_title
from fewstep.eval.fid50k import PARTS, Protocol, results_table, summarise_draws
from fewstep.eval.load_features import load_aligned, load_features
from fewstep.eval.prompt_scores import Joined, Resized, diversity, scores
from fewstep.eval.reference import Reference, read_reference
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.runner import device_named
from fewstep.runs.teacher import open_generator
from fewstep.storage.files import digest, write_json
from fewstep.storage.folder_lock import locked
from fewstep.storage.model_folder import is_finished
from fewstep.teachers.diffusers.folder import is_pipeline, open_folder
from fewstep.teachers.diffusers.load import with_text_and_vae
from fewstep.teachers.diffusers.prompt_lengths import lost
from fewstep.training.progress import heard, remark


@dataclass(frozen=True)
class Asked:
    """Options of `fewstep evaluate --prompts`."""

    prompts: str
    """A file."""
    clip: str
    features: str = ""
    reference: Path | None = None
    side: int = 256
    samples: int = 0
    """Prompts, the first so many; 0: all."""
    runs: int = 1
    batch: int = 10
    sampling: Sampling = Sampling()
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.clip:
            raise ValueError("--prompts needs --clip FOLDER, a CLIP of transformers")
        if bool(self.features) != (self.reference is not None):
            raise ValueError("real pictures need both --features and --reference FILE")
        if self.side < 0 or self.samples < 0:
            raise ValueError("--side and --samples must not be negative")


def evaluate_prompts(path: Path, asked: Asked) -> tuple[dict[str, Any], str]:
    """Measure the run, model or pipeline folder `path` on prompts; the report, and as text.

    Writes RUN/evaluation/prompts-<features>-<samples>.json, or PIPELINE.evaluation/..., and keeps
    features beside it: what was made is not made again.
    """
    where = device_named(asked.device)
    prompts = read_prompts(asked.prompts)
    if asked.samples > len(prompts):
        raise ValueError(f"{asked.prompts} has {len(prompts)} prompts, fewer than --samples")
    prompts = prompts[: asked.samples or len(prompts)]
    if len(prompts) < 2 * PARTS:
        raise ValueError(
            f"too few prompts to be measured on: {len(prompts)}, at least {2 * PARTS} are needed"
        )
    (model, home), suffix = identity(path), asked.sampling.suffix
    clip = load_aligned(asked.clip, where)
    features = load_features(asked.features, where) if asked.features else None
    real = read_reference(asked.reference, features) if asked.reference and features else None
    kinds: list[Features] = [clip]
    if features is not None:
        kinds.append(Resized(features, asked.side))
    joined = Joined(kinds)
    place = home / f"prompts-{joined.name}-{len(prompts)}{suffix}"
    said = digest(Path(asked.prompts))
    speaker = speaking(path, where, prompts)
    generator = asked.sampling.applied(speaker, path)
    made_by = f"{model}+{said}{suffix}"
    protocol = Protocol(generator, joined, place, made_by, len(prompts), asked.runs, asked.batch)
    with locked(place), heard(say):
        remark(lost(generator.card, prompts))
        make_parts(protocol)
        measured = _scored(protocol, clip, prompts, features, real)
    report: dict[str, Any] = {
        "features": joined.name,
        "samples": len(prompts),
        "labels": f"prompts of {Path(asked.prompts).name}, SHA-256 {said[:16]}",
        **asked.sampling.record(speaker),
        "reference": about(asked.reference, real) if asked.reference and real else {},
        "resized": f"to {asked.side} by Lanczos' filter" if features and asked.side else "",
        "model": model,
        **measured,
    }
    write_json(home / f"{place.name}.json", report)
    spread = report["diversity"]
    last = "" if spread is None else f"\n\ndiversity of a prompt's pictures: {spread:.4g}"
    return report, results_table(report) + last


def identity(path: Path) -> tuple[str, Path]:
    """What identifies the model in a folder, and where its evaluations are kept."""
    if is_pipeline(path):
        return "+".join(map(digest, open_folder(path).weights())), Path(f"{path}.evaluation")
    folder = RunFolder(path)
    folder.refuse_unfinished()
    return digest(is_finished(path) / "manifest.json"), path / "evaluation"


def speaking(path: Path, device: torch.device, prompts: list[str]) -> Generator:
    """The model in `path`; sample i is made for prompt i modulo their number."""
    generator = with_text_and_vae(open_generator(path, device))
    text: Callable[[list[str]], Cond] | None = generator.text
    if text is None:
        raise ValueError(f"{path} takes no prompts; measure it without --prompts")

    def condition(index: Tensor) -> Cond:
        return text([prompts[i % len(prompts)] for i in index.tolist()])

    return replace(generator, condition=condition)


def _scored(
    protocol: Protocol,
    clip: Aligned,
    prompts: list[str],
    features: Features | None,
    real: Reference | None,
) -> dict[str, Any]:
    """Scores of all runs, the best by CLIP, mean, deviation, and the diversity of several."""
    texts, runs = text_vectors(clip, prompts), []
    with Bar("scoring runs", protocol.runs) as bar:
        for run in range(protocol.runs):
            runs.append(scores(protocol, run, clip, texts, features, real))
            bar.update(run + 1)
    joined = protocol.features
    assert isinstance(joined, Joined)
    seen = [joined.split(protocol.found(run))[0] for run in range(protocol.runs)]
    lead = metric_title("CLIP", clip, protocol.samples)
    spread = diversity(seen) if len(seen) > 1 else None
    return {"runs": runs, "diversity": spread, **summarise_draws(runs, lead, highest=True)}
