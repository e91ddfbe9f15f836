"""The published text-to-image runs of the KL family, pinned to the papers' tables by number.

The tables are written from the papers and their code, not from the recipes; what these do not
state has no part in them.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.config import decode, encode
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import VP
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch
from fewstep.domains.captions import Captions
from fewstep.domains.prompts import Prompts
from fewstep.losses.weight import L1, MinSNR, Power, SignalNoise
from fewstep.methods.disback import DisBack
from fewstep.plan.meta_step import prepared, rehearsed
from fewstep.recipes import divergences_text_to_image
from fewstep.recipes.registry import by_module, in_module
from fewstep.recipes.text_to_image import SAME
from fewstep.runs.run import Run
from tests.conftest import Folders
from tests.recipes.pinned import differing, rows

RECIPES = in_module(divergences_text_to_image)

COLUMNS = (
    *("batch", "student", "fake", "beta1", "beta2", "decay", "clip", "warmup", "ratio", "first"),
    *("calls", "steps", "average", "low", "high", "kappa"),
)
"""first: who is updated first; steps: of the student; average: what it keeps of itself in an
update, 0 for none; low, high: noise levels; kappa: the teacher's; -: not stated."""
TABLE = """
dmd_sd15           2304 1e-5 1e-5 .9 .999 .01 10 500 1 student 1 20000 0 20 980 3
swiftbrush_sd21       - 1e-6 1e-3 .9 .999 0    1   0 1 student 1     - - 20 980 4.5
snoopi_sd15          64 1e-6 1e-3  -    - -    -   - 1 student 1     - 0 20 980 -
snoopi_sd21          64 1e-6 1e-3  -    - -    -   - 1 student 1     - 0 20 980 -
f_distill_sd15     2048 1e-5 1e-5  -    - -    -   - 10 fake   -     - 0  1 999 1.75
f_distill_sdxl        - 5e-7 5e-7  -    - -    -   - 5 fake    -     - 0  1 999 8
decoupled_dmd_sdxl  128 5e-7 5e-7 .9 .999 .01 10   0 - fake    -     - 0  -   - -
disback_sdxl          - 5e-7 5e-7 .9 .999 .01 10   0 5 fake    - 11000 0 20 980 8
cdm_sd3             128 1e-5 5e-6 .9 .999 1e-4 -   - 2 fake    -  2000 .999 .02 .98 8
tdm_pixart            - 4e-6 2e-5 0  .95  .01  1   - 1 fake    4   500 0 20 889 4.5
swd_sd35             64 5e-6 5e-6 .9 .999 .01 10   - 5 fake    4  3000 0 .0089 .7904 7
phased_dmd_qwen_image 64   - 4e-7  -    - -    -   - 5 fake    4     - 0  0   1 -
"""
ROWS = rows(TABLE, COLUMNS)
LOOSE = dict.fromkeys(("low", "high"), 1e-4)
"""Quantiles of a time law, to the digits that are printed."""
KINDS = {
    **dict.fromkeys(
        ("dmd_sd15", "swiftbrush_sd21", "snoopi_sd15", "snoopi_sd21", "f_distill_sd15"), "sd"
    ),
    **dict.fromkeys(("f_distill_sdxl", "decoupled_dmd_sdxl", "disback_sdxl"), "sdxl"),
    **{"cdm_sd3": "sd3", "tdm_pixart": "pixart", "swd_sd35": "sd35", "self_e_t2i": "sd3"},
    **{"phased_dmd_qwen_image": "qwen_image"},
}
"""The tiny pipeline that each is begun with."""


def teacher_scale(method: Any) -> float:
    """kappa of the teacher, the mean of many where it is drawn."""
    if hasattr(method, "kappa"):
        return float(method.kappa)
    batch = Batch(torch.zeros(4096, 1), draws=Draws(torch.arange(4096)))
    return float(torch.as_tensor(method.guidance.scales(batch).real).double().mean())


def facts(run: Run) -> dict[str, Any]:
    """What the table says of a run, as the run has it."""
    method: Any = run.method
    turns = [turn for turn in method.turns(run.steps - 1) if turn.net != "discriminator"]
    nets = [turn.net for turn in turns]
    rates = {turn.net: turn.rate * run.optims(nets)[turn.net].lr for turn in turns}
    optim = run.optims(nets)["fake"]
    assert replace(optim, lr=1) == replace(run.optim, lr=1)
    ends = method.times.quantile(torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64)).tolist()
    return {
        "batch": run.batch,
        "student": rates.get("student", rates.get("expert1", run.optim.lr)),
        "fake": rates["fake"],
        "beta1": optim.betas[0],
        "beta2": optim.betas[1],
        "decay": optim.weight_decay,
        "clip": optim.clip,
        "warmup": optim.warmup,
        "ratio": nets.count("fake"),
        "first": nets[0],
        "calls": method.sampler.calls,
        "steps": run.steps,
        "average": run.ema.decay(run.batch, run.batch),
        "low": ends[0],
        "high": ends[1],
        "kappa": teacher_scale(method),
    }


@pytest.mark.parametrize("name", ROWS)
def test_the_run(name: str) -> None:
    run = RECIPES[name]()
    assert differing(facts(run), ROWS[name], LOOSE) == []
    data = ("f_distill", "swd")
    assert (run.model, run.domain) == (SAME, Captions() if name.startswith(data) else Prompts())
    assert decode(encode(run)) == run


@pytest.mark.parametrize("key", COLUMNS)
def test_a_wrong_number_is_seen(key: str) -> None:
    """Negative control: each number of a row in turn, a tenth larger."""
    row = dict(ROWS["dmd_sd15"])
    row[key] = "fake" if key == "first" else str(float(row[key]) * 1.1 + 0.1 * (key == "average"))
    assert differing(facts(RECIPES["dmd_sd15"]()), row, LOOSE) == [key]


def method(name: str) -> Any:
    return RECIPES[name]().method


def test_dmd() -> None:
    """500,000 pairs of the teacher at the same scale, which the fake score has not."""
    dmd = method("dmd_sd15")
    assert (dmd.weight, dmd.fake.weight) == (L1(), Power(2, -2))
    assert isinstance(dmd.pairs.sampler, CFG)
    assert (dmd.pairs.count, dmd.pairs.sampler.kappa) == (500_000, 3.0)
    assert dmd.pairs.sampler.sampler.calls == 50
    batch = Batch(torch.zeros(2, 1))
    assert dmd.guidance.scales(batch)[:2] == (1.0, 1.0)


@pytest.mark.parametrize("name", ["swiftbrush_sd21", "snoopi_sd15", "snoopi_sd21"])
def test_vsd(name: str) -> None:
    """w = alpha sigma; the fake score's loss alpha^4 / sigma^2 of x_0, a tenth without condition.

    SwiftBrush compares both at 4.5 and teaches the fake score at 1.
    """
    run, vsd = RECIPES[name](), method(name)
    assert (vsd.sampler, vsd.weight) == (FewStep(999.0, unit=True), SignalNoise())
    assert vsd.fake.weight == Power(4, -2)
    t = vsd.fake.times.quantile(torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64))
    assert t.tolist() == [0, 999]
    assert vsd.guidance.drop == 0.1
    assert run.lora is not None
    assert (run.lora.rank, run.lora.alpha) == (64, 108 if name.startswith("swift") else 128)
    kappas = vsd.guidance.scales(Batch(torch.zeros(999, 1), draws=Draws(torch.arange(999))))
    if name.startswith("swift"):
        assert (kappas.fake_loss, kappas.fake, kappas.real) == (1.0, 4.5, 4.5)
    else:
        assert kappas.fake is kappas.real
        ends = float(kappas.real.min()), float(kappas.real.max())
        assert ends == pytest.approx((0.5, 4.0), abs=0.02)


def test_of_dmd2s_kin() -> None:
    for name, gan in (("f_distill_sd15", 1e-3), ("f_distill_sdxl", 5e-3)):
        assert (method(name).gan, method(name).clip) == (gan, (0.1, 20.0))
        assert method(name).fake.features == "teacher"
    decoupled = method("decoupled_dmd_sdxl")
    assert (decoupled.weight, decoupled.augmentation_weight) == (L1(), L1())
    assert decoupled.ratio > 1
    back = method("disback_sdxl")
    assert isinstance(back, DisBack)
    kept = [step for step in range(0, 1001, 100) if 0 < step < back.recording]
    assert (len(kept), back.record_steps, back.recording) == (back.targets, 100, 1000)
    walk = [back.target(step) for step in range(back.recording, 11_000, 1000)]
    assert walk == [*(f"target{number}" for number in range(9, 0, -1)), "teacher"]


def test_cdm_and_tdm() -> None:
    """CDM's augmentation is 7 (f_0 - f_c); TDM's calls are at 899, 674, 449 and 224."""
    cdm, tdm = method("cdm_sd3"), method("tdm_pixart")
    assert (cdm.kappa - 1, cdm.longest, cdm.between) == (7, 28, (0.25, 0.95))
    assert (cdm.weight, cdm.off, cdm.pull) == (L1(0.1), 1.0, 0.999)
    assert (tdm.weight, tdm.huber, tdm.target) == (L1(), 1e-3, "sample")
    assert tdm.fake_weight == MinSNR(5)
    path = VP(1e-4, 0.02, schedule="linear")
    assert tdm.sampler.ladder(path) == [899, 674, 449, 224]
    assert (tdm.sampler.noise, tdm.sampler.unit) == ("ddim", True)
    assert RECIPES["tdm_pixart"]().precision == "fp16"


def test_swd() -> None:
    """The levels of its calls are among the 28 that its losses are drawn from."""
    run, swd = RECIPES["swd_sd35"](), method("swd_sd35")
    assert swd.sampler.times == (1.0, 0.8959, 0.7371, 0.6022)
    every = divergences_text_to_image._levels(0).values[::-1]
    assert [every[i] for i in (0, 7, 14, 18)] == pytest.approx(list(swd.sampler.times), abs=5e-5)
    assert swd.times.values == every[:11:-1]
    assert swd.mmd_times.values == every[:17:-1]
    assert (len(swd.times.values), len(swd.mmd_times.values)) == (16, 10)
    assert (swd.mmd, swd.kernel, swd.weight, swd.fake.weight) == (1.0, "linear", L1(), Power())
    assert run.lora is not None
    assert run.lora.rank == 64


def test_phased_dmd() -> None:
    """The exact KL gradient; two calls in each phase, the last of which learns."""
    phased = method("phased_dmd_qwen_image")
    assert (phased.phases, phased.each, phased.clip, phased.matching) == (2, 2, 10.0, "final")
    assert (phased.weight, phased.fake_weight) == (Power(2, -2), Power(0, -2))
    rates = {turn.net: turn.rate for turn in phased.turns(0)}
    assert set(rates.values()) == {1.0}
    assert RECIPES["phased_dmd_qwen_image"]().optim.lr == 4e-7


def test_self_e() -> None:
    run, self_e = RECIPES["self_e_t2i"](), method("self_e_t2i")
    assert (run.batch, run.steps, run.domain) == (1024, 710_000, Captions())
    assert (run.optim.lr, run.optim.betas, run.optim.warmup) == (3e-4, (0.9, 0.95), 1000)
    assert (self_e.auxiliary_from, self_e.decay) == (550_000, 0.9999)
    assert 1 - 1 / self_e.kappa == pytest.approx(0.9)
    assert run.ema.decay(run.batch, 10 * run.batch) == pytest.approx(0.9999, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_each_begins(name: str, folders: Folders) -> None:
    """Its last step with a tiny pipeline's network."""
    pytest.importorskip("diffusers")
    from fewstep.teachers.diffusers.load import load_pipeline

    model = load_pipeline(str(folders(KINDS[name]))).model
    run = replace(RECIPES[name](), model=model, batch=2, accumulate=1)
    assert rehearsed(prepared(run)).step == run.last_step


def test_listed_under_their_papers() -> None:
    title = (
        "The published text-to-image runs of DMD, SwiftBrush, f-distill and others of the KL "
        "family."
    )
    assert by_module()[title] == RECIPES
    assert set(RECIPES) == {*ROWS, "self_e_t2i"}
    assert all((inspect.getdoc(make) or "").endswith(").") for make in RECIPES.values())
