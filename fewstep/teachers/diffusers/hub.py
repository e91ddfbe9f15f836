"""A teacher by its name on the Hugging Face hub: hub:ORG/NAME, or hub:ORG/NAME@REVISION.

Fetched are configurations and tokenizers, and of each part the weights that are read: what
`fewstep.teachers.diffusers.weight_files` chooses from the repository's list of files, so a variant
such as fp16 where there are no plain weights. Nothing is fetched that would have to be run or
unpickled. What was fetched before is not fetched again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fewstep.teachers.diffusers.folder import NEVER_LOADED, described, with_weights
from fewstep.teachers.diffusers.network import require_library
from fewstep.teachers.diffusers.weight_files import named_by, variant_of, variants

PREFIX = "hub:"
WORDS = ("model_index.json", "README.md", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")
"""Files that say what the weights are, and how they are read."""
UNWANTED = tuple(f"{part}/*" for part in NEVER_LOADED)


def name_of(folder: Path) -> str:
    """ORG/NAME of a snapshot in the hub's cache, .../models--ORG--NAME/snapshots/COMMIT, or ""."""
    home = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not home.startswith("models--"):
        return ""
    return "/".join(home.removeprefix("models--").split("--", 1))


def local(name: str) -> str:
    """The folder of a pipeline "hub:ORG/NAME[@REVISION]"; any other name as it is.

    Raises ValueError where the hub has no such pipeline, or does not answer.
    """
    if not name.startswith(PREFIX):
        return name
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name[len(PREFIX) :])
    if not match:
        raise ValueError(f"a pipeline on the hub is named {PREFIX}ORG/NAME[@REVISION], got {name}")
    require_library("diffusers")
    from huggingface_hub import snapshot_download

    try:
        words, unwanted = [*WORDS], [*UNWANTED]
        folder = Path(
            snapshot_download(
                match[1], revision=match[2], allow_patterns=words, ignore_patterns=unwanted
            )
        )
        weights = chosen(folder, _listing(match[1], folder))
        snapshot_download(match[1], revision=folder.name, allow_patterns=weights)
    except (OSError, ValueError) as error:  # those of the hub and of the network are OSErrors
        if type(error).__name__ == "GatedRepoError":
            raise ValueError(
                f"{name} is given to those alone who accept its licence: do so at "
                f"https://huggingface.co/{match[1]}, then log in with 'hf auth login'"
            ) from None
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} could not be fetched: {why}; a folder that was fetched otherwise will do too"
        ) from None
    return str(folder)


def _listing(name: str, folder: Path) -> list[str]:
    """The repository's files at the commit of a snapshot; without a network, those here."""
    from huggingface_hub import list_repo_files

    try:
        return list(list_repo_files(name, revision=folder.name))
    except Exception:  # of whichever library makes the connection
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def chosen(folder: Path, files: Sequence[str]) -> list[str]:
    """The weights that are read of a pipeline whose other files are in `folder`.

    files: all of the repository, as paths relative to it. ValueError where they lack weights of a
    part, or the pipeline is not known.
    """
    pipeline, parts, _ = described(folder)
    available = {
        folder / part: variants(
            folder / part, library, [Path(file).name for file in files if _within(file, part)]
        )
        for part, library in with_weights(pipeline, parts).items()
    }
    variant, out = variant_of(available), []
    for home, by_variant in available.items():
        path = by_variant.get(variant, by_variant.get(""))
        assert path is not None
        shards = set(named_by(path).values()) if path.suffix == ".json" else set()
        out += [f"{home.name}/{name}" for name in sorted({path.name, *shards})]
    return out


def _within(file: str, part: str) -> bool:
    return file.rpartition("/")[0] == part
