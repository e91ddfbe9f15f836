"""Train a classifier whose features measure digits: python tools/train_features.py digits

For MNIST: FEWSTEP_MNIST=mnist.npz python tools/train_features.py mnist

Writes fewstep/eval/assets/NAME_features.safetensors (float16). Deterministic on one thread.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fewstep.eval.digit_features import LAYOUTS, Classifier

ASSETS = Path(__file__).parent.parent / "fewstep" / "eval" / "assets"
BATCH = 128


@dataclass(frozen=True)
class Training:
    """How one of them is trained."""

    steps: int
    rate: float
    linear: float
    """Deviation of the entries of the random linear maps."""
    shift: float
    """Deviation of the random shifts, in half pictures."""


TRAININGS = {
    "digits": Training(3000, 2e-3, 0.12, 0.15),
    "mnist": Training(6000, 3e-3, 0.1, 0.08),
}


def augment(x: Tensor, training: Training, generator: torch.Generator) -> Tensor:
    """Small random affine maps (shift, scale, shear) and a little noise; background is -1."""
    n = len(x)
    eye = torch.eye(2).expand(n, 2, 2)
    linear = eye + training.linear * torch.randn(n, 2, 2, generator=generator)
    shift = training.shift * torch.randn(n, 2, 1, generator=generator)
    grid = F.affine_grid(torch.cat([linear, shift], 2), list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1
    return moved + 0.05 * torch.randn(moved.shape, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=[*LAYOUTS])
    name = parser.parse_args().name
    training = TRAININGS[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if name == "digits":
        from fewstep.data import digits

        train, held = digits.load_digits()
    else:
        from fewstep.data import mnist

        train, held = mnist.load_mnist(os.environ.get("FEWSTEP_MNIST", "mnist.npz"))
    net = Classifier(LAYOUTS[name])
    optimizer = torch.optim.AdamW(net.parameters(), training.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.rate, training.steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(training.steps):
        rows = torch.randint(len(train.x0), (BATCH,), generator=generator)
        features = net(augment(train.x0[rows], training, generator))
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
    out = ASSETS / f"{name}_features.safetensors"
    save_file({key: tensor.half() for key, tensor in net.state_dict().items()}, out)
    print(out)


if __name__ == "__main__":
    main()
