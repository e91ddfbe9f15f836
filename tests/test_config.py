"""Configuration as text: round trips, refusals in words, and nothing that runs."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PosixPath
from typing import Any

import pytest

from fewstep import config
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VP, Flow
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Discrete, Karras, LogNormal, TimeLaw
from fewstep.diffusion.types import Sampler
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.method import Method
from fewstep.losses.weight import EDMWeight, Power
from fewstep.methods.sid import SiD
from fewstep.methods.sim import SIM
from fewstep.nets.mlp import MLP
from fewstep.recipes.digits import digits
from fewstep.recipes.registry import every, recipe
from fewstep.runs.run import Run
from fewstep.training.optim import Optim
from tests import instances


def defaults() -> Iterator[object]:
    """Every configuration class that needs no argument."""
    for cls in config.known().values():
        with suppress(TypeError):
            yield cls()


THINGS: list[object] = [
    *defaults(),
    *(make() for make in every().values()),
    *(*instances.PATHS, *instances.TIME_LAWS, *instances.DISTANCES, *instances.WEIGHTS),
    *(*instances.SAMPLERS, *instances.METHODS, *instances.GUIDANCE),
    Optim(clip=0.5, betas=(0.5, 0.75), decay="cosine"),
    Model(MLP(8, 0), (3, 4), 2, VP(betas=(0.1, 0.2)), predicts="velocity"),
]


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: type(thing).__name__)
def test_round_trips(thing: Any) -> None:
    """Through JSON text, and through the repr."""
    data = config.encode(thing)
    assert data["type"] == type(thing).__name__
    again = config.decode(json.loads(json.dumps(data, allow_nan=False)), type(thing))
    assert again == thing
    assert config.encode(again) == data
    assert config.parse(repr(thing)) == thing
    assert config.configuration(repr(thing), type(thing)) == thing


def test_what_is_known() -> None:
    """At least this; and no class of another package."""
    names = {type(thing).__name__ for thing in THINGS}
    assert {"SiD", "SIM", "DiffInstruct", "Pretrain", "Run", "Optim", "EMA", "VE", "MLP"} <= names
    assert {"Ring", "Digits", "FakeScore", "Heun", "FewStep", "L1", "PseudoHuber"} <= names
    assert all(cls.__module__.startswith("fewstep.") for cls in config.known().values())


def test_encoding_is_plain() -> None:
    assert config.encode(Optim()) == {
        "type": "Optim",
        "lr": 1e-3,
        "betas": [0.0, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "warmup": 0,
        "decay": "constant",
        "clip": "inf",
        "clip_value": "inf",
        "offload": False,
        "bits": 32,
    }
    assert config.encode({"a": (1, None), "b": [True, "x"]}) == {"a": [1, None], "b": [True, "x"]}
    with pytest.raises(TypeError, match="cannot store a PosixPath as configuration"):
        config.encode({"a": PosixPath("x")})
    with pytest.raises(ValueError, match=r"^nan is no setting; give a number$"):
        config.encode(Power(scale=math.nan))


def test_infinity() -> None:
    assert config.parse("Optim(clip=inf)") == Optim(clip=math.inf)
    assert config.decode({"type": "Optim", "clip": "inf"}).clip == math.inf
    assert config.decode({"type": "Power", "s": "-inf"}).s == -math.inf
    with pytest.raises(ValueError, match=r"^Optim\.clip is float, got 'nan'$"):
        config.parse("Optim(clip=nan)")
    with pytest.raises(ValueError, match=r"^MLP\.width is int, got 'inf'$"):
        config.parse("MLP(width=inf)")


def test_values_are_made_what_the_field_is() -> None:
    karras = config.parse("Karras(0, 80, tmax=800)")
    assert karras == Karras(0.0, 80.0, tmax=800.0)
    assert all(type(v) is float for v in vars(karras).values())
    assert config.parse("Discrete([0.5, 1])") == Discrete((0.5, 1.0))
    assert config.parse("Model(MLP, [2])").shape == (2,)


def test_nested_parts() -> None:
    text = "SiD(FewStep(steps=2), fake=FakeScore(LogNormal(std=2), weight=Power), alpha=1)"
    fake = FakeScore(LogNormal(std=2.0), Power())
    assert config.parse(text) == SiD(FewStep(steps=2), 1.0, fake=fake)
    assert config.parse("SiD", Method) == config.parse(" SiD() ") == SiD()
    whole = config.encode(digits())
    whole["method"]["fake"]["weight"] = {"type": "Power", "a": 2}
    changed = config.decode(whole, Run).method.fake
    assert changed == FakeScore(weight=Power(2.0))
    assert digits().method.fake == FakeScore(weight=EDMWeight(0.75))  # type: ignore[attr-defined]


METHODS = ", ".join(sorted({type(method).__name__ for method in instances.METHODS}))
REFUSED = {
    "Sid()": "there is no 'Sid'; did you mean 'SiD'?",
    "sid": "there is no 'sid'; did you mean 'SiD'?",
    "SiD(sampler=Haun())": "there is no 'Haun'; did you mean 'Heun'?",
    "Method()": f"there is no 'Method'; choose from {METHODS}",
    "SiD(alhpa=1)": "SiD has no field 'alhpa'; did you mean 'alpha'?",
    "SIM(FewStep(zzz=1))": (
        "FewStep has no field 'zzz'; choose from noise, rho, steps, t_init, times, unit"
    ),
    "SiD(alpha='1')": "SiD.alpha is float, got '1'",
    "SiD(alpha=True)": "SiD.alpha is float, got True",
    "SiD(FewStep(steps=2.0))": "FewStep.steps is int, got 2.0",
    "SiD(FewStep(steps=0))": "FewStep needs steps >= 1, t_init > 0 and rho > 0, got "
    "FewStep(t_init=2.5, steps=0, noise='fresh', rho=1.0, unit=False, times=())",
    "SiD(sampler=3)": "SiD.sampler is Sampler, got 3",
    "SiD(sampler=Karras)": "expected a Sampler, got Karras",
    "SiD(times=Discrete((1, 'a')))": "Discrete.values is float, got 'a'",
    "SiD(times=Discrete())": "Discrete: Discrete.__init__() missing 1 required positional "
    "argument: 'values'",
    "SiD(times=Karras(1, 2, 3, 4, 5))": "Karras takes 4 values without a name, got 5; write "
    "the others as field=value",
    "SiD(times=Karras(1, lo=2))": "Karras.lo is given twice",
    "SiD(**{'alpha': 1})": "SiD has no field '**'; choose from alpha, fake, guidance, matching, "
    "ratio, sampler, shared, times, weight",
    "SiD(output='fake')": "SiD has no field 'output'; choose from alpha, fake, guidance, "
    "matching, ratio, sampler, shared, times, weight",
    "SiD(*[1])": "cannot read '*[1]' as a value",
    "Karras()": "expected a Method, got Karras",
    "SiD(": "cannot read 'SiD('; write it as Name(field=value, ...)",
    "": "cannot read ''; write it as Name(field=value, ...)",
    "3": "expected an expression such as Name(field=value), got 3",
    "None": "expected an expression such as Name(field=value), got None",
    "{[]: 1}": "cannot read '{[]: 1}' as a value",
    "SiD(alpha=9**9**9)": "cannot read '9 ** 9 ** 9' as a value",
}


@pytest.mark.parametrize(("text", "sentence"), REFUSED.items(), ids=REFUSED)
def test_refusals_say_what_came_and_what_was_expected(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        config.parse(text, Method)


def test_refusals_of_tuples_and_choices() -> None:
    cases = {
        "Optim(betas=(0.1,))": "Optim.betas is tuple[float, float], got [0.1]",
        "Optim(betas=(0.1, 1.0))": "Optim.betas are in [0, 1), got (0.1, 1.0)",
        "Optim(decay='sine')": "Optim.decay is 'constant' | 'linear' | 'cosine', got 'sine'",
        "Optim(lr=inf)": "Optim needs a finite lr > 0 and warmup >= 0, got Optim(lr=inf, "
        "betas=(0.0, 0.999), eps=1e-08, weight_decay=0.0, warmup=0, "
        "decay='constant', clip=inf, clip_value=inf, offload=False, bits=32)",
        "Optim(lr=0)": "Optim needs a finite lr > 0 and warmup >= 0, got "
        "Optim(lr=0.0, betas=(0.0, 0.999), eps=1e-08, weight_decay=0.0, warmup=0, "
        "decay='constant', clip=inf, clip_value=inf, offload=False, bits=32)",
        "VP(betas=3)": "VP.betas is tuple[float, ...], got 3",
        "MLP(width=2)": "MLP needs width >= 4 and blocks >= 0, got MLP(width=2, blocks=4)",
    }
    for text, sentence in cases.items():
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            config.parse(text)
    with pytest.raises(ValueError, match=r"^there is no 'Nothing'; choose from .*Karras.*$"):
        config.decode({"type": "Nothing"}, TimeLaw)
    for data in ([], "SiD", None, {"alpha": 1}, {"type": 3}, {"type": ["SiD"]}):
        with pytest.raises(ValueError, match=r"^expected an expression such as Name"):
            config.decode(data)


ATTACKS = (
    "__import__('pathlib').Path({!r}).touch()",
    "SiD(alpha=__import__('pathlib').Path({!r}).touch())",
    "SiD(sampler=open({!r}, 'w'))",
    "open({!r}, 'w')",
    "(lambda: open({!r}, 'w'))()",
    "[open({!r}, 'w') for _ in (1,)]",
    "SiD.__init__.__globals__['__builtins__']['open']({!r}, 'w')",
    "f'{{open({!r}, chr(119))}}'",
    "exec('open({!r})')",
    "(x := open({!r}, 'w'))",
    "SiD(alpha=1 if open({!r}, 'w') else 2)",
    "{{**SiD().__dict__, 'x': open({!r}, 'w')}}",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_never_runs(attack: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = attack.format(str(mark))
    for read in (config.parse, config.configuration):
        with pytest.raises(ValueError, match=r"^(there is no '|cannot read |SiD has no field)"):
            read(text)
    assert not mark.exists()


@pytest.mark.parametrize("level", [100, 3000, 100_000])
@pytest.mark.parametrize("pattern", ["(", "[", "-", "SiD(fake=", "x.", "not "])
def test_deep_nesting_is_refused_in_words(pattern: str, level: int) -> None:
    closing = {"(": ")", "[": "]", "SiD(fake=": ")"}.get(pattern, "")
    with pytest.raises(ValueError, match=r"^(cannot read |there is no |expected an? )"):
        config.parse(pattern * level + "x" + closing * level)
    with pytest.raises(ValueError, match=r"^cannot read '"):
        config.parse(pattern * level)


def test_long_text_makes_a_short_sentence() -> None:
    with pytest.raises(ValueError, match="cannot read") as caught:
        config.parse("nonsense " * 1000)
    assert len(str(caught.value)) < 120


MINE = """
from dataclasses import dataclass, field
from fewstep.diffusion.types import Sampler
from fewstep.diffusion.samplers import FewStep

@dataclass(frozen=True)
class Mine(FewStep):
    extra: float = 1.0

@dataclass(frozen=True)
class Other:
    x: int = 0
    y: float | None = None
    z: dict[str, int] = field(default_factory=dict)
"""


@pytest.mark.usefixtures("known")
def test_classes_of_ones_own_file(tmp_path: Path) -> None:
    """A file called like an installed module does not shadow it."""
    path = tmp_path / "json.py"
    path.write_text(MINE)
    found = config.configuration(f"{path}:Mine(extra=2, steps=3)", Sampler)
    assert (type(found).__name__, found.extra, found.steps, found.calls) == ("Mine", 2.0, 3, 3)
    assert config.configuration(f"{path}:Mine", Sampler).extra == 1.0
    assert isinstance(config.parse("SiD(sampler=Mine(extra=4))").sampler, FewStep)  # by name now
    assert config.decode(config.encode(found)).extra == 2.0
    assert sys.modules["json"] is json
    other = config.parse("Other(y=2, z={'a': 1})")
    assert (other.x, other.y, other.z) == (0, 2.0, {"a": 1})
    assert type(other.y) is float
    assert config.parse("Other(y=None)").y is None
    with pytest.raises(ValueError, match=r"^Other\.y is float \| None, got 'a'$"):
        config.parse("Other(y='a')")
    with pytest.raises(ValueError, match=r"^Other\.z\['a'\] is int, got 'b'$"):
        config.parse("Other(z={'a': 'b'})")
    with pytest.raises(ValueError, match=r"^expected a Sampler, got Other$"):
        config.configuration(f"{path}:Other()", Sampler)
    with pytest.raises(ValueError, match=r"^there is no 'Mina'; did you mean 'Mine'\?$"):
        config.configuration(f"{path}:Mina()", Sampler)
    with pytest.raises(ValueError, match=r"^there is no file .*none\.py$"):
        config.configuration(f"{tmp_path / 'none.py'}:Mine")


@pytest.mark.usefixtures("known")
def test_parts_that_only_ones_own_class_has(tmp_path: Path) -> None:
    """A configuration class that no method of the package is made of, and what it is made of."""
    assert "Rollout" not in config.known()
    path = tmp_path / "rollouts_only.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from fewstep.diffusion.samplers import FewStep\n"
        "from fewstep.distillation.fake_score import Rollout\n\n"
        "@dataclass(frozen=True)\nclass Only:\n    rollout: Rollout = Rollout(FewStep(), 1)\n"
    )
    found = config.configuration(f"{path}:Only(rollout=Rollout(FewStep(2.5, 2), 2))")
    assert found.rollout.k == found.rollout.sampler.calls == 2
    assert config.decode(config.encode(found)) == found


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ndef (:\n")
    with pytest.raises(ValueError, match=r"broken\.py, line 2: "):
        config.configuration(f"{path}:Mine")


def test_recipes_of_ones_own_file(tmp_path: Path) -> None:
    path = tmp_path / "my_recipes.py"
    path.write_text(
        "from dataclasses import replace\nfrom fewstep.runs.run import Run\n"
        "from fewstep.recipes.digits import digits\n\n"
        "def short() -> Run:\n    return replace(digits(), steps=7)\n\n"
        "def helper():\n    return 1\n"
    )
    assert recipe(f"{path}:short")().steps == 7
    with pytest.raises(ValueError, match=r"^there is no recipe 'shrt'; did you mean 'short'\?$"):
        recipe(f"{path}:shrt")
    with pytest.raises(ValueError, match=r"^there is no recipe 'helper'; choose from short$"):
        recipe(f"{path}:helper")
    with pytest.raises(ValueError, match=r"^there is no recipe 'digit'; did you mean 'digits'\?$"):
        recipe("digit")
    assert every().keys() >= {"digits", "digits_teacher", "mixture"}
    assert isinstance(recipe("digits")().method, SiD)
    assert config.parse("Heun") == Heun()
    assert config.parse("SIM(FewStep())") == SIM(FewStep())
    assert config.parse("Flow") == Flow()
