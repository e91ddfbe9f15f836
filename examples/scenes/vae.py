"""A small AutoencoderKL: pictures of 32x32 to latents of 16x16 with four channels, and back.

It is learnt on crops, since it has no attention and what it learns is local, and in the last part
on whole pictures, whose group norms are those that it will have. Absolute plus squared error, the
absolute error of the differences between neighbours, so that plain stays plain and edges sharp,
and a trace of the KL divergence (Kingma & Welling 2013, https://arxiv.org/abs/1312.6114).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

KL = 1e-6
"""Weight of the KL divergence of one latent number, against the error of one colour."""
CROP, BATCH, PICTURES = 16, 32, 16
"""Side of the crops, how many make a step, and the pictures that they are cut from."""
WHOLE = 8
"""Whole pictures that make a step of the last part: as many pixels as in the crops."""
LAST = 0.4
"""Share of the steps that are taken on whole pictures."""
RATE = 3e-3

Scenes = Callable[[int, int], Tensor]
"""(first, count) -> pictures (count, 3, 32, 32) in [-1, 1] of these numbers."""


def build(channels: tuple[int, ...]) -> Any:
    """An autoencoder of len(channels) - 1 halvings with weights drawn from torch's own state."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # latents have unit size at the end, see `standardise`
    )


def crops(x: Tensor, draws: torch.Generator) -> Tensor:
    """BATCH squares of side CROP out of pictures (N, 3, H, W), as many of each."""
    room = x.shape[2] - CROP + 1
    tops, lefts = torch.randint(room, (2, BATCH), generator=draws).tolist()
    return torch.stack(
        [
            x[i % len(x), :, top : top + CROP, left : left + CROP]
            for i, (top, left) in enumerate(zip(tops, lefts, strict=True))
        ]
    )


def fit(scenes: Scenes, channels: tuple[int, ...], steps: int) -> Iterator[tuple[int, Any]]:
    """(step, autoencoder in evaluation mode) after each hundredth step and at the end.

    At the end its latents are standardised.
    """
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(1)
    vae = build(channels)
    optimizer = torch.optim.Adam(vae.parameters(), RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.05)
    for step in range(1, steps + 1):
        batch = scenes(PICTURES * step, PICTURES)
        batch = batch[:WHOLE] if step > (1 - LAST) * steps else crops(batch, draws)
        posterior = vae.train().encode(batch).latent_dist
        error = vae.decode(posterior.sample(draws)).sample - batch
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + error.square().mean() + roughness(error) + KL * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step == steps:
            standardise(vae.eval(), scenes(0, 1000))
        if step % 100 == 0 or step == steps:
            yield step, vae.eval()


def roughness(error: Tensor) -> Tensor:
    """Mean absolute difference between neighbours of (N, 3, H, W), across and down."""
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


@torch.no_grad()
def standardise(vae: Any, x: Tensor) -> None:
    """Give each channel of the latents of pictures x mean 0 and deviation 1; decoded as before.

    A pipeline's one `scaling_factor` cannot; the 1x1 convolutions on both sides of the latent can.
    """
    z = encoded(vae, x)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    scale = torch.cat([1 / std, torch.ones_like(std)])  # of the means, and of the log-variances
    shift = torch.cat([-mean / std, -2 * std.log()])
    into.weight.mul_(scale.reshape(-1, 1, 1, 1))
    into.bias.mul_(scale).add_(shift)
    out.bias.add_(out.weight[:, :, 0, 0] @ mean)
    out.weight.mul_(std.reshape(1, -1, 1, 1))


@torch.no_grad()
def encoded(vae: Any, x: Tensor) -> Tensor:
    """The means of the latents of pictures (N, 3, H, W), not scaled: (N, 4, H / 2, W / 2)."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(64)])


@torch.no_grad()
def decoded(vae: Any, z: Tensor) -> Tensor:
    """Pictures of latents, clipped to [-1, 1]."""
    return torch.cat([vae.decode(part).sample for part in z.split(64)]).clamp(-1, 1)


def psnr(vae: Any, x: Tensor) -> float:
    """Peak signal-to-noise ratio of the decoded latents of x, in decibels."""
    error = decoded(vae, encoded(vae, x)) - x
    return float(10 * torch.log10(4 / error.square().mean()))
