"""Whole networks beside adapters: python benchmarks/adapters.py, into results/adapters.json

Memory of a step of SiD: a UNet2DConditionModel in the shape of Stable Diffusion 1.5 at half its
width (220 M numbers; random weights), 32x32 latents, two samples a step. Each case runs in a
process of its own, which tells in GiB what teacher, student, fake score and average hold, what
Adam holds, the size of a checkpoint, and the largest resident memory beyond that of the imports.

Quality: the digits, distilled as their recipe does, one seed, with whole networks and with
adapters; runs are kept in runs/adapters, and found there.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

CASES = ("whole", "LoRA(16)", "LoRA(64)", "LoRA(64, targets=('*',))")
WIDTH = 160
DIGITS = (
    "whole",
    "LoRA(64, targets=('*',))",
    "LoRA(16, targets=('*',))",
    "LoRA(4, targets=('*',))",
)
OUT = Path(__file__).parent / "results" / "adapters.json"
RUNS = Path("runs/adapters")


def resident() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def denoiser() -> Any:
    """The network, predicting eps on Stable Diffusion's betas."""
    import diffusers
    import torch

    from fewstep.diffusion.denoisers import Eps
    from fewstep.diffusion.noise_path import VP
    from fewstep.teachers.diffusers.adapters import UNet

    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH),
        attention_head_dim=8,
        cross_attention_dim=768,
    )
    return Eps(UNet(net, 77, (4, 32, 32), 8).eval(), VP())


def measure(case: str) -> dict[str, float]:
    """Two steps of one case: GiB by what holds them, and CPU seconds of a step."""
    from itertools import chain

    from fewstep.config import parse
    from fewstep.data.batches import Latents
    from fewstep.diffusion.samplers import FewStep
    from fewstep.diffusion.time_distributions import Uniform
    from fewstep.methods.sid import SiD
    from fewstep.storage.checkpoint import tensors
    from fewstep.training.loop import train

    teacher = denoiser()
    before = resident() - sum(p.numel() for p in teacher.parameters()) * 4 / 2**30
    role = teacher if case == "whole" else parse(case).adapt(teacher)
    method = SiD(FewStep(625.0), alpha=1.0, times=Uniform(20.0, 979.0))
    began = time.process_time()
    *_, last = train(method, teacher, role, Latents((4, 32, 32)), batch=2, accumulate=2, steps=2)
    seconds = (time.process_time() - began) / 2
    nets = (teacher, *last.state.nets.values(), last.state.average)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for net in nets
        for t in chain(net.parameters(), net.buffers())
    }
    parts = tensors(last.state)
    size = {part: sum(t.nbytes for t in named.values()) for part, named in parts.items()}
    adam = sum(number for part, number in size.items() if part.startswith("optim"))
    sizes = {"weights": sum(held.values()), "adam": adam, "checkpoint": sum(size.values())}
    told = {name: number / 2**30 for name, number in sizes.items()}
    return {**told, "peak": resident() - before, "seconds": seconds}


def on_digits(case: str, teacher: Path) -> dict[str, float]:
    """Trained numbers of the student, and its scores, of one run."""
    from fewstep.cli.measure import measured
    from fewstep.config import parse
    from fewstep.recipes.digits import digits
    from fewstep.runs.runner import execute
    from fewstep.storage.model_folder import load_student

    run = digits()
    lora = None if case == "whole" else parse(case)
    out = RUNS / "".join(c for c in case if c.isalnum())
    for _ in execute(replace(run, lora=lora), out, recipe="digits", teacher=str(teacher)):
        pass
    net: Any = load_student(out).denoiser
    adapted = net if lora is None else lora.adapt(load_student(teacher).denoiser)
    trained = sum(p.numel() for p in adapted.parameters() if lora is None or p.requires_grad)
    scores = measured(out, samples=5000, draws=3)
    return {"numbers": trained, **scores["student"], "teacher": scores["teacher"]["fd_digits"]}


def main() -> None:
    """All cases, one after another."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    from fewstep.recipes.digits import digits_teacher
    from fewstep.runs.environment import environment
    from fewstep.runs.runner import execute
    from fewstep.storage.files import write_json

    memory, quality = dict[str, Any](), dict[str, Any]()
    for case in CASES:
        run = subprocess.run([sys.executable, __file__, case], capture_output=True, check=True)
        memory[case] = json.loads(run.stdout)
        print(case, memory[case], file=sys.stderr, flush=True)
    for _ in execute(digits_teacher(), RUNS / "teacher", recipe="digits_teacher"):
        pass
    for case in DIGITS:
        quality[case] = on_digits(case, RUNS / "teacher")
        print(case, quality[case], file=sys.stderr, flush=True)
    write_json(OUT, {"environment": environment(), "memory": memory, "digits": quality})


if __name__ == "__main__":
    main()
