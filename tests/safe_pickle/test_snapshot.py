"""Snapshots are read bit for bit, and nothing in them is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.nets import edm2 as mp
from fewstep.nets.edm_precond import EDMPrecond, VPPrecond, iDDPMPrecond
from fewstep.safe_pickle import Limits, UnsafeSnapshotError, parse_snapshot, read_snapshot
from fewstep.teachers import edm, edm2
from tests import snapshot_writer
from tests.hostile_files import archive, hostile
from tests.pickle_assembler import Raw, call, data, name, network, pickled, storage, tensor, value

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 3,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # zipfile warns of a member written twice
    CORPUS = hostile()
NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any], str]] = {
    "ddpmpp": (EDMPrecond, SMALL | {"model_type": "SongUNet", "augment_dim": 9}, "edm"),
    "ncsnpp": (VPPrecond, SMALL | {"model_type": "SongUNet"} | NCSNPP, "edm"),
    "adm": (iDDPMPrecond, SMALL | {"label_dim": 5}, "edm"),
    "edm2": (mp.Precond, SMALL | {"label_dim": 5, "channels_per_head": 8}, "edm2"),
}


def made(kind: str) -> tuple[nn.Module, dict[str, Any], str]:
    cls, kwargs, form = NETWORKS[kind]
    torch.manual_seed(0)
    net = cls(**kwargs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return net.eval(), kwargs, form


def same(state: Any, net: nn.Module) -> None:
    """Names, order, types and bits."""
    expected = net.state_dict()
    assert list(state) == list(expected)
    for key, tensor_ in state.items():
        assert tensor_.dtype == expected[key].dtype
        assert torch.equal(tensor_, expected[key]), key


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", NETWORKS)
def test_snapshots_are_read_bit_for_bit(kind, protocol, tmp_path):
    net, kwargs, form = made(kind)
    if form == "edm2":
        net = net.half()
    content = snapshot_writer.write(net, kwargs, form, protocol)
    path = tmp_path / "a snapshot.pkl"
    path.write_bytes(content)
    snapshot = read_snapshot(path)
    ema = snapshot.objects["ema"]
    same(ema.state, net)
    assert ema.class_name == type(net).__name__
    assert ema.init_kwargs == kwargs
    assert ema.init_args == ()
    assert ema.source == snapshot_writer.source()
    assert ema.source_sha256 == hashlib.sha256(snapshot_writer.source().encode()).hexdigest()
    assert snapshot.sha256 == hashlib.sha256(content).hexdigest()
    assert (snapshot.kind, snapshot.size) == ("pickle", len(content))
    assert snapshot.settings["dataset_kwargs"]["path"] == "data/cifar10.zip"
    assert snapshot.left == ()
    others = {"edm": {"loss_fn", "augment_pipe"}, "edm2": {"loss_fn", "encoder"}}[form]
    assert set(snapshot.objects) == {"ema"} | others
    assert all(not snapshot.objects[key].state for key in others)
    if form == "edm2":
        arrays = snapshot.objects["encoder"].arrays
        assert torch.equal(arrays["scale"], torch.arange(4.0))
        assert torch.equal(arrays["bias"], torch.ones(1, 4, 1, 1))


@pytest.mark.parametrize("kind", NETWORKS)
def test_rebuilt_networks_compute_the_same(kind):
    net, kwargs, form = made(kind)
    found = parse_snapshot(snapshot_writer.write(net, kwargs, form)).objects["ema"]
    if form == "edm2":
        rebuilt = edm2.build(found.init_kwargs, found.state)
    else:
        rebuilt = edm.build(found.init_kwargs, found.state, class_name=found.class_name)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 5.0])
    labels = torch.tensor([0, 5])
    assert torch.equal(rebuilt(x, t, labels), net(x, t, labels))


def test_training_states_are_read_bit_for_bit():
    net, kwargs, _ = made("ddpmpp")
    snapshot = parse_snapshot(snapshot_writer.write(net, kwargs, "state"))
    same(snapshot.objects["net"].state, net)
    assert snapshot.kind == "archive"
    assert snapshot.left == ("optimizer_state",)


def test_fixtures_would_shout():
    """The negative control: the standard reader does call what these files name."""
    net, kwargs, _ = made("ddpmpp")
    content = snapshot_writer.write(net, kwargs, "edm")
    with snapshot_writer.pretended(), pytest.raises(AssertionError, match=snapshot_writer.CANARY):
        pickle.loads(content)


def test_state_dicts_beside_objects():
    tree = {"ema": network({}), "weights": {"a.b": tensor()}, "step": 7, "odd": [tensor()]}
    snapshot = parse_snapshot(pickled(tree))
    assert torch.equal(snapshot.tensors["weights"]["a.b"], torch.zeros(4))
    assert snapshot.settings == {"step": 7}
    assert snapshot.left == ("odd",)


def test_views_share_their_storage_and_non_persistent_buffers_are_left_out():
    ramp = torch.arange(6.0).numpy().tobytes()
    store = Raw(storage(ramp, count=6).code + b"q\1")
    state = {
        "a": tensor(store, 0, (2, 3), (3, 1)),
        "b": tensor(Raw(b"h\1"), 1, (2, 2), (1, 3)),
        "c": tensor(Raw(b"h\1"), 0, (0, 5), (1, 1)),
    }
    hidden = Raw(b"\x8f(" + value("gone") + b"\x90")
    module = network(state, _buffers={"gone": tensor(), "stays": tensor()},
                     _non_persistent_buffers_set=hidden)  # fmt: skip
    found = parse_snapshot(pickled({"ema": module})).objects["ema"].state
    assert list(found) == ["a", "b", "c", "stays"]
    assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found["b"], torch.tensor([[1.0, 4.0], [2.0, 5.0]]))
    assert found["c"].shape == (0, 5)
    found["a"][0, 1] = 9
    assert found["b"][0, 0] == 9


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Half", torch.float16), ("BFloat16", torch.bfloat16), ("Double", torch.float64),
     ("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8),
     ("Byte", torch.uint8), ("Bool", torch.bool)],
)  # fmt: skip
def test_every_type_of_storage(kind, dtype):
    wanted = torch.tensor([1, 0, 1, 1]).to(dtype)
    content = bytes(wanted.view(torch.uint8).tolist())
    tree = {"ema": network({"w": tensor(storage(content, f"{kind}Storage"))})}
    found = parse_snapshot(pickled(tree)).objects["ema"].state["w"]
    assert found.dtype == dtype
    assert torch.equal(found, wanted)


def test_fortran_arrays_and_numbers_of_numpy():
    array = call(
        "numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), (0,), data(b"b")
    )
    dtype = call("numpy", "dtype", "i2", False, True)
    content = torch.tensor([0, 3, 1, 4, 2, 5], dtype=torch.int16).numpy().tobytes()
    filled = Raw(array.code + value((1, (2, 3), dtype, True, data(content))) + b"b")
    half = call("numpy.core.multiarray", "scalar", dtype, data(b"\7\0"))
    tree = {"ema": network({}, pos=filled, _init_kwargs={"n": half})}
    found = parse_snapshot(pickled(tree)).objects["ema"]
    assert torch.equal(found.arrays["pos"].long(), torch.arange(6).reshape(2, 3))
    assert found.init_kwargs == {"n": 7}


@pytest.mark.parametrize("reason", CORPUS)
def test_hostile_files_are_refused(reason):
    with pytest.raises(UnsafeSnapshotError) as refusal:
        parse_snapshot(CORPUS[reason])
    sentence = str(refusal.value)
    assert 5 < len(sentence) < 400
    assert sentence.isprintable()


def test_the_corpus_is_large_and_its_honest_models_are_read():
    assert len(CORPUS) >= 300
    assert torch.equal(parse_snapshot(archive()).objects["net"].state["w"], torch.zeros(4))
    assert parse_snapshot(pickled({"ema": network({"w": tensor()})})).objects["ema"].state[
        "w"
    ].shape == (4,)


def test_hostile_source_is_text_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "__import__('os').system('touch canary')"
    found = parse_snapshot(pickled({"ema": Raw(network({}).code.replace(
        value("raise SystemExit"), value(source)))})).objects["ema"]  # fmt: skip
    assert found.source == source
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_none(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    empty = tmp_path / "empty"
    empty.touch()
    for path in (pipe, empty, tmp_path, tmp_path / "missing", "/dev/zero", "a\0b"):
        with pytest.raises(UnsafeSnapshotError, match=r"cannot be read|not a regular file"):
            read_snapshot(path)
    small = tmp_path / "small"
    small.write_bytes(pickled({"a": 1}))
    assert read_snapshot(small).settings == {"a": 1}
    with pytest.raises(UnsafeSnapshotError, match="too large"):
        read_snapshot(small, Limits(file_bytes=10))
    small.write_bytes(b"\x80\4cos\nsystem\n.")
    with pytest.raises(UnsafeSnapshotError, match=r"small: the name 'os.system' is not allowed"):
        read_snapshot(small)


def test_one_storage_cannot_be_copied_over_and_over():
    """Eight bytes of the file must not become another kilobyte of tensors each."""
    store = storage(bytes(4096), count=1024)
    once = pickled({"ema": network({"w0": tensor(store, shape=(1024,))})})
    assert parse_snapshot(once).objects["ema"].state["w0"].shape == (1024,)
    load = name("torch.storage", "_load_from_bytes").code
    inner = store.code[len(load) + 1 : -2]
    again = Raw(load + b"(h\1tR")
    first = Raw(load + b"(" + inner + b"q\1tR")
    many = {f"w{i}": tensor(again if i else first, shape=(1024,)) for i in range(100)}
    with pytest.raises(UnsafeSnapshotError, match="bytes of tensors"):
        parse_snapshot(pickled({"ema": network(many)}))


@pytest.mark.slow
def test_fuzz_in_a_fresh_interpreter():
    """2,000 mutations and the corpus: no other error, no import, no execution, bounded memory."""
    command = [sys.executable, "-W", "ignore", "tools/fuzz_snapshot.py", "--count", "2000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    assert report["foreign"] == []
    assert report["events"] == []
    assert done.returncode == 0
    assert report["refused"] + report["read"] == 2000 + report["corpus"]
    assert report["refused"] > 1500
    assert report["read"] > 20
    assert report["grown_mib"] < 256
    assert report["slowest"] < 20
