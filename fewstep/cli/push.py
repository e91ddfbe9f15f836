"""fewstep push: a finished student as a repository of the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fewstep.cli.output import result
from fewstep.cli.parser import Parser, code_flag, refuse_missing, verb_parser
from fewstep.cli.progress_bar import say
from fewstep.export.formats import FORMATS, format_called, notes
from fewstep.signals import last_words
from fewstep.storage.user_code import trust


def run(args: list[str]) -> int:
    """A student as a repository of the hub."""
    flags = _parser().parse_args(args)
    format_called(flags.to)
    refuse_missing(flags.run)
    trust(flags.code, [flags.run])
    from fewstep.export.hub_upload import (
        Unreachable,
        checked_name,
        prepared,
        require_login,
        upload,
    )

    checked_name(flags.repository)
    if not flags.dry_run:
        require_login()
    with tempfile.TemporaryDirectory(prefix="fewstep-push-") as home:
        place = Path(home) / flags.repository.rpartition("/")[2]
        asked = (flags.to, flags.licence, flags.base_model)
        publication = prepared(flags.run, flags.repository, place, *asked)
        for note in notes(flags.run, flags.to):
            say(note)
        files = publication.files
        for name, size in files:
            say(f"{size:>15,}  {name}")
        total, seen = sum(size for _, size in files), "private" if flags.private else "public"
        base = publication.base_model or "none on the hub"
        say(
            f"{total:>15,} bytes in {len(files)} files; licence {publication.licence}, base {base}"
        )
        told = {
            "repository": flags.repository,
            "kind": publication.kind,
            "licence": publication.licence,
            "base_model": publication.base_model,
            "files": dict(files),
        }
        if flags.dry_run:
            say(f"nothing was sent; this would be {flags.repository}, a {seen} {publication.kind}")
            result({**told, "address": None})
            return 0
        try:
            address = upload(publication, flags.private, flags.replace)
            result({**told, "address": address}, address)
        except Unreachable as error:
            last_words(f"fewstep: {error}; run the same command again")
            return 1
    return 0


def _parser() -> Parser:
    """The flags of the verb."""
    parser = verb_parser(
        "push",
        "Export a finished student and upload it to the Hugging Face hub, with its model card.",
    )
    parser.add_argument("run", type=Path, help="a run folder, or a folder with model.json")
    parser.add_argument("repository", metavar="ORG/NAME", help="the repository, new or empty")
    parser.add_argument(
        "--to",
        default="diffusers",
        metavar="FORMAT",
        help=f"as of 'fewstep export': {', '.join(FORMATS)} (default: diffusers)",
    )
    parser.add_argument("--private", action="store_true", help="make the repository not public")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="export, and list what would be uploaded; nothing is sent",
    )
    parser.add_argument(
        "--licence",
        "--license",
        default="",
        help="of the teacher, such as openrail++, where its card does not state it",
    )
    parser.add_argument(
        "--base-model",
        default="",
        metavar="ORG/NAME",
        help="the teacher on the hub, where it did not come from there; 'none': it is on none",
    )
    parser.add_argument(
        "--replace", action="store_true", help="write over the files of a repository"
    )
    code_flag(parser)
    return parser
