"""A teacher by its name on the Hugging Face hub: hub:ORG/NAME, or hub:ORG/NAME@REVISION.

Fetched are configurations, safetensors and tokenizers of the parts, in full precision, and
nothing that would have to be run or unpickled. What was fetched before is not fetched again.
"""

from __future__ import annotations

import re
from pathlib import Path

from fewstep.teachers.diffusers.network import require_library

PREFIX = "hub:"
WANTED = ("model_index.json", "README.md", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors")
UNWANTED = ("*.fp16.*", "*.bf16.*", "*.non_ema.*", "safety_checker/*", "feature_extractor/*")


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
        return str(
            snapshot_download(
                match[1],
                revision=match[2],
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
            )
        )
    except (OSError, ValueError) as error:  # those of the hub and of the network are OSErrors
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} could not be fetched: {why}; a folder that was fetched otherwise will do too"
        ) from None
