"""Peak memory and time of a step with and without --recompute: python benchmarks/memory.py

SiD on EDM's DDPM++ network for CIFAR-10 at half its width, 16 pictures a step, on a CPU. Each
setting runs in a process of its own, whose largest resident size the system knows. The figures go
into results/memory.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

OUT = Path(__file__).parent / "results" / "memory.json"


def measure(lean: bool) -> dict[str, float]:
    """GB beside what was there before the first step, and CPU seconds of the second step."""
    from fewstep.data.batches import Latents
    from fewstep.methods.sid import SiD
    from fewstep.nets.activation_checkpointing import recompute
    from fewstep.nets.edm_precond import EDMPrecond
    from fewstep.training.loop import State, train

    net = EDMPrecond(32, 3, model_type="SongUNet", model_channels=64, num_blocks=4)
    teacher = deepcopy(net)
    for one in (net, teacher) if lean else ():
        recompute(one)
    method = SiD()
    state = State.init(method, teacher, net)
    before = _peak()
    steps = train(method, teacher, net, Latents((3, 32, 32)), batch=16, steps=2, state=state)
    next(steps)
    began = time.process_time()
    next(steps)
    seconds = time.process_time() - began
    return {"beyond": round(_peak() - before, 2), "seconds": round(seconds, 1)}


def _peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def main() -> None:
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        print(json.dumps(measure(sys.argv[1] == "lean")))
        return
    from fewstep.runs.environment import environment
    from fewstep.storage.files import write_json

    found: dict[str, Any] = {"environment": environment()}
    for name in ("whole", "lean"):
        run = subprocess.run([sys.executable, __file__, name], capture_output=True, check=True)
        found[name] = json.loads(run.stdout)
        print(name, found[name])
    found["seconds, ratio"] = found["lean"]["seconds"] / found["whole"]["seconds"]
    write_json(OUT, found)


if __name__ == "__main__":
    main()
