"""Train the classifier whose features measure the digits demo.

Run: python tools/train_digit_features.py

Writes fewstep/eval/assets/digit_features.safetensors (float16). Deterministic on one thread.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fewstep.data import digits
from fewstep.eval.digit_features import DigitFeatures

OUT = Path(__file__).parent.parent / "fewstep" / "eval" / "assets" / "digit_features.safetensors"
STEPS, BATCH = 3000, 128


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Small random affine maps (shift, scale, shear) and a little noise; background is -1."""
    n = len(x)
    eye = torch.eye(2).expand(n, 2, 2)
    linear = eye + 0.12 * torch.randn(n, 2, 2, generator=generator)
    shift = 0.15 * torch.randn(n, 2, 1, generator=generator)
    grid = F.affine_grid(torch.cat([linear, shift], 2), list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1
    return moved + 0.05 * torch.randn(moved.shape, generator=generator)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, held = digits.load()
    net = DigitFeatures()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        rows = torch.randint(len(train.x0), (BATCH,), generator=generator)
        features = net(augment(train.x0[rows], generator))
        logits = net.classify(F.dropout(features, 0.2))
        loss = F.cross_entropy(logits, train.labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            net.eval()
            with torch.no_grad():
                right = (net.classify(net(held.x0)).argmax(1) == held.labels).double().mean()
            print(f"step {step + 1}  loss {loss:.4f}  held-out accuracy {right:.4f}", flush=True)
            net.train()
    save_file({name: tensor.half() for name, tensor in net.state_dict().items()}, OUT)
    print(OUT)


if __name__ == "__main__":
    main()
