"""One function a verb: argument strings in, exit code out. Imported once a verb is chosen."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

from fewstep.cli.display import say
from fewstep.cli.parser import GUIDANCE, TEACHER, VAE, code_flag, fail, printable, verb_parser
from fewstep.cli.work import demonstrate, found_again, like_teacher, perform
from fewstep.shell import command_line


def recipes(args: list[str]) -> int:
    """List the ready-made runs."""
    from fewstep.recipes.find import by_module, summary

    verb_parser("recipes", "List the ready-made runs.").parse_args(args)
    groups = {title: group for title, group in by_module().items() if group}
    width = max(len(name) for group in groups.values() for name in group)
    for title, group in sorted(groups.items(), key=lambda item: len(item[1])):
        print(f"{title}\n")
        for name, make in sorted(group.items()):
            print(f"  {name:{width}}  {summary(make)}")
        print()
    return 0


def train(args: list[str]) -> int:
    """Train a teacher by a recipe."""
    return _run("train", args, "runs/{recipe}")


def distill(args: list[str]) -> int:
    """Distil a teacher by a recipe."""
    return _run("distill", args, "runs/{recipe}")


def _run(verb: str, args: list[str], default: str) -> int:
    from fewstep.cli.overrides import help_text, resolve
    from fewstep.own_code import trust
    from fewstep.pipelines.hub import local
    from fewstep.recipes.find import every, recipe
    from fewstep.recipes.t2i import suit

    parser = verb_parser(
        verb, f"{verb} RECIPE in a folder; the same command continues.", add_help=False
    )
    parser.add_argument("recipe", nargs="?", help="see 'fewstep recipes'; or file.py:function")
    parser.add_argument("--out", default=default, help="the run folder (default: %(default)s)")
    if verb == "distill":
        parser.add_argument(
            "--teacher",
            default="",
            help="a run or model folder, a pipeline folder or hub:ORG/NAME, or a snapshot",
        )
        parser.add_argument(
            "--init", default="", help="folder of the network to start from (default: the teacher)"
        )
        code_flag(parser)
    _machine_flags(parser)
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
    teacher, init = local(getattr(own, "teacher", "")), getattr(own, "init", "")
    trust(getattr(own, "code", []), (teacher, init))
    run = resolve(like_teacher(run, teacher), rest, f"fewstep {verb} {name}", parser.flags())
    suit(run, name, every())
    right = "distill" if run.distils else "train"
    if verb != right:
        does = "distils" if run.distils else "trains"
        fail(f"{name} {does} a teacher; the command is: fewstep {right} {name}")
    out = Path(own.out.replace("{recipe}", Path(name.partition(":")[0]).stem))
    command = command_line(["fewstep", verb, *args])
    machine = {"device": own.device, "timeout": own.timeout, "parts": own.shard}
    return perform(run, out, name, teacher, command, own.dry_run, init=init, **machine)


def _machine_flags(parser: ArgumentParser) -> None:
    """What is no part of a run: where it is computed."""
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="with several processes: seconds a step may take before all stop (default: 120)",
    )
    parser.add_argument(
        "--shard",
        nargs="?",
        type=int,
        const=0,
        default=1,
        metavar="PARTS",
        help="with several processes: each keeps but a part of every net (FSDP2); with a number, "
        "so many share a copy (HSDP)",
    )


def plan(args: list[str]) -> int:
    """Memory and time of each way to distil a teacher."""
    from fewstep.cli.plan import run

    return run(args)


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
    return demonstrate(own.out, own.seed, command_line(["fewstep", "demo", *args]))


def sample(args: list[str]) -> int:
    """Make pictures with a finished model."""
    parser = verb_parser("sample", "Make pictures with a finished model: a student or a teacher.")
    parser.add_argument(
        "model",
        type=Path,
        help="a run folder, a folder with model.json, a pipeline folder, or a snapshot",
    )
    parser.add_argument("--seeds", default="0-63", help="such as 0-63 or 3,7,9 (default: 0-63)")
    parser.add_argument("--labels", default="", help="one class number for all, or one a seed")
    parser.add_argument(
        "--prompts", default="", help="a text for all, or a file of them to take in turn"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="a .png grid or an .npz of arrays (default: samples.png)",
    )
    parser.add_argument("--vae", default="", help=VAE)
    parser.add_argument("--guidance", type=float, default=1.0, help=GUIDANCE)
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    code_flag(parser)
    own = parser.parse_args(args)
    from fewstep.cli.samples import make
    from fewstep.own_code import trust

    trust(own.code, [own.model])
    given = (own.vae, own.prompts, own.guidance, own.device)
    make(own.model, own.seeds, own.labels, own.out, *given)
    print(own.out)
    return 0


def evaluate(args: list[str]) -> int:
    """Measure a finished run."""
    from fewstep.cli.measure import evaluate as run

    return run(args)


def stats(args: list[str]) -> int:
    """Reference statistics of real pictures."""
    from fewstep.cli.measure import stats as run

    return run(args)


def report(args: list[str]) -> int:
    """One self-contained page of a run."""
    text = "Write report.html, one self-contained page, into a run folder."
    parser = verb_parser("report", text)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--teacher", default="", help=TEACHER)
    code_flag(parser)
    own = parser.parse_args(args)
    from fewstep.own_code import trust
    from fewstep.report.page import write_report

    trust(own.code, [own.run])
    if own.teacher:
        found_again(own.run, own.teacher)
    print(write_report(own.run))
    return 0


def export(args: list[str]) -> int:
    """A student as files of other programs."""
    from fewstep.export.formats import FORMATS, notes
    from fewstep.export.formats import export as write
    from fewstep.own_code import trust

    formats = "; ".join(f"{name}: {form.what}" for name, form in FORMATS.items())
    parser = verb_parser(
        "export",
        "Write a finished student for other programs. What is written is loaded again and "
        "compared with the student before it is kept.",
    )
    parser.add_argument("run", type=Path, help="a run folder, or a folder with model.json")
    parser.add_argument("out", type=Path, help="the folder or file to write, new or empty")
    parser.add_argument("--to", default="diffusers", metavar="FORMAT", help=formats)
    parser.add_argument(
        "--rank", type=int, help="of an adapter (default: the one that was trained)"
    )
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="of a pipeline as pt2 or onnx: the VAE's decoder is a part of the program",
    )
    code_flag(parser)
    own = parser.parse_args(args)
    trust(own.code, [own.run])
    off = write(own.run, own.out, own.to, own.rank, own.pictures)
    say(f"differs from the student by {off:.1g} of its range")
    for note in notes(own.run, own.to):
        say(note)
    print(own.out)
    return 0


def inspect(args: list[str]) -> int:
    """What is inside a model file or folder."""
    parser = verb_parser("inspect", "Tell what is inside a model, without executing any of it.")
    parser.add_argument("model", type=Path, help="a .pkl, .pt or .safetensors file, or a folder")
    parser.add_argument("--json", action="store_true", help="for machines")
    own = parser.parse_args(args)
    from fewstep.contents import contents, lines

    facts = contents(own.model)
    print(json.dumps(facts, indent=2) if own.json else "\n".join(map(printable, lines(facts))))
    return 0


def convert(args: list[str]) -> int:
    """A model folder of a snapshot."""
    parser = verb_parser(
        "convert",
        "Make a model folder (safetensors and JSON) of a snapshot of EDM, EDM2, SiD or SiDA, "
        "for 'sample', 'inspect' and 'distill --teacher'. Nothing in the file is executed.",
    )
    parser.add_argument("file", type=Path, help="a snapshot (.pkl) or training state (.pt)")
    parser.add_argument("out", type=Path, help="the folder, new or empty")
    parser.add_argument(
        "--object", default="", help="which network of the file (default: ema, G_ema, or the only)"
    )
    parser.add_argument(
        "--student", action="store_true", help="a one-step generator, as of SiD and SiDA"
    )
    own = parser.parse_args(args)
    from fewstep.teachers.convert import convert as write

    write(own.file, own.out, own.object, own.student)
    print(own.out)
    return 0


def data(args: list[str]) -> int:
    """Pack, check and show pictures to train on."""
    from fewstep.cli.data import run

    return run(args)


def ema(args: list[str]) -> int:
    """Another average of a run's weights."""
    parser = verb_parser(
        "ema",
        "Make a model of another average of a run's weights, of any length, from the averages "
        "that it stored (--power.sigma-rel 0.05 0.1). Karras et al. 2024, arXiv 2312.02696.",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "--sigma-rel", type=float, required=True, help="length as a part of the training: 0.13"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder, new or empty")
    parser.add_argument("--teacher", default="", help=TEACHER)
    code_flag(parser)
    own = parser.parse_args(args)
    from fewstep.own_code import trust
    from fewstep.posthoc import write

    trust(own.code, [own.run])
    if own.teacher:
        found_again(own.run, own.teacher)
    say(write(own.run, own.sigma_rel, own.out))
    print(own.out)
    return 0


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
