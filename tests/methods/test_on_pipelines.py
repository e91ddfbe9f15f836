"""One step of every method, as it is by default, on pipelines of betas and of a flow.

The teacher answers as before, what is trained moves, and what the run would ship makes finite
samples. Methods that cannot take a pipeline say why in a sentence.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise_path import VP
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import ladder_of
from fewstep.diffusion.types import Source
from fewstep.distillation.default_times import with_times_of
from fewstep.distillation.method import Method
from fewstep.distillation.pairs import PairSource
from fewstep.domains.captions import Captions
from fewstep.domains.prompts import Prompts
from fewstep.nets.lora import LoRA
from fewstep.runs.monitor import made_so_far
from fewstep.runs.run import Run
from fewstep.runs.runner import PreparedRun, _refuse_path, with_adapters
from fewstep.runs.teacher import load_teacher
from fewstep.training.optim import Optim
from tests.conftest import Folders
from tests.distillation.test_default_times import defaults
from tests.domains.test_captions import write

pytestmark = pytest.mark.slow

HEADS = "does not say where its output layer is"
REFUSED = {
    "MSD": "networks that share the work by labels need Model.classes",
    "PDD": HEADS,
    "PiFlow": HEADS,
}
"""Methods that do not suit pipelines -> words of the sentence that says so."""
SOLVER = "trains no network that it ships: leave out --lora"
NO_ADAPTERS = {
    **dict.fromkeys(("OptimalSteps", "AlignYourSteps", "GAS", "DODE"), SOLVER),
    "PhasedDMD": "trains whole networks, one a phase: leave out --lora",
    "Pretrain": "LoRA adapts the network of a teacher, and this run trains one",
}
LATER = {
    "DisBack": {"student", "target1", "target2", "target3"},
    "FlashDiffusion": {"fake", "discriminator"},
    "Lightning": {"before", "discriminator", "stage", "target"},
    "NCT": {"dual"},
    "ProgressiveDistillation": {"stage", "target"},
    "SlimFlow": {"flow"},
    "VSD": {"student"},
}
"""Nets that the first step leaves as they are: of later stages, or at a gradient of zero."""


class Opened:
    """A tiny pipeline with the sources of its prompts and of captioned pictures."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = str(folder)
        (home / "prompts.txt").write_text("a red ball\na blue ball\na green ball\n")
        photos = write(home / "photos")
        self.prompts = Prompts(str(home / "prompts.txt"), check=False)
        self.captions = Captions(str(photos), check=False)
        teacher = load_teacher(self.prompts, self.folder)
        assert teacher is not None
        assert teacher.model is not None
        self.teacher: Generator = teacher
        self.model = teacher.model
        self.sources: dict[bool, Source] = {
            True: self.captions.source_for(teacher, self.model, data_free=False),
            False: self.prompts.source_for(teacher, self.model, data_free=True),
        }

    def prepared(self, method: Method, lora: LoRA | None) -> PreparedRun:
        """A run of one step, with what `prepare` would load."""
        method = with_times_of(method, self.model.path)
        domain = self.captions if method.needs_data else self.prompts
        optim = Optim(1e-3)
        _refuse_path(method, self.model.path)
        ladder_of(method.sampler, self.model.path)
        run = Run(method, self.model, domain, 1, 2, optim=optim, lora=lora)
        source = self.sources[method.needs_data]
        pairs = method.needs_pairs()
        if pairs is not None:
            x = torch.randn(4, *self.model.shape)
            source = PairSource(source, pairs, x)
        net: Any = self.teacher.denoiser
        if lora is not None:
            net = with_adapters(run, self.teacher, "")
        return PreparedRun(run, self.teacher, net, source)


@pytest.fixture(scope="module", params=["sd", "flux"])
def opened(
    request: pytest.FixtureRequest, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Opened:
    return Opened(folders(request.param), tmp_path_factory.mktemp("opened"))


def numbers(net: nn.Module) -> list[torch.Tensor]:
    return [t.detach().clone() for t in net.state_dict().values()]


def still(net: nn.Module, before: list[torch.Tensor]) -> bool:
    """Whether all numbers of a network are what they were."""
    return all(map(torch.equal, net.state_dict().values(), before))


@pytest.mark.parametrize("method", defaults(), ids=lambda method: type(method).__name__)
def test_one_step(opened: Opened, method: Method) -> None:
    """Whole networks on betas, and adapters on a flow."""
    lora = None if isinstance(opened.model.path, VP) else LoRA(2)
    name = type(method).__name__
    if name == "IBMD" and isinstance(opened.model.path, VP):
        with pytest.raises(ValueError, match="IBMD is for teachers on the noise path Bridge"):
            opened.prepared(method, lora)
        return
    words = REFUSED.get(name) or (NO_ADAPTERS.get(name) if lora else None)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            opened.prepared(method, lora).init()
        return
    work = opened.prepared(method, lora)
    state = work.init()
    teacher = numbers(opened.teacher.denoiser)
    before = {name: numbers(net) for name, net in state.nets.items()}
    (record,) = work.records(state)
    assert all(math.isfinite(value) for value in record.logs.values()), record.logs
    assert not record.logs["skipped"]
    assert still(opened.teacher.denoiser, teacher)
    kept = {name for name, net in state.nets.items() if still(net, before[name])}
    assert kept == ({*method.frozen} | LATER.get(name, set())) & {*state.nets}
    product = made_so_far(work.run.method, state, opened.teacher)
    batch = work.source(Draws(torch.arange(2), 1, ""))
    with torch.no_grad():
        z = torch.randn(2, *opened.model.shape)
        x = product.sampler(product.net, z, batch.cond, batch.draws)
    assert bool(x.isfinite().all())
    assert x.std() > 0
