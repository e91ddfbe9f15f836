"""fewstep stats, and fewstep evaluate --protocol: published measures, with progress."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.cli.progress_bar import Bar, say
from fewstep.cli.sampling import Sampling
from fewstep.data.autoencoder import as_pictures
from fewstep.data.picture_set import PictureSet, first_shape
from fewstep.data.readers import reader_of
from fewstep.eval.fid50k import Protocol, results_table, summarise_draws
from fewstep.eval.load_features import load_features
from fewstep.eval.reference import Gatherer, Reference, read_reference
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.runner import device_named
from fewstep.storage.files import digest, write_json
from fewstep.storage.folder_lock import locked
from fewstep.storage.model_folder import is_finished, load_student
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.training.progress import heard, remark


def make_stats(data: Path, features: str, out: Path, keep: int, device: str, batch: int) -> None:
    """Write the reference statistics of the pictures in `data` to `out`."""
    if out.suffix != ".npz" or not out.absolute().parent.is_dir():
        raise ValueError(f"--out must be an .npz file in an existing folder, got {out}")
    if keep < 0 or batch < 1:
        raise ValueError("--keep must not be negative, and --batch at least 1")
    where = device_named(device)
    total, batches = pictures(data, batch)
    gatherer = Gatherer(load_features(features, where), keep)
    with Bar("measuring", total) as bar, heard(bar.say):
        for done in gatherer.run(batches):
            bar.update(done)
    gatherer.save(out)


def pictures(data: Path, batch: int) -> tuple[int, Iterator[Tensor]]:
    """How many pictures `data` holds, and these as batches of uint8 (B, H, W, 1 or 3).

    A folder, a .zip or an .npz, read as training reads it; ValueError names unfit pictures.
    """
    reader = reader_of(data)
    rows = torch.arange(len(reader))
    shown = PictureSet(reader, rows, first_shape(reader))

    def batches() -> Iterator[Tensor]:
        for part in rows.split(batch):
            yield shown.take(part).permute(0, 2, 3, 1)
        remark(*(f"{data}: {line}" for line in reader.notes.lines()))

    return len(rows), batches()


def evaluate_protocol(
    path: Path,
    features: str,
    reference: Path,
    samples: int,
    runs: int,
    batch: int,
    device: str,
    vae: str = "",
    sampling: Sampling = Sampling(),
) -> tuple[dict[str, Any], str]:
    """Measure the model in `path` by the 50k protocol; the report, and as text.

    Writes PATH/evaluation/<features>-<samples>.json, and keeps features beside it.
    """
    folder = RunFolder(path)
    folder.refuse_unfinished()
    where = device_named(device)
    student = load_student(path, where)
    if student.model is not None and isinstance(student.model.net, DiffusersNet):
        raise ValueError(
            f"{path} takes prompts, and --protocol fid50k knows labels alone; measure it with "
            "--prompts FILE --clip FOLDER"
        )
    generator, decoder = as_pictures(sampling.applied(student, path), vae)
    network = load_features(features, where)
    real = read_reference(reference, network)
    model = digest(is_finished(path) / "manifest.json")
    made_by = "+".join(filter(None, (model, decoder, sampling.suffix)))
    name = f"{network.name}-{samples}{sampling.suffix}"
    place = path / "evaluation" / name
    protocol = Protocol(generator, network, place, made_by, samples, runs, batch)
    with locked(place):
        make_parts(protocol)
        scores = []
        with Bar("scoring runs", runs) as bar:
            for run in range(runs):
                scores.append(protocol.scores(run, real, where))
                bar.update(run + 1)
    report: dict[str, Any] = {
        "features": network.name,
        "samples": samples,
        "labels": "seed modulo classes" if generator.classes else "none",
        **sampling.record(student),
        "reference": about(reference, real),
        "model": model,
        **({"vae": decoder} if decoder else {}),
        "runs": scores,
        **summarise_draws(scores, lead=next(name for name in scores[0] if name != "seeds")),
    }
    write_json(path / "evaluation" / f"{name}.json", report)
    many = "an unknown number of" if real.count is None else real.count
    return report, f"{results_table(report)}\n\nagainst {many} pictures, {reference}"


def about(path: Path, real: Reference) -> dict[str, Any]:
    """The record of a reference: file name, SHA-256 and number of pictures."""
    return {"file": path.name, "sha256": real.sha256, "pictures": real.count}


def make_parts(protocol: Protocol) -> None:
    """Sample and measure the missing parts of a protocol, with a progress bar."""
    missing = protocol.missing()
    there = len(protocol.parts()) - len(missing)
    if there:
        say(f"{there} of {len(protocol.parts())} parts are there already")
    done, total = 0, sum(part.size for part in missing)
    with Bar("measuring", total) as bar:
        for part in missing:
            for count in protocol.make(part):
                done += count
                bar.update(done, f"run {part.run}")
