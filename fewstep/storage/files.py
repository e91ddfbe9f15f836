"""Atomic writes, and digests that are checked when a file is read.

Everything fewstep stores is safetensors and JSON; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fewstep.storage.bounded_reading import json_value, regular, tensors_header

if TYPE_CHECKING:
    from torch import Tensor

LARGEST, LONGEST = 16 << 20, 1 << 20
"""Bytes of a JSON file, and of a line where each is a value, that are read at most."""


class Damaged(ValueError):
    """A stored file is missing, cut short or altered."""


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def require_vacant(folder: Path) -> None:
    """ValueError unless `folder` is missing or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; choose a new or empty folder")


def require_unchanged(path: Path | str, known: str, found: str) -> str:
    """`found`, the fingerprint of `path` now; ValueError where `known` is another one."""
    if known not in ("", found):
        raise ValueError(f"{path} no longer holds what the run was started with")
    return found


def origin_of(facts: Any) -> dict[str, Any]:
    """The origin that checkpoints and models record, from `facts`, the content of a run.json.

    {} where it has no id.
    """
    run = facts.get("run") if isinstance(facts, dict) else None
    if not isinstance(run, dict) or not facts.get("id"):
        return {}
    return {"run": facts["id"], "seed": run.get("seed"), "digests": facts.get("digests") or {}}


def of_run(path: Path, facts: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """ValueError unless `facts`, the manifest of `path`, say that the run `origin` wrote it.

    origin: {"run": its id, "seed": ..., "digests": of the files it depends on}; empty: any run.
    """
    stored = facts.get("origin")
    stored = stored if isinstance(stored, dict) else {}
    if not origin or stored == origin:
        return
    run_id, other = (str(entry.get("run", "none"))[:8] for entry in (origin, stored))
    if run_id != other:
        raise ValueError(
            f"{path} was written by another run (id {other}, and this run has {run_id}); move it "
            "out of this folder and put this run's own back"
        )
    wrong = " and ".join(key for key in origin if stored.get(key) != origin[key])
    raise ValueError(
        f"{path} was written with another {wrong} than run.json names; put back the run.json that "
        "belongs to it, or choose another --out folder"
    )


def nothing() -> None:
    """The default `check` of `write_folder`: checks nothing."""


def write(path: Path, content: bytes | str) -> None:
    """Write beside, flush to disk, rename: `path` holds the old content or all of the new.

    Text is written as UTF-8; the bytes of a name that is none are written as escapes.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a full disk
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def spelled(path: Path) -> Iterator[Path]:
    """`path` for a library that takes only names in UTF-8: itself, or a link to it."""
    if not any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        yield path
        return
    with TemporaryDirectory() as folder:
        link = Path(folder, f"link{path.suffix if path.suffix.isascii() else ''}")
        link.symlink_to(path.absolute())
        yield link


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented JSON; NaN and infinity are refused rather than written."""
    write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, finite: bool = True) -> Any:
    """The JSON value in `path`, read without trust, see `json_value`.

    finite: refuse NaN and infinity, which schedulers of diffusers have. `Damaged` names the file
    where it is missing, larger than `LARGEST`, or broken.
    """
    if not path.exists():
        raise Damaged(f"{path} is missing")
    if not path.is_file():
        raise Damaged(f"{path} is not a regular file")
    try:
        with regular(path) as file:
            data = file.read(LARGEST + 1)
    except ValueError as error:
        raise Damaged(str(error)) from None
    if len(data) > LARGEST:
        raise Damaged(f"{path} is larger than {LARGEST >> 20} MiB, too large for what it holds")
    try:
        return json_value(data, finite=finite)
    except ValueError as error:
        raise Damaged(f"{path} is not readable JSON ({error})") from None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in `path`, one a line; none where it is missing. NaN and infinity are numbers.

    A torn last line is left out, as a process that was killed leaves one; `Damaged` names any
    other line that is no object.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise Damaged(f"{path} is not a regular file")
    with path.open("rb") as file:
        for number, data in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
            try:
                if len(data) > LONGEST:
                    raise ValueError(f"it is longer than {LONGEST >> 20} MiB")
                line = json_value(data) if data.strip() else {}
                if not isinstance(line, dict):
                    raise ValueError("it is no object")
            except ValueError as error:
                if not data.endswith(b"\n") and len(data) <= LONGEST:
                    return
                raise Damaged(f"{path}, line {number} is not readable JSON ({error})") from None
            if line:
                yield line


def write_folder(
    folder: Path,
    files: Mapping[str, bytes],
    facts: Mapping[str, Any],
    check: Callable[[], None] = nothing,
) -> None:
    """Write a folder of `files` and a manifest with their digests, renamed when complete.

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
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**facts, "self": checksum}, indent=2) + "\n"


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file; shared ones are written for each name."""
    from safetensors.torch import save

    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        plain[name] = t.clone() if t.untyped_storage().data_ptr() in storages else t
        storages.add(t.untyped_storage().data_ptr())
    return save(plain)


def unpack(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; `Damaged` where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load

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
