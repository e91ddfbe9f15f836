"""Which files of a part of a pipeline are its weights: as stock diffusers and transformers say.

    diffusion_pytorch_model.safetensors     or .safetensors.index.json and the shards it names
    model.safetensors                       the same of transformers

A file of another precision has its name, the variant, in the middle: model.fp16.safetensors,
diffusion_pytorch_model.safetensors.index.fp16.json. Where both an index and a single file are
there, diffusers reads the index and transformers the file. A pipeline is read in one variant,
`from_pretrained(folder, variant="fp16")`: in each part that has it, and in plain weights in the
others; so it is none where all parts have plain weights, and else the one that completes them.

Everything that reads weights asks here: loading, digests, checks, plan, inspect and export. What
lies beside and is not read is known too, so that it can be told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.storage.files import read_json
from fewstep.storage.safetensors_header import Tensors, header

Variants = Mapping[str, Path]
"""Variant, "" for plain weights -> the single file or the index that is read for it."""
BASES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""What names of weights begin with."""
KINDS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx")
"""Files that are weights."""
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class Weights:
    """The weight files of one part."""

    files: tuple[Path, ...]
    """One, or the shards."""
    base: str
    variant: str
    """ "" for plain weights."""
    index: Path | None
    unread: tuple[Path, ...]
    """Other weights in the same folder, and their indices."""

    def header(self) -> Tensors:
        """The headers of all files as one; `Damaged` where one is no whole file."""
        types: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            head = header(path)
            types |= head.types
            shapes |= head.shapes
        return Tensors(types, shapes, {})

    def plain_name(self, path: Path) -> str:
        """The name of a file without its variant."""
        return path.name.replace(f".{self.variant}", "", 1) if self.variant else path.name


def variants(home: Path, library: str, names: Iterable[str] | None = None) -> Variants:
    """The variants in which the part in the folder `home` is there; ValueError without any.

    names: the files of that folder, where it is elsewhere and only its listing is here.
    """
    listed = sorted(names if names is not None else (path.name for path in home.iterdir()))
    base = BASES[library]
    single = re.compile(rf"{base}(?:\.([^.]+))?\.safetensors")
    index = re.compile(rf"{base}\.safetensors\.index(?:\.([^.]+))?\.json")
    legacy = re.compile(rf"{base}\.safetensors\.([^.]+)\.index\.json")
    order = [single, legacy, index] if library == "diffusers" else [index, single]
    by_variant: dict[str, Path] = {}
    for pattern in order:  # later ones win
        for name in listed:
            match = pattern.fullmatch(name)
            if match and not _SHARD.search(match[1] or ""):
                by_variant[match[1] or ""] = home / name
    if not by_variant:
        raise ValueError(_nothing(home, base, listed))
    return by_variant


def variant_of(parts: Mapping[Path, Variants]) -> str:
    """The variant that `from_pretrained` is told to find all parts, "" for none; else ValueError.

    parts: folder of a part -> the variants in which it is there.
    """
    lacking = {home: available for home, available in parts.items() if "" not in available}
    if not lacking:
        return ""
    fitting = sorted(set.intersection(*(set(available) for available in lacking.values())))
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(sorted(home.name for home in lacking))
    if fitting:
        raise ValueError(
            f"{next(iter(lacking)).parent} holds {names} in several variants "
            f"({', '.join(fitting)}) and not in plain weights; keep one of them"
        )
    raise ValueError(
        f"{next(iter(lacking)).parent} has no plain weights of {names}, and no one variant has "
        "them all; save the pipeline anew with save_pretrained"
    )


def _nothing(home: Path, base: str, names: Sequence[str]) -> str:
    """What to do about a part without weights."""
    paths = [Path(name) for name in names]
    if any(path.suffix == ".safetensors" and _SHARD.search(path.stem) for path in paths):
        return f"{home} holds shards but no index.json that names them; fetch that too"
    beside = [path.name for path in paths if path.suffix in KINDS]
    holds = f" (but {', '.join(beside[:3])})" if beside else ""
    return (
        f"{home} holds no {base}.safetensors{holds}; save the pipeline with "
        "safe_serialization=True, since pickles are never opened"
    )


def resolve(home: Path, library: str, variant: str) -> Weights:
    """The weights of the part in `home` when its pipeline is read in this variant of `variant_of`.

    Raises ValueError where the index names other than whole files of this folder.
    """
    available = variants(home, library)
    chosen = variant if variant in available else ""
    path = available[chosen]
    index = path if path.suffix == ".json" else None
    files = (path,) if index is None else _shards(index)
    read = {path, *files}
    unread = tuple(
        other
        for other in sorted(home.iterdir())
        if other not in read and (other.suffix in KINDS or ".index." in other.name)
    )
    return Weights(files, BASES[library], chosen, index, unread)


def named_by(index: Path) -> dict[str, str]:
    """Tensor -> the file beside `index` that holds it, as the index says.

    Raises ValueError where it names nothing, or anything but safetensors files of its own folder.
    """
    facts = read_json(index)
    places = facts.get("weight_map") if isinstance(facts, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} names no weights")
    for name in places.values():
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is no safetensors file beside it")
    return places


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names: all there, in its own folder, and as it says."""
    places = named_by(index)
    files = tuple(index.parent / name for name in sorted(set(places.values())))
    held: dict[str, str] = {}
    for path in files:
        for tensor in header(path).shapes:
            if tensor in held:
                raise ValueError(f"{path} and {held[tensor]} both hold {tensor}")
            held[tensor] = path.name
    if held != places:
        wrong = sorted(n for n in held.keys() | places.keys() if held.get(n) != places.get(n))
        raise ValueError(
            f"{index} does not fit its shards in {len(wrong)} tensors, first {wrong[0]}: these "
            "are files of several downloads; fetch the folder anew"
        )
    return files
