"""fewstep evaluate: what is asked for, and by which measure."""

from __future__ import annotations

import argparse
from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import FEATURES, TEACHER, VAE, code_flag, fail, refuse_missing, verb_parser
from fewstep.cli.sampling_flags import NAMES, sampling_flags
from fewstep.storage.user_code import trust


def run(args: list[str]) -> int:
    """Measure a finished run."""
    parser = verb_parser(
        "evaluate",
        "Measure a finished run beside its teacher and real data; writes metrics.json. With "
        "--protocol fid50k instead as papers report it: FID and others in features of choice; "
        "with --prompts a model that takes prompts, by CLIP score, diversity and the same.",
    )
    parser.add_argument("run", type=Path, help="a run folder; with --protocol any model's folder")
    parser.add_argument("--teacher", default="", help=TEACHER)
    parser.add_argument("--samples", type=int, help="a draw (default: 5000; fid50k: 50000)")
    parser.add_argument("--draws", type=int, help="sets of samples (default: 3; --prompts: 1)")
    parser.add_argument("--protocol", choices=["fid50k"], help="see docs/evaluation.md")
    parser.add_argument("--prompts", default="", help="a file of them, a picture for each")
    parser.add_argument("--clip", help="with --prompts: a CLIP folder, or my_file.py:Name")
    parser.add_argument(
        "--side",
        type=int,
        help="with --prompts: pictures are resized to this for --features (default: 256; 0: not)",
    )
    code_flag(parser)
    group = parser.add_argument_group("with --protocol or --prompts")
    group.add_argument(
        "--runs", type=int, dest="draws", default=argparse.SUPPRESS, help="the same as --draws"
    )
    group.add_argument("--reference", type=Path, help="statistics of real pictures (.npz, .pkl)")
    group.add_argument("--features", help=FEATURES)
    group.add_argument("--vae", help=VAE)
    group.add_argument(
        "--batch", type=int, help="pictures at a time (default: 100; --prompts: 10)"
    )
    sampling_flags(group)
    group.add_argument("--device", help="such as cuda or mps (default: cpu)")
    flags = parser.parse_args(args)
    refuse_missing(flags.run)
    trust(flags.code, [flags.run])
    if not flags.prompts:
        for flag in ("clip", "side"):
            if getattr(flags, flag) is not None:
                fail(f"--{flag} needs --prompts FILE")
    if flags.teacher:
        from fewstep.cli.measure import found_again

        found_again(flags.run, flags.teacher)
    if flags.prompts:
        return _prompted(flags)
    flags.draws = 3 if flags.draws is None else flags.draws
    if flags.protocol:
        return _published(flags)
    for flag in ("reference", "features", "vae", "batch", *NAMES, "device"):
        if getattr(flags, flag) is not None:
            fail(f"--{flag} needs --protocol fid50k, or --prompts")
    samples = 5000 if flags.samples is None else flags.samples
    if samples < 100 or flags.draws < 1:
        fail("evaluate needs --samples of at least 100 and --draws of at least 1")
    from fewstep.cli.measure import measured, table

    metrics = measured(flags.run, samples, flags.draws)
    result(metrics, table(metrics))
    return 0


def _prompted(own: argparse.Namespace) -> int:
    """evaluate --prompts."""
    if own.protocol or own.vae is not None:
        fail("--prompts has a protocol of its own, and the pipeline's VAE")
    from fewstep.cli.evaluate_prompts import Asked, evaluate_prompts
    from fewstep.cli.sampling import Sampling

    names = ("features", "reference", "side", "samples", "batch", "device")
    given = {name: getattr(own, name) for name in names if getattr(own, name) is not None}
    runs = {} if own.draws is None else {"runs": own.draws}
    given |= {"sampling": Sampling.asked(own)}
    result(*evaluate_prompts(own.run, Asked(own.prompts, own.clip or "", **given, **runs)))
    return 0


def _published(own: argparse.Namespace) -> int:
    """evaluate --protocol."""
    if own.reference is None:
        fail("--protocol fid50k needs --reference FILE; 'fewstep stats' makes one")
    from fewstep.cli.evaluate_fid50k import evaluate_protocol
    from fewstep.cli.sampling import Sampling

    samples = 50_000 if own.samples is None else own.samples
    batch = 100 if own.batch is None else own.batch
    features, device = own.features or "", own.device or "cpu"
    protocol = (samples, own.draws, batch, device, own.vae or "", Sampling.asked(own))
    result(*evaluate_protocol(own.run, features, own.reference, *protocol))
    return 0
