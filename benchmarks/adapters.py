"""Memory of a step of SiD with whole networks and with adapters: python benchmarks/adapters.py

A UNet2DConditionModel in the shape of Stable Diffusion 1.5 at half its width (220 M numbers;
random weights), 32x32 latents, two samples a step. Each case runs in a process of its own, which
prints what teacher, student, fake score and average hold, what Adam holds, the size of a
checkpoint, and the largest resident memory beyond that of the imports.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any

CASES = ("whole", "LoRA(16)", "LoRA(64)", "LoRA(64, targets=('*',))")
WIDTH = 160


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
    return Eps(UNet(net, tokens=77, pixels=256).eval(), VP())


def measure(case: str) -> None:
    """Two steps of one case, as one line of a table."""
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
    told = [sum(held.values()), adam, sum(size.values())]
    cells = " | ".join(f"{number / 2**30:.2f}" for number in told)
    print(f"| `{case}` | {cells} | {resident() - before:.2f} | {seconds:.1f} |", flush=True)


def main() -> None:
    """All cases, one after another."""
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    print("| nets | weights of the four | Adam | checkpoint | peak resident | CPU s a step |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        subprocess.run([sys.executable, __file__, case], check=True)


if __name__ == "__main__":
    main()
