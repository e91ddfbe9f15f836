"""Nets in parts: the same numbers as whole nets, from and to the same checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fewstep.nets.activation_checkpointing import recompute
from fewstep.nets.edm2 import Precond
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.training import distributed
from fewstep.training.averaging import averaging
from fewstep.training.optim import Optim
from fewstep.training.sharding import shard
from tests.command import tree
from tests.processes import results, together
from tests.training.test_distributed import MODEL, SMOOTH, STEPS, apart, run
from tests.training.test_distributed_faults import ARGS, STUDENT, codes, command, sends

pytestmark = pytest.mark.slow

CLIPPED = Optim(1e-2, (0.9, 0.99), eps=1e-3, clip=0.3, clip_value=0.2)


def sharded(until: int = STEPS, resume: Any = None, save: Any = None, optim: Any = SMOOTH) -> Any:
    return run(until, 1, optim, None, resume, save, parts=0)


def whole(until: int = STEPS, resume: Any = None, save: Any = None, optim: Any = SMOOTH) -> Any:
    return run(until, 1, optim, None, resume, save)


def test_parts_have_the_bits_of_whole_nets(tmp_path: Path) -> None:
    """Weights, average, moments and logs but for the norm, which is summed in another order."""
    nets, logs = results(2, tmp_path, whole)[0]
    for found, told in results(2, tmp_path, sharded):
        assert apart(found, nets) == 0.0
        for ours, theirs in zip(told, logs, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


def test_parts_are_clipped_together(tmp_path: Path) -> None:
    """By the norm of all parts, not of each rank's."""
    nets, _ = results(2, tmp_path, whole, STEPS, None, None, CLIPPED)[0]
    found, _ = results(2, tmp_path, sharded, STEPS, None, None, CLIPPED)[0]
    assert apart(found, nets) < 1e-6
    assert apart(found, whole()[0]) > 1e-3


@pytest.mark.parametrize(
    ("before", "after", "equal"),
    [
        ((2, sharded), (2, sharded), True),
        ((2, whole), (2, sharded), True),
        ((2, sharded), (2, whole), True),
        ((1, whole), (2, sharded), False),
        ((2, sharded), (1, whole), False),
        ((2, sharded), (4, sharded), False),  # the last bias has two numbers: empty parts
    ],
)
def test_runs_continue_sharded_or_not(
    before: Any, after: Any, equal: bool, tmp_path: Path
) -> None:
    """Saved at step 4 of 10; to the bit with as many processes."""
    undisturbed, _ = results(after[0], tmp_path, after[1])[0]
    results(before[0], tmp_path, before[1], 4, None, tmp_path / "c")
    again, _ = results(after[0], tmp_path, after[1], STEPS, tmp_path / "c")[0]
    distance = apart(again, undisturbed)
    assert distance == 0 if equal else 0 < distance < 1e-6


SCATTER = "reduce_scatter_single"
if not hasattr(dist, SCATTER):  # before torch 2.13
    SCATTER = "reduce_scatter_tensor"


def messages() -> tuple[list[int], list[int], int]:
    """Numbers of gradient each rank receives, those it sends as whole nets do, parts it holds."""
    parts, sums = [], []
    scatter, reduce = getattr(dist, SCATTER), dist.all_reduce

    def scattering(*args: Any, **options: Any) -> Any:
        parts.append((args[0] if args else options["output"]).numel())
        return scatter(*args, **options)

    def reducing(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sums.append(tensor.numel())
        return reduce(tensor, *args, **options)

    dist.all_reduce = reducing
    setattr(dist, SCATTER, scattering)
    run(1, parts=0)
    return parts, sums, sum(p.numel() for p in MODEL.build().parameters())


def test_frozen_nets_send_no_gradient(tmp_path: Path) -> None:
    """Two turns, a net each: half of its numbers (and padding) arrive, and no whole gradient."""
    for parts, sums, total in results(2, tmp_path, messages):
        assert total <= sum(parts) < 1.1 * total  # 2 nets of total, half of each
        assert max(sums) == 1  # the logged loss


def trapped(policy: bool) -> tuple[float, float, bool]:
    """A net that is frozen at its first call; the error of its gradient, in units of bfloat16."""
    with distributed.process_group():
        net = nn.Linear(4, 4, bias=False)
        nn.init.constant_(net.weight, 0.5)
        if policy:
            low = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            fully_shard(net, mesh=init_device_mesh("cpu", (2,)), mp_policy=low)
        else:
            shard(net)
        net.requires_grad_(False)
        net(torch.ones(1, 4))
        net.requires_grad_(True)
        x = torch.full((1, 4), 1.0 if distributed.rank() else 2.0**-8)
        net(x).sum().backward()
        exact = (1.0 + 2.0**-8) / 2
        assert net.weight.grad is not None
        gradient = distributed.full_tensor(net.weight.grad)
        part = distributed.local_tensor(net.weight)
        return float((gradient - exact).abs().max()), exact, part.numel() == 8


def test_freezing_before_the_first_call_does_no_harm(tmp_path: Path) -> None:
    """FSDP's trap: its policy reads types off the weights that are trained at the first call.

    It finds none, averages 1 and 2^-8 in bfloat16 and loses the latter; torch 2.13 notices the
    type of the result and raises. `shard` sets no policy: nothing is lost.
    """
    for end in together(2, tmp_path, trapped, True):
        assert end.result[0] > 1e-3 if end.code == 0 else "BFloat16" in end.err
    assert results(2, tmp_path, trapped, False) == [(0.0, (1 + 2**-8) / 2, True)] * 2


def tapped() -> list[float]:
    """A small U-Net, whole and sharded: prediction, features, both at once."""
    with distributed.process_group():
        torch.manual_seed(0)
        options: Any = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
        net = EDMPrecond(8, 1, model_type="DhariwalUNet", **options).eval()
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
        before = [net(x, t), net.encode(x, t), *net.forward_with_features(x, t)]
        shard(net)
        after = [net(x, t), net.encode(x, t), *net.forward_with_features(x, t)]
        assert all(distributed.local_tensor(p) is not p for p in net.parameters())
        return [float((a - b).abs().max()) for a, b in zip(before, after, strict=True)]


def test_a_unet_and_its_tap(tmp_path: Path) -> None:
    assert results(2, tmp_path, tapped) == [[0.0] * 4] * 2


def leaner() -> list[float]:
    """How far apart gradients are: of a U-Net whole and in parts, in parts and in lean ones."""
    with distributed.process_group():
        torch.manual_seed(distributed.rank())
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
        found: list[list[Tensor]] = []
        for lean, parts in ((False, False), (False, True), (True, True)):
            torch.manual_seed(0)
            options: Any = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
            net = EDMPrecond(8, 1, model_type="DhariwalUNet", dropout=0.2, **options)
            for p in net.parameters():
                nn.init.normal_(p, std=0.1)
            if lean:
                recompute(net)
            if parts:
                shard(net)
            out, features = net.forward_with_features(x, t)
            (out.square().mean() + features.square().mean()).backward()
            with averaging(net, None):
                pass
            found.append(
                [distributed.full_tensor(p.grad) for p in net.parameters() if p.grad is not None]
            )
        whole, parted, again = found
        assert len(whole) == len(parted) == len(again) > 20
        both = (zip(whole, parted, strict=True), zip(parted, again, strict=True))
        return [max(float((a - b).abs().max()) for a, b in pairs) for pairs in both]


def test_parts_are_put_together_again_to_recompute(tmp_path: Path) -> None:
    """Of a sharded block, in the backward pass: the bits of one that keeps its activations."""
    for whole, parts in results(2, tmp_path, leaner):
        assert whole < 1e-7
        assert parts == 0.0


def refused() -> str:
    with distributed.process_group():
        try:
            shard(Precond(8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1))
        except ValueError as error:
            return str(error)
    return ""


def test_networks_that_rewrite_their_weights_are_refused(tmp_path: Path) -> None:
    sentence = "MPConv rewrites its weights in each step, which parts of them cannot"
    assert results(2, tmp_path, refused) == [f"{sentence}; leave --shard out"] * 2


def test_a_sharded_command(tmp_path: Path) -> None:
    """Stopped by a signal, continued, and whole nets have the same weights."""
    homes = [tmp_path / name for name in ("whole", "parts")]
    for home in homes:
        home.mkdir()
    results(2, tmp_path, command, homes[0])
    assert "--shard" not in ARGS
    assert codes(together(2, tmp_path, command, homes[1], sends(1, 15), "--shard")) == [75, 75]
    results(2, tmp_path, command, homes[1], None, "--shard")
    assert (homes[0] / STUDENT).read_bytes() == (homes[1] / STUDENT).read_bytes()
    assert tree(homes[0] / "run").keys() == tree(homes[1] / "run").keys()
