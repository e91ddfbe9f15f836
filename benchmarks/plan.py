"""What `fewstep plan` foretells, beside what is measured: python benchmarks/plan.py

Into results/plan.json. For small runs, the peak of the bytes that torch's allocator gives out on a
CPU in a step, and the prediction, in MB. For the network of Stable Diffusion 1.5 at 512 pixels,
the table of SiD-LSG in GiB, as the command prints it; no weight of it is made.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.diffusion.model import Model
from fewstep.nets.lora import LoRA
from fewstep.plan.choices import GPUs, choices, rows
from fewstep.plan.meta_step import measure_step
from fewstep.recipes.digits import digits
from fewstep.recipes.mnist import mnist
from fewstep.recipes.text_to_image import t2i, t2i_flow
from fewstep.runs.environment import environment
from fewstep.runs.run import Run
from fewstep.runs.teacher import describe_model
from fewstep.storage.files import write_json
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.training.optim import Optim
from tests import tiny_pipelines
from tests.plan.test_meta_step import measured

OUT = Path(__file__).parent / "results" / "plan.json"
LOW: dict[str, Any] = {"precision": "bf16", "frozen": "bf16"}
PIPELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny Stable Diffusion": ("sd", {}),
    "the same in bf16": ("sd", {"precision": "bf16"}),
    "the same in bf16, frozen weights too": ("sd", LOW),
    "the same with adapters": ("sd", {"lora": LoRA(4)}),
    "the same with recomputation": ("sd", {"recompute": True}),
    "the same with adapters, in bf16, frozen weights too, with recomputation": (
        "sd",
        {**LOW, "lora": LoRA(4), "recompute": True},
    ),
    "tiny SDXL": ("sdxl", {}),
    "tiny SD3, in two parts": ("sd3", {"accumulate": 2}),
    "tiny SANA": ("sana", {}),
    "tiny FLUX": ("flux", {}),
    "tiny PixArt": ("pixart", {}),
}
"""Name -> kind of `tests.tiny_pipelines`, settings."""
SD15 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}


def small_runs(home: Path) -> dict[str, Run]:
    """Runs by name, whose steps can be done with numbers."""
    eight = replace(digits(), optim=Optim(bits=8), fake_optim=None)
    found = {"digits": digits(), "the same with moments of 8 bits": eight}
    found["MNIST at 16x16, 64 samples"] = replace(mnist(), batch=64)
    for name, (kind, settings) in PIPELINES.items():
        folder = home / kind / "pipe"
        if not folder.exists():
            (home / kind).mkdir()
            tiny_pipelines.build(kind, home / kind)
        recipe = t2i_flow if kind in tiny_pipelines.FLOWS else t2i
        told = {"batch": 4, "accumulate": 1, **settings}
        found[name] = replace(recipe(), model=describe_model(folder), **told)
    return found


def published(like: Model) -> dict[str, float]:
    """GiB of each way for Stable Diffusion 1.5, whose path and classes are those of `like`."""
    net = DiffusersNet("UNet2DConditionModel", json.dumps(SD15), tokens=77, pixels=512)
    model = replace(like, net=net, shape=(4, 64, 64))
    run, found = replace(t2i(), model=model), dict[str, float]()
    for choice in choices(model, [4, 16]):
        if choice.batch == 16 and not (choice.lora and choice.recompute):
            continue
        words = ["adapters" if choice.lora else "all", "again" if choice.recompute else "kept"]
        name = " ".join((*words, choice.precision, str(choice.bits), str(choice.batch)))
        (row,) = rows(run, choice, GPUs.parse("1x24GB"), 80e12, model)
        found[name] = row.memory / 2**30
        print(name, found[name], file=sys.stderr, flush=True)
    return found


def main() -> None:
    """All of it."""
    peaks = dict[str, Any]()
    with tempfile.TemporaryDirectory() as home:
        for name, run in small_runs(Path(home)).items():
            pair = {"measured": measured(run) / 1e6, "predicted": measure_step(run).peak / 1e6}
            peaks[name] = {**pair, "ratio": pair["predicted"] / pair["measured"]}
            print(name, peaks[name], file=sys.stderr, flush=True)
        like = describe_model(Path(home) / "sd" / "pipe")
    table = published(like)
    ratios = [row["ratio"] for row in peaks.values()]
    span = {"lowest": min(ratios), "highest": max(ratios), "runs": len(ratios)}
    write_json(OUT, {"environment": environment(), "peaks": peaks, "span": span, "sd15": table})


if __name__ == "__main__":
    main()
