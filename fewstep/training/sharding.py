"""Sharding of nets too large for one accelerator: each rank keeps a part of every weight (FSDP2).

`shard` turns the parameters of a net into shards, one on each rank of
`fewstep.training.distributed`. A block is gathered when it is called and freed after, so that
gradients, optimiser moments and averages exist as shards alone; gradients are averaged as they
are made, and those of a frozen net never are. Everything stays in float32: precision is autocast's
matter, and an FSDP policy would fix its types at a first call that may find the net frozen.

A checkpoint of a sharded net holds whole tensors (`distributed.full_tensor`,
`distributed.scatter`): it can be continued with any number of processes, sharded or not.
"""

from __future__ import annotations

from torch import nn

from fewstep.training import distributed

METHODS = ("encode", "forward_with_features", "answers", "numbers")
"""Methods of nets that are called beside forward (`HasEncoderFeatures`, heads, `methods.gas`)."""


def shard(net: nn.Module, parts: int = 0, offload: bool = False) -> None:
    """Shard `net` in place: every entry of its lists of blocks by itself, then the rest.

    To be called on all ranks, before its optimiser is built.

    Args:
        net: a network on this rank's device; one without parameters stays as it is.
        parts: shards of each weight, one for each of as many neighbouring ranks; 0: for all ranks.
            Where there are more ranks, they hold copies (HSDP).
        offload: keep the shards in main memory, and gather blocks on the accelerator.

    Raises ValueError where the ranks do not make whole copies, and for networks that rewrite their
    weights as they are called.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    parameters = list(net.parameters())
    if distributed.world_size() == 1 or not parameters:
        return
    require_parts(net)
    device = parameters[0].device.type
    policy = CPUOffloadPolicy(pin_memory=device != "cpu") if offload else OffloadPolicy()
    rows, parts = copies(parts), parts or distributed.world_size()
    names = ("copies", "parts")
    mesh = init_device_mesh(device, (rows, parts), mesh_dim_names=names)
    mesh = mesh if rows > 1 else mesh["parts"]
    for p in parameters:  # FSDP2 takes no other order
        p.data = p.data.contiguous()
    for module in units(net):  # taken apart after each call, or turns would find it whole
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    for name in METHODS:
        if hasattr(net, name):
            register_fsdp_forward_method(net, name)


def require_parts(net: nn.Module) -> None:
    """ValueError for a network that rewrites its weights as it is called."""
    for module in net.modules():
        if getattr(module, "rewrites_weight", False):
            raise ValueError(
                f"{type(module).__name__} rewrites its weights in each step, which parts of them "
                "cannot; leave --shard out"
            )


def units(net: nn.Module) -> list[nn.Module]:
    """The modules of `net` that are gathered by themselves, inner ones first, `net` last.

    Each has the parameters that those before it have not.
    """
    lists = [m for m in net.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    return [*(block for one in reversed(lists) for block in one.children()), net]


def copies(parts: int) -> int:
    """The number of whole copies that the ranks hold of nets in `parts` shards (0: one per rank).

    ValueError where the ranks do not make whole copies.
    """
    parts = parts or distributed.world_size()
    if parts < 1 or distributed.world_size() % parts:
        raise ValueError(
            f"{distributed.world_size()} processes do not make whole copies of nets in {parts} "
            "parts; give --shard a number that divides them"
        )
    return distributed.world_size() // parts
