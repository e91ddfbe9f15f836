"""Strangers' state dicts and statistics: read bit-equal, or refused; nothing is executed."""

from __future__ import annotations

import io
import pickle
import random
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.safe_pickle import UnsafeSnapshotError
from fewstep.safe_pickle.state_dicts import parse_state, read_arrays, read_state


def saved(value: Any, archive: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def network() -> nn.Module:
    """Tensors of several types, a shared storage, and a tensor that is a view."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4).double())
    net.register_buffer("short", torch.randn(6).half()[1:].view(5))
    net.register_buffer("turned", torch.randn(2, 3).T)
    net.register_parameter("again", net[0].weight)
    return net


class Shout:
    """Would create a file if it were executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("archive", [False, True])
def test_state_dicts_are_read_bit_equal(archive: bool, tmp_path: Path) -> None:
    state = network().state_dict()
    path = tmp_path / "net.pth"
    path.write_bytes(saved(state, archive))
    found = read_state(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    again = parse_state(saved({"w": nn.Parameter(torch.ones(2))}, archive))
    assert torch.equal(again["w"], torch.ones(2))


@pytest.mark.parametrize("archive", [False, True])
def test_what_is_no_state_dict_is_refused(archive: bool, tmp_path: Path) -> None:
    shout = tmp_path / "executed"
    for value in (
        {"w": torch.ones(2), "x": Shout(shout)},
        Shout(shout),
        nn.Linear(2, 2),
        {"w": 3},
        {},
        [torch.ones(2)],
        {3: torch.ones(2)},
        {"w": {"v": torch.ones(2)}},
        OrderedDict(w=torch.ones(2, dtype=torch.complex64)),
    ):
        with pytest.raises(UnsafeSnapshotError):
            parse_state(saved(value, archive))
    assert not shout.exists()
    for data in (b"", b"\x80", b"PK", b"hello", pickle.dumps({"w": 1}), b"\x80\x02K\x01."):
        with pytest.raises(UnsafeSnapshotError):
            parse_state(data)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(UnsafeSnapshotError, match=r"empty\.pth is empty"):
        read_state(tmp_path / "empty.pth")


def test_sizes_that_lie_are_refused() -> None:
    """In the older format the storages follow the pickle: too few, too long, another count."""
    data = saved({"w": torch.arange(4.0)}, archive=False)
    assert torch.equal(parse_state(data)["w"], torch.arange(4.0))
    count = data.rindex((4).to_bytes(8, "little"))
    for wrong in (
        data[:-1],
        data + b"\0",
        data[: count + 8],
        data[:count] + (5).to_bytes(8, "little") + data[count + 8 :],
        data[:count] + (2**62).to_bytes(8, "little") + data[count + 8 :],
    ):
        with pytest.raises(UnsafeSnapshotError):
            parse_state(wrong)


@pytest.mark.parametrize("archive", [False, True])
def test_damage_ends_in_the_same_refusal(archive: bool) -> None:
    """4,000 mutated files: read or refused, no other exception, and nothing is run or imported."""
    data, chance = saved(network().state_dict(), archive), random.Random(int(archive))
    events: list[str] = []

    def watch(event: str, args: Any) -> None:
        if watching and event in ("exec", "compile", "import", "subprocess.Popen", "open"):
            events.append(event)

    watching = False
    sys.addaudithook(watch)
    parse_state(data)
    read = 0
    for _ in range(2000):
        wrong = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            wrong[chance.randrange(min(len(wrong), 3000))] = chance.randrange(256)
        if chance.random() < 0.2:
            del wrong[chance.randrange(len(wrong)) :]
        watching = True
        try:
            parse_state(bytes(wrong))
            read += 1
        except UnsafeSnapshotError:
            pass
        finally:
            watching = False
    assert events == []
    assert read < 1000


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_statistics_are_read(protocol: int, tmp_path: Path) -> None:
    """As EDM2 writes them: a count and dictionaries of arrays, in C or Fortran order."""
    chance = np.random.default_rng(0)
    sigma = chance.standard_normal((3, 3))
    stats = {
        "num_images": 5,
        "fid": {"mu": chance.standard_normal(3), "sigma": sigma},
        "fd_dinov2": {"mu": np.ones(2, np.float32), "sigma": np.asfortranarray(sigma)},
    }
    path = tmp_path / "ref.pkl"
    path.write_bytes(pickle.dumps(stats, protocol))
    found = read_arrays(path)
    assert found["num_images"] == 5
    assert np.array_equal(found["fid"]["sigma"].numpy(), sigma)
    assert np.array_equal(found["fd_dinov2"]["sigma"].numpy(), sigma)
    assert found["fd_dinov2"]["mu"].dtype == torch.float32
    shout = tmp_path / "executed"
    for wrong in ({"fid": Shout(shout)}, [1], {"a": {"b": {"c": 1}}}, {1: 2}):
        path.write_bytes(pickle.dumps(wrong, protocol))
        with pytest.raises(UnsafeSnapshotError, match=r"ref\.pkl: "):
            read_arrays(path)
    assert not shout.exists()
