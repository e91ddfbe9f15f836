"""Runs made with classes of one's own files: read again on the user's word, and never without."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
import shutil
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import fewstep as package
from fewstep import config
from fewstep.diffusion.noise_path import VE
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.storage.files import pack, unpack, write_folder
from fewstep.storage.model_folder import KIND, load_student
from fewstep.storage.user_code import recorded
from tests.command import DISTIL, SMALL, TEACH, fewstep

MARK = "Path(__file__).with_name('ran').touch()\n"
HEAD = "from pathlib import Path\nfrom dataclasses import dataclass\n"
OWN = {
    "sampler": (
        "from fewstep.diffusion.samplers import FewStep\n@dataclass(frozen=True)\n"
        "class Mine(FewStep):\n    extra: float = 1.0\n",
        ("--method.sampler", "mine.py:Mine()"),
    ),
    "domain": (
        "from fewstep.recipes.digits import Digits\n@dataclass(frozen=True)\n"
        "class Mine(Digits):\n    extra: float = 1.0\n",
        ("--domain", "mine.py:Mine()"),
    ),
    "method": (
        "from fewstep.methods.sid import SiD\nfrom fewstep.diffusion.samplers import FewStep\n"
        "@dataclass(frozen=True)\nclass Steps(FewStep):\n    extra: float = 1.0\n"
        "@dataclass(frozen=True)\nclass Mine(SiD):\n    sampler: FewStep = Steps()\n",
        ("--method", "mine.py:Mine()"),
    ),
}
NET = (
    "from fewstep.nets.mlp import MLP\n@dataclass(frozen=True)\n"
    "class Mine(MLP):\n    extra: float = 1.0\n"
)
VERBS = (
    ("sample", "x", "--seeds", "0-3"),
    ("evaluate", "x", "--samples", "100", "--draws", "1"),
    ("report", "x"),
    ("export", "x", "x.pt2", "--to", "pt2"),
)


@pytest.fixture(autouse=True)
def _apart(known: dict[str, type], tmp_path: Path, monkeypatch: Any) -> None:
    """In a folder of its own, where the classes of earlier tests are forgotten."""
    monkeypatch.chdir(tmp_path)


def forget() -> None:
    """As in a new process: the user's classes are not known."""
    for name in [n for n, c in config.known().items() if not c.__module__.startswith("fewstep.")]:
        del config.known()[name]


def without(name: str) -> None:
    """The file that a run was made with is gone, and what its running leaves."""
    Path(name).unlink()
    forget()
    for mark in Path().rglob("ran"):
        mark.unlink()


@pytest.mark.parametrize(
    "part",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("method", "sampler"))) for n in OWN],
)
def test_every_verb_reads_a_run_of_own_classes(part: str, finished: Path) -> None:
    """With --code and the copy in the run; without, refused in a sentence that names both."""
    text, flags = OWN[part]
    Path("mine.py").write_text(HEAD + text + MARK)
    teacher = ("--teacher", str(finished / "runs" / "teacher"))
    assert fewstep(*DISTIL, *teacher, *flags, "--out", "x").code == 0
    without("mine.py")
    copy = Path("x", "code", "mine.py")
    assert copy.read_text() == HEAD + text + MARK
    facts = json.loads(Path("x/run.json").read_text())
    assert set(facts["files"].values()) == {own.sha256 for own in recorded(Path("x"))}
    needs = {"domain": ("evaluate",)}.get(part, tuple(verb[0] for verb in VERBS))
    verbs = VERBS if part == "sampler" else VERBS[:3]  # a program is of network and sampler
    for verb in verbs:
        refused = fewstep(*verb)
        if verb[0] in needs:
            assert (refused.code, refused.out) == (2, ""), verb
            assert refused.err.count("\n") == 1
            assert refused.err.endswith("mine.py\n")
            assert "if you trust it add --code x/" in refused.err
        assert not list(Path().rglob("ran"))  # nothing was run
    shutil.rmtree("x.pt2", ignore_errors=True)
    for verb in verbs:
        forget()
        if verb[0] == "export":
            verb = ("export", "x", "y.pt2", "--to", "pt2")
        done = fewstep(*verb, "--code", str(copy))
        assert done.code == 0, (verb, done.err)


def test_a_network_of_ones_own_goes_from_teacher_to_student() -> None:
    """The teacher's network is the student's, whose run has a copy of its own."""
    Path("mine.py").write_text(HEAD + NET + MARK)
    net = ("--model.net", "mine.py:Mine(16, 1)")
    steps = ("--batch", "8", "--steps", "3")
    assert fewstep(*TEACH[:2], *net, *steps, "--out", "t").code == 0
    without("mine.py")
    distil = ("distill", "digits", *steps, "--teacher", "t", "--out", "x")
    refused = fewstep(*distil)
    assert refused.code == 2
    assert refused.err.endswith("add --code t/student/mine.py\n")
    assert not list(Path().rglob("ran"))
    assert fewstep(*distil, "--code", "t/code/mine.py").code == 0
    shutil.rmtree("t")
    forget()
    assert fewstep("sample", "x").err.endswith("add --code x/student/mine.py\n")
    assert fewstep("sample", "x", "--code", "x/student/mine.py").code == 0
    forget()
    shutil.copytree("x/student", "alone")  # a model folder travels without its run
    assert fewstep("sample", "alone", "--code", "alone/mine.py").code == 0
    assert type(load_student("alone").model.net).__name__ == "Mine"  # type: ignore[union-attr]


def test_a_reward_of_ones_own(finished: Path) -> None:
    """It trains, is kept beside the run, and is not needed to sample the student."""
    text = (
        "from fewstep.distillation.pictures import Reward\n@dataclass(frozen=True)\n"
        "class Mine(Reward):\n    factor: float = 2.0\n    def __call__(self, pictures, cond):\n"
        "        return self.factor * pictures.flatten(1).mean(1)\n"
    )
    Path("mine.py").write_text(HEAD + text)
    teacher = ("--teacher", str(finished / "runs" / "teacher"), "--out", "x")
    flags = ("--method", "Rewarded(SiD(), Ink())", "--method.reward", "mine.py:Mine(3)")
    assert fewstep(*DISTIL, *teacher, *flags).code == 0
    facts = json.loads(Path("x/run.json").read_text())
    assert facts["run"]["method"]["reward"] == {"type": "Mine", "factor": 3.0}
    assert set(facts["files"]) == {"Mine"}
    assert Path("x/code/mine.py").read_text() == HEAD + text
    lines = [json.loads(line) for line in Path("x/log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["student/reward"]) for line in lines)
    without("mine.py")
    assert fewstep("sample", "x").code == 0


def test_only_the_recorded_file_is_run(finished: Path) -> None:
    """An edited copy, another file, a file for a run that needs none."""
    text, flags = OWN["sampler"]
    Path("mine.py").write_text(HEAD + text)
    teacher = ("--teacher", str(finished / "runs" / "teacher"))
    assert fewstep(*DISTIL, *teacher, *flags, "--out", "x").code == 0
    without("mine.py")
    copy = Path("x/code/mine.py")
    copy.write_text(copy.read_text() + MARK)
    Path("other.py").write_text(MARK)
    for file in ("x/code/mine.py", "other.py"):
        refused = fewstep("sample", "x", "--code", file)
        assert refused.code == 2
        assert refused.err.startswith(f"fewstep: {file} is not what x was made with: its SHA-256")
    missing = fewstep("sample", "x", "--code", "none.py")
    assert missing.err == "fewstep: there is no file none.py\n"
    sid = str(finished / "runs" / "sid")
    refused = fewstep("sample", sid, "--code", "other.py")
    assert refused.err.endswith("was made with no code of its own: leave out --code\n")
    assert not list(Path().rglob("ran"))
    assert fewstep("sample", "x", "--code", "x/student/mine.py").code == 0
    forget()
    Path("later.py").write_text(HEAD + text + "x = 1\n")
    config.load_classes(Path("later.py"))  # another version of the class
    assert "later.py has another one of that name" in fewstep("sample", "x").err


TAKEN = {
    "a method": ("fewstep.methods.sid", "SiD"),
    "a network": ("fewstep.nets.mlp", "MLP"),
    "a path": ("fewstep.diffusion.noise_path", "VE"),
    "an optimiser": ("fewstep.training.optim", "Optim"),
}


@pytest.mark.parametrize(("module", "name"), TAKEN.values(), ids=TAKEN)
def test_no_class_takes_the_name_of_another(module: str, name: str) -> None:
    """Of fewstep's, or of another file's: text would mean another class than before."""
    before = config.known()[name]
    text = (
        f"{HEAD}import {module} as m\n@dataclass(frozen=True)\nclass {name}(m.{name}):\n    pass"
    )
    Path("thief.py").write_text(text)
    sentence = f"^thief.py: the class {name} has the name of one of fewstep; give it a name"
    with pytest.raises(ValueError, match=sentence):
        config.load_classes(Path("thief.py"))
    assert config.known()[name] is before
    stolen: Any = type(name, (before,), {"__module__": "elsewhere"})
    made = object.__new__(stolen)
    with pytest.raises(ValueError, match=f"^elsewhere: the class {name} has the name of one of"):
        config.encode(made)


def test_two_files_do_not_share_a_name() -> None:
    """The same file again, edited or as a copy, is no other file."""
    for folder in ("a", "b", "c"):
        Path(folder).mkdir()
    Path("a/mine.py").write_text(HEAD + NET)
    shutil.copy("a/mine.py", "c/copy.py")
    first = config.configuration("a/mine.py:Mine()")
    assert config.configuration("a/mine.py:Mine()") == first
    Path("a/mine.py").write_text(HEAD + NET.replace("1.0", "2.0"))
    assert config.configuration("a/mine.py:Mine()").extra == 2.0
    Path("b/mine.py").write_text(HEAD + NET.replace("1.0", "3.0"))
    with pytest.raises(ValueError, match=r"^b/mine.py: the class Mine has the name of one of a"):
        config.configuration("b/mine.py:Mine()")
    assert config.parse("Mine()").extra == 2.0


def test_only_configuration_is_read_from_text() -> None:
    """Every dataclass of the package that no field of a run can hold is unknown to text."""
    pytest.importorskip("diffusers")
    skipped = ("fewstep.__main__",)
    names = [m.name for m in pkgutil.walk_packages(package.__path__, "fewstep.")]
    every: dict[str, type] = {}
    for name in names:
        if name not in skipped:
            module = importlib.import_module(name)
            own = [v for v in vars(module).values() if isinstance(v, type) and is_dataclass(v)]
            every |= {c.__name__: c for c in own if c.__module__ == name}
    internal = set(every) - set(config.known())
    assert {
        "State",
        "Generator",
        "RunData",
        "PreparedRun",
        "RunFolder",
        "Setup",
        "Init",
    } <= internal
    assert {"SiD", "Optim", "LoRA", "Best", "Timesteps", "Digits"} <= set(config.known())
    for name in sorted(internal):
        with pytest.raises(ValueError, match=rf"^there is no '{name}'"):
            config.parse(f"{name}()")


BROKEN = {
    "x = 1\ny = nothing\n": "mine.py, line 2: NameError: name 'nothing' is not defined",
    "import there_is_no_such_thing\n": "mine.py, line 1: ModuleNotFoundError: No module named",
    "raise SystemExit(3)\n": "mine.py, line 1: SystemExit: 3",
    "def (:\n": "mine.py, line 1: ",
    "x = '\0'\n": "mine.py: ",
}


@pytest.mark.parametrize(("text", "sentence"), BROKEN.items())
def test_a_file_that_cannot_be_run_is_one_sentence(text: str, sentence: str) -> None:
    Path("mine.py").write_text(text)
    refused = fewstep(*TEACH[:2], "--method", "mine.py:Mine", "--out", "x")
    assert refused.code == 2
    assert refused.err.startswith(f"fewstep: --method: {sentence}")
    assert refused.err.count("\n") == 1


CHANGED = {
    "wider": "MLP(20, 1)",
    "deeper": "MLP(16, 2)",
    "another kind": "PatchUNet(16)",
}
INIT = """
from dataclasses import dataclass, replace
from torch import nn
from fewstep import Nets
from fewstep.methods.sid import SiD
from fewstep.methods.pretrain import Pretrain
from fewstep import config
from fewstep.recipes.digits import digits

class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.path = net, net.path
    def forward(self, *args):
        return self.net(*args)

@dataclass(frozen=True)
class Other(SiD):
    net: str = ""
    def init(self, teacher, net):
        if self.net:
            other = replace(digits().model, net=config.parse(self.net)).build()
        else:
            other = Wrapped(net)
        return Nets({"student": other, "fake": other})

@dataclass(frozen=True)
class InPlace(Pretrain):
    def init(self, teacher, net):
        net.register_buffer("more", next(net.parameters()).detach()[:1].clone())
        return Nets({"denoiser": net})
"""


@pytest.mark.parametrize("net", [*CHANGED.values(), ""], ids=[*CHANGED, "wrapped"])
def test_a_result_that_nobody_could_read_is_refused_at_step_0(net: str, finished: Path) -> None:
    """Before a step: the method's network is not the one that run.json describes."""
    Path("mine.py").write_text(INIT)
    teacher = ("--teacher", str(finished / "runs" / "teacher"))
    refused = fewstep(*DISTIL, *teacher, "--method", f"mine.py:Other(net='{net}')", "--out", "x")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert refused.err.startswith("fewstep: Other.init makes a 'student' that is not the network")
    assert not Path("x/log.jsonl").exists()
    assert not Path("x/student").exists()


def test_a_network_that_is_changed_in_place_is_seen_too() -> None:
    Path("mine.py").write_text(INIT)
    refused = fewstep(*TEACH[:2], *SMALL, "--method", "mine.py:InPlace", "--out", "x")
    assert refused.code == 2
    made = "InPlace.init makes a 'denoiser' that is not the network of the run"
    assert refused.err.startswith(f"fewstep: {made} (more is of shape (1, ")
    assert "), described as not there), so that it could not be read" in refused.err


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_refused(value: float, finished: Path) -> None:
    """A finished model whose digests are right and whose weights are not: no verb shows it."""
    shutil.copytree(finished / "runs" / "sid", "x")
    path = Path("x/student")
    tensors = unpack(path / "model.safetensors")
    for name in tensors:
        tensors[name].fill_(value)
    files = {"model.json": (path / "model.json").read_bytes(), "model.safetensors": pack(tensors)}
    write_folder(path, files, {"kind": KIND})
    shutil.copytree(path, "alone")
    for verb in (*VERBS, ("sample", "x", "--out", "a.npz"), ("sample", "alone", "--seeds", "3")):
        refused = fewstep(*verb)
        assert refused.code == 2, verb
        assert refused.err.splitlines()[-1].startswith("fewstep: ")
        assert "samples are not finite (NaN or infinity)" in refused.err
    assert not [p for p in Path().iterdir() if p.name not in ("x", "alone")]
    assert not Path("x/report.html").exists()
    assert not Path("x/metrics.json").exists()


def test_classes_of_an_imported_module_are_kept_too(tmp_path: Path, monkeypatch: Any) -> None:
    """A class that Python imported is of its file; one of no file could not be found again."""
    Path("module_of_mine.py").write_text(HEAD + NET)
    monkeypatch.syspath_prepend(tmp_path)
    import module_of_mine  # type: ignore[import-not-found]

    files = config.own_sources((1, {"a": module_of_mine.Mine()}))
    assert {name: file.data.decode() for name, file in files.items()} == {"Mine": HEAD + NET}
    assert config.own_files([SiD(), MLP(), VE()]) == {}
    nowhere = type("Nowhere", (MLP,), {"__module__": "nowhere"})
    with pytest.raises(ValueError, match=r"^Nowhere is of no file that a run could keep"):
        config.own_files(object.__new__(nowhere))


def test_whole_numbers_have_64_bits() -> None:
    """A size of 400 digits is refused by its field, not by whoever allocates it."""
    for number in (2**63, -(2**63), 10**400, 10**5000):
        with pytest.raises(ValueError, match=r"^MLP\.width is a whole number below 2\^63"):
            config.decode({"type": "MLP", "width": number})
        with pytest.raises(ValueError, match=r"^Optim\.lr "):
            config.decode({"type": "Optim", "lr": -number * 10**400})
