"""Runs with a learned head: stored, continued, counted, and shipped without it.

It is trained beside adapters in test_lora_runs.py, over processes and in parts in
tests/training/test_distributed_head.py, and on every pipeline's network in
tests/teachers/diffusers/test_all_architectures.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.data.batches import Images
from fewstep.diffusion.encoder_features import feature_shape
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.critic import Critic
from fewstep.distillation.discriminator_head import DenoiserWithHead, DiscriminatorHead
from fewstep.methods.dmd2 import DMD2
from fewstep.plan.meta_step import measure_step, size
from fewstep.recipes.digits import digits
from fewstep.storage import checkpoint
from fewstep.storage.files import unpack
from fewstep.storage.model_folder import load_student, save_student
from fewstep.training.loop import State, train
from fewstep.training.optim import Optim
from tests.distillation.test_discriminator_head import METHOD, MODELS, stirred
from tests.plan.test_meta_step import counts

pytestmark = pytest.mark.slow

X0 = torch.randn(64, 2, generator=torch.Generator().manual_seed(3))
SOURCE = Images(X0, torch.arange(64) % 3)
OPTIM = Optim(1e-2, (0.5, 0.99))


def fresh(method: Any = METHOD, seed: int = 0) -> State:
    return State.init(method, MODELS["mlp"].build(), MODELS["mlp"].build(seed))


def advance(state: State, until: int, method: Any = METHOD) -> State:
    settings: Any = {"batch": 8, "steps": until, "optim": OPTIM, "state": state}
    for _ in train(method, MODELS["mlp"].build(), MODELS["mlp"].build(), SOURCE, **settings):
        pass
    return state


def everything(state: State) -> list[tuple[str, bytes]]:
    parts = checkpoint.tensors(state)
    named = [(f"{part}.{name}", t) for part in parts for name, t in parts[part].items()]
    return [(name, t.numpy().tobytes()) for name, t in named]


def test_a_continued_run_has_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Head and moments come from the file; a run that forgets the head ends elsewhere."""
    undisturbed = everything(advance(fresh(), 6))
    checkpoint.save(tmp_path, advance(fresh(), 3), METHOD)
    optims = {"student": OPTIM, "fake": OPTIM}
    ends = []
    for forget in (False, True):
        state = fresh(seed=1)
        stirred(state.nets["fake"], 4)
        checkpoint.resume_newest(tmp_path, state, METHOD, optims)
        if forget:
            new: Any = fresh().nets["fake"]
            state.nets["fake"].head.load_state_dict(new.head.state_dict())  # type: ignore
        ends.append(everything(advance(state, 6)) == undisturbed)
    assert ends == [True, False]


def test_all_of_the_head_is_trained_and_none_is_shipped(tmp_path: Path) -> None:
    start, state = fresh(), advance(fresh(), 2)
    for old, new in zip(*(s.nets["fake"].parameters() for s in (start, state)), strict=True):
        assert not torch.equal(old, new) or not new.count_nonzero()
    names = MODELS["mlp"].build().state_dict().keys()
    assert sum(key.startswith("head.") for key in state.nets["fake"].state_dict()) == 6
    save_student(tmp_path / "student", state.average, MODELS["mlp"], METHOD, {})
    assert unpack(tmp_path / "student" / "model.safetensors").keys() == names
    for net in (state.nets["student"], load_student(tmp_path / "student").denoiser):
        assert not isinstance(net, DenoiserWithHead)


def test_a_plan_counts_it() -> None:
    """Weights and a moment of the head, and it is a part of the largest gradient."""
    run = digits()
    critic = Critic(average="sample")
    made = [
        measure_step(replace(run, method=DMD2(FewStep(2.5), fake=replace(critic, pool=pool))))
        for pool in ("channels", "learned")
    ]
    judge = DiscriminatorHead(feature_shape(run.model.build()))
    head = size(judge)
    assert made[1].kept - made[0].kept == 2 * head + counts(judge)
    assert made[1].gradient - made[0].gradient == head


def test_a_plan_counts_networks_that_judge() -> None:
    """Heads on the teacher, or a copy of the network with a head: weights and two moments."""
    run = digits()
    net = run.model.build()
    critic = Critic(average="sample")
    made = [
        measure_step(replace(run, method=DMD2(FewStep(2.5), fake=replace(critic, **more))))
        for more in (
            {},
            {"features": "teacher", "pool": "learned"},
            {"features": "own", "pool": "learned"},
        )
    ]
    judge = DiscriminatorHead(feature_shape(net))
    head = size(judge)
    assert made[1].kept - made[0].kept == 2 * head + counts(judge)
    buffers = sum(b.numel() * b.element_size() for b in net.buffers())
    assert made[2].kept - made[0].kept == (
        2 * (head + size(net)) + buffers + counts(judge) + counts(net)
    )
    assert made[0].operations < made[1].operations < made[2].operations
