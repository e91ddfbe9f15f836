"""What an evaluation costs beside the feature network: python benchmarks/evaluation.py

Into results/evaluation.json: CPU seconds on one thread of each part, for made-up features of the
size of Inception's, two sets of 50,000 x 2,048, correlated and clipped at 0 as those are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.eval.fid50k import neighbourhoods
from fewstep.eval.frechet import frechet_distance, moments
from fewstep.eval.metrics import kid
from fewstep.runs.environment import environment
from fewstep.storage.files import write_json

OUT = Path(__file__).parent / "results" / "evaluation.json"
SAMPLES, FEATURES, RANK, NEAREST = 50_000, 2_048, 64, 10_000


def features(seed: int) -> Tensor:
    """Features of one set, (50,000, 2,048), float32."""
    rng = torch.Generator().manual_seed(0)  # the same mixing for both sets
    mixing = torch.randn(RANK, FEATURES, generator=rng)
    rng.manual_seed(seed)
    x = torch.randn(SAMPLES, RANK, generator=rng) @ mixing / RANK**0.5
    return (x + 0.3 * torch.randn(SAMPLES, FEATURES, generator=rng)).relu()


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and its CPU seconds."""
    start = time.process_time()
    out = function()
    return out, time.process_time() - start


def main() -> None:
    """All parts, in the order of an evaluation."""
    torch.set_num_threads(1)
    real, fake = features(1), features(2)
    few = real[:NEAREST], fake[:NEAREST]
    (a, b), summing = timed(lambda: (moments(real), moments(fake)))
    fd, distance = timed(lambda: frechet_distance(a, b))
    seconds = {"moments of both sets": summing, "Frechet distance": distance}
    seconds["KID, 100 subsets of 1,000"] = timed(lambda: kid(real, fake))[1]
    seconds["precision, recall, density, coverage"] = timed(lambda: neighbourhoods(*few))[1]
    found = {
        "samples": SAMPLES,
        "features": FEATURES,
        "samples with neighbours": NEAREST,
        "seconds": seconds,
        "total": sum(seconds.values()),
        "distance": fd,
        "environment": environment(),
    }
    write_json(OUT, found)
    print(found)


if __name__ == "__main__":
    main()
