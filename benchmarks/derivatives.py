"""What derivatives in forward mode cost beside a plain step: python benchmarks/derivatives.py

Into results/derivatives.json: for DDPM++, EDM2 and tiny pipelines of SD3 and FLUX a step of
MeanFlow, sCM and AYF, by forward mode and by differences, over a step of denoising with the same
network and batch: one forward and one backward pass. CPU seconds on one thread, the median of
rounds in turns, and the peak of the bytes that torch's allocator gives out.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion.model import Model
from fewstep.distillation.default_times import with_times_of
from fewstep.distillation.method import Method
from fewstep.methods.ayf import AYF
from fewstep.methods.mean_flow import MeanFlow
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.scm import SCM
from fewstep.plan.meta_step import begun, prepared
from fewstep.recipes.text_to_image import t2i_flow
from fewstep.runs.environment import environment
from fewstep.runs.run import Run
from fewstep.runs.teacher import describe_model
from fewstep.storage.files import write_json
from fewstep.teachers.network_config import published_model
from tests import tiny_pipelines
from tests.plan.test_meta_step import measured

OUT = Path(__file__).parent / "results" / "derivatives.json"
ROUNDS = 3
PIXELS = {"img_resolution": 32, "img_channels": 3}
DDPM = {**PIXELS, "model_type": "SongUNet", "model_channels": 64, "channel_mult": [1, 2, 2]}
EDM2 = {**PIXELS, "model_channels": 32, "channel_mult": [1, 2, 3], "label_dim": 10}
METHODS: dict[str, Method] = {
    f"{name}, {how}": make(derivative=how)
    for name, make in (("MeanFlow", MeanFlow), ("SCM", SCM), ("AYF", AYF))
    for how in ("forward", "difference")
}


def models(home: Path) -> Iterator[tuple[str, Model, int]]:
    """Names, networks and batches."""
    yield "DDPM++", published_model("EDMPrecond", DDPM), 8
    yield "EDM2", published_model("Precond", EDM2), 8
    for kind in ("sd3", "flux"):
        (home / kind).mkdir()
        tiny_pipelines.build(kind, home / kind)
        yield f"tiny {kind.upper()}", describe_model(home / kind / "pipe"), 16


def seconds(run: Run) -> float:
    """CPU time of the last step of a run, without what comes before it."""
    work = prepared(run).rehearsal()
    state = begun(work)
    began = time.process_time()
    for _ in work.records(state):
        pass
    return time.process_time() - began


def of(model: Model, batch: int) -> dict[str, Any]:
    """Every method's step over the plain one."""
    plain = replace(t2i_flow(), method=Pretrain(), model=model, batch=batch, accumulate=1)
    runs = {
        name: replace(plain, method=with_times_of(method, model.path))
        for name, method in METHODS.items()
    }
    spent: dict[str, list[float]] = {name: [] for name in ("plain", *runs)}
    for _ in range(ROUNDS):
        for name, run in {"plain": plain, **runs}.items():
            spent[name].append(seconds(run))
    peak = measured(plain)
    found: dict[str, Any] = {
        "batch": batch,
        "weights": sum(p.numel() for p in model.build().parameters()),
        "seconds": statistics.median(spent["plain"]),
        "megabytes": peak / 1e6,
    }
    for name, run in runs.items():
        pairs = zip(spent[name], spent["plain"], strict=True)
        time_, memory = statistics.median(a / b for a, b in pairs), measured(run) / peak
        found[name] = {"time": time_, "memory": memory}
    return found


def main() -> None:
    """All of them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        found = {}
        for name, model, batch in models(Path(home)):
            found[name] = of(model, batch)
            print(name, found[name], file=sys.stderr, flush=True)
    write_json(OUT, {"environment": environment(), "rounds": ROUNDS, "networks": found})


if __name__ == "__main__":
    main()
