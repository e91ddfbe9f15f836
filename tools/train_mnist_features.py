"""Train the classifier whose features measure MNIST at 16x16.

Run: FEWSTEP_MNIST=mnist.npz python tools/train_mnist_features.py

Writes fewstep/eval/assets/mnist_features.safetensors (float16). Deterministic on one thread.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fewstep.data import mnist
from fewstep.eval.mnist_features import MnistFeatures

OUT = Path(__file__).parent.parent / "fewstep" / "eval" / "assets" / "mnist_features.safetensors"
STEPS, BATCH = 6000, 128


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Small random affine maps (shift, scale, shear) and a little noise; background is -1."""
    n = len(x)
    eye = torch.eye(2).expand(n, 2, 2)
    linear = eye + 0.1 * torch.randn(n, 2, 2, generator=generator)
    shift = 0.08 * torch.randn(n, 2, 1, generator=generator)
    grid = F.affine_grid(torch.cat([linear, shift], 2), list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1
    return moved + 0.05 * torch.randn(moved.shape, generator=generator)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, test = mnist.load(os.environ.get("FEWSTEP_MNIST", "mnist.npz"))
    net = MnistFeatures()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
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
        if (step + 1) % 1000 == 0:
            net.eval()
            with torch.no_grad():
                right = (net.classify(net(test.x0)).argmax(1) == test.labels).double().mean()
            print(f"step {step + 1}  loss {loss:.4f}  test accuracy {right:.4f}", flush=True)
            net.train()
    save_file({name: tensor.half() for name, tensor in net.state_dict().items()}, OUT)
    print(OUT)


if __name__ == "__main__":
    main()
