"""Files that must be refused, each for a reason of its own."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from tests.pickle_assembler import (
    Raw,
    call,
    data,
    module,
    name,
    network,
    pickled,
    storage,
    tensor,
    value,
)
from tests.pickle_gadgets import gadgets


def _operations() -> dict[str, bytes]:
    bodies = {
        "INST": b"(X\2\0\0\0idios\nsystem\n",
        "OBJ": b"(cos\nsystem\no",
        "PERSID": b"P0\n",
        "BINPERSID": b"N" + b"Q",
        "STRING": b"S'a'\n",
        "UNICODE": b"Va\n",
        "INT": b"I1\n",
        "LONG": b"L1L\n",
        "LONG4": b"\x8b\1\0\0\0\1",
        "FLOAT": b"F1\n",
        "EXT1": b"\x82\1",
        "EXT2": b"\x83\1\0",
        "EXT4": b"\x84\1\0\0\0",
        "NEXT_BUFFER": b"\x97",
        "READONLY_BUFFER": b"N\x98",
        "FROZENSET": b"(\x91",
        "NEWOBJ_EX": name("collections", "OrderedDict").code + b")}\x92",
        "GET": b"g0\n",
        "PUT": b"Np0\n",
        "DICT": b"(d",
        "LIST": b"(l",
        "unknown": b"\xff",
        "protocol 0": b"\x80\0N",
        "protocol 6": b"\x80\6N",
        "empty stack": b"0",
        "no mark": b"t",
        "append to nothing": b"Na",
        "append to a tuple": b")Na",
        "append to a dictionary": b"}Na",
        "item of a list": b"]NNs",
        "odd items": b"}(Nu",
        "add to a list": b"](N\x90",
        "no memo": b"h\5",
        "two results": b"NN",
        "mark as result": b"(",
        "call of a number": b"K\1)R",
        "call with a list": name("collections", "OrderedDict").code + b"]R",
        "new of a number": b"K\1)\x81",
        "name of a number": b"K\1K\1\x93",
        "endless name": b"c" + b"a" * 600 + b"\nb\n",
        "name beyond ASCII": b"c\xc3\xa4\nb\n",
        "text not UTF-8": b"X\1\0\0\0\xff",
        "text too long": b"X\xff\xff\xff\x7fa",
        "bytes too long": b"\x8e" + b"\xff" * 8,
        "integer too long": b"\x8a\xff" + b"\1" * 255,
        "key of a tuple": value({"a": {(): 1}}),
        "key of a list": value({"a": Raw(b"}]Ns")}),
        "key of a float": value({"a": {1.5: 1}}),
        "key too large": value({"a": {2**61 - 1: 1}}),
        "set of tuples": value({"a": Raw(b"\x8f()\x90")}),
    }
    return {f"operation {k}": b"\x80\4" + body + b"." for k, body in bodies.items()}


def _doubling(levels: int) -> bytes:
    """A network whose every module holds the next one twice."""
    code = value(network({}))
    for _ in range(levels):
        inner = Raw(b"h\1")
        code += b"q\1" + b"0" + value(network({}, {"a": inner, "b": inner}))
    return b"\x80\4" + b"}X\3\0\0\0ema" + code + b"s."


_LAYER = name("torch.nn.modules.linear", "Linear")
_STORAGE = ("storage", name("torch", "FloatStorage", modern=False), "7", "cpu", 4)
_TWICE = b"\x80\2" + 2 * (value(_STORAGE) + b"Q") + b"0."


def _cycle() -> bytes:
    """A module that holds itself."""
    children = Raw(b"}q\1")
    code = value(network({}, children)) + b"q\2" + b"h\1" + value("a") + b"h\2s0"
    return b"\x80\4}" + value("ema") + code + b"s."


def _tensors() -> dict[str, Any]:
    return {
        "hooks": network({"w": tensor(hooks={"a": 1})}),
        "stride 0": network({"w": tensor(shape=(1 << 30,), stride=(0,))}),
        "beyond storage": network({"w": tensor(offset=1)}),
        "beyond by stride": network({"w": tensor(stride=(2,))}),
        "negative offset": network({"w": tensor(offset=-4)}),
        "negative shape": network({"w": tensor(shape=(-4,))}),
        "huge shape": network({"w": tensor(shape=(1 << 39, 0, 1 << 39), stride=(1, 1, 1))}),
        "shape of floats": network({"w": tensor(shape=(4.0,))}),
        "shape of bools": network({"w": tensor(shape=(True,))}),
        "shape is a list": network({"w": tensor(shape=[4])}),
        "shape without stride": network({"w": tensor(stride=())}),
        "nine dimensions": network({"w": tensor(shape=(1,) * 9, stride=(1,) * 9)}),
        "tensor of text": network({"w": tensor("text")}),
        "bool of 2": network({"w": tensor(storage(b"\2" * 4, "BoolStorage"))}),
        "storage too short": network({"w": tensor(storage(bytes(15)))}),
        "storage too long": network({"w": tensor(storage(bytes(17)))}),
        "storage count": network({"w": tensor(storage(count=5))}),
        "storage negative": network({"w": tensor(storage(b"", count=-1))}),
        "storage magic": network({"w": tensor(storage(magic=pickled(1, 2)))}),
        "storage version": network({"w": tensor(storage(version=pickled(1.0, 2)))}),
        "storage big-endian": network({"w": tensor(storage(facts=pickled({"little_endian": 0})))}),
        "storage facts": network({"w": tensor(storage(facts=pickled([])))}),
        "storage keys": network({"w": tensor(storage(keys=pickled(["8"])))}),
        "storage is a number": network({"w": tensor(storage(object=pickled(1)))}),
        "storage empty": network({"w": tensor(storage(object=b""))}),
        "storage kind": network({"w": tensor(storage(kind="UntypedStorage"))}),
        "storage fills": network({"w": tensor(storage(object=b"\x80\2}}b."))}),
        "two storages": network({"w": tensor(storage(object=_TWICE))}),
        "storage of text": call("torch.storage", "_load_from_bytes", "text"),
    }


def _objects() -> dict[str, Any]:
    array = call(
        "numpy._core.multiarray", "_reconstruct", name("numpy", "ndarray"), (0,), data(b"b")
    )

    def filled(kind: str, shape: Any, content: bytes, end: str = "<") -> Raw:
        dtype = Raw(call("numpy", "dtype", kind, False, True).code + value(
            (3, end, None, None, None, -1, -1, 0)) + b"b")  # fmt: skip
        return Raw(array.code + value((1, shape, dtype, False, data(content))) + b"b")

    return {
        "version 5": module({}, version=5),
        "version true": module({}, version=True),
        "another type": module({}, type="function"),
        "more fields": module({}, more=1),
        "class name": module({}, class_name="a.b"),
        "class name of bytes": module({}, class_name=data(b"a")),
        "source of bytes": module({}, module_src=data(b"a")),
        "state of nothing": module(Raw(b"N")),
        "kwargs of tensors": network({}, _init_kwargs={"a": tensor()}),
        "kwargs of numbers": network({}, _init_kwargs={1: 2}),
        "kwargs a list": network({}, _init_kwargs=[]),
        "too many kwargs": network({}, _init_kwargs={"a": [0] * 20_000}),
        "deep kwargs": network({}, _init_kwargs={"a": Raw(b"]" * 100 + b"a" * 99)}),
        "parameter of text": network({"w": "text"}),
        "parameter with dot": network({"a.b": tensor()}),
        "parameter 1": network({1: tensor()}),
        "long name": network({"n" * 600: tensor()}),
        "parameters a list": network([]),
        "child of text": network({}, {"a": "text"}),
        "ndarray called": call("numpy", "ndarray", (1,)),
        "dtype of objects": call("numpy", "dtype", "O8", False, True),
        "dtype big-endian": call("numpy", "dtype", ">f8", False, True),
        "array big-endian": filled("f4", (1,), bytes(4), ">"),
        "array too short": filled("f4", (2,), bytes(4)),
        "array negative": filled("f4", (-1, -1), bytes(4)),
        "array of text": Raw(array.code + value((1, (1,), "f4", False, "abcd")) + b"b"),
        "array of two": Raw(array.code + value((1, 2)) + b"b"),
        "scalar too long": call("numpy.core.multiarray", "scalar",
                                call("numpy", "dtype", "f8", False, True), data(bytes(9))),
        "encode": call("_codecs", "encode", "a", "rot13"),
        "encode beyond": call("_codecs", "encode", "\u1234", "latin1"),
        "set of a set": call("builtins", "set", {}),
        "pairs of one": call("collections", "OrderedDict", [["a"]]),
        "dictionary with state": Raw(value({}) + value({"a": 1}) + b"b"),
        "tensor with state": Raw(tensor().code + value({"a": 1}) + b"b"),
        "layer with arguments": Raw(_LAYER.code + value((1,)) + b"\x81"),
        "layer called": call("torch.nn.modules.linear", "Linear", 1, 1),
        "layer of text": Raw(_LAYER.code + b")\x81" + value("a") + b"b"),
        "name with dots": name("torch.nn.modules.linear", "Linear.__init__"),
    }  # fmt: skip


def _structures() -> dict[str, bytes]:
    trees = _tensors() | _objects()
    files = {key: pickled({"ema": tree}) for key, tree in trees.items()}
    files["code among values"] = pickled({"a": [name("torch", "load")]})
    files["entries"] = pickled({f"e{i}": 0 for i in range(200)})
    files["entry 1"] = pickled({1: network({})})
    files["a list"] = pickled([network({})])
    files["a tensor"] = pickled(tensor())
    files["shared modules"] = _doubling(60)
    files["cycle of modules"] = _cycle()
    files["trailing"] = pickled({"a": 1}) + b"."
    files["no stop"] = pickled({"a": 1})[:-1]
    files["operations"] = b"\x80\4}" + b"N0" * 600_000 + b"."
    files["containers"] = b"\x80\4}" + b"}0" * 400_000 + b"."
    files["memo"] = b"\x80\4}" + b"\x94" * 600_000 + b"."
    files["deep module"] = pickled({"ema": _chain(100)})
    return files


def _chain(depth: int) -> Raw:
    inner = network({})
    for _ in range(depth):
        inner = network({}, {"a": inner})
    return inner


def _files() -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"hello world, this is no snapshot",
        "gzip": b"\x1f\x8b\x08\0" + bytes(60),
        "safetensors": struct.pack("<Q", 2) + b"{}",
        "executable": b"\x7fELF" + bytes(60),
        "protocol 0 text": b"cos\nsystem\n(S'touch canary'\ntR.",
        "half a zip": b"PK\3\4" + bytes(60),
    }


def archive(change: Callable[[dict[str, bytes]], None] | None = None, **options: Any) -> bytes:
    """An archive as torch.save makes them, after a change to its members."""
    pid = ("storage", name("torch", "FloatStorage", modern=False), "0", "cpu", 4)
    weight = tensor(Raw(value(pid) + b"Q"))
    members = {
        "archive/data.pkl": pickled({"net": network({"w": weight})}, 2),
        "archive/byteorder": b"little",
        "archive/data/0": bytes(16),
        "archive/version": b"3\n",
    }
    if change is not None:
        change(members)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", options.get("compression", zipfile.ZIP_STORED)) as file:
        for key, content in members.items():
            file.writestr(key.removesuffix("#"), content)
    return out.getvalue()


def _archives() -> dict[str, bytes]:
    def dropped(key: str) -> Callable[[dict[str, bytes]], None]:
        return lambda members: members.pop(key) and None

    def added(key: str, content: bytes = b"x") -> Callable[[dict[str, bytes]], None]:
        return lambda members: members.update({key: content})

    whole = archive()
    twice = {
        kind: call(
            "torch._utils",
            "_rebuild_tensor_v2",
            Raw(value(("storage", name("torch", kind, modern=False), "0", "cpu", 4)) + b"Q"),
            0,
            (4,),
            (1,),
            False,
            None,
        )
        for kind in ("FloatStorage", "IntStorage")
    }
    other = pickled({"net": network(twice)}, 2)
    flipped = bytearray(whole)
    flipped[whole.index(bytes(16))] = 1
    locked = bytearray(whole)
    locked[whole.index(b"PK\1\2") + 8] |= 1
    gadget = pickled({"net": call("os", "system", "touch canary")})
    inside = pickled({"net": network({"w": tensor()})})
    return {
        "archive compressed": archive(compression=zipfile.ZIP_DEFLATED),
        "archive without pickle": archive(dropped("archive/data.pkl")),
        "archive without data": archive(dropped("archive/data/0")),
        "archive short data": archive(added("archive/data/0", bytes(15))),
        "archive stray": archive(added("etc/passwd")),
        "archive two pickles": archive(added("archive/b/data.pkl")),
        "archive big-endian": archive(added("archive/byteorder", b"big")),
        "archive with gadget": archive(added("archive/data.pkl", gadget)),
        "archive with storage inside": archive(added("archive/data.pkl", inside)),
        "archive trailing": archive(added("archive/data.pkl", pickled({}) + b"N.")),
        "archive twice": archive(added("archive/version#")),
        "archive with a storage of two types": archive(added("archive/data.pkl", other)),
        "archive cut": whole[:-10],
        "archive damaged": bytes(flipped),
        "archive locked": bytes(locked),
        "archive end only": whole[whole.index(b"PK\5\6"):],
    }  # fmt: skip


def hostile() -> dict[str, bytes]:
    """All of them, by what is wrong."""
    return gadgets() | _operations() | _structures() | _files() | _archives()
