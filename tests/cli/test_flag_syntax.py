"""A value that cannot be read is answered by how it is written; the answer itself can be read."""

from __future__ import annotations

import ast
import re
import shlex
import typing
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest

from fewstep.cli import flag_syntax
from fewstep.cli.parser import verb_parser
from fewstep.cli.run_flags import help_text, resolve
from fewstep.diffusion.samplers import Heun
from fewstep.diffusion.time_distributions import LogNormal
from fewstep.distillation.feature_distance import FeatureDistance
from fewstep.distillation.preferences import Preference
from fewstep.domains.prompts import Prompts
from fewstep.eval.picture_networks import DigitFeatures, LabelReward
from fewstep.recipes.digits import digits
from fewstep.recipes.registry import every
from fewstep.recipes.text_to_image import t2i
from fewstep.runs.run import Run
from tests.instances import METHODS


def inside(node: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """(flag, type) of every field that has no flags inside."""
    for field in fields(node):
        value, hint = getattr(node, field.name), typing.get_type_hints(type(node))[field.name]
        flag = f"{prefix}{field.name.replace('_', '-')}"
        if flag_syntax.opened(hint, value):
            yield from inside(value, f"{flag}.")
        elif field.init:
            yield flag, hint


BOUND = "--method.sampler.times"
"""In place of the steps that these samplers say, so that no times will do beside them."""
TEXTS = ("<class 'str'>", "tuple[str, ...]")


@cache
def kinds() -> dict[str, tuple[str, Run]]:
    """One flag of each type that any recipe or method has, but for texts, which any value is."""
    found: dict[str, tuple[str, Run]] = {}
    runs = [make() for make in every().values()]
    runs += [replace(digits(), method=method) for method in METHODS]
    for run in runs:
        for flag, hint in inside(run):
            if flag == BOUND:
                continue
            found.setdefault(str(hint), (flag, run))
    return {kind: found[kind] for kind in sorted(found) if kind not in TEXTS}


def refused(run: Run, words: list[str]) -> str:
    with pytest.raises(ValueError, match="--") as caught:
        resolve(run, words, "fewstep")
    return str(caught.value)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("value", ["a,b", ""])
def test_every_typed_flag_says_how_it_is_written(kind: str, value: str) -> None:
    flag, run = kinds()[kind]
    told = refused(run, [flag, value] if value or kind != "<class 'bool'>" else [f"{flag}=maybe"])
    assert told.startswith(f"{flag} ")
    assert "\n" not in told
    assert "got" in told or "nothing came" in told or "did you mean" in told
    if kind == "<class 'bool'>":
        assert f"write {flag} or " in told
    else:
        (example,) = re.findall(r"(?:written like|did you mean) (--.+?)(?:; |\?$)", told)
        resolve(run, shlex.split(example), "fewstep")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--model.shape 3,8,8", "whole numbers with spaces between, written like --model.shape"),
        ("--optim.betas 0.1", "--optim.betas is 2 numbers with spaces between"),
        ("--optim.lr=fast", "--optim.lr is a number, written like --optim.lr "),
        ("--batch 1 2", "--batch is a whole number, written like --batch 512; got '1 2'"),
        ("--steps 1e4", "--steps is a whole number, written like --steps 20000; got '1e4'"),
        ("--recompute yes", "--recompute takes no value: write --recompute or --no-recompute"),
        ("--domain.check 1", "write --domain.check or --domain.no-check; got '1'"),
        ("--optim.bits 16", "--optim.bits is one of 32, 8, written like --optim.bits 32"),
        ("--lora 8", "--lora is an expression; did you mean --lora 'LoRA(rank=8)'?"),
        ("--domain my.txt", "did you mean --domain \"Prompts(file='my.txt')\"?"),
        ("--method.sampler 4", "did you mean --method.sampler 'FewStep(steps=4)'?"),
        ("--best quick.clip", "did you mean --best \"Best(metric='quick.clip')\"?"),
        ("--guidance 3", "there is no flag --guidance"),
        ("--method.guidance .", "ZeroCFG), written like --method.guidance 'LSG(kappa=1.5)'"),
        ("--prompt my.txt", "there is no flag --prompt; did you mean --prompts?"),
        ("--prompts", "--prompts is a text, written like --prompts prompts.txt; nothing came"),
    ],
)
def test_what_people_write_first(words: str, told: str) -> None:
    assert told in refused(t2i(), words.split())


STAGES = "((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))"


@pytest.mark.parametrize(
    ("method", "flag", "text", "expected"),
    [
        ("DMD()", "pairs.sampler", "Heun(steps=4)", Heun(steps=4)),
        ("DMD(pairs=Pairs(sampler=Heun(steps=4)))", "pairs.sampler", "None", None),
        ("ADD()", "judge.times", "LogNormal(std=2)", LogNormal(std=2.0)),
        ("ADD()", "judge.features", "DigitFeatures()", DigitFeatures()),
        (
            "ADD(judge=Discriminator(times=None, features=DigitFeatures()))",
            "judge.features",
            "teacher",
            "teacher",
        ),
        ("DMD()", "distance", "FeatureDistance()", FeatureDistance()),
        ("FlashDiffusion()", "shares", STAGES, ast.literal_eval(STAGES)),
        ("FlashDMD()", "preference", "Preference(LabelReward())", Preference(LabelReward())),
    ],
)
def test_values_given_whole(method: str, flag: str, text: str, expected: Any) -> None:
    """Optional parts, texts or parts, and lists of lists: there or not before."""
    for words in ([f"--method.{flag}", text], [f"--method.{flag}={text}"]):
        run = resolve(digits(), ["--method", method, *words], "fewstep")
        field = flag_syntax.field_of(run, ["method", *flag.split(".")])
        assert field is not None
        assert field[1] == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lora.rank 4", "--lora has no flags inside; give it whole: --lora 'LoRA(rank=64)'"),
        ("--method.judge.times.std 2", "--method.judge.times 'LogNormal(mean=-1.2)'"),
        (
            "--method.judge.features onw",
            "--method.judge.features: there is no 'onw'; did you mean",
        ),
        ("--method.judge.features DigitFeature()", "did you mean 'DigitFeatures'?"),
        ("--method.judge.features Heun()", "expected a PictureFeatures, got Heun"),
        ("--method.judge.times 2", "is an expression (one of Discrete, FlowBeta, "),
        (
            "--method.judge.times",
            "written like --method.judge.times 'LogNormal(mean=-1.2)'; nothing",
        ),
        ("--method None", "--method is Method, got None"),
    ],
)
def test_what_is_wrong_with_a_value_given_whole(words: str, told: str) -> None:
    run = resolve(digits(), ["--method", "ADD()"], "fewstep")
    assert told in refused(run, words.split())


@pytest.mark.parametrize("words", ["--lora 8", "--domain my.txt", "--method.sampler 4"])
def test_what_is_meant_can_be_typed(words: str) -> None:
    (meant,) = re.findall(r"did you mean (.+)\?", refused(t2i(), words.split()))
    assert resolve(t2i(), shlex.split(meant), "fewstep") != t2i()


def test_prompts_name_the_file_of_a_domain_of_prompts() -> None:
    for words in (["--prompts", "my.txt"], ["--prompts=my.txt"]):
        assert resolve(t2i(), words, "fewstep").domain == Prompts(file="my.txt")
    run = resolve(t2i(), ["--prompts", "my.txt", "--domain", "Prompts(check=False)"], "fewstep")
    assert run.domain == Prompts(file="my.txt", check=False)
    told = refused(digits(), ["--prompts", "my.txt"])
    assert told == "--prompts names a file of prompts, and this run's domain is Digits"


def test_help_shows_the_parts_that_a_run_does_not_have() -> None:
    shown = help_text(t2i(), "fewstep")
    assert "  --lora LORA | NONE\n" in shown
    assert "  --fake-optim OPTIM | NONE\n" in shown
    assert "  --method.fake.augment AUGMENT | NONE\n" in shown
    assert "--lora 'LoRA(rank=64)'" in " ".join(shown.split())
    assert "{fixed}" not in shown
    assert "--prompts is short for --domain.file" in shown
    assert "--prompts" not in help_text(digits(), "fewstep")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--count x", "--count is a whole number, written like --count 7; got 'x'"),
        ("--rate", "--rate is a number, written like --rate 0.5; nothing came after it"),
        ("--many 1 x", "--many is whole numbers with spaces between, written like --many 4"),
        ("--way up", "--way is one of left, right, written like --way left; got 'up'"),
        ("--gpus", "--gpus needs a value: such as 1x24GB"),
    ],
)
def test_the_flags_of_the_verbs_too(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = verb_parser("verb", "For a test.")
    parser.add_argument("--count", type=int, default=7)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--many", type=int, nargs="+", default=[4])
    parser.add_argument("--way", choices=["left", "right"])
    parser.add_argument("--gpus", help="such as 1x24GB")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(words.split())
    assert told in capsys.readouterr().err
