"""fewstep convert: a folder of a published snapshot, or of a checkpoint in one file."""

from __future__ import annotations

from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import refuse_missing, verb_parser
from fewstep.cli.progress_bar import say


def run(args: list[str]) -> int:
    """Write a folder from a published file; returns the exit code."""
    parser = verb_parser(
        "convert",
        "Make a model folder (safetensors and JSON) of a snapshot of EDM, EDM2, SiD or SiDA, or a "
        "pipeline folder of a checkpoint in one .safetensors file (Stable Diffusion, SDXL, SD3, "
        "FLUX), for 'sample', 'inspect' and 'distill --teacher'. Nothing in the file is executed.",
    )
    parser.add_argument(
        "file", type=Path, help="a snapshot (.pkl), training state (.pt), or .safetensors"
    )
    parser.add_argument("out", type=Path, help="the folder, new or empty")
    parser.add_argument(
        "--object", default="", help="which network of the file (default: ema, G_ema, or the only)"
    )
    parser.add_argument(
        "--student", action="store_true", help="a one-step generator, as of SiD and SiDA"
    )
    parser.add_argument(
        "--config",
        default="",
        metavar="PIPELINE",
        help="of a checkpoint: a pipeline folder of the same model, or hub:ORG/NAME, for "
        "configurations and tokenizers (default: the published model's, from the hub)",
    )
    flags = parser.parse_args(args)
    refuse_missing(flags.file)
    if flags.file.suffix == ".safetensors":
        if flags.object or flags.student:
            raise ValueError("--object and --student are for snapshots; leave them out")
        from fewstep.teachers.diffusers.single_file import (
            configurations,
            convert_checkpoint,
            layout_of,
        )

        config = configurations(layout_of(flags.file), flags.config)
        layout = convert_checkpoint(flags.file, flags.out, config)
        say(f"{flags.file} is a checkpoint of {layout.name}")
    else:
        if flags.config:
            raise ValueError("--config is for checkpoints in one .safetensors file; leave it out")
        from fewstep.teachers.snapshots import convert as write

        write(flags.file, flags.out, flags.object, flags.student)
    result({"model": str(flags.out)}, str(flags.out))
    return 0
