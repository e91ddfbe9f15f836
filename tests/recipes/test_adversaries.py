"""The published runs of adversarial distillation, pinned to the papers and their code, by number.

What the papers do not state is a sibling's, as the recipes' module says, and pinned all the same.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.config import decode, encode
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import VP, Flow
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Discrete, LogitNormal, Whole
from fewstep.distillation.default_times import with_times_of
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.feature_distance import FeatureDistance
from fewstep.distillation.pairs import Pairs
from fewstep.domains.captions import Captions
from fewstep.domains.prompts import Prompts
from fewstep.eval.picture_networks import VisionFeatures
from fewstep.losses.adversarial import GradientPenalty
from fewstep.losses.weight import L1, Power
from fewstep.recipes import adversaries
from fewstep.recipes.registry import every, in_module
from fewstep.recipes.text_to_image import SAME
from fewstep.runs.teacher import describe_model
from tests.command import fewstep
from tests.conftest import Folders
from tests.recipes.pinned import COLUMNS, cells_apart, fields_apart, rows, steps

RECIPES = in_module(adversaries)
TABLE = rows("""
ladd_sd3             256  3907 2e-6 .9 .999 0 inf 0   0
add_sd21             128  4000 1e-5 .9 .999 0 inf 0   0
lightning_sdxl       512 25000 1e-5 0  .99  0 inf 0   0
lightning_lora_sdxl  512 20000 1e-5 0  .99  0 inf 0  64
flash_sd15             2 20000 1e-5 .9 .999 0 inf 0 128
flash_sdxl             2 20000 1e-5 .9 .999 0 inf 0  64
diffusion2gan_sd15  1024  4000 1e-5 .9 .999 0 inf 0   0
""")
JUDGES = {"ladd_sd3": 4e-6, "lightning_sdxl": 5e-7, "lightning_lora_sdxl": 1e-6}
"""Rates of what judges, where it is not the student's."""
FOUR = FewStep(999.0, 4, unit=True)
LEVELS = Discrete((10.0, 250.0, 500.0, 750.0))
LIGHTNING = {
    **{"teacher_steps": 128, "stage_steps": 5000, "regressed": 1, "squared": 0.0, "kappa": 6.0},
    "judge": Discriminator(LEVELS, "own", loss="nonsaturating", joint=True),
    **{"skip": 2, "times": 4},
}
FLASH = {
    "sampler": FOUR,
    **{"teacher_times": 32, "width": 0.5, "stage_steps": 5000, "kappa": (3.0, 13.0)},
    "shares": (
        *((0.0, 0.0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3)),
        *((0.25, 0.25, 0.25, 0.25), (0.4, 0.2, 0.2, 0.2)),
    ),
    **{"gan": (0.0, 0.1, 0.2, 0.3), "dmd": (0.0, 0.3, 0.5, 0.7), "solver": "dpm++"},
    "judge": Discriminator(LEVELS, loss="least_squares"),
    **{"times": Whole(20, 980), "weight": L1(), "fake": FakeScore(Whole(0, 999), Power(2, -2))},
}
METHODS: dict[str, dict[str, Any]] = {
    "ladd_sd3": {
        "sampler": FewStep(1.0, 4),
        "judge": Discriminator(LogitNormal(1.0, 1.0), loss="hinge"),
        **{"early_shares": (0.0, 0.0, 0.5, 0.5), "early": 500},
        **{"shares": (0.7, 0.1, 0.1, 0.1), "rate": 1.0},
    },
    "add_sd21": {
        "sampler": FOUR,
        "judge": Discriminator(
            None,
            VisionFeatures("dinov2-small"),
            loss="hinge",
            penalty=GradientPenalty(1e-5, 0.0, of="features"),
        ),
        **{"distil": 2.5, "times": Whole(0, 999), "weight": Power(1, 0), "pictures": True},
    },
    "lightning_sdxl": LIGHTNING
    | {"sampler": FewStep(999.0, 1, "ddim", unit=True), "stages": (32, 8, 4, 2, 1)}
    | {"rate": 5e-7 / 1e-5},
    "lightning_lora_sdxl": LIGHTNING
    | {"sampler": FewStep(999.0, 2, "ddim", unit=True), "stages": (32, 8, 4, 2)}
    | {"rate": 1e-6 / 1e-5},
    "flash_sd15": FLASH,
    "flash_sdxl": FLASH,
    "diffusion2gan_sd15": {
        "sampler": FewStep(999.0, unit=True),
        "pairs": Pairs(3_000_000, CFG(Heun(Whole(0, 999), 50, order=1), 8.0)),
        "distance": FeatureDistance(Whole(20, 980)),
        "every": 16,
    },
}
PIPELINES = {"sd15": "sd", "sd21": "sd_v", "sdxl": "sdxl", "sd3": "sd3"}
QUICK = ("ladd_sd3", "flash_sd15")
"""Those of which the fast tests take a step, too."""
each = pytest.mark.parametrize("name", RECIPES)


@each
def test_the_run(name: str) -> None:
    run = RECIPES[name]()
    assert cells_apart(run, TABLE[name]) == []
    judge = JUDGES.get(name)
    assert run.fake_optim == (None if judge is None else replace(run.optim, lr=judge))
    assert (run.model, run.precision, run.accumulate) == (SAME, "bf16", run.batch)
    data_free = name in ("ladd_sd3", "diffusion2gan_sd15")
    assert run.domain == (Prompts() if data_free else Captions())
    assert (run.optim.eps, run.optim.warmup, run.optim.decay) == (1e-8, 0, "constant")


@each
def test_the_method(name: str) -> None:
    assert fields_apart(RECIPES[name]().method, METHODS[name]) == []


def test_a_wrong_number_is_seen() -> None:
    """Negative control: each cell, and a field of each method."""
    for name, row in TABLE.items():
        for column in COLUMNS:
            wrong = {**row, column: str(float(row[column].replace("inf", "9")) + 0.5)}
            assert cells_apart(RECIPES[name](), wrong) == [column], name
        for field in METHODS[name]:
            told = METHODS[name] | {field: "another"}
            assert fields_apart(RECIPES[name]().method, told) == [field]
    small: Any = {"judge": Discriminator(), "rate": 0.1}
    assert fields_apart(RECIPES["ladd_sd3"]().method, METHODS["ladd_sd3"] | small) == [
        "judge",
        "rate",
    ]


def test_lightnings_rates() -> None:
    """1e-5 by squared errors, then 5e-7, or 1e-6 with adapters, of student and discriminator."""
    for name, lr in (("lightning_sdxl", 5e-7), ("lightning_lora_sdxl", 1e-6)):
        run = RECIPES[name]()
        optims = run.optims(("student", "discriminator"))
        for step, told in ((0, {"student": 1e-5}), (5000, dict.fromkeys(optims, lr))):
            turns = run.method.turns(step)
            rates = {t.net: t.rate * optims[t.net].lr for t in turns}
            assert rates == pytest.approx(told)


def test_flashs_law_of_times() -> None:
    """A peak at each fourth of 32 times, its neighbours at e^-2 of it; the first stage has two."""
    method: Any = RECIPES["flash_sd15"]().method
    law = method.law(2)
    assert float(law[9] / law[8]) == pytest.approx(math.exp(-2), rel=1e-6)  # .135
    assert float(method.law(0)[:12].sum()) < 1e-3
    assert torch.topk(law, 4).indices.sort().values.tolist() == [0, 8, 16, 24]


@each
def test_no_time_is_left_in_edms_noise_levels(name: str) -> None:
    run = RECIPES[name]()
    path = Flow() if name == "ladd_sd3" else VP()
    assert with_times_of(run.method, path) == run.method


@each
def test_listed_and_stored(name: str) -> None:
    make = every()[name]
    run = make()
    assert decode(encode(run)) == run
    doc = (inspect.getdoc(make) or "").partition("\n")[0]
    assert len(f"{name:22}{doc}") < 110
    assert ("Captions('FOLDER')" if run.method.needs_data else "prompts alone") in doc


def test_they_are_all_here() -> None:
    assert set(RECIPES) == set(TABLE) == set(METHODS)
    first = (adversaries.__doc__ or "").partition("\n")[0]
    assert first in fewstep("recipes").out


def test_resolved_without_a_teacher() -> None:
    done = fewstep("distill", "ladd_sd3", "--dry-run", "--batch", "8", "--accumulate", "4")
    assert done.code == 0, done.err
    assert '"early": 500' in done.out


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in RECIPES],
)
def test_starts_on_a_small_pipeline(name: str, folders: Folders) -> None:
    """ADD by its teacher's features of latents, as the vision network is a person's own folder."""
    run: Any = RECIPES[name]()
    if name == "add_sd21":
        judge = replace(run.method.judge, features="teacher")
        run = replace(run, method=replace(run.method, judge=judge, pictures=False))
    model = describe_model(folders(PIPELINES[name.rpartition("_")[2]]))
    steps(replace(run, model=model))
