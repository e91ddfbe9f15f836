"""A pipeline folder, read as data: JSON and safetensors of known classes, no code.

    model_index.json   unet/ (or transformer/)   scheduler/   text_encoder/   tokenizer/   vae/

`open_folder` looks at everything that decides what will be built before anything is built. A
folder with Python files is refused, a class that is not in `fewstep.pipelines.families` is
refused, and weights are read from .safetensors files alone: pickles beside them are not opened.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.files import digest, read_json
from fewstep.pipelines.families import FAMILIES, SCHEDULERS, Family

_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?(\.fp16)?(-\d+-of-\d+)?\.safetensors")
NEVER_LOADED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of published folders that distillation has no use for."""


@dataclass(frozen=True)
class PipelineFolder:
    """A folder that has been looked at."""

    path: Path
    pipeline: str
    """The class of the pipeline, one of `FAMILIES`."""
    parts: Mapping[str, str]
    """Part -> the name of its class; those that are missing are left out."""
    settings: Mapping[str, Any]
    """What else model_index.json says, such as force_zeros_for_empty_prompt."""

    @property
    def family(self) -> Family:
        """What is known of such pipelines."""
        return FAMILIES[self.pipeline]

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of a part without what starts with "_"."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return plain(read_json(self.path / part / name), self.path / part / name)

    def weights(self) -> list[Path]:
        """The network's files: one, or its shards; in half precision if there are no others."""
        home = self.path / self.family.network
        found = [path for path in sorted(home.glob("*.safetensors")) if _WEIGHTS.match(path.name)]
        plain = [path for path in found if ".fp16" not in path.name]
        if not found:
            raise ValueError(
                f"{home} holds no diffusion_pytorch_model.safetensors; save the pipeline with "
                "safe_serialization=True, since pickles are never opened"
            )
        return plain or found

    @property
    def variant(self) -> str | None:
        """ "fp16" where the network's weights are stored under that name alone."""
        return "fp16" if ".fp16" in self.weights()[0].name else None

    @cached_property
    def text_digest(self) -> str:
        """SHA-256 over all files that turn prompts into conditions, names included."""
        return self._digest(sorted(set(self.family.text) & set(self.parts)), self.pipeline)

    @cached_property
    def vae_digest(self) -> str:
        """SHA-256 over all files that turn pictures into latents, names included."""
        return self._digest(["vae"], "")

    def _digest(self, parts: Sequence[str], start: str) -> str:
        total = hashlib.sha256(start.encode())
        for part in parts:
            for path in sorted(p for p in (self.path / part).rglob("*") if p.is_file()):
                if path.suffix in (".json", ".safetensors", ".txt", ".model"):
                    name = path.relative_to(self.path).as_posix()
                    total.update(f"\n{name} {digest(path)}".encode())
        return total.hexdigest()


def is_pipeline(path: Path | str) -> bool:
    """Whether a folder says that it is a diffusers pipeline."""
    return (Path(path) / "model_index.json").is_file()


def open_folder(path: Path | str) -> PipelineFolder:
    """Look at a local pipeline folder; a ValueError says what is missing or not allowed."""
    path = Path(path)
    if not is_pipeline(path):
        raise ValueError(f"{path} is no pipeline folder (no model_index.json in it)")
    index = read_json(path / "model_index.json")
    if not isinstance(index, dict):
        raise ValueError(f"{path / 'model_index.json'} does not describe a pipeline")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise ValueError(
            f"{path} is a {pipeline}; fewstep knows {', '.join(FAMILIES)} and nothing else"
        )
    code = next((p for p in sorted(path.rglob("*.py"))), None)
    if code is not None:
        raise ValueError(f"{path} holds code ({code.relative_to(path)}); remove it first")
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    settings = {k: v for k, v in plain(index, path).items() if k not in parts}
    folder = PipelineFolder(path, pipeline, _allowed(path, pipeline, parts), settings)
    folder.weights()
    return folder


def _allowed(path: Path, pipeline: str, parts: Mapping[str, list[Any]]) -> dict[str, str]:
    """Part -> class, of the parts that will be loaded; all are there and all are known."""
    family = FAMILIES[pipeline]
    known = {
        family.network: (family.network_class, *family.older),
        "vae": family.vae,
        "scheduler": SCHEDULERS,
        **family.text,
    }
    found: dict[str, str] = {}
    for name, entry in parts.items():
        if name in NEVER_LOADED or entry == [None, None]:
            continue
        if name not in known:
            raise ValueError(f"{path}: a {pipeline} has no part {name!r}")
        library, cls = map(str, entry) if len(entry) == 2 else ("", "")
        wanted = known[name]
        if library not in ("diffusers", "transformers") or cls not in wanted:
            raise ValueError(
                f"{path}: {name} is {library}.{cls}, which fewstep does not load; "
                f"it knows {', '.join(wanted)}"
            )
        if not (path / name).is_dir():
            raise ValueError(f"{path} has no folder {name}, which its model_index.json names")
        found[name] = cls
    missing = known.keys() - found.keys() - set(family.optional)
    if missing:
        raise ValueError(f"{path}: a {pipeline} needs {', '.join(sorted(missing))}")
    return found


def plain(config: Any, where: Path) -> dict[str, Any]:
    """A configuration without its private keys; one that asks for other code is refused."""
    if not isinstance(config, dict):
        raise ValueError(f"{where} is not a configuration")
    for key in ("auto_map", "quantization_config"):
        if config.get(key):
            raise ValueError(f"{where} has {key}, which fewstep does not load")
    return {key: value for key, value in config.items() if not key.startswith("_")}
