"""DDPM++ against a plain transcription of it: python benchmarks/networks.py [--batch 16]

The transcription is what one would write down from the paper's description in torch's own
functions: interpolation, pooling, softmax attention, nothing in place. It runs on the very weights
of ours, must give the same numbers, and takes turns with ours while both are timed by process CPU
time. Memory is what autograd keeps between forward and backward.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.nets.edm_layers import Conv2d, UNetBlock
from fewstep.nets.edm_unets import SongUNet

OUT = Path(__file__).parent / "results" / "networks.json"


def convolved(x: Tensor, layer: Conv2d) -> Tensor:
    """Resampling by the box filter, then the convolution."""
    if layer.resample == "up":
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if layer.resample == "down":
        x = F.avg_pool2d(x, 2)
    if layer.weight is None:
        return x
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def normed(x: Tensor, layer: nn.Module) -> Tensor:
    return F.group_norm(x, layer.groups, layer.weight, layer.bias, layer.eps)


def residual(x: Tensor, emb: Tensor, block: UNetBlock) -> Tensor:
    """One block, with attention if it has any."""
    h = convolved(F.silu(normed(x, block.norm0)), block.conv0)
    h = h + F.linear(emb, block.affine.weight, block.affine.bias)[:, :, None, None]
    h = convolved(F.silu(normed(h, block.norm1)), block.conv1)
    h = (h + (x if block.skip is None else convolved(x, block.skip))) * math.sqrt(0.5)
    if not block.heads:
        return h
    b, c, *size = h.shape
    q, k, v = convolved(normed(h, block.norm2), block.qkv).reshape(b, c, 3, -1).unbind(2)
    weight = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(c)).softmax(2)
    seen = torch.einsum("bqk,bck->bcq", weight, v).reshape(b, c, *size)
    return (h + convolved(seen, block.proj)) * math.sqrt(0.5)


def transcription(net: SongUNet, x: Tensor, noise: Tensor) -> Tensor:
    """F(x; noise) of the DDPM++ network `net`."""
    half = net.map_noise.count
    phase = noise[:, None] * (1 / 10000) ** (torch.arange(half) / (half - 1))
    emb = torch.cat([phase.sin(), phase.cos()], 1)
    for layer in (net.map_layer0, net.map_layer1):
        emb = F.silu(F.linear(emb, layer.weight, layer.bias))
    skips: list[Tensor] = []
    for name, block in net.enc.items():
        x = convolved(x, block) if name.endswith("conv") else residual(x, emb, block)
        skips.append(x)
    for name, block in net.dec.items():
        if name.endswith("aux_norm"):
            x = F.silu(normed(x, block))
        elif name.endswith("aux_conv"):
            x = convolved(x, block)
        else:
            x = residual(torch.cat([x, skips.pop()], 1) if "block" in name else x, emb, block)
    return x


def kept(run: Callable[[], Tensor], net: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()  # alive, so that no storage is used twice
    del out
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = SongUNet(32, 3, 3, model_channels=64, channel_mult=(2, 2, 2), dropout=0.0).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    x, noise = torch.randn(args.batch, 3, 32, 32), torch.randn(args.batch)
    calls = {
        "fewstep": lambda: net(x, noise),
        "transcription": lambda: transcription(net, x, noise),
    }
    ours, theirs = (call() for call in calls.values())
    difference = float((ours - theirs).detach().norm() / theirs.detach().norm())
    assert difference < 1e-5, difference
    del ours, theirs
    seconds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, call in calls.items():
            began = time.process_time()
            with torch.no_grad():
                call()
            middle = time.process_time()
            call().square().mean().backward()
            end = time.process_time()
            seconds.setdefault(f"{name} forward", []).append(middle - began)
            seconds.setdefault(f"{name} forward and backward", []).append(end - middle)
    result: dict[str, object] = {
        "network": "DDPM++, 64 channels, 32x32, batch " + str(args.batch),
        "parameters": sum(p.numel() for p in net.parameters()),
        "relative difference": difference,
        "torch": torch.__version__,
    }
    for what in ("forward", "forward and backward"):
        pairs = zip(seconds[f"fewstep {what}"], seconds[f"transcription {what}"], strict=True)
        result[f"{what}, seconds"] = round(statistics.median(seconds[f"fewstep {what}"]), 3)
        result[f"{what}, ratio"] = round(statistics.median(a / b for a, b in pairs), 3)
    sizes = {name: kept(call, net) for name, call in calls.items()}
    result["kept for backward, MiB"] = round(sizes["fewstep"] / 2**20, 1)
    result["kept for backward, ratio"] = round(sizes["fewstep"] / sizes["transcription"], 3)
    print(json.dumps(result, indent=1))
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
