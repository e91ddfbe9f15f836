"""Sample pipeline folders with diffusers alone: nothing of fewstep is imported here.

    python stock.py PROMPTS.txt REPEATS FOLDER STEPS SCALE [FOLDER STEPS SCALE ...]

Writes FOLDER.npz with `images` (prompts x repeats, H, W, 3) uint8, those of a prompt in a row.
"""

from __future__ import annotations

import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

BATCH = 64


def main(prompts: str, repeats: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    lines = Path(prompts).read_text(encoding="utf-8").splitlines()
    texts = [text for text in lines for _ in range(int(repeats))]
    for folder, steps, scale in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        images = sampled(folder, texts, int(steps), float(scale))
        np.savez_compressed(f"{folder}.npz", images=images)
    assert not any(name.partition(".")[0] == "fewstep" for name in sys.modules)


def sampled(folder: str, texts: list[str], steps: int, scale: float) -> np.ndarray:
    """One picture of each text: (texts, H, W, 3) uint8."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    made = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        told = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np"}
        made.append(pipe(part, **told).images)
    return (np.concatenate(made) * 255).round().astype(np.uint8)


if __name__ == "__main__":
    main(*sys.argv[1:])
