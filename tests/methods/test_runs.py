"""Every method as a run: stopped, continued to the bit, read again, and sampled as it says."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.distillation.method import Method
from fewstep.distillation.pairs import Pairs
from fewstep.domains.pictures import Pictures
from fewstep.methods.dmd import DMD
from fewstep.methods.f_distill import FDistill
from fewstep.methods.mean_flow import MeanFlow
from fewstep.methods.optimal_steps import OptimalSteps
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.progressive import ProgressiveDistillation
from fewstep.methods.sid import SiD
from fewstep.nets.lora import LoRA, pairs
from fewstep.nets.mlp import MLP
from fewstep.runs.averages import write_average
from fewstep.runs.run import Run
from fewstep.runs.runner import Step, execute
from fewstep.runs.teacher import open_generator
from fewstep.storage.files import unpack
from fewstep.storage.model_folder import load_student
from fewstep.training.optim import Optim
from fewstep.training.power_ema import PowerEMA
from tests.command import bits
from tests.instances import METHODS
from tests.parameters import firsts

MODEL = Model(MLP(16, 1), (1, 4, 4), 3, VE())
STEPS = 5
QUICK = (SiD, DMD, MeanFlow, ProgressiveDistillation, OptimalSteps)
"""Of each kind one: the others are stopped and continued among the slow tests."""
each_method = pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if isinstance(method, QUICK) else pytest.mark.slow)
        for method in firsts(METHODS)
    ],
    ids=repr,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 pictures, and a teacher trained on them for two steps."""
    place = tmp_path_factory.mktemp("methods")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (24, 4, 4), dtype=np.uint8)
    np.savez(place / "set.npz", images=pictures, labels=np.arange(24) % 3)
    teacher = next(method for method in METHODS if isinstance(method, Pretrain))
    finish(run_of(place, teacher), place / "teacher", "")
    return place


FAMILIES = (
    MeanFlow(),
    FDistill(),
    DMD(pairs=Pairs(8)),
    ProgressiveDistillation(start=2, stage_steps=3),
)


def run_of(place: Path, method: Method) -> Run:
    return Run(
        method,
        MODEL,
        Pictures(str(place / "set.npz")),
        steps=STEPS,
        batch=4,
        accumulate=2,
        optim=Optim(1e-2),
        sample_every=STEPS,
        save_every=2,
    )


def finish(run: Run, out: Path, teacher: str, stop: int = 0) -> list[str]:
    """Execute to the end, or stop after that step; what was said."""
    said = []
    with closing(execute(run, out, recipe="test", teacher=teacher)) as work:
        for progress in work:
            if isinstance(progress, Step):
                if progress.step == stop:
                    break
            else:
                said.append(getattr(progress, "text", ""))
    return said


@each_method
def test_a_run_that_is_stopped_ends_in_the_same_bits(
    method: Method, place: Path, tmp_path: Path
) -> None:
    run = run_of(place, method)
    teacher = str(place / "teacher") if run.distils else ""
    finish(run, tmp_path / "whole", teacher)
    finish(run, tmp_path / "parts", teacher, stop=3)
    assert run.last_step <= 3 or not (tmp_path / "parts" / "student").exists()
    said = finish(run, tmp_path / "parts", teacher)
    assert run.last_step <= 3 or f"continuing from step 3 of {run.last_step}" in said
    whole, parts = (bits(tmp_path / name / "student") for name in ("whole", "parts"))
    assert whole == parts
    made = load_student(tmp_path / "whole")
    assert made.model == method.result(MODEL)
    first, second = made.sample(range(3)), made.sample(range(3, 6))
    assert first.shape == (3, 1, 4, 4)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("method", FAMILIES, ids=lambda m: type(m).__name__)
def test_adapters_of_every_family(method: Method, place: Path, tmp_path: Path) -> None:
    """Stopped and continued to the bit; the student is its teacher's weights and the adapters."""
    lora = LoRA(2, alpha=3, targets=("inner", "mix"))
    run = replace(run_of(place, method), lora=lora, power=PowerEMA((0.1, 0.2)))
    teacher = str(place / "teacher")
    finish(run, tmp_path / "whole", teacher)
    finish(run, tmp_path / "parts", teacher, stop=3)
    finish(run, tmp_path / "parts", teacher)
    assert bits(tmp_path / "whole" / "student") == bits(tmp_path / "parts" / "student")
    made = load_student(tmp_path / "whole")
    assert made.model == run.result
    base = run.model.carried(load_student(place / "teacher").denoiser.state_dict(), run.result)
    adapters = unpack(tmp_path / "whole" / "student" / "lora.safetensors")
    state = made.denoiser.state_dict()
    full = {name for name in adapters if not name.endswith((".up", ".down.weight"))}
    assert full == state.keys() - base.keys()
    for name in full:
        assert torch.equal(state[name], adapters[name])
    layers = pairs(adapters)
    assert {name.rpartition(".")[2] for name in layers} == {"inner", "mix"}
    for name, tensor in base.items():
        layer = name.removesuffix(".weight")
        down, up = layers.get(layer, (torch.zeros(1, 1), torch.zeros(1, 1)))
        change = 1.5 * up @ down if layer in layers else torch.zeros(())
        torch.testing.assert_close(state[name], tensor + change, rtol=1e-6, atol=1e-7)
        assert torch.equal(state[name], tensor) != (layer in layers)
    write_average(tmp_path / "whole", 0.15, tmp_path / "longer")
    other = load_student(tmp_path / "longer")
    assert (other.model, other.sampler) == (made.model, made.sampler)
    assert other.sample(range(3)).isfinite().all()


def test_what_is_not_trained_has_no_adapters_and_no_average(place: Path, tmp_path: Path) -> None:
    """One sentence, for each of the ways to ask for it."""
    run = run_of(place, OptimalSteps())
    ways: dict[str, dict[str, Any]] = {
        "lora": {"lora": LoRA(2, targets=("inner",))},
        "power": {"power": PowerEMA((0.1,))},
        "frozen": {"precision": "bf16", "frozen": "bf16"},
    }
    for flag, change in ways.items():
        message = f"^OptimalSteps trains no network that it ships: leave out --{flag}$"
        with pytest.raises(ValueError, match=message):
            finish(replace(run, **change), tmp_path / flag, str(place / "teacher"))


def test_adapters_are_of_the_teachers_network(place: Path, tmp_path: Path) -> None:
    lora = LoRA(2, targets=("inner",))
    run = replace(run_of(place, FDistill()), lora=lora, model=replace(MODEL, net=MLP(8, 1)))
    with pytest.raises(
        ValueError, match=r"adapts the teacher's network, MLP.width=16.*or --model"
    ):
        finish(run, tmp_path / "run", str(place / "teacher"))


def test_an_average_is_sampled_as_what_the_run_ships(place: Path, tmp_path: Path) -> None:
    """A run that ends in an early stage has as many steps as that, by `ema` too."""
    run = run_of(place, ProgressiveDistillation(start=4, stage_steps=4))
    run = replace(run, power=PowerEMA((0.1, 0.2)))
    finish(run, tmp_path / "run", str(place / "teacher"))
    write_average(tmp_path / "run", 0.15, tmp_path / "other")
    assert load_student(tmp_path / "other").sampler == load_student(tmp_path / "run").sampler
    assert load_student(tmp_path / "run").sampler.calls == 2


def test_another_method_ends_in_other_bits(place: Path, tmp_path: Path) -> None:
    """The control of the test above."""
    teacher = str(place / "teacher")
    for name, method in (("a", METHODS[0]), ("b", METHODS[1])):
        finish(run_of(place, method), tmp_path / name, teacher)
    assert bits(tmp_path / "a" / "student") != bits(tmp_path / "b" / "student")


@pytest.mark.parametrize("width", [8, 32])
def test_a_student_smaller_or_larger_than_its_teacher(
    width: int, place: Path, tmp_path: Path
) -> None:
    """It is the network described, and the fake score starts as the teacher."""
    model = replace(MODEL, net=MLP(width, 1))
    run = replace(run_of(place, METHODS[0]), model=model)
    said = finish(run, tmp_path / "run", str(place / "teacher"))
    told = f"the student's network is {model.net}, another than its teacher's: it starts from new"
    assert any(text.startswith(told) for text in said)
    made = load_student(tmp_path / "run")
    assert made.model == model
    shapes = {tuple(p.shape) for p in made.denoiser.parameters()}
    assert (width, 16) in shapes
    checkpoint: Any = max((tmp_path / "run" / "checkpoints").iterdir())
    fake = unpack(checkpoint / "nets.safetensors")
    teacher = open_generator(place / "teacher").denoiser.state_dict()
    for name, tensor in teacher.items():
        assert fake[f"fake.{name}"].shape == tensor.shape


@pytest.mark.parametrize(
    "change",
    [{"shape": (1, 2, 2)}, {"classes": 0}, {"path": VE(0.002, 40.0)}],
    ids=lambda change: next(iter(change)),
)
def test_a_student_that_cannot_learn_from_its_teacher(
    change: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    run = replace(run_of(place, METHODS[0]), model=replace(MODEL, **change))
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"the student's {name} is .*, but its teacher in"):
        finish(run, tmp_path / "run", str(place / "teacher"))
