"""A small network of every architecture, none of whose weights are zero, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VP, Flow
from fewstep.distillation.discriminator_head import DenoiserWithHead
from fewstep.nets.edm2 import Precond
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.nets.lora import LoRA
from fewstep.nets.mlp import MLP
from fewstep.nets.patch_unet import PatchUNet

SMALL: dict[str, Any] = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
NCSN: dict[str, Any] = {"encoder_type": "residual", "embedding_type": "fourier"}
FLOW = Model(MLP(16, 2), (1, 8, 8), 3, Flow(), "velocity")
VARIANCE_PRESERVING = Model(MLP(16, 2), (1, 8, 8), 3, VP(), "v")
PATCHES = Model(PatchUNet(16, (1, 2), attention=(4,), dropout=0.2), (1, 8, 8), 3)
TOKENS = Model(PatchUNet(8, (1,), attention=(20,), patch=1), (1, 20, 20), 3)
"""As many pixels as take the fused kernel of attention."""


def stirred(net: nn.Module, seed: int = 0) -> nn.Module:
    """The same net with noise on all of its parameters."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p)
    return net


def seeded(make: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    """make(*args, **options), the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args, attn_resolutions=[8], dropout=0.2, **SMALL, **options)


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": FLOW.build,
    "mlp, vp": VARIANCE_PRESERVING.build,
    "patches": PATCHES.build,
    "tokens": TOKENS.build,
    "ddpm++": lambda: seeded(EDMPrecond, 8, 1, 3, model_type="SongUNet"),
    "ncsn++": lambda: seeded(EDMPrecond, 8, 1, 3, model_type="SongUNet", **NCSN),
    "adm": lambda: seeded(EDMPrecond, 8, 1, 3, model_type="DhariwalUNet"),
    "edm2": lambda: seeded(Precond, 8, 1, 3, channels_per_head=16),
    "headed": lambda: DenoiserWithHead(FLOW.build()),
    "adapted": lambda: LoRA(2, targets=("*",)).adapt(stirred(FLOW.build())),
}


def shape_of(name: str) -> tuple[int, ...]:
    """The shape of a sample of the network `name`."""
    return TOKENS.shape if name == "tokens" else FLOW.shape


def samples(
    net: Any, shape: tuple[int, ...] = FLOW.shape, count: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t, t, labels, s) with s < t, no t being a whole number."""
    path = net.path
    top = min(path.t_max, 900.0 if path.t_max > 100 else 5.0)
    xt = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    t = top * torch.linspace(0.2, 0.9, count)
    t = t.floor() + 0.5 if top > 100 else t
    return xt, t, torch.arange(count) % 4, t / 3
