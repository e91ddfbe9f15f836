"""fewstep data: pack pictures into one file, check and show what a set holds."""

from __future__ import annotations

from argparse import Namespace, RawDescriptionHelpFormatter
from contextlib import closing
from pathlib import Path
from typing import Any

from fewstep.cli.output import output_flags, result
from fewstep.cli.parser import Parser, fail, printable, refuse_missing, refuse_over
from fewstep.cli.progress_bar import Bar, say, stopping

FEW = 20
"""Classes that are listed one by one."""


def parser() -> Parser:
    """The arguments of `fewstep data`."""
    top = Parser(
        prog="fewstep data",
        description="Sets of pictures: folders, zip files with dataset.json, .npz arrays.",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = top.add_subparsers(dest="what", metavar="pack|check", required=True)
    pack = kinds.add_parser("pack", help="make one zip file of equal squares", allow_abbrev=False)
    pack.add_argument("source", type=Path, help="a folder, .zip or .npz")
    pack.add_argument("out", type=Path, help="the .zip to write")
    pack.add_argument(
        "--resolution", type=int, default=0, help="width and height (default: as they are)"
    )
    pack.add_argument(
        "--crop",
        choices=("center", "dhariwal"),
        default="center",
        help="how the middle square is cut out and resized: as StyleGAN and EDM do (center, "
        "Lanczos), or as ADM and EDM2 do (dhariwal) (default: center)",
    )
    pack.add_argument(
        "--labels",
        default="auto",
        help="auto (dataset.json, or class folders), none, or a file like dataset.json",
    )
    check = kinds.add_parser("check", help="read every picture, count, show", allow_abbrev=False)
    check.add_argument("source", type=Path, help="a folder, .zip or .npz")
    check.add_argument(
        "--sheet",
        type=Path,
        default=Path("sheet.png"),
        help="some of them, a .png file outside the set (default: sheet.png)",
    )
    for kind in (pack, check):
        output_flags(kind)
    top.epilog = pack.format_usage() + check.format_usage()
    return top


def run(args: list[str]) -> int:
    """Run `fewstep data` with these arguments; returns the exit code."""
    flags = parser().parse_args(args)
    refuse_missing(flags.source)
    return pack(flags) if flags.what == "pack" else check(flags)


def pack(own: Namespace) -> int:
    """Pack a set of pictures into one zip file; returns the exit code."""
    from fewstep.data import labels
    from fewstep.data.pack import Packer
    from fewstep.data.readers import reader_of

    reader = reader_of(own.source)
    assigned = reader.labels if own.labels == "auto" else None
    if own.labels not in ("auto", "none"):
        assigned = labels.from_file(Path(own.labels), reader.names)
    packer = Packer(reader, own.out, own.resolution, own.crop, assigned)
    for title, steps in (("looking", packer.look()), ("packing", packer.write())):
        with stopping() as stop, closing(steps) as progress, Bar(title, len(reader)) as bar:
            for done in progress:
                bar.update(done)
                if stop.signal:
                    bar.say(f"stopped at {done} of {len(reader)}; nothing was written")
                    return stop.code(stop.signal)
    if packer.enlarged:
        say(f"{packer.enlarged:,} of {len(reader):,} pictures were smaller and were enlarged")
    for line in reader.notes.lines():
        say(printable(line))
    result({"file": str(own.out), "pictures": len(reader)}, str(own.out))
    return 0


def check(own: Namespace) -> int:
    """Read every picture, tell what there is, and draw some."""
    import torch

    from fewstep.data.errors import Problems
    from fewstep.data.image_grid import grid, png
    from fewstep.data.picture_set import Marker, array, every, first_shape, spread_labels
    from fewstep.data.readers import reader_of
    from fewstep.storage.files import write

    if own.sheet.suffix != ".png" or own.sheet.is_dir() or not own.sheet.parent.is_dir():
        fail(f"--sheet is a .png file in a folder that exists, got {own.sheet}")
    refuse_over("--sheet", own.sheet, [own.source], beside=False)
    reader = reader_of(own.source)
    problems = Problems(own.source)
    shape = first_shape(reader)
    shown, step = set(spread_labels(100, len(reader)).tolist()), max(1, min(shape[1:]) // 96)
    pictures: dict[int, torch.Tensor] = {}

    def job(place: int, row: int) -> None:
        x = array(reader, row, shape)
        if row in shown:
            pictures[row] = torch.from_numpy(x[:, ::step, ::step].copy()).float() / 127.5 - 1

    with Bar("reading", len(reader)) as bar:
        for done in every(reader, torch.arange(len(reader)), job, problems):
            bar.update(done)
    problems.refuse()
    Marker.of(reader, shape).put()
    write(own.sheet, png(grid(torch.stack([pictures[row] for row in sorted(pictures)]), 10)))
    facts: dict[str, Any] = {"path": str(own.source), "pictures": len(reader), "shape": shape}
    if reader.labels is not None:
        counts = torch.bincount(reader.labels).tolist()
        facts |= {"classes": len(counts), "names": reader.classes, "counts": counts}
    facts["sheet"] = str(own.sheet)
    if notes := reader.notes.lines():
        facts["notes"] = notes
    result(facts, printable_facts(facts))
    return 0


def printable_facts(facts: dict[str, Any]) -> str:
    """Facts about a data set as aligned lines."""
    channels, height, width = facts["shape"]
    kind = "grey" if channels == 1 else "RGB"
    lines = [f"{facts['pictures']:,} pictures of {width}x{height} pixels, {kind}; all sound"]
    counts = facts.get("counts")
    if counts is None:
        lines.append("no labels")
    else:
        lines.append(
            f"labels 0 to {len(counts) - 1}, {min(counts):,} to {max(counts):,} pictures each"
        )
        for label, count in enumerate(counts if len(counts) <= FEW else []):
            name = facts["names"][label] if label < len(facts["names"]) else ""
            lines.append(f"{label:>6} {count:>10,}  {name}".rstrip())
    lines += [*facts.get("notes", []), f"some of them: {facts['sheet']}"]
    return "\n".join(map(printable, lines))
