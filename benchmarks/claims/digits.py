"""The published claims, measured on 8x8 digits: python benchmarks/claims/digits.py [CLAIM ...]

Three seeds of everything, six where a claim hangs on it. The teacher is trained first (a minute
and a half), with a tenth of the labels dropped so that it can be guided. Results:
benchmarks/results/claims/digits-CLAIM.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import lab
from lab import Setting, Trial

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.critic import Critic
from fewstep.distillation.guidance_scales import LSG, AntiCFG, Guidance, Unguided, ZeroCFG
from fewstep.domains.digits import Digits
from fewstep.losses.distance import PseudoHuber, SquaredL2
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.sim import SIM
from fewstep.recipes.digits import digits, digits_teacher
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.runner import execute
from fewstep.storage.model_folder import load_student

SEEDS = (0, 1, 2)
MORE = (0, 1, 2, 3, 4, 5)
"""Where three seeds left a comparison open."""
RECIPE = digits()
assert isinstance(RECIPE.method, SiD)
SID: SiD = RECIPE.method


def teacher() -> Generator:
    """The digits teacher, trained if need be."""
    out = lab.WORK / "digits" / "teacher"
    run = replace(digits_teacher(), domain=Digits(drop=0.1))
    if not RunFolder(out).finished:
        for _ in execute(run, out, recipe="digits_teacher"):
            pass
    return load_student(out)


SETTING = Setting("digits", Digits(), teacher, RECIPE.optim, RECIPE.ema)


def sid(**changes: Any) -> SiD:
    """The digits recipe's SiD."""
    return replace(SID, **changes)


def sida(**changes: Any) -> SiDA:
    """SiDA with the same settings."""
    critic = Critic(weight=SID.fake.weight, judging=SID.fake.weight)
    return replace(SiDA(times=SID.times, fake=critic, gan=0.01), **changes)


def alpha() -> Iterable[Trial]:
    """Claims 1 and 2: how SiD falls, and with which alpha."""
    for seed in SEEDS:
        for value in (1.0, 0.5, 1.2, 0.75, 0.25, 0.0, 1.5, 2.0):
            yield Trial(f"alpha {value:g}", sid(alpha=value), seed)


def adversarial() -> Iterable[Trial]:
    """Claim 3: SiDA needs fewer pictures than SiD and passes the teacher; 5 % of the data do."""
    for seed in MORE:
        yield Trial("SiD", sid(), seed)
        yield Trial("SiDA", sida(), seed)
    for seed in SEEDS:
        yield Trial("SiDA, 5 % of the data", sida(), seed, {"domain": Digits(share=0.05)})


def distances() -> Iterable[Trial]:
    """Claim 4: SIM's pseudo-Huber distance against the squared one, up to rates too high."""
    for rate in (2e-3, 2e-4, 1e-2, 5e-3):
        for seed in SEEDS:
            changes = {"optim": replace(SETTING.optim, lr=rate), "steps": 600}
            for name, distance in (("pseudo-Huber", PseudoHuber()), ("squared L2", SquaredL2())):
                method = SIM(distance=distance, times=SID.times, fake=SID.fake)
                yield Trial(f"{name}, lr {rate:g}", method, seed, changes)


SLOW = {"optim": replace(SETTING.optim, lr=5e-4), "steps": 600}
"""A rate that every number of calls and both matchings bear."""


def steps() -> Iterable[Trial]:
    """Claim 5: students of one, two and four calls, matched in every step or in the last."""
    for seed in SEEDS:
        yield Trial("1 call", sid(), seed, SLOW)
        for count in (2, 4):
            for matching in ("uniform", "final"):
                method = sid(sampler=FewStep(2.5, count), matching=matching)
                yield Trial(f"{count} calls, {matching}", method, seed, SLOW)
        fast = sid(sampler=FewStep(2.5, 4), matching="final")
        yield Trial("4 calls, final, lr 0.002", fast, seed, {"steps": 600})


def guidance() -> Iterable[Trial]:
    """Claim 5: the scales of guidance trade diversity (recall) for alignment."""
    first: tuple[Guidance, ...] = (Unguided(), AntiCFG(-1.0), LSG(1.1), LSG(1.05))
    then: tuple[Guidance, ...] = (
        *(LSG(1.2), AntiCFG(-0.5), ZeroCFG(), LSG(1.35), LSG(1.5)),
        *(LSG(2.0), LSG(3.0)),
    )
    for choices in (first, then):
        for seed, choice in product(SEEDS, choices):
            kappa = getattr(choice, "kappa", 1.0)
            label = type(choice).__name__ + ("" if kappa == 1 else f" {kappa:g}")
            compared = kappa < 2  # beyond, LSG is far more aligned than the others
            yield Trial(label, sid(guidance=choice), seed, {"steps": 600}, compared)


CLAIMS: dict[str, Callable[[], Iterable[Trial]]] = {
    "alpha": alpha,
    "adversarial": adversarial,
    "distances": distances,
    "steps": steps,
    "guidance": guidance,
}

if __name__ == "__main__":
    lab.main(CLAIMS, SETTING, (__doc__ or "").partition("\n")[0])
