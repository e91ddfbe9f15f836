"""A pipeline folder, read as data: JSON and safetensors of known classes, no code.

    model_index.json   unet/ (or transformer/)   scheduler/   text_encoder/   tokenizer/   vae/

`open_folder` looks at everything that decides what will be built before anything is built. A
folder with Python files is refused, a class that is not in `fewstep.teachers.diffusers.families`
is refused, and weights are read from .safetensors files alone: pickles beside them are not opened.
Which files those are is in `fewstep.teachers.diffusers.weight_files`, what a configuration means
in `fewstep.teachers.diffusers.completed_config`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fewstep.storage.files import digest, read_json
from fewstep.storage.safetensors_header import fetched, header
from fewstep.teachers.diffusers.completed_config import completed
from fewstep.teachers.diffusers.families import (
    FAMILIES,
    SCHEDULERS,
    VAES,
    Family,
    VAEKind,
    is_text_class,
)
from fewstep.teachers.diffusers.network import EXTRA, require_library
from fewstep.teachers.diffusers.weight_files import Weights, resolve, variant_of, variants

NEVER_LOADED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of published folders that distillation has no use for."""
REFUSED = (
    *("auto_map", "quantization_config", "transformers_weights", "configuration_files"),
    *("backbone", "use_timm_backbone", "use_pretrained_backbone"),
)
"""Keys of a configuration that ask for other code, other numbers or other files."""
WORDS = (".json", ".txt", ".model", ".jinja")
"""What files of configurations, vocabularies and chat templates end in."""


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline folder whose files were found and whose classes are known."""

    path: Path
    pipeline: str
    """The class of the pipeline, one of `FAMILIES`."""
    parts: Mapping[str, str]
    """Part -> the name of its class; those that are missing are left out."""
    settings: Mapping[str, Any]
    """What else model_index.json says, such as force_zeros_for_empty_prompt."""
    files: Mapping[str, Weights]
    """Part -> its weights, of the parts that have some."""

    @property
    def family(self) -> Family:
        """The entry of `FAMILIES` for this kind of pipeline."""
        return FAMILIES[self.pipeline]

    def config_path(self, part: str) -> Path:
        """The file with the configuration of a part."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return self.path / part / name

    def config(self, part: str) -> dict[str, Any]:
        """The completed configuration of a part that belongs to diffusers.

        Raises ValueError for a file that describes something unknown.
        """
        family, where = self.family, self.config_path(part)
        raw = configuration(where)
        if part == "scheduler":
            return completed(self.parts[part], raw, where, SCHEDULERS)
        network = part == family.network
        known = (family.network_class, *family.older) if network else (self.parts[part],)
        if raw.get("_class_name", known[0]) not in known:
            raise ValueError(f"{where} is that of a {raw['_class_name']}, not of a {known[0]}")
        return completed(known[0], raw, where, known[1:], EXTRA.get(known[0], ()))

    def text_config(self, part: str) -> Any:
        """The completed configuration of a text encoder, an object of transformers."""
        where = self.config_path(part)
        configuration(where)
        cls = getattr(require_library("transformers"), self.parts[part])
        try:
            return cls.config_class.from_pretrained(where.parent, local_files_only=True)
        except Exception as error:  # any error another library raises
            raise ValueError(
                f"{where} is not the configuration of a {cls.__name__}: {first_line(error)}"
            ) from None

    def weights(self) -> list[Path]:
        """The network's files: one, or its shards."""
        return list(self.files[self.family.network].files)

    @property
    def variant(self) -> str | None:
        """The variant that stock diffusers reads the same files by, such as "fp16", or None."""
        return next((w.variant for w in self.files.values() if w.variant), None)

    @property
    def unread(self) -> list[str]:
        """Weights in the folder that are not read, as paths relative to it."""
        return [str(p.relative_to(self.path)) for w in self.files.values() for p in w.unread]

    @property
    def left_out(self) -> list[str]:
        """Optional parts that are missing, which stock diffusers must be given as None."""
        return [part for part in self.family.optional if part not in self.parts]

    @property
    def vae_kind(self) -> VAEKind:
        """How its VAE is read."""
        return VAES[self.parts["vae"]]

    @property
    def encoders(self) -> list[str]:
        """Names of the text encoders in the folder."""
        return [part for part in self.family.text if part in self.files]

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
        for path in self.read(parts):
            name = path.relative_to(self.path).as_posix()
            total.update(f"\n{name} {digest(path)}".encode())
        return total.hexdigest()

    def read(self, parts: Sequence[str]) -> list[Path]:
        """Files of these parts that are read, in order: weights, configurations, vocabularies."""
        files = []
        for part in parts:
            weights = self.files.get(part)
            unread = weights.unread if weights else ()
            for path in sorted(p for p in (self.path / part).rglob("*") if p.is_file()):
                text = path.suffix in WORDS and path not in unread
                if text or (weights and path in weights.files):
                    files.append(path)
        return files


def refuse_single_file(path: Path | str) -> None:
    """Raise ValueError, with the remedy, for a whole pipeline in one file.

    Those are .safetensors or .ckpt; the latter is not opened.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in (".safetensors", ".ckpt"):
        return
    if path.suffix == ".ckpt":
        raise ValueError(
            f"{path} is a pickle, which is not opened, and a pipeline as teacher is a folder; if "
            f"you trust it: diffusers.StableDiffusionPipeline.from_single_file("
            f'"{path.name}").save_pretrained("FOLDER")'
        )
    header(path)
    raise ValueError(
        f"{path} is one file, and a pipeline as teacher is a folder; make one of a checkpoint: "
        f"fewstep convert {path.name} FOLDER"
    )


def is_pipeline(path: Path | str) -> bool:
    """Whether a folder is a diffusers pipeline, by its model_index.json."""
    return (Path(path) / "model_index.json").is_file()


def open_folder(path: Path | str) -> PipelineFolder:
    """Examine a local pipeline folder; ValueError says what is missing or not allowed."""
    path = Path(path)
    pipeline, parts, settings = described(path)
    return PipelineFolder(path, pipeline, parts, settings, _weights(path, pipeline, parts))


def described(path: Path) -> tuple[str, dict[str, str], dict[str, Any]]:
    """What model_index.json says: the pipeline, its parts and their classes, and other settings.

    Raises ValueError for what is not known or not allowed. Weights need not be there.
    """
    if not is_pipeline(path):
        raise ValueError(f"{path} is no pipeline folder (no model_index.json in it)")
    fetched(path / "model_index.json")
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
    return pipeline, _allowed(path, pipeline, parts), settings


def with_weights(pipeline: str, parts: Iterable[str]) -> dict[str, str]:
    """Those of the parts that have weights -> the library that reads them."""
    return {
        part: "transformers" if part in FAMILIES[pipeline].text else "diffusers"
        for part in parts
        if part != "scheduler" and "tokenizer" not in part
    }


def _weights(path: Path, pipeline: str, parts: Mapping[str, str]) -> dict[str, Weights]:
    """The weights of each part; ValueError where they are quantised."""
    homes = with_weights(pipeline, parts)
    variant = variant_of(
        {path / part: variants(path / part, kind) for part, kind in homes.items()}
    )
    by_part = {part: resolve(path / part, kind, variant) for part, kind in homes.items()}
    for part, weights in by_part.items():
        for name, kind in weights.header().types.items():
            if kind in ("I8", "U8", "BOOL") or kind.startswith("F4"):
                raise ValueError(
                    f"{path / part} holds quantised weights ({name} is {kind}), which fewstep "
                    "does not load; take the folder in half or full precision"
                )
    return by_part


def _allowed(path: Path, pipeline: str, parts: Mapping[str, list[Any]]) -> dict[str, str]:
    """Name -> class of the parts that are loaded; ValueError for a missing or unknown one."""
    family = FAMILIES[pipeline]
    known = {
        family.network: (family.network_class, *family.older),
        "vae": family.vae,
        "scheduler": SCHEDULERS,
        **family.text,
    }
    classes: dict[str, str] = {}
    for name, entry in parts.items():
        if name in NEVER_LOADED or entry == [None, None]:
            continue
        if name not in known:
            raise ValueError(f"{path}: a {pipeline} has no part {name!r}")
        origin, cls = map(str, entry) if len(entry) == 2 else ("", "")
        allowed, home = known[name], "transformers" if name in family.text else "diffusers"
        text = name in family.text
        if origin != home or not (cls in allowed or (text and is_text_class(cls, name))):
            what = "tokenizers" if name.startswith("tokenizer") else "models"
            knows = f"the {what} of the installed transformers" if text else ", ".join(allowed)
            raise ValueError(
                f"{path}: {name} is {origin}.{cls}, which fewstep does not load; it knows {knows}"
            )
        if not (path / name).is_dir():
            more = f', or write "{name}": [null, null] there' if name in family.optional else ""
            raise ValueError(
                f"{path} has no folder {name}, which its model_index.json names; fetch that "
                f"too{more}"
            )
        classes[name] = cls
    missing = known.keys() - classes.keys()
    if not classes.keys() & set(family.optional):
        missing -= set(family.optional)
    if missing:
        raise ValueError(f"{path}: a {pipeline} needs {', '.join(sorted(missing))}")
    return classes


def configuration(where: Path) -> dict[str, Any]:
    """The contents of a configuration file; ValueError where it asks for other code."""
    if where.is_file():
        fetched(where)
    config = read_json(where, finite=False)
    plain(config, where)
    return dict(config)


def plain(config: Any, where: Path) -> dict[str, Any]:
    """A configuration without its private keys; one that asks for other code is refused."""
    if not isinstance(config, dict):
        raise ValueError(f"{where} is not a configuration")
    for key in REFUSED:
        if config.get(key):
            raise ValueError(f"{where} has {key}, which fewstep does not load")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def first_line(error: Exception) -> str:
    """The first line of an exception of another library, cut to 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
