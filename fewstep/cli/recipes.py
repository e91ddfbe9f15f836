"""fewstep recipes: the ready-made runs."""

from __future__ import annotations

from fewstep.cli.parser import verb_parser


def run(args: list[str]) -> int:
    """List the ready-made runs."""
    from fewstep.recipes.registry import by_module, summary

    verb_parser("recipes", "List the ready-made runs.").parse_args(args)
    groups = {title: group for title, group in by_module().items() if group}
    width = max(len(name) for group in groups.values() for name in group)
    for title, group in sorted(groups.items(), key=lambda item: len(item[1])):
        print(f"{title}\n")
        for name, make in sorted(group.items()):
            print(f"  {name:{width}}  {summary(make)}")
        print()
    return 0
