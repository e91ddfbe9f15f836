"""What a result depends on besides its settings: versions and hardware."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("fewstep", "torch", "numpy", "safetensors", "pillow", "scikit-learn", "diffusers")


def environment() -> dict[str, str]:
    """Versions of libraries and a line about the machine, without names or paths."""
    import torch

    facts = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue
    facts["cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0)
    facts["threads"] = str(torch.get_num_threads())
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts["byteorder"] = sys.byteorder
    return facts
