"""What an hour of training left, in one file: autoencoder, teacher's U-Net and judge.

With them `python -m examples.scenes --taught` begins at the students. The weights are stored in
half precision: 2^-11 of each, which no score here can hear.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

from fewstep.storage.files import write

FILE = Path(__file__).with_name("trained.safetensors")


def keep(parts: dict[str, nn.Module], file: Path = FILE) -> None:
    """Write the weights of networks by their names."""
    weights = {
        f"{name}/{key}": value.half().contiguous()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    write(file, save(weights))


def taught(name: str, part: Any, file: Path = FILE) -> Any:
    """`part` with the weights that were kept under `name`; ValueError where they do not fit."""
    if not file.is_file():
        raise ValueError(f"there is no file {file} of trained weights; leave out --taught")
    prefix = f"{name}/"
    weights = {
        key.removeprefix(prefix): value.float()
        for key, value in load_file(file).items()
        if key.startswith(prefix)
    }
    try:
        part.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"{file} has a {name} of other sizes than {__package__}.sizes") from None
    return part.eval()
