"""fewstep doctor: what is installed, what the machine offers, whether the mathematics holds."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import verb_parser
from fewstep.runs.environment import environment
from fewstep.signals import last_words

FREE = 2 << 30
"""Bytes of disk below which a warning is due."""


def run(args: list[str]) -> int:
    """Check the installation and the machine."""
    verb_parser(
        "doctor", "Check the installation and the machine; exit code 1 if something is wrong."
    ).parse_args(args)
    facts, problems = examine()
    text = "\n".join(f"{name:14} {value}" for name, value in facts.items())
    result({**facts, "problems": problems}, text)
    for problem in problems:
        last_words(f"problem: {problem}")
    return 1 if problems else 0


def examine() -> tuple[dict[str, str], list[str]]:
    """The facts by name, and the problems, one sentence each."""
    import torch

    facts = dict(environment())
    disk = shutil.disk_usage(Path.cwd()).free
    facts["free disk"] = f"{disk / 2**30:.1f} GiB in this folder"
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        facts["free memory"] = f"{memory / 2**30:.1f} GiB"
    error = gradient_error()
    facts["self-test"] = f"SiD gradient against its closed form: {100 * error:.2f} % off"
    problems = []
    if error > 0.02:
        problems.append("the SiD gradient differs from its closed form; reinstall torch")
    if disk < FREE:
        problems.append("less than 2 GiB of disk is free here; runs and checkpoints need room")
    try:
        vision = version("torchvision")
        import torchvision  # noqa: F401
    except PackageNotFoundError:
        pass
    except Exception:  # the broken pairs raise many kinds
        problems.append(
            f"torchvision {vision} does not fit torch {torch.__version__} and breaks libraries "
            "that look for it; fewstep does not need it: pip uninstall torchvision"
        )
    return facts, problems


def gradient_error(count: int = 200_000) -> float:
    """Relative error of the SiD gradient in the mean of a Gaussian student, alpha = 1.

    Data N(1, 1/4), student N(0.2, 0.64), sigma = 2: the closed form is
    sigma^4 (0.2 - 1) / ((1/4 + sigma^2) (0.64 + sigma^2)).
    """
    import torch

    from fewstep.losses.score import sid
    from fewstep.teachers.gaussian import Gaussian

    sigma = torch.tensor(2.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, count, 1, generator=generator, dtype=torch.float64)
    mean = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    teacher = Gaussian(torch.tensor([1.0]).double(), torch.tensor([0.25]).double())
    fake = Gaussian(torch.tensor([0.2]).double(), torch.tensor([0.64]).double())
    x = mean + 0.8 * z
    xt = x + sigma * eps
    loss = sid(x, teacher(xt, sigma), fake(xt, sigma), alpha=1.0).mean()
    (got,) = torch.autograd.grad(loss, mean)
    exact = 16 * (0.2 - 1) / ((0.25 + 4) * (0.64 + 4))
    return abs(float(got) / exact - 1)
