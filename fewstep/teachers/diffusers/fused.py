"""A pipeline with a LoRA fused into its weights, as a folder: a fine-tune that can be a teacher.

Stock diffusers reads the file (its own names, or kohya's), fuses it into network and text
encoders, and what it changed is written; all else is copied from the base.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.storage.files import digest, read_json, write_json
from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.load import network
from fewstep.teachers.diffusers.text_and_vae import TextAndVAE

FACTS = "fused.json"
"""What the folder was made of."""
WRONG = (ValueError, KeyError, IndexError, TypeError, AttributeError)
"""What the loader of stock diffusers raises for a file that it cannot use."""


def fuse(base: Path, lora: Path, out: Path, scale: float = 1.0) -> Path:
    """Write the pipeline `base` with the adapters of the file `lora` fused as the folder `out`.

    A folder that was made of the same before is left as it is. Raises ValueError where the file is
    no adapter of this pipeline, peft is missing, or `out` holds something else.
    """
    folder = open_folder(base)
    if not lora.is_file():
        raise ValueError(f"there is no file {lora}; name the .safetensors file of a LoRA")
    weights = {path.name: digest(path) for path in folder.weights()}
    facts = {"base": weights, "lora": digest(lora), "scale": scale}
    if (out / FACTS).is_file() and read_json(out / FACTS) == facts:
        return out
    if out.exists():
        raise ValueError(f"{out} is in use; remove it, or choose another --out")
    stock = TextAndVAE(folder)
    if not hasattr(stock.kind, "load_lora_weights"):
        raise ValueError(f"diffusers has no adapters for {folder.pipeline}")
    pipe = stock.pipeline(network(folder))
    named = {part: getattr(pipe, part) for part in (folder.family.network, *folder.encoders)}
    before = {part: copy.deepcopy(net.state_dict()) for part, net in named.items()}
    try:
        pipe.load_lora_weights(
            str(lora.parent), weight_name=lora.name, local_files_only=True, adapter_name="fused"
        )
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
    except (*WRONG, RuntimeError, OSError, ImportError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{lora} is no LoRA of {folder.path}: {why}") from None
    changed = [part for part, net in named.items() if _moved(before[part], net)]
    if not changed:
        raise ValueError(
            f"{lora} changes no weight of {folder.path}: it is of another model, or is empty"
        )
    partial, where = out.with_name(f".{out.name}.partial"), str(folder.path)
    shutil.rmtree(partial, ignore_errors=True)
    left = shutil.ignore_patterns("*.safetensors", "*.bin", "*.ckpt", "*.gguf", *changed)
    shutil.copytree(
        folder.path, partial, ignore=lambda at, names: left(at, names) if at == where else ()
    )
    for part in changed:
        named[part].save_pretrained(partial / part, safe_serialization=True)
    write_json(partial / FACTS, facts)
    partial.rename(out)
    return out


def _moved(before: Mapping[str, Tensor], net: nn.Module) -> bool:
    """Whether a weight of the network is another than before."""
    return any(not torch.equal(before[name], t) for name, t in net.state_dict().items())
