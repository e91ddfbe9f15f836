"""One function a verb: argument strings in, exit code out. Imported once a verb is chosen.

Those of model files are in `models`.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from fewstep.cli.display import say
from fewstep.cli.models import convert as convert
from fewstep.cli.models import ema as ema
from fewstep.cli.models import inspect as inspect
from fewstep.cli.parser import fail, verb_parser
from fewstep.cli.work import demonstrate, like_teacher, measured, perform, table


def recipes(args: list[str]) -> int:
    """List the ready-made runs."""
    from fewstep.recipes.find import every, summary

    verb_parser("recipes", "List the ready-made runs.").parse_args(args)
    found = every()
    width = max(map(len, found))
    for name, make in sorted(found.items()):
        print(f"{name:{width}}  {summary(make)}")
    return 0


def train(args: list[str]) -> int:
    """Train a teacher by a recipe."""
    return _run("train", args, "runs/{recipe}")


def distill(args: list[str]) -> int:
    """Distil a teacher by a recipe."""
    return _run("distill", args, "runs/{recipe}")


def _run(verb: str, args: list[str], default: str) -> int:
    from fewstep.cli.overrides import help_text, resolve
    from fewstep.recipes.find import recipe

    parser = verb_parser(
        verb, f"{verb} RECIPE in a folder; the same command continues.", add_help=False
    )
    parser.add_argument("recipe", nargs="?", help="see 'fewstep recipes'; or file.py:function")
    parser.add_argument("--out", default=default, help="the run folder (default: %(default)s)")
    if verb == "distill":
        parser.add_argument(
            "--teacher", default="", help="a finished run or model folder, or a snapshot"
        )
        parser.add_argument(
            "--init", default="", help="folder of the network to start from (default: the teacher)"
        )
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="with several processes: seconds a step may take before all stop (default: 120)",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="with several processes: each keeps but a part of every net (FSDP2)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the run and its cost only")
    parser.add_argument("-h", "--help", action="store_true", help="this, and the recipe's fields")
    own, rest = parser.parse_known_args(args)
    if own.recipe is None:
        example = "digits" if verb == "distill" else "digits_teacher"
        if not own.help:
            fail(f"{verb} needs a recipe, such as '{example}'; 'fewstep recipes' lists them")
        print(parser.format_help())
        print(f"fewstep {verb} RECIPE --help lists every field of the recipe.")
        return 0
    name = own.recipe
    run = recipe(name)()
    if own.help:
        print(parser.format_help())
        print(help_text(run, f"fewstep {verb} {name}"))
        print(
            'A whole part is replaced by an expression: --method "SIM()", '
            '--method my_file.py:MyMethod, --fake-optim "Optim(lr=1e-5)".'
        )
        return 0
    teacher, init = getattr(own, "teacher", ""), getattr(own, "init", "")
    run = resolve(like_teacher(run, teacher), rest, f"fewstep {verb} {name}", parser.flags())
    right = "distill" if run.distils else "train"
    if verb != right:
        does = "distils" if run.distils else "trains"
        fail(f"{name} {does} a teacher; the command is: fewstep {right} {name}")
    out = Path(own.out.replace("{recipe}", Path(name.partition(":")[0]).stem))
    command = shlex.join(["fewstep", verb, *args])
    machine = {"device": own.device, "timeout": own.timeout, "sharded": own.shard}
    return perform(run, out, name, teacher, command, own.dry_run, init=init, **machine)


def demo(args: list[str]) -> int:
    """The main job on the embedded example."""
    parser = verb_parser(
        "demo",
        "Train a teacher on 8x8 digits, distil it to one step with SiD, "
        "measure both, and write a report.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the run folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    own = parser.parse_args(args)
    return demonstrate(own.out, own.seed, shlex.join(["fewstep", "demo", *args]))


def sample(args: list[str]) -> int:
    """Make pictures with a finished model."""
    parser = verb_parser("sample", "Make pictures with a finished model: a student or a teacher.")
    parser.add_argument(
        "model", type=Path, help="a run folder, a folder with model.json, or a snapshot"
    )
    parser.add_argument("--seeds", default="0-63", help="such as 0-63 or 3,7,9 (default: 0-63)")
    parser.add_argument("--labels", default="", help="one class number for all, or one a seed")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="a .png grid or an .npz of arrays (default: samples.png)",
    )
    own = parser.parse_args(args)
    from fewstep.cli.samples import make

    make(own.model, own.seeds, own.labels, own.out)
    print(own.out)
    return 0


def evaluate(args: list[str]) -> int:
    """Measure a finished run."""
    parser = verb_parser(
        "evaluate",
        "Measure a finished run beside its teacher and real data; writes metrics.json. With "
        "--protocol fid50k instead as papers report it: FID and others in features of choice.",
    )
    parser.add_argument("run", type=Path, help="a run folder; with --protocol any model's folder")
    parser.add_argument("--samples", type=int, help="a draw (default: 5000; fid50k: 50000)")
    parser.add_argument("--draws", type=int, default=3, help="sets of samples (default: 3)")
    parser.add_argument("--protocol", choices=["fid50k"], help="see docs/evaluation.md")
    group = parser.add_argument_group("with --protocol")
    group.add_argument(
        "--runs", type=int, dest="draws", default=argparse.SUPPRESS, help="the same as --draws"
    )
    group.add_argument("--reference", type=Path, help="statistics of real pictures (.npz, .pkl)")
    group.add_argument("--features", help=_FEATURES)
    group.add_argument("--batch", type=int, help="pictures at a time (default: 100)")
    group.add_argument("--device", help="such as cuda or mps (default: cpu)")
    own = parser.parse_args(args)
    if own.protocol:
        return _published(own)
    for flag in ("reference", "features", "batch", "device"):
        if getattr(own, flag) is not None:
            fail(f"--{flag} needs --protocol fid50k")
    samples = 5000 if own.samples is None else own.samples
    if samples < 100 or own.draws < 1:
        fail("evaluate needs --samples of at least 100 and --draws of at least 1")
    print(table(measured(own.run, samples, own.draws)))
    return 0


_FEATURES = (
    "Inception's weights, a DINOv2 folder, or my_file.py:Name (default: what "
    "FEWSTEP_INCEPTION names)"
)


def _published(own: argparse.Namespace) -> int:
    """evaluate --protocol."""
    from fewstep.cli.protocol import evaluate_protocol

    if own.reference is None:
        fail("--protocol fid50k needs --reference FILE; 'fewstep stats' makes one")
    samples = 50_000 if own.samples is None else own.samples
    batch = 100 if own.batch is None else own.batch
    features, device = own.features or "", own.device or "cpu"
    print(evaluate_protocol(own.run, features, own.reference, samples, own.draws, batch, device))
    return 0


def stats(args: list[str]) -> int:
    """Reference statistics of real pictures."""
    parser = verb_parser(
        "stats", "Make the statistics of real pictures that 'evaluate --protocol' compares with."
    )
    parser.add_argument("data", type=Path, help="a folder of pictures, or an .npz with images")
    parser.add_argument("--features", default="", help=_FEATURES)
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument(
        "--keep",
        type=int,
        default=10_000,
        help="pictures whose features are kept for KID, precision and recall (default: 10000)",
    )
    parser.add_argument("--batch", type=int, default=100, help="pictures at a time (default: 100)")
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    own = parser.parse_args(args)
    from fewstep.cli.protocol import make_stats

    make_stats(own.data, own.features, own.out, own.keep, own.device, own.batch)
    print(own.out)
    return 0


def report(args: list[str]) -> int:
    """One self-contained page of a run."""
    parser = verb_parser(
        "report", "Write report.html, one self-contained page, into a run folder."
    )
    parser.add_argument("run", type=Path, help="a run folder")
    own = parser.parse_args(args)
    from fewstep.report.page import write_report

    print(write_report(own.run))
    return 0


def data(args: list[str]) -> int:
    """Pack, check and show pictures to train on."""
    from fewstep.cli.data import run

    return run(args)


def doctor(args: list[str]) -> int:
    """Check the installation and the machine."""
    verb_parser(
        "doctor", "Check the installation and the machine; exit code 1 if something is wrong."
    ).parse_args(args)
    from fewstep.cli.doctor import examine

    problems = examine()
    for problem in problems:
        say(f"problem: {problem}")
    return 1 if problems else 0
