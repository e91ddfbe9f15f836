"""Wrong input on the command line: one sentence, exit code 2, nothing created and nothing lost."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli import VERBS
from fewstep.recipes.digits import digits_teacher
from tests.command import SMALL, TEACH, fewstep, tree
from tests.storage.test_checkpoint import damage

T = "train digits_teacher --out new"
D = "distill digits --out new"
SMALLER = " ".join(SMALL)
TORN = "torn/run.json is not readable JSON (Expecting value: line 1 column 1 (char 0))"
DIGEST = "is damaged: its SHA-256 is not the recorded one"
LISTS = "--help lists the fields"
BAD_NET = repr(digits_teacher().model.net).replace("width=256", "width=2")
BAD_EMA = re.sub("halflife=[0-9.]+", "halflife=nan", repr(digits_teacher().ema))
LABELS = "labels must be 0 to 9, or 10 for none"
CASES = {
    # verbs and recipes
    "trian": "there is no verb 'trian'; did you mean 'train'?",
    "frobnicate": f"there is no verb 'frobnicate'; choose from {', '.join(VERBS)}",
    "train": "train needs a recipe, such as 'digits_teacher'; 'fewstep recipes' lists them",
    "distill": "distill needs a recipe, such as 'digits'; 'fewstep recipes' lists them",
    "train digits_techer": "there is no recipe 'digits_techer'; did you mean 'digits_teacher'?",
    "train mine.py:run": "there is no file mine.py",
    "train digits": "digits distils a teacher; the command is: fewstep distill digits",
    "distill digits_teacher": "digits_teacher trains a teacher; the command is: fewstep train "
    "digits_teacher",
    # flags
    f"{T} --stesp 3": "there is no flag --stesp; did you mean --steps?",
    f"{T} --dryrun": "there is no flag --dryrun; did you mean --dry-run?",
    f"{D} --techer x": "there is no flag --techer; did you mean --teacher?",
    f"{T} --method.alpha 1": f"there is no flag --method.alpha; {LISTS}",
    f"{T} --method.__class__ SiD": f"there is no flag --method.__class__; {LISTS}",
    f"{T} --device abacus": "this machine has no device 'abacus'; leave --device out for the CPU",
    f"{T} more": f"there is no argument more; {LISTS}",
    f"{T} --steps": "--steps is a whole number, written like --steps 6000; nothing came after it",
    "recipes --all": "there is no flag --all; fewstep recipes --help lists them",
    "recipes digits": "there is no argument digits; fewstep recipes --help lists them",
    "evaluate sid --drawz 3": "there is no flag --drawz; did you mean --draws?",
    "sample": "fewstep sample needs: model; fewstep sample --help tells more",
    # values
    f"{T} --steps 0": "Run.steps must be at least 1, got 0",
    f"{T} --steps abc": "--steps is a whole number, written like --steps 6000; got 'abc'",
    f"{T} --seed -3": "Run.seed must be 0 to 2^63 - 1, got -3",
    f"{T} --batch 6 --accumulate 4": "Run.batch 6 is not a multiple of Run.accumulate 4",
    f"{T} --optim.betas 2 0.9": "Optim.betas are in [0, 1), got (2.0, 0.9)",
    f"{T} --ema.halflife nan": f"EMA needs halflife >= 0 and ramp >= 0, got {BAD_EMA}",
    f"{T} --optim.decay sine": "--optim.decay is one of constant, linear, cosine, written like "
    "--optim.decay cosine; got 'sine'",
    f"{T} --model.net.width 2": f"MLP needs width >= 4 and blocks >= 0, got {BAD_NET}",
    f"{T} --model.shape 1 4 4": "digits are (1, 8, 8) with 10 classes (or 0, to ignore the "
    "labels), got Model.shape (1, 4, 4) with 10",
    f"{T} --model.classes 5": "digits are (1, 8, 8) with 10 classes (or 0, to ignore the "
    "labels), got Model.shape (1, 8, 8) with 5",
    f"{T} --method.times.std nan": "LogNormal(mean=-1.2, std=nan) needs std > 0 "
    "and finite, got nan",
    # expressions
    f"{D} --method Sid()": "--method: there is no 'Sid'; did you mean 'SiD'?",
    f"{D} --method SiD(alhpa=1)": "--method: SiD has no field 'alhpa'; did you mean 'alpha'?",
    f"{D} --method SiD(": "--method: cannot read 'SiD('; write it as Name(field=value, ...)",
    f"{D} --method.times Heun()": "--method.times: expected a TimeLaw, got Heun",
    f"{D} --method.sampler FewStep(steps=0)": "--method.sampler: FewStep needs steps >= 1, "
    "t_init > 0 and rho > 0, got FewStep(t_init=2.5, steps=0, noise='fresh', rho=1.0, "
    "unit=False, times=())",
    f"{D} --method x.py:Mine": "--method: there is no file x.py",
    f"{D} --optim=": "--optim is an expression, written like --optim 'Optim(lr=0.002)'; "
    "nothing came after it",
    # teachers
    D: "digits needs a teacher: train one first (see 'fewstep recipes'), then pass its run "
    "folder with --teacher",
    f"{D} --teacher nowhere": "there is no file or folder nowhere",
    f"{D} --teacher hurt": f"hurt/student/model.safetensors {DIGEST}",
    f"{D} --teacher teacher/checkpoints/step-00000030": "teacher/checkpoints/step-00000030 is a "
    "checkpoint or something else, not a finished model",
    # folders
    f"train digits_teacher --out thesis {SMALLER}": "thesis is in use: it holds book.tex but no "
    "run; choose an empty folder with --out",
    f"{' '.join(TEACH).replace('30', '31')} --out teacher": "teacher is in use by a run with "
    "other settings (run.steps was 30, now 31); choose another folder with --out",
    f"{' '.join(TEACH)} --out teacher --ema.ramp 0.5": "teacher is in use by a run with other "
    f"settings (run.ema.ramp was {digits_teacher().ema.ramp}, now 0.5); choose another folder "
    "with --out",
    f"{' '.join(TEACH)} --out thesis/book.tex": "cannot write to thesis/book.tex: File exists",
    f"{' '.join(TEACH)} --out thesis/book.tex/run": "cannot write to thesis/book.tex/run: Not a "
    "directory",
    f"{' '.join(TEACH)} --out busy": "busy is in use by another process; wait for it, or choose "
    "another --out",
    "demo --out thesis": "thesis is in use: it holds book.tex but no run; choose an empty folder "
    "with --out",
    "demo --seed one": "--seed is a whole number, written like --seed 0; got 'one'",
    # sampling
    "sample nowhere": "there is no file or folder nowhere",
    "sample thesis": "thesis holds no finished model (no manifest.json in it)",
    "sample hurt": f"hurt/student/model.safetensors {DIGEST}",
    "sample sid --seeds 5-2": "--seeds are written like 0-63 or 3,7,9, got '5-2'",
    "sample sid --seeds 1;2": "--seeds are written like 0-63 or 3,7,9, got '1;2'",
    "sample sid --seeds=": "--seeds is empty; give it a value, or leave it out",
    "sample sid --seeds ,": "--seeds names no sample",
    "sample sid --out=": "--out is empty; give it a value, or leave it out",
    "sample sid --json=1": "--json takes no value: leave out =1",
    "sample sid --device meta": "this machine has no device 'meta'; leave --device out for the "
    "CPU",
    "sample sid --guidance 1e400": "--guidance is a finite scale, got inf",
    "sample sid --steps 0": "--steps is from 1 to 10,000, got 0",
    "sample sid --steps 99999999999999999999": "--steps is from 1 to 10,000, got "
    "99999999999999999999",
    "sample sid --seeds 0-99999999999": "--seeds: more than a million numbers in '0-99999999999'",
    "sample sid --seeds 9223372036854775808": "--seeds end at 2^63 - 1, got 9223372036854775808",
    "sample sid --labels 12": LABELS,
    "sample sid --labels 1,2": "got 2 labels for 64 seeds",
    "sample sid --labels x": "--labels are written like 0-63 or 3,7,9, got 'x'",
    "sample sid --out a.jpg": "--out ends in .png for a grid or in .npz for arrays, or is a "
    "folder, got a.jpg",
    "sample sid --out no/a.png": "there is no folder no to write a.png to",
    "sample sid --out taken.png": "taken.png is a folder; name a file in it, or a folder without "
    ".png",
    "sample sid --out thesis": "thesis exists already; choose a new or empty folder",
    # what is read is not written over
    "sample sid --out sid/grids/step-00000020.png": "sid/grids/step-00000020.png is a file of "
    "sid, which is read; choose another --out",
    "sample sid --from a.png --strength 0.5 --out ./a.png": "a.png is what is read, and would be "
    "lost; choose another --out",
    "compare sid --out sid/run.json": "--out is a page, whose name ends in .html; got "
    "sid/run.json",
    "compare sid --out sid/page.html": "sid/page.html is a file of sid, which is read; choose "
    "another --out",
    "compare sid --out new.html --no-page": "--out and --no-page contradict each other: leave "
    "one of them out",
    "data check pictures --sheet pictures/a.png": "pictures/a.png is a file of pictures, which "
    "is read; choose another --sheet",
    "data check pictures --sheet pictures/b.png": "pictures/b.png would become a part of "
    "pictures, which is read; choose another --sheet",
    "data check pictures --sheet sid/run.json": "--sheet is a .png file in a folder that exists, "
    "got sid/run.json",
    "stats set.npz --out set.npz": "set.npz exists already; choose another name",
    # measuring and reporting
    "evaluate nowhere": "there is no file or folder nowhere",
    "evaluate thesis": "thesis is not a run folder (no run.json in it)",
    "evaluate sid --samples 9": "evaluate needs --samples of at least 100 and --draws of at "
    "least 1",
    "evaluate sid --draws 0": "evaluate needs --samples of at least 100 and --draws of at least 1",
    "evaluate sid --draws x": "--draws is a whole number, written like --draws 3; got 'x'",
    "evaluate half": "half is not finished; continue it with: fewstep train half",
    "evaluate torn": TORN,
    "evaluate odd": "odd/run.json does not describe a run",
    "report nowhere": "there is no file or folder nowhere",
    "report torn": TORN,
}


@pytest.fixture(scope="module")
def place(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs, a damaged one, a half one, a foreign folder, and one that is locked."""
    here = tmp_path_factory.mktemp("refusals")
    shutil.copytree(finished / "runs", here, dirs_exist_ok=True)
    shutil.copytree(here / "sid", here / "hurt")
    damage(here / "hurt" / "student" / "model.safetensors", 1000, 1)
    shutil.copytree(here / "teacher", here / "half", ignore=shutil.ignore_patterns("student"))
    facts = json.loads((here / "half" / "run.json").read_text())
    (here / "half" / "run.json").write_text(json.dumps({**facts, "command": "fewstep train half"}))
    for name, text in (("torn/run.json", ""), ("odd/run.json", '{"run": 3}')):
        (here / name).parent.mkdir()
        (here / name).write_text(text)
    (here / "pictures").mkdir()
    for name in ("pictures/a.png", "a.png", "set.npz", "sid/page.html"):
        (here / name).write_text("of the person")
    for name in ("thesis/book.tex", "busy/.lock"):
        (here / name).parent.mkdir()
        (here / name).write_text("years of work")
    (here / "taken.png").mkdir()
    return here


@pytest.mark.parametrize("command", CASES)
def test_wrong_input_is_one_sentence(command: str, place: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(place)
    before = tree(place)
    with Path("busy/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = fewstep(*command.split())
    assert result == (2, "", f"fewstep: {CASES[command]}\n")
    assert tree(place) == before
