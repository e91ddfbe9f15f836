"""What distillations take on 8 to 1,024 GPUs, on paper: python benchmarks/scale.py

Into results/scale.json, for docs/scale.md. The networks are those of Stable Diffusion 1.5, SDXL,
Stable Diffusion 3 and FLUX.1 by their published configurations; no weight of them is made. A step
of SiD is rehearsed without numbers, as `fewstep plan` does, whole and in parts, and its messages
are laid on nodes of eight GPUs. What of this is counted and what is assumed is said on the page.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fewstep.cli.plan import RATE
from fewstep.diffusion.samplers import FewStep
from fewstep.methods.dmd2 import DMD2
from fewstep.plan.choices import Choice, GiB, GPUs, holds, in_parts, row
from fewstep.plan.links import Links
from fewstep.plan.meta_step import StepCost, measure_step
from fewstep.plan.traffic import HOST
from fewstep.recipes.text_to_image import t2i, t2i_flow
from fewstep.runs.environment import environment
from fewstep.runs.run import Run
from fewstep.runs.teacher import describe_model
from fewstep.storage.files import write_json
from fewstep.teachers.diffusers.network import DiffusersNet
from tests import tiny_pipelines

OUT = Path(__file__).parent / "results" / "scale.json"
COUNTS = (8, 64, 256, 1024)
AT_ONCE = 4
MEMORY = 80


@dataclass(frozen=True)
class Published:
    """A network by its published configuration, at the size it was trained at."""

    like: str
    """The kind of `tests.tiny_pipelines` that has its noise path and prompts."""
    class_name: str
    tokens: int
    pixels: int
    shape: tuple[int, int, int]
    recipe: Callable[[], Run]
    config: dict[str, Any]


MODELS = {
    "Stable Diffusion 1.5": Published(
        *("sd", "UNet2DConditionModel", 77, 512, (4, 64, 64), t2i),
        {
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
    ),
    "SDXL": Published(
        *("sdxl", "UNet2DConditionModel", 77, 1024, (4, 128, 128), t2i),
        {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "layers_per_block": 2,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "Stable Diffusion 3": Published(
        *("sd3", "SD3Transformer2DModel", 333, 1024, (16, 128, 128), t2i_flow),
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
    ),
    "FLUX.1": Published(
        *("flux", "FluxTransformer2DModel", 512, 1024, (16, 128, 128), t2i_flow),
        {
            "sample_size": 128,
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": [16, 56, 56],
        },
    ),
}
METHODS = {"SiD": None, "DMD2": DMD2(FewStep(625.0))}
"""Of which the networks are told, on Stable Diffusion 1.5."""


def described(one: Published, home: Path) -> Run:
    """The recipe of a published network."""
    if not (home / one.like).exists():
        (home / one.like).mkdir()
        tiny_pipelines.build(one.like, home / one.like)
    like = describe_model(home / one.like / "pipe")
    net = DiffusersNet(
        one.class_name, json.dumps(one.config), tokens=one.tokens, pixels=one.pixels
    )
    return replace(one.recipe(), model=replace(like, net=net, shape=one.shape))


def cost_of(run: Run, chosen: Choice, parts: bool = False) -> StepCost:
    """What one GPU computes at once."""
    return measure_step(chosen.of(run), gpu=True, teacher=run.model, parts=parts)


def facts(cost: StepCost) -> dict[str, Any]:
    """Counts that do not depend on the machines."""
    found: dict[str, Any] = {"gather": [0.0, 0], "scatter": [0.0, 0], "average": [0.0, 0]}
    for message, times in cost.messages:
        if message.kind in found:
            found[message.kind][0] += message.bytes() * times / 1e9
            found[message.kind][1] += times
    sent = {kind: {"gigabytes": b, "messages": n} for kind, (b, n) in found.items()}
    return {
        "teraoperations": cost.operations / 1e12 / AT_ONCE,
        "start": cost.start / GiB,
        "kept": cost.kept / GiB,
        "peak": cost.peak / GiB,
        "checkpoint": cost.checkpoint / 1e9,
        "sample": cost.sample / 1e6,
        **sent,
    }


def ways(run: Run, chosen: Choice, whole: StepCost, cut: StepCost | None) -> dict[str, Any]:
    """Way -> number of GPUs -> what a step takes."""
    table: dict[str, Any] = {}
    for count in COUNTS:
        gpus = GPUs(count, MEMORY * GiB)
        numbers = {"whole": (whole, 1)}
        if cut is not None:
            numbers |= {"in parts": (cut, count), "in 8 parts": (cut, 8)}
        for name, (cost, parts) in numbers.items():
            found = row(cost, run, replace(chosen, parts=parts), gpus, RATE * 1e12)
            step = found.seconds + found.saving
            shares = {
                "computing": found.computing / step,
                "sending": found.sending / step,
                "hops": found.hops / step,
                "reading": found.reading / step,
                "saving": found.saving / step,
            }
            table.setdefault(name, {})[str(count)] = {
                "memory": found.memory / GiB,
                "in a step": _in_a_step(cost, parts) / GiB,
                "fits": "yes" if found.fits else "no",
                "batch": found.batch,
                "seconds": step,
                "sent": found.sent / 1e9,
                "messages": found.messages,
                "percent": {name: 100 * share for name, share in shares.items()},
            }
    return table


def _in_a_step(cost: StepCost, parts: int) -> float:
    """Bytes, if the nets were not whole before they are cut."""
    return float(cost.peak) if parts == 1 else in_parts(replace(cost, start=0), parts)


def of_model(run: Run) -> dict[str, Any]:
    """All of a published network."""
    chosen = Choice(False, True, "bf16", AT_ONCE, frozen=holds(run.model))
    whole, cut = cost_of(run, chosen), cost_of(run, chosen, parts=True)
    few = replace(chosen, lora=True)
    adapters = cost_of(run, few)
    table = ways(run, chosen, whole, cut)
    table["adapters"] = ways(run, few, adapters, None)["whole"]
    numbers = whole.nets[0].numbers / 1e9
    return {
        "billions": numbers,
        "facts": facts(replace(whole, messages=cut.messages)),
        "adapters": facts(adapters),
        "ways": table,
    }


def of_method(run: Run) -> dict[str, Any]:
    """The networks of a method: millions of numbers, and whether they are trained."""
    chosen = Choice(False, True, "bf16", AT_ONCE, frozen=holds(run.model))
    cost = cost_of(run, chosen)
    nets = {
        net.name: {"millions": net.numbers / 1e6, "trained": "yes" if net.trained else "no"}
        for net in cost.nets
    }
    return {"nets": nets, "kept": cost.kept / GiB, "checkpoint": cost.checkpoint / 1e9}


def main() -> None:
    """All of it."""
    models, methods = dict[str, Any](), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for name, one in MODELS.items():
            models[name] = of_model(described(one, home))
            print(name, models[name], file=sys.stderr, flush=True)
        first = described(MODELS["Stable Diffusion 1.5"], home)
        for name, method in METHODS.items():
            methods[name] = of_method(replace(first, method=method or first.method))
            print(name, methods[name], file=sys.stderr, flush=True)
    assumed = {"teraoperations": RATE, "memory": MEMORY, "at_once": AT_ONCE, "host": HOST / 1e9}
    found = {"environment": environment(), "links": asdict(Links()), "assumed": assumed}
    write_json(OUT, {**found, "models": models, "methods": methods})


if __name__ == "__main__":
    main()
