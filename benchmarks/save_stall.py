"""How long checkpoints keep a run from training: python benchmarks/save_stall.py

For each setting, one interval of 500 steps with its checkpoint: how long the loop waits (the copy
to memory), and what the writing thread computes meanwhile (digests, file contents), which a
machine without a free core loses too. All in seconds of one core, so that other work on the
machine does not count; shares are of the interval, and the mark is 5 %. Steps of the large
network are timed once and multiplied. The figures go into results/save_stall.json.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.methods.sid import SiD
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.nets.mlp import MLP
from fewstep.runs.environment import environment
from fewstep.storage import checkpoint
from fewstep.storage.files import write_json
from fewstep.training.loop import State, train

EVERY = 500
OUT = Path(__file__).parent / "results" / "save_stall.json"


def settings() -> Iterator[tuple[str, Any, tuple[int, ...], int, int]]:
    """Name, network, shape of a sample, batch, steps that are timed."""
    yield "digits, MLP", Model(MLP(256, 4), (1, 8, 8)).build(), (1, 8, 8), 128, EVERY
    unet = EDMPrecond(32, 3, model_type="SongUNet", model_channels=64)
    yield "CIFAR-10, DDPM++ at half width", unet, (3, 32, 32), 4, 2


def measure(net: Any, shape: tuple[int, ...], batch: int, steps: int) -> dict[str, float]:
    """Seconds of an interval, of the copy, of computing beside; size of the checkpoint in MB."""
    teacher, method = deepcopy(net), SiD()
    state = State.init(method, teacher, net)
    settings: dict[str, Any] = {"batch": batch, "steps": steps + 1, "state": state}
    records = train(method, teacher, net, Latents(shape), **settings)
    next(records)  # builds the optimisers
    began = time.thread_time()
    for _ in range(steps):
        next(records)
    interval = (time.thread_time() - began) * EVERY / steps
    write, beside = checkpoint._write, [0.0]

    def timed(*args: Any) -> Path:
        before = time.thread_time()
        path = write(*args)
        beside[0] = time.thread_time() - before
        return path

    checkpoint._write = timed
    with tempfile.TemporaryDirectory() as home:
        with checkpoint.Writer(Path(home), method) as writer:
            began = time.thread_time()
            writer.save(state)
            wait = time.thread_time() - began
        size = sum(p.stat().st_size for p in Path(home).rglob("*") if p.is_file()) / 1e6
    checkpoint._write = write
    return {"interval": interval, "wait": wait, "beside": beside[0], "MB": size}


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {"environment": environment()}
    for name, net, shape, batch, steps in settings():
        found = measure(net, shape, batch, steps)
        parts = {key: 100 * found[key] / found["interval"] for key in ("wait", "beside")}
        results[name] = {**found, "percent": parts}
        print(
            f"{name}: {found['MB']:.0f} MB every {found['interval']:.1f} s; waits "
            f"{found['wait']:.3f} s ({parts['wait']:.2f} %), computes {found['beside']:.2f} s "
            f"beside ({parts['beside']:.2f} %)"
        )
    write_json(OUT, results)


if __name__ == "__main__":
    main()
