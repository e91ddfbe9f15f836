"""What fewstep plan makes of a cost: parts on several GPUs, what fits, and the command line."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from fewstep.cli.plan_table import fitting, limits, nets
from fewstep.methods.sid import SiD
from fewstep.nets.lora import LoRA
from fewstep.plan.choices import (
    Choice,
    GiB,
    GPUs,
    Row,
    best,
    choices,
    command,
    in_parts,
    numbers_of_parts,
    recipe_for,
    row,
)
from fewstep.plan.gathers import Message, Size
from fewstep.plan.links import Links
from fewstep.plan.meta_step import StepCost
from fewstep.recipes.digits import digits
from fewstep.recipes.registry import every
from fewstep.runs.teacher import describe_model
from fewstep.teachers.network_config import describe
from fewstep.training.optim import Optim
from tests.command import fewstep
from tests.conftest import Folders, folders

__all__ = ["folders"]


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("1x24GB", GPUs(1, 24 * GiB)),
        ("8x80gib", GPUs(8, 80 * GiB)),
        (" 2x12.5GB ", GPUs(2, 12.5 * GiB)),
    ],
)
def test_gpus(text: str, gpus: GPUs) -> None:
    assert GPUs.parse(text) == gpus


@pytest.mark.parametrize("text", ["24", "24GB", "0x24GB", "1x0GB", "1x24TB", "1x24", ""])
def test_what_is_no_description_of_gpus(text: str) -> None:
    with pytest.raises(ValueError, match="written like 1x24GB or 8x80GB"):
        GPUs.parse(text)


def test_parts() -> None:
    """Of 16 that stay, 4 of gradients and 10 in between, four GPUs hold 5 and 10, and 2 blocks."""
    assert in_parts(StepCost(30, 16, 4, 1, 0.0), 4) == 5 + 10 + 2


def test_parts_are_whole_before_they_are_cut() -> None:
    """20 bytes at the start are more than the 17 of a step."""
    assert in_parts(StepCost(30, 16, 4, 1, 0.0, start=20), 4) == 20


def test_numbers_of_parts() -> None:
    """One for each GPU, and one for each of a node where there are several whole ones."""
    assert numbers_of_parts(GPUs(8, 1.0), Links()) == [8]
    assert numbers_of_parts(GPUs(64, 1.0), Links()) == [64, 8]
    assert numbers_of_parts(GPUs(64, 1.0), Links(per_node=4)) == [64, 4]
    assert numbers_of_parts(GPUs(4, 1.0), Links(per_node=1)) == [4]


AVERAGE = ((Message("average", "student", (Size(10**9, 1, 4),)), 1),)


def test_a_row_by_hand() -> None:
    """4 GB of gradients between 64 GPUs whose nodes send 400 GB/s, after 2 s of two microbatches.

    6 MB a sample, read for 8 GPUs of a node at 2 GB/s; 20 GB of checkpoint every 10 steps, copied
    at 10 GB/s: training stands still for 2 s, and the 10 s of writing are over before the next.
    """
    cost = StepCost(30, 16, 4, 1, 1e12, 20, AVERAGE, (), 20 * 10**9, 6 * 10**6)
    run = replace(digits(), batch=512, save_every=10)
    found = row(cost, run, Choice(False, False, "bf16", 4), GPUs(64, 80 * GiB), 1e12)
    assert found.batch == 512
    assert found.computing == 2.0
    assert found.sent == 2 * 4e9 * 63 / 64
    assert found.sending == pytest.approx(found.sent / 400e9 + found.hops)
    assert found.hops == pytest.approx(2 * 6 * 4e-6)
    assert found.reading == pytest.approx(2 * 4 * 6e6 * 8 / 2e9)
    assert found.seconds == pytest.approx(2 + found.sending + found.reading)
    assert found.saving == pytest.approx(0.2)
    assert (found.memory, found.fits, found.messages) == (30, True, 1)


def test_many_gpus_make_a_larger_batch() -> None:
    """1,024 that compute 4 at once have no part of 512: the step is of 4,096, and as long."""
    run, cost = replace(digits(), batch=512), StepCost(30, 16, 4, 1, 1e12)
    few, many = (
        row(cost, run, Choice(False, False, "bf16", 4), GPUs(count, GiB), 1e12)
        for count in (128, 1024)
    )
    assert (few.batch, many.batch) == (512, 4096)
    assert few.computing == many.computing == 1.0


def rows() -> list[Row]:
    whole = Choice(False, False, "fp32", 4)
    return [
        Row(whole, 30, 4.0, False),
        Row(replace(whole, precision="bf16"), 20, 2.0, True),
        Row(replace(whole, precision="bf16", recompute=True), 10, 3.0, True),
        Row(replace(whole, lora=True, precision="bf16"), 5, 1.0, True),
        Row(replace(whole, precision="bf16", bits=8), 12, 2.0, True),
    ]


def test_the_best_is_whole_and_exact_and_fast() -> None:
    found = rows()
    assert best(found) == found[1]
    assert best([found[4], found[2]]) == found[2]
    assert best([found[3], found[4]]) == found[4]
    assert best([found[0], found[3]]) == found[3]
    assert best([found[0]]) is None


def test_what_there_is_to_choose() -> None:
    """Weights of EDM2's networks, which are normalised in every call, cannot be held in bf16."""
    found = choices(digits().model, [4])
    assert len(found) == 2 * 2 * 2 + 2 * 2
    assert {(c.precision, c.frozen) for c in found} == {("fp32", "fp32"), ("bf16", "bf16")}
    assert {c.bits for c in found if c.lora} == {32}
    edm2 = choices(every()["sid_edm2_s"]().model, [4])
    assert {(c.precision, c.frozen) for c in edm2} == {("fp32", "fp32"), ("bf16", "fp32")}
    run = replace(digits(), fake_optim=Optim(2e-4))
    small = found[-5].of(run)
    assert (found[-5].bits, small.frozen) == (8, "bf16")
    assert small.fake_optim == Optim(2e-4, bits=8)
    assert small.optim == replace(run.optim, bits=8)
    assert found[0].of(run) == replace(run, batch=4)


def test_the_command_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.cli.run_flags import resolve

    run = replace(digits(), batch=512)
    one = command(rows()[3], run, "digits", "runs/teacher", GPUs(1, 1.0)).split(" --device cuda ")
    assert one[0] == "fewstep distill digits --teacher runs/teacher"
    assert '--accumulate 128 --precision bf16 --no-recompute --lora "LoRA(rank=64' in one[1]
    many = command(
        replace(rows()[2], choice=Choice(False, True, "bf16", 4, parts=4)),
        run,
        "digits",
        "t",
        GPUs(4, 1.0),
    )
    assert many.startswith("torchrun --standalone --nproc-per-node=4 -m fewstep distill digits")
    flags = ["--batch", "512", "--accumulate", "32", "--precision", "bf16", "--recompute"]
    assert many.endswith(" ".join(["--shard", *flags]))
    done = resolve(run, flags, "test")
    assert (done.batch, done.accumulate, done.recompute) == (512, 32, True)
    wide = command(
        replace(rows()[2], choice=Choice(False, True, "bf16", 4, parts=8)),
        run,
        "digits",
        "t",
        GPUs(64, 1.0),
    )
    launch = (
        "torchrun --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500"
    )
    assert wide.startswith(f"{launch} -m fewstep distill digits --teacher t --device cuda")
    assert "--shard 8 --batch 512 --accumulate 2" in wide
    slow = Row(rows()[2].choice, 10, 131.2, True)
    assert "--timeout 525 --batch" in command(slow, run, "digits", "t", GPUs(2, 1.0))
    assert "--timeout" not in wide + command(slow, run, "digits", "t", GPUs(1, 1.0))
    run = replace(run, fake_optim=Optim(1e-4, clip=1.0))
    least = replace(rows()[4].choice, frozen="bf16")
    words = shlex.split(command(Row(least, 1, 1.0, True), run, "digits", "t", GPUs(1, 1.0)))
    done = resolve(run, words[words.index("--batch") :], "test")
    assert done == replace(least.of(run), batch=512, accumulate=128)
    own = ["--batch", "512", "--method.alpha", "-0.5", "--precision=fp16", "--no-recompute"]
    own += ["--optim.lr=3e-4", "--lora", "LoRA(4)", "--steps", "7"]
    words = shlex.split(command(rows()[3], run, "digits", "t", GPUs(1, 1.0), own))
    done = resolve(run, words[words.index("cuda") + 1 :], "test")
    assert isinstance(done.method, SiD)
    assert (done.method.alpha, done.optim.lr, done.steps) == (-0.5, 3e-4, 7)
    assert (done.precision, done.lora, words.count("--batch")) == ("bf16", LoRA(), 1)


def test_the_recipe_of_a_teacher(folders: Folders) -> None:
    assert recipe_for(describe_model(folders("sd"))) == "t2i"
    assert recipe_for(describe_model(folders("sd3"))) == "t2i_flow"
    assert recipe_for(digits().model) == "digits"
    assert recipe_for(every()["sid_edm2_s"]().model) == "sid_edm2_s"
    odd, _ = describe("EDMPrecond", {"img_resolution": 48, "img_channels": 3, "label_dim": 7})
    with pytest.raises(ValueError, match=r"no recipe distils a model of \(3, 48, 48\) with 7"):
        recipe_for(odd)


def test_the_verb(finished: Path) -> None:
    teacher = str(finished / "runs" / "teacher")
    done = fewstep("plan", teacher, "--gpus", "2x24GB", "--at-once", "4", "--batch", "64")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "digits: SiD, batch 64, 1,800 steps, on 2 GPUs of 24 GiB"
    table = [line for line in lines if "  fits  " in line]
    # precision and recomputation; whole, in parts, and whole with moments of 8 bits
    assert len(table) == 2 * 2 * (2 + (find_spec("bitsandbytes") is not None))
    assert ("pip install 'fewstep[lowmem]'" in done.out) == (len(table) == 8)
    assert "not possible: LoRA adapts the projections of attention" in done.out
    assert lines[-1].startswith(
        "torchrun --standalone --nproc-per-node=2 -m fewstep distill digits"
    )
    small = fewstep("plan", teacher, "--gpus", "1x1GB", "--at-once", "4")
    assert "Nothing fits: compute fewer samples at once" in small.out


def test_several_nodes(finished: Path) -> None:
    """The ways that the runner has, what each sends, and what limits the one that is chosen."""
    teacher, few = str(finished / "runs" / "teacher"), ("--at-once", "4", "--batch", "64")
    done = fewstep("plan", teacher, "--gpus", "16x24GB", *few, "--between", "1", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["links"] == {**asdict(Links()), "between": 1e9}
    assert {row["choice"]["parts"] for row in told["rows"]} == {1, 8, 16}
    plain = {row["choice"]["parts"]: row for row in told["rows"] if row["choice"]["bits"] == 32}
    assert all(row["batch"] == 64 for row in told["rows"])
    assert plain[1]["sent"] > 0
    assert plain[16]["sending"] > plain[8]["sending"]  # every call goes over the slow links
    assert told["command"].startswith("torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d")


def test_what_limits_a_step() -> None:
    """Shares of a second, in which parts send while they compute; short messages are told."""
    run, gpus = replace(digits(), save_every=50), GPUs(16, GiB)
    whole = Row(Choice(False, False, "bf16", 4), 1, 0.9, True, 64, 0.6, 0.2, hops=0.09)
    whole = replace(whole, reading=0.1, checkpoint=8 * GiB, saving=0.1)
    assert limits(whole, run, gpus, Links()) == (
        "Of a step's time 60% computing, 20% sending, 10% reading samples, 10% checkpoints. A "
        "checkpoint every 50 steps is 8.00 GiB: process 0 needs twice as much main memory beside "
        "its own, and writes for 4.3 s at 2 GB/s."
    )
    parted = replace(whole, choice=replace(whole.choice, parts=8), hops=0.11)
    told = limits(parted, run, gpus, Links())
    assert "sending (most of it waiting for short messages: fewer parts help, not links)" in told
    assert "checkpoints, the first two at once. A" in told
    assert "sending" not in limits(whole, run, GPUs(1, GiB), Links())
    assert [nets(replace(whole.choice, parts=n), gpus) for n in (1, 8, 16)] == [
        "whole",
        "in 8 parts",
        "in parts",
    ]


def test_what_does_not_fit_at_the_start() -> None:
    parted = Row(Choice(False, False, "bf16", 4, parts=8), 20, 1.0, False, start=20)
    assert fitting(parted) == "does not fit at the start"
    assert fitting(replace(parted, memory=21)) == "does not fit"
    assert fitting(replace(parted, fits=True)) == "fits"


def test_wrong_input(finished: Path, folders: Folders, tmp_path: Path) -> None:
    teacher = str(finished / "runs" / "teacher")
    shutil.copytree(folders("sd"), tmp_path / "sd")
    (tmp_path / "sd" / "unet" / "config.json").unlink()
    wrong = {
        ("plan", teacher, "--gpus", "24"): "--gpus is written like 1x24GB or 8x80GB, got '24'",
        ("plan", str(tmp_path / "sd"), "--gpus", "1x24GB"): "unet/config.json is missing",
        ("plan", teacher): "needs: --gpus",
        ("plan", teacher, "--gpus", "1x8GB", "--recipe", "digit"): "did you mean 'digits'",
        ("plan", teacher, "--gpus", "1x8GB", "--recipe", "digits_teacher"): "trains a teacher",
        ("plan", teacher, "--gpus", "1x8GB", "--at-once", "0"): "--at-once is from 1 to",
        ("plan", teacher, "--gpus", "1x8GB", "--between", "0"): "a positive number, got 0",
        ("plan", teacher, "--gpus", "12x8GB"): "12 GPUs do not make whole nodes of 8; give",
        ("plan", teacher, "--gpus", "1x8GB", "--metod", "SIM()"): "there is no flag --metod",
        ("plan", str(tmp_path / "none"), "--gpus", "1x8GB"): "there is no file or folder",
    }
    for args, message in wrong.items():
        done = fewstep(*args)
        assert done.code == 2, args
        assert message in done.err, done.err
