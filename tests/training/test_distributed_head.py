"""What judges, over processes, as whole nets and in parts: a head, heads, a network of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.losses.adversarial import GradientPenalty
from fewstep.nets.lora import LoRA
from fewstep.storage import checkpoint
from fewstep.training import distributed
from fewstep.training.loop import State, train
from fewstep.training.sharding import shard
from tests.distillation.test_discriminator_head import METHOD, MODELS
from tests.distillation.test_discriminator_head_runs import SOURCE
from tests.processes import results
from tests.training.test_distributed import SMOOTH, apart, everything

pytestmark = pytest.mark.slow

STEPS = 4
METHODS = {
    "head": METHOD,
    "heads": replace(
        METHOD,
        fake=replace(
            METHOD.fake,
            features="teacher",
            layers=("net.first", "net.blocks.0"),
            loss="hinge",
            penalty=GradientPenalty(0.1, 0.1, 0.1),
        ),
    ),
    "own": replace(
        METHOD,
        fake=replace(
            METHOD.fake,
            features="own",
            loss="relativistic",
            penalty=GradientPenalty(0.1, 0.1, 0.1),
        ),
    ),
    "exact": replace(METHOD, fake=replace(METHOD.fake, penalty=GradientPenalty(0.1))),
}


def run(
    accumulate: int = 1,
    parts: int | None = None,
    lora: bool = False,
    until: int = STEPS,
    resume: Path | None = None,
    save: Path | None = None,
    kind: str = "head",
) -> Any:
    """DMD2 with a judge to step `until`; (everything, the logs of all steps)."""
    method = METHODS[kind]
    with distributed.process_group():
        teacher: Any = MODELS["mlp"].build().requires_grad_(False)
        net = LoRA(4, targets=("*",)).adapt(teacher) if lora else MODELS["mlp"].build(1)
        state = State.init(method, teacher, net)
        frozen = [teacher] if kind == "heads" else []  # adapters share the teacher's weights
        for one in (*state.nets.values(), state.average, *frozen) if parts is not None else ():
            shard(one, parts or 0)
        if resume:
            optims = dict.fromkeys(state.nets, SMOOTH)
            checkpoint.resume_newest(resume, state, method, optims)
        settings: Any = {"batch": 16, "optim": SMOOTH, "accumulate": accumulate, "state": state}
        logs = [r.logs for r in train(method, teacher, net, SOURCE, steps=until, **settings)]
        checkpoint.require_equal_state(state)
        if save:
            with checkpoint.Writer(save, method) as writer:
                writer.save(state)
                writer.finish()
        found = {
            name: distributed.full_tensor(t).detach() for name, t in everything(state).items()
        }
        return found, logs


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_two_processes_are_one_with_the_batch_in_two_parts(lora: bool, tmp_path: Path) -> None:
    """To the bit, head and moments included; against one undivided batch to 1e-5."""
    expected, told = run(2, lora=lora)
    heads = [name for name in expected if name.startswith("nets.fake.head.")]
    assert len(heads) == 6
    for found, logs in results(2, tmp_path, run, 1, None, lora):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], t) for name, t in expected.items())
        assert logs == told
    undivided, _ = run(lora=lora)
    assert 0 < apart(undivided, expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "lora"), [("head", False), ("head", True), ("heads", False), ("own", True)]
)
def test_in_parts_a_run_has_the_same_numbers(kind: str, lora: bool, tmp_path: Path) -> None:
    """To a rounding: the fused update rounds by where a part of a tensor ends."""
    rest: Any = (lora, STEPS, None, None, kind)
    expected, _ = results(2, tmp_path, run, 1, None, *rest)[0]
    sharded, _ = results(2, tmp_path, run, 1, 0, *rest)[0]
    judges = {name.split(".")[1] for name in expected if name.startswith("nets.")}
    assert ("discriminator" in judges) == (kind != "head")
    assert apart(sharded, expected) < 2e-7


def refused() -> str:
    """What a run with an exact penalty says in parts."""
    try:
        run(1, 0, kind="exact")
    except ValueError as error:
        return str(error)
    return ""


def test_an_exact_penalty_needs_whole_nets(tmp_path: Path) -> None:
    for text in results(2, tmp_path, refused):
        assert text.startswith("an exact gradient penalty has no second derivative of a network")
    found, _ = results(2, tmp_path, run, 1, None, False, STEPS, None, None, "exact")[0]
    assert found


def test_a_run_in_parts_goes_on_whole(tmp_path: Path) -> None:
    """Stored at step 2 of 4."""
    expected, _ = results(2, tmp_path, run)[0]
    results(2, tmp_path, run, 1, 0, False, 2, None, tmp_path / "c")
    again, _ = results(2, tmp_path, run, 1, None, False, STEPS, tmp_path / "c")[0]
    assert apart(again, expected) == 0.0
    other, _ = results(2, tmp_path, run, 1, None, False, STEPS - 1)[0]
    assert apart(other, expected) > 1e-3  # the comparison can fail
