"""fewstep recipes: the ready-made runs, and which method suits a wish."""

from __future__ import annotations

from fewstep.cli.output import result
from fewstep.cli.parser import verb_parser


def run(args: list[str]) -> int:
    """List the ready-made runs, or the methods that suit a wish."""
    parser = verb_parser(
        "recipes",
        "List the ready-made runs; with --for, the methods that did best in the arena among those "
        "that suit.",
    )
    parser.add_argument(
        "--for",
        dest="wish",
        metavar="WISH",
        help='such as "no data, 4 steps, 24 GB"; also "data", "guidance" and "robust"',
    )
    flags = parser.parse_args(args)
    if flags.wish is not None:
        return _choose(flags.wish)
    from fewstep.recipes.registry import by_module, summary

    groups = {title: group for title, group in by_module().items() if group}
    width = max(len(name) for group in groups.values() for name in group)
    lines, known = list[str](), list[dict[str, str]]()
    for title, group in sorted(groups.items(), key=lambda item: len(item[1])):
        lines += [title, ""]
        for name, make in sorted(group.items()):
            known.append({"name": name, "what": summary(make), "group": title})
            lines.append(f"  {name:{width}}  {summary(make)}")
        lines.append("")
    result(known, "\n".join(lines))
    return 0


def _choose(text: str) -> int:
    """Print what the arena says of a wish."""
    from fewstep.recipes.choosing import answer, measured, told, wish

    asked, table = wish(text), measured()
    found = answer(asked, table)
    value = {"scenes": table["scenes"], "notes": list(found.notes), "rows": list(found.rows)}
    result(value, "\n".join(told(found, table)))
    return 0
