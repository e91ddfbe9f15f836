"""The parts of a folder as objects of diffusers and transformers, in float32.

Files are chosen by `fewstep.teachers.diffusers.weight_files`; what their names mean is left to the
libraries. Stock fills a tensor that no file has with noise, and says so in a warning: here it is
refused. Each part can be had on the device "meta", from headers alone, which is how it is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.storage.safetensors_header import fetched
from fewstep.teachers.diffusers.folder import WORDS, PipelineFolder, first_line
from fewstep.teachers.diffusers.network import require_library
from fewstep.teachers.diffusers.weight_files import Weights

Shapes = Mapping[str, tuple[int, ...]]


def tensors(weights: Weights, meta: bool = False) -> dict[str, Tensor]:
    """The tensors of a part under the names that its files have; meta: without numbers."""
    if meta:
        shapes = weights.header().shapes
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    from safetensors.torch import load_file

    files = [load_file(path) for path in weights.files]
    return {name: t for file in files for name, t in file.items()}


def stored(weights: Weights, *names: str) -> list[Tensor]:
    """Tensors of a part by name, in float32; ValueError where a file has them not."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in weights.files:
        with safe_open(path, "pt") as file:
            here = set(names) & set(file.keys())
            found |= {name: file.get_tensor(name).float() for name in here}
    if lacking := [name for name in names if name not in found]:
        raise ValueError(f"{weights.files[0]} has no {lacking[0]}, which its pipeline reads")
    return [found[name] for name in names]


def text_encoder(folder: PipelineFolder, part: str, meta: bool = False) -> Any:
    """A text encoder; ValueError where its weights are not those of its configuration."""
    weights, home = folder.files[part], folder.path / part
    config = folder.text_config(part)
    cls = getattr(require_library("transformers"), folder.parts[part])
    state = tensors(weights, meta)
    more = {"device_map": "meta"} if meta else {}
    try:
        net, loading = cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **more,
        )
    except Exception as error:  # whatever another library raises about a stranger's file
        raise ValueError(f"{home} holds no usable text encoder: {first_line(error)}") from None
    expected = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    wrong = {n: ("nothing", expected.get(n, "something")) for n in loading["missing_keys"]}
    wrong |= {n: (tuple(stored), tuple(shape)) for n, stored, shape in loading["mismatched_keys"]}
    _refuse(home, wrong)
    return net.requires_grad_(False).eval()


def vae(folder: PipelineFolder, meta: bool = False) -> Any:
    """The VAE; ValueError where its weights are not those of its configuration."""
    net = built(folder.parts["vae"], folder.config("vae"), folder.path / "vae", meta)
    weights = folder.files["vae"]
    state = tensors(weights, meta)
    if weights.index is None:
        net._fix_state_dict_keys_on_load(state)  # of attention as it was named in 2022
    expected = net.state_dict()
    fit(expected, {n: t for n, t in state.items() if n in expected}, folder.path / "vae")
    if not meta:
        net.load_state_dict({name: state[name].float() for name in expected})
    return net.requires_grad_(False).eval()


def built(class_name: str, config: Mapping[str, Any], home: Path, meta: bool) -> Any:
    """A network of diffusers of this configuration, whose numbers mean nothing yet."""
    cls = getattr(require_library("diffusers"), class_name)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
            return cls.from_config(dict(config))
    except Exception as error:  # whatever a constructor raises about a stranger's numbers
        raise ValueError(f"{home}: {class_name} cannot be built so: {first_line(error)}") from None


def fit(wanted: Mapping[str, Tensor], came: Mapping[str, Tensor], home: Path) -> None:
    """A ValueError unless the tensors that came are those that are wanted."""
    want = {name: tuple(t.shape) for name, t in wanted.items()}
    have = {name: tuple(t.shape) for name, t in came.items()}
    names = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
    _refuse(home, {n: (have.get(n, "nothing"), want.get(n, "nothing")) for n in names})


def _refuse(home: Path, wrong: Mapping[str, tuple[Any, Any]]) -> None:
    """A ValueError where there are tensors (found, expected) that do not fit."""
    if wrong:
        name = min(wrong)
        stored, expected = wrong[name]
        raise ValueError(
            f"{home}: the weights do not fit the configuration in {len(wrong)} places, first "
            f"{name}: expected {expected}, found {stored}"
        )


def tokenizer(folder: PipelineFolder, part: str) -> Any:
    """A tokenizer; ValueError where a file of its vocabulary is missing or broken.

    transformers makes an empty vocabulary where there is no file of it.
    """
    home = folder.path / part
    cls = getattr(require_library("transformers"), folder.parts[part])
    names = dict(cls.vocab_files_names)
    fast = names.pop("tokenizer_file", "tokenizer.json")
    whole: Iterable[str] = names.values() or ["tokenizer.model"]
    if strange := [name for name in whole if Path(name).suffix not in WORDS]:
        raise ValueError(
            f"{home}: a {cls.__name__} reads {strange[0]}, which fewstep does not; it reads "
            f"vocabularies that end in {', '.join(WORDS)}"
        )
    present = [name for name in (fast, *whole) if (home / name).is_file()]
    for name in (*present, "tokenizer_config.json"):
        if (home / name).is_file():
            fetched(home / name)
    if fast not in present and not set(whole) <= set(present):
        raise ValueError(
            f"{home} has no vocabulary: it needs {fast}, or {' and '.join(whole)}; fetch them "
            "from where the pipeline is from"
        )
    try:
        return cls.from_pretrained(home, local_files_only=True)
    except Exception as error:  # whatever another library raises about a stranger's file
        raise ValueError(f"{home} holds no usable tokenizer: {first_line(error)}") from None
