"""The published runs of trajectory distillation, pinned to the papers and their code, by number.

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
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP, Flow
from fewstep.diffusion.samplers import FewStep, Heun, Jumps, WithInput
from fewstep.diffusion.time_distributions import LogitNormal, LogNormal
from fewstep.distillation.default_times import with_times_of
from fewstep.distillation.flow_maps import Ladder
from fewstep.distillation.pairs import Pairs
from fewstep.domains.captions import Captions
from fewstep.domains.latents import LatentMoments
from fewstep.domains.pictures import Pictures
from fewstep.losses.distance import PseudoHuber
from fewstep.recipes import trajectories
from fewstep.recipes.registry import every, in_module
from fewstep.recipes.sid_edm import SETUPS
from fewstep.recipes.text_to_image import SAME
from fewstep.runs.teacher import describe_model
from fewstep.teachers.network_config import published_model
from tests.cli.test_inspect import SMALL, SONG
from tests.command import fewstep
from tests.conftest import Folders
from tests.recipes.pinned import COLUMNS, cells_apart, fields_apart, rows, steps

RECIPES = in_module(trajectories)
TABLE = rows("""
cd_cifar10         512  800000 4e-4 .9 .999 0 inf .9999   0
cd_imagenet64     2048  600000 8e-6 .9 .999 0 inf .999943 0
ect_cifar10        128  200000 1e-4 .9 .999 0 inf .9999   0
pd_cifar10         128  650000 5e-5 .9 .999 0 1   0       0
pd_imagenet64     2048  500000 1e-4 .9 .999 0 1   0       0
scm_cifar10        512  400000 1e-4 .9 .99  0 inf .5M     0
sct_cifar10        512  400000 1e-4 .9 .99  0 inf .5M     0
scm_imagenet64    2048  400000 1e-4 .9 .99  0 inf .5M     0
scm_edm2_s        2048  400000 1e-4 .9 .99  0 inf .5M     0
scm_edm2_m        2048  400000 1e-4 .9 .99  0 inf .5M     0
scm_edm2_l        2048  400000 1e-4 .9 .99  0 inf .5M     0
scm_edm2_xl       2048  400000 1e-4 .9 .99  0 inf .5M     0
scm_edm2_xxl      2048  400000 1e-4 .9 .99  0 inf .5M     0
ayf_edm2_s        2048  400000 1e-4 .9 .99  0 inf .5M     0
mean_flow_cifar10 1024 1000000 6e-4 .9 .999 0 inf .9999   0
sfd_cifar10        128    1563 5e-5 .9 .999 0 inf 0       0
get_cifar10        128  800000 1e-4 .9 .999 0 inf 0       0
lcm_sd15            72  100000 1e-6 .9 .999 0 1   0       0
lcm_lora_sd15       12    1000 1e-4 .9 .999 0 1   0      64
lcm_lora_sdxl       12    1000 1e-4 .9 .999 0 1   0      64
pcm_sd15            20    5000 5e-6 .9 .999 0 1   0      64
tdd_sdxl            64    5000 1e-6 .9 .999 0 1   0      64
slam_sd15           72  100000 8e-6 .9 .999 0 1   0       0
scott_sd15          40   40000 8e-6 .9 .999 0 1   0       0
icd_sd15             8    6000 8e-6 .9 .999 0 1   0      64
scfm_flux            8    5000 2e-5 .9 .999 0 10  0      64
""")
SCM = {"sampler": FewStep(times=(80.0, 0.5 * math.tan(1.1))), "warmup": 10_000}
LCM = FewStep(times=(999.0, 759.0, 499.0, 259.0), unit=True)
FOUR = FewStep(999.0, 4, "ddim", unit=True)
EDM2 = {
    f"scm_edm2_{size}": SCM | {"times": LogNormal(-1.0, 1.6)}
    for size in ("s", "m", "l", "xl", "xxl")
}
METHODS: dict[str, dict[str, Any]] = {
    "cd_cifar10": {"sampler": FewStep(80.0), "ladder": Ladder(17), "order": 2, "decay": 0.0},
    "cd_imagenet64": {"sampler": FewStep(80.0), "ladder": Ladder(39), "order": 2, "decay": 0.95},
    "ect_cifar10": {
        "sampler": FewStep(times=(80.0, 0.821)),
        "times": LogNormal(-1.1, 2.0),
        **{"q": 2.0, "k": 8.0, "b": 1.0, "stages": 8, "stage_steps": 25_000},
        "distance": PseudoHuber(1e-6),
    },
    "pd_cifar10": {
        "sampler": FewStep(80.0, 1, "ddim", rho=7.0),
        **{"start": 8192 // 2, "stage_steps": 50_000},
    },
    "pd_imagenet64": {
        "sampler": FewStep(80.0, 1, "ddim", rho=7.0),
        **{"start": 1024 // 2, "stage_steps": 50_000},
    },
    "scm_cifar10": SCM | {"times": LogNormal(-1.0, 1.4), "c": 0.1, "sigma_data": 0.5},
    "sct_cifar10": SCM | {"times": LogNormal(-1.0, 1.8), "velocity": "data"},
    "scm_imagenet64": SCM | {"times": LogNormal(-1.0, 1.6)},
    **EDM2,
    "ayf_edm2_s": {"sampler": Jumps(80.0, 4, 7.0), "warmup": 10_000, "r": 0.99, "c": 0.1},
    "mean_flow_cifar10": {
        "sampler": Jumps(80.0),
        "times": LogitNormal(-0.6, 1.6),
        **{"diagonal": 1 - 0.75, "velocity": "data", "p": 0.75, "c": 1e-3},
    },
    "sfd_cifar10": {"sampler": FewStep(80.0, 2, "ddim", rho=7.0), "between": 3},
    "get_cifar10": {"sampler": FewStep(80.0), "pairs": Pairs(1_000_000, Heun(steps=18))},
    "lcm_sd15": {
        "sampler": WithInput(LCM, "w", 8.0),
        "ladder": Ladder(50),
        **{"kappa": (1 + 2.0, 1 + 14.0), "c": 0.001, "decay": 0.95, "order": 1},
    },
    **{
        f"lcm_lora_{model}": {
            "sampler": WithInput(LCM, "w", 10.0),
            "ladder": Ladder(50),
            **{"kappa": (1 + 5.0, 1 + 15.0), "decay": 0.0},
        }
        for model in ("sd15", "sdxl")
    },
    "pcm_sd15": {"sampler": FOUR, "decay": 0.0, "kappa": 1 + 4.5, "c": 0.001, "order": 1},
    "tdd_sdxl": {
        "sampler": FOUR,
        **{"calls": (4, 8), "steps": 250, "window": 0.26, "rho": 0.3, "decay": 0.0},
        **{"kappa": 1 + 3.5, "drop": 0.2, "c": 0.001, "order": 1},
    },
    "slam_sd15": {
        "sampler": WithInput(LCM, "gamma", 1.0),
        "ladder": Ladder(50),
        **{"noise": "independent", "decay": 0.95, "c": 0.001, "kappa": 9.0},
    },
    "scott_sd15": {
        "sampler": FewStep(999.0, 2, unit=True),
        "ladder": Ladder(42),
        **{"eta": 0.2, "substeps": 3, "gan": 0.4, "decay": 0.95, "kappa": 9.0},
    },
    "icd_sd15": {
        "sampler": Jumps(999.0, 4),
        "ladder": Ladder(50),
        **{"kappa": 1 + 7.0, "scales": (1 + 0.0, 1 + 19.0), "preserve": 1.5, "c": 0.001},
        **{"decay": 0.0, "order": 1},
    },
    "scfm_flux": {
        "sampler": FewStep(
            times=tuple(3.5 * u / (1 + 2.5 * u) for u in (1.0, 0.75, 0.5, 0.25)), noise="ddim"
        ),
        **{"grids": (2, 4, 8, 16), "teacher_steps": 32, "teacher_share": 0.4},
        **{"shift": (2.5, 4.5), "fast": 0.99, "slow": 0.999},
    },
}
TEXT = [name for name, make in RECIPES.items() if make().model == SAME]
EDM = [name for name in RECIPES if name not in TEXT]
TINY = {
    "EDMPrecond": SONG | {"img_channels": 3, "label_dim": 0, "attn_resolutions": []},
    "Precond": SMALL | {"channels_per_head": 8},
}
PIPELINES = {"sd15": "sd", "sdxl": "sdxl", "flux": "flux"}
QUICK = ("lcm_sd15", "icd_sd15", "scfm_flux")
"""Those of which the fast tests take a step, too."""


@pytest.mark.parametrize("name", RECIPES)
def test_the_run(name: str) -> None:
    assert cells_apart(RECIPES[name](), TABLE[name]) == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_method(name: str) -> None:
    assert fields_apart(RECIPES[name]().method, METHODS[name]) == []


def test_a_wrong_number_is_seen() -> None:
    """Negative control: each cell, and a field of each method."""
    for name, row in TABLE.items():
        for column in COLUMNS:
            wrong = {**row, column: str(float(row[column].rstrip("M").replace("inf", "9")) + 0.5)}
            assert cells_apart(RECIPES[name](), wrong) == [column], name
        told = METHODS[name]
        for field in told:
            assert fields_apart(RECIPES[name]().method, told | {field: "another"}) == [field]
    assert fields_apart(RECIPES["cd_cifar10"]().method, METHODS["cd_imagenet64"]) == [
        "ladder",
        "decay",
    ]


def test_adams_eps() -> None:
    """As published, divided by the pixels where losses were sums: the norm of ECT, SFD's."""
    told = {"ect_cifar10": 1e-8 / 3072**0.5, "sfd_cifar10": 1e-8 / 3072}
    for name, make in RECIPES.items():
        run = make()
        scm = run.batch == 2048 and run.optim.betas[1] == 0.99
        assert run.optim.eps == pytest.approx(told.get(name, 1e-11 if scm else 1e-8)), name
        assert (run.optim.decay, run.optim.clip_value) == ("constant", math.inf)
        assert run.optim.warmup == (9765 if name == "mean_flow_cifar10" else 0)  # 200 epochs
        judge = run.fake_optim
        assert judge == (replace(run.optim, lr=2e-5) if name == "scott_sd15" else None)


def test_networks_and_data() -> None:
    for name in EDM:
        run: Any = RECIPES[name]()
        row = next((key for key in SETUPS if name.endswith(key)), "cifar10_uncond")
        if name == "scm_imagenet64":
            assert (run.model.shape, run.model.classes) == ((3, 64, 64), 1000)
            assert run.model.net.kwargs()["model_channels"] == 192  # EDM2-S
        else:
            assert run.model.net.kwargs() == SETUPS[row].network
        assert run.domain == (LatentMoments() if "edm2" in name else Pictures())
        assert run.precision == "fp32"
    for name in TEXT:
        run = RECIPES[name]()
        assert run.domain == Captions()
        assert (run.precision, run.accumulate) == ("bf16", run.batch)


def test_times_are_those_of_the_papers() -> None:
    """Ladders on their paths, by hand, and where students are called on them."""
    lcm: Any = RECIPES["lcm_sd15"]().method
    times = lcm.ladder.times(VP(), 999.0)
    assert times == [0.0, *(20.0 * i - 1 for i in range(1, 51))]
    assert set(lcm.sampler.sampler.times) <= set(times)
    scott: Any = RECIPES["scott_sd15"]().method
    steps = torch.tensor(scott.ladder.times(VP(), 999.0)).diff()
    assert round(float(steps.mean())) == 24
    scm: Any = RECIPES["scm_edm2_s"]().method
    angles = [math.atan(t / 0.5) for t in scm.sampler.ladder(VE())]
    assert angles == pytest.approx([math.atan(160), 1.1])
    ect: Any = RECIPES["ect_cifar10"]().method
    assert ect.stages * ect.stage_steps == RECIPES["ect_cifar10"]().steps
    assert ect.stage_steps * 128 == 250 * 12_800
    for name, halvings in (("pd_cifar10", 13), ("pd_imagenet64", 10)):
        run = RECIPES[name]()
        method: Any = run.method
        assert 2**halvings == 2 * method.start
        assert (method.stages, method.length) == (halvings, run.steps)
    get: Any = RECIPES["get_cifar10"]().method
    assert get.pairs.sampler.calls == 35


@pytest.mark.parametrize("name", TEXT)
def test_no_time_is_left_in_edms_noise_levels(name: str) -> None:
    run = RECIPES[name]()
    path = Flow() if name.endswith("flux") else VP()
    assert with_times_of(run.method, path) == run.method


@pytest.mark.parametrize("name", RECIPES)
def test_listed_and_stored(name: str) -> None:
    make = every()[name]
    run = make()
    assert decode(encode(run)) == run
    doc = (inspect.getdoc(make) or "").partition("\n")[0]
    assert len(f"{name:22}{doc}") < 110
    assert doc.endswith(".")
    assert (type(run.domain).__name__ if run.method.needs_data else "no data") in doc


def test_they_are_all_here() -> None:
    assert set(RECIPES) == set(TABLE) == set(METHODS)
    first = (trajectories.__doc__ or "").partition("\n")[0]
    assert first in fewstep("recipes").out


def test_resolved_without_a_teacher() -> None:
    done = fewstep("distill", "tdd_sdxl", "--dry-run", "--batch", "8", "--accumulate", "4")
    assert done.code == 0, done.err
    assert '"kappa": 4.5' in done.out


@pytest.mark.parametrize("name", EDM)
def test_starts_on_a_small_network(name: str) -> None:
    run: Any = RECIPES[name]()
    kind = run.model.net.class_name
    steps(replace(run, model=published_model(kind, TINY[kind])))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in TEXT]
)
def test_starts_on_a_small_pipeline(name: str, folders: Folders) -> None:
    kind = PIPELINES[name.rpartition("_")[2]]
    model: Model = describe_model(folders(kind))
    steps(replace(RECIPES[name](), model=model))
