"""Reads mutated snapshots and reports what happened, as JSON.

    python tools/fuzz_snapshot.py --count 100000 --seed 0

Every file must either be read or be refused with UnsafeSnapshotError; nothing may be imported,
compiled, executed or opened meanwhile, as an audit hook of the interpreter would see. The exit
status is 1 if any of that fails. Run it from the root of the repository.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from fewstep.nets.edm2 import Precond
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.safe_pickle import UnsafeSnapshotError, parse_snapshot
from tests import snapshot_writer
from tests.hostile_files import archive, hostile
from tests.pickle_assembler import call, data, name, network, pickled, tensor

BANNED = (
    "import",
    "exec",
    "compile",
    "open",
    "marshal",
    "code.__new__",
    "pickle.",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "shutil.",
    "tempfile.",
    "urllib.",
    "webbrowser.",
    "pty.",
    "fcntl.",
    "signal.",
    "mmap.",
    "sys._getframe",
    "cpython.run",
)
_seen: list[str] = []
_watching = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event.startswith(BANNED):
        _seen.append(f"{event} {str(args)[:100]}")


def seeds() -> list[bytes]:
    """Honest files: small ones by hand, larger ones as the projects write them."""
    torch.manual_seed(0)
    small = {"img_resolution": 4, "img_channels": 1, "model_channels": 4, "channel_mult": [1]}
    small |= {"num_blocks": 0, "attn_resolutions": []}
    edm = EDMPrecond(**small, model_type="SongUNet")
    edm2 = Precond(**small, label_dim=2).half()
    weights = {"weight": tensor(), "bias": tensor(shape=(2, 2), stride=(2, 1))}
    scalar = call(
        "numpy.core.multiarray", "scalar", call("numpy", "dtype", "f8", 0, 1), data(bytes(8))
    )
    module = name("torch.nn.modules.container", "ModuleDict")
    by_hand = pickled({"ema": network(weights, {"a": network({})}), "x": [scalar], "y": module})
    written = [snapshot_writer.write(edm, small, "edm", p) for p in (2, 4)]
    written += [
        snapshot_writer.write(edm2, small, "edm2", 5),
        snapshot_writer.write(edm, small, "state"),
    ]
    return [by_hand, archive()] * 8 + written


def mutate(rng: random.Random, files: list[bytes]) -> bytes:
    """One of the files with one to four changes."""
    content = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, length = rng.randrange(len(content) + 1), rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(8):
            case 0:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                content[at : at + 1] = rng.choice(
                    b"RbcQ(tu}]0.\x93\x81\x94h)\x85\x86\x87"
                ).to_bytes(1, "big")
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = content[at : at + length] * rng.choice((1, 2, 1000))
            case 4:
                content[at:at] = rng.randbytes(length)
            case 5:
                number = rng.choice((0, 1, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
                content[at : at + length] = number.to_bytes(8, "little")[:length]
            case 6:
                other = rng.choice(files)
                start = rng.randrange(len(other))
                content[at:at] = other[start : start + 8 * length]
            case _:
                if rng.random() < 0.1:
                    del content[at:]
                elif at < len(content):
                    content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


def run(count: int, seed: int) -> dict[str, Any]:
    """Read the hostile corpus and `count` mutated files."""
    global _watching
    rng, honest = random.Random(seed), seeds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corpus = list(hostile().values())
    for content in honest:
        parse_snapshot(
            content
        )  # must be readable; also lets torch import what it imports on first use
    sys.addaudithook(_audit)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report: dict[str, Any] = {"count": count, "corpus": len(corpus), "refused": 0, "read": 0}
    report |= {"foreign": [], "slowest": 0.0}
    for index in range(count + len(corpus)):
        content = corpus[index] if index < len(corpus) else mutate(rng, honest)
        start = time.perf_counter()
        _watching = True
        try:
            parse_snapshot(content)
            outcome = "read"
        except UnsafeSnapshotError:
            outcome = "refused"
        except BaseException as error:
            outcome = "foreign"
            foreign = f"{type(error).__name__}: {error}"
        _watching = False
        if outcome == "foreign":
            report["foreign"].append(foreign[:200])
        else:
            report[outcome] += 1
        report["slowest"] = max(report["slowest"], time.perf_counter() - start)
    report["events"] = _seen[:100]
    report["grown_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = run(options.count, options.seed)
    print(json.dumps(result))
    sys.exit(bool(result["foreign"] or result["events"]))
