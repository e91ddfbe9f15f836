"""Files that survive: written whole or not at all, and checked by digest when read.

Everything fewstep stores is safetensors and JSON; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fewstep.bounded import tensors_header


class Damaged(ValueError):
    """A stored file is missing, cut short or altered."""


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def vacant(folder: Path) -> None:
    """A ValueError unless `folder` is missing or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; choose a new or empty folder")


def unchanged(path: Path | str, known: str, found: str) -> str:
    """`found`, the fingerprint of `path` now; ValueError where a run knows it by another."""
    if known not in ("", found):
        raise ValueError(f"{path} no longer holds what the run was started with")
    return found


def origin_of(facts: Any) -> dict[str, Any]:
    """What checkpoints and models say of the run of `facts`, a run.json; {} where it has no id."""
    run = facts.get("run") if isinstance(facts, dict) else None
    if not isinstance(run, dict) or not facts.get("id"):
        return {}
    return {"run": facts["id"], "seed": run.get("seed"), "digests": facts.get("digests") or {}}


def of_run(path: Path, facts: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """A ValueError unless `facts`, the manifest of `path`, say that the run `origin` wrote it.

    origin: {"run": its id, "seed": ..., "digests": of what it rests on}; empty: of any run.
    """
    stored = facts.get("origin")
    stored = stored if isinstance(stored, dict) else {}
    if not origin or stored == origin:
        return
    own, other = (str(said.get("run", "none"))[:8] for said in (origin, stored))
    if own != other:
        raise ValueError(
            f"{path} was written by another run (id {other}, and this run has {own}); move it "
            "out of this folder and put this run's own back"
        )
    wrong = " and ".join(key for key in origin if stored.get(key) != origin[key])
    raise ValueError(
        f"{path} was written with another {wrong} than run.json names; put back the run.json that "
        "belongs to it, or choose another --out folder"
    )


def nothing() -> None:
    """No check before a write."""


def write(path: Path, content: bytes | str) -> None:
    """Write beside, flush to disk, rename: `path` holds the old content or all of the new."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented JSON; NaN and infinity are refused rather than written."""
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; `Damaged` names the file where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not readable JSON ({error})") from None


def write_folder(
    folder: Path,
    files: Mapping[str, bytes],
    facts: Mapping[str, Any],
    check: Callable[[], None] = nothing,
) -> None:
    """A folder of `files` and a manifest with their digests, renamed into place when complete.

    `facts` are stored in the manifest. An existing folder is replaced; until the last moment, and
    after any failure, it is there with its old content. `check` is called before anything is
    written, and again before anything is replaced; what it raises ends the writing.
    """
    check()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        digests = {}
        for name, data in files.items():
            write(partial / name, data)
            digests[name] = hashlib.sha256(data).hexdigest()
        manifest = {"format": 1, **facts, "sha256": digests}
        write(partial / "manifest.json", _manifest(manifest))
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        check()
        if folder.exists():
            folder.replace(old)
        try:
            partial.replace(folder)
        except BaseException:
            if old.exists():
                old.replace(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, sound in itself, or `Damaged`; the other files are not looked at.

    A sound manifest of another format is refused by a plain ValueError: nothing is wrong with it.
    """
    path = folder / "manifest.json"
    facts = read_json(path)
    if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), dict):
        raise Damaged(f"{path} is not a fewstep manifest")
    facts.pop("self", None)
    if path.read_bytes() != _manifest(facts).encode():
        raise Damaged(f"{path} is damaged: its SHA-256 is not the recorded one")
    if facts.get("format") != 1:
        raise ValueError(
            f"{folder} has format {facts.get('format')!r}; this version of fewstep reads 1"
        )
    return facts


def read_folder(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose every file has its recorded digest, or `Damaged`.

    ValueError as `read_manifest`.
    """
    facts = read_manifest(folder)
    for name, expected in facts["sha256"].items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            raise Damaged(f"{path} is missing")
        if digest(path) != expected:
            raise Damaged(f"{path} is damaged: its SHA-256 is not the recorded one")
    return facts


def _manifest(facts: Mapping[str, Any]) -> str:
    """The text of a manifest, which ends with the digest of all the rest of it."""
    text = json.dumps(facts, indent=2, allow_nan=False)
    own = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**facts, "self": own}, indent=2) + "\n"


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file; shared ones are written for each name."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        plain[name] = t.clone() if t.untyped_storage().data_ptr() in storages else t
        storages.add(t.untyped_storage().data_ptr())
    return save(plain)


def unpack(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; `Damaged` where it cannot be read."""
    try:
        tensors_header(path)
        return load(path.read_bytes())
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (SafetensorError, ValueError) as error:
        raise Damaged(f"{path} is not a safetensors file ({error})") from None


def _sync(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
