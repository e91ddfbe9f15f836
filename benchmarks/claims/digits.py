"""The published claims, measured on 8x8 digits: python benchmarks/claims/digits.py [CLAIM ...]

Three seeds of everything. The teacher is trained first (a minute and a half), with a tenth of the
labels dropped so that it can be guided. Results: benchmarks/results/claims/digits-CLAIM.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import lab
from lab import Setting, Trial

from fewstep.critic import Critic
from fewstep.data.digits import SIGMA_DATA
from fewstep.ema import EMA
from fewstep.fake_score import FakeScore
from fewstep.generator import Generator
from fewstep.losses.weight import EDMWeight
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.optim import Optim
from fewstep.recipes.digits import Digits, digits_teacher
from fewstep.runner import execute
from fewstep.student import load_student
from fewstep.times import Karras

SEEDS = (0, 1, 2)
TIMES, WEIGHT = Karras(tmax=500.0), EDMWeight(SIGMA_DATA)
FAKE = FakeScore(weight=WEIGHT)


def teacher() -> Generator:
    """The digits teacher, trained if need be."""
    out = lab.WORK / "digits" / "teacher"
    run = replace(digits_teacher(), domain=Digits(drop=0.1))
    for _ in execute(run, out, recipe="digits_teacher"):
        pass
    return load_student(out)


SETTING = Setting(
    "digits",
    Digits(),
    teacher,
    Optim(lr=2e-3, betas=(0.0, 0.99), warmup=50, decay="linear"),
    EMA(halflife=10_000),
)


def sid(**changes: Any) -> SiD:
    """The digits recipe's SiD."""
    return replace(SiD(alpha=1.0, times=TIMES, fake=FAKE), **changes)


def sida(**changes: Any) -> SiDA:
    """SiDA with the same settings."""
    critic = Critic(weight=WEIGHT, judging=WEIGHT)
    return replace(SiDA(times=TIMES, fake=critic, gan=0.01), **changes)


def alpha() -> Iterable[Trial]:
    """Claims 1 and 2: how SiD falls, and with which alpha."""
    for seed in SEEDS:
        for value in (1.0, 0.5, 1.2, 0.75, 0.25, 0.0):
            yield Trial(f"alpha {value:g}", sid(alpha=value), seed)


def adversarial() -> Iterable[Trial]:
    """Claim 3: SiDA needs fewer pictures than SiD and passes the teacher; 5 % of the data do."""
    for seed in SEEDS:
        yield Trial("SiD", sid(), seed)
        yield Trial("SiDA", sida(), seed)
        yield Trial("SiDA, 5 % of the data", sida(), seed, {"domain": Digits(share=0.05)})


CLAIMS: dict[str, Callable[[], Iterable[Trial]]] = {"alpha": alpha, "adversarial": adversarial}

if __name__ == "__main__":
    lab.main(CLAIMS, SETTING, (__doc__ or "").partition("\n")[0])
