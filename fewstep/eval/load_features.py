"""Load feature networks from local files: Inception, DINOv2, or your own."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from fewstep.config import load_classes
from fewstep.diffusion.without_values import without_values
from fewstep.eval import inception_torchscript
from fewstep.eval.clip import Aligned, load_clip
from fewstep.eval.dinov2 import load_dinov2
from fewstep.eval.features import Features, PublishedFeatures, channels_first
from fewstep.eval.inception import InceptionV3, resize
from fewstep.safe_pickle.state_dicts import read_state
from fewstep.storage.files import unpack
from fewstep.teachers.checks import load_state

VARIABLE = "FEWSTEP_INCEPTION"


class Inception(PublishedFeatures):
    """The features of the Frechet inception distance, from either published file."""

    family, label, dim = "fid", "inception", 2048

    def __init__(
        self,
        net: InceptionV3 | inception_torchscript.ScriptedInception,
        sha256: str,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(sha256)
        self.net, self.device = net, device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        x = channels_first(pictures, self.device)
        # the full precision of float32: reduced convolutions shift the distance
        with torch.backends.cudnn.flags(True, deterministic=True, allow_tf32=False):
            if not isinstance(self.net, InceptionV3):
                return self.net(x)
            features = self.net((resize(x) - 128) / 128)
        return features, self.net.logits(features)


def load_features(path: str = "", device: torch.device | str = "cpu") -> Features:
    """The feature network that pictures are measured in.

    Arguments:
        path: Inception's weights (.pth, .pt, .safetensors), a folder with a DINOv2 of
            transformers, or an object or class of your own ("my_file.py:Name"); "": the file that
            the environment variable FEWSTEP_INCEPTION names.
        device: where it runs; your own network chooses its device itself.
    Returns a `Features`: uint8 (B, H, W, 1 or 3) -> features (B, dim), and logits or None.
    Raises ValueError where nothing is named, or the file holds something else.
    """
    path = path or os.environ.get(VARIABLE, "")
    if not path:
        raise ValueError(
            f"a feature network is needed: --features PATH, or set {VARIABLE}; "
            "docs/evaluation.md tells where to get one"
        )
    file, _, name = path.rpartition(":")
    if file.endswith(".py"):
        return _own(Path(file), name)
    if Path(path).is_dir():
        return load_dinov2(Path(path), device)
    return _inception(Path(path), device)


def load_aligned(path: str, device: torch.device | str = "cpu") -> Aligned:
    """The network of pictures and texts in `path`: a folder with a CLIP, or my_file.py:Name."""
    file, _, name = path.rpartition(":")
    if not file.endswith(".py"):
        return load_clip(Path(path), device)
    network = _own(Path(file), name)
    if not callable(getattr(network, "text", None)):
        raise ValueError(f"{name} has no text(prompts), so it cannot compare pictures with them")
    return network  # type: ignore[return-value]


def _inception(path: Path, device: torch.device | str) -> Inception:
    """Inception from a file of weights."""
    if path.suffix not in (".pth", ".pt", ".safetensors") or not path.is_file():
        raise ValueError(
            f"{path} is no feature network: expected Inception's weights (.pth, .pt, "
            ".safetensors), a DINOv2 folder, or my_file.py:Name"
        )
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if _is_script(path):
        return Inception(inception_torchscript.ScriptedInception(data, device), sha256, device)
    state = unpack(path) if path.suffix == ".safetensors" else read_state(path)
    counters = {name for name in state if name.endswith(".num_batches_tracked")}
    with without_values():
        net = InceptionV3()
    load_state(net, {k: v for k, v in state.items() if k not in counters}, str(path))
    return Inception(net.requires_grad_(False).eval().to(device), sha256, device)


def _is_script(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which holds code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _own(file: Path, name: str) -> Features:
    """The user's own network: an object, or a class that is called without arguments."""
    named = getattr(load_classes(file), name, None)
    if named is None:
        raise ValueError(f"{file} has no {name}")
    network: Features = named() if isinstance(named, type) else named
    label = getattr(network, "name", None)
    if not (isinstance(label, str) and re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", label)):
        raise ValueError(f"{name}.name should be small letters, digits and dashes, got {label!r}")
    if re.match("inception|dinov2|fid|clip", label):
        raise ValueError(f"{name}.name {label!r} is that of a published network; choose another")
    if not isinstance(getattr(network, "dim", None), int) or not callable(network):
        raise ValueError(f"{name} is no feature network: it needs name, dim and a call")
    return network
