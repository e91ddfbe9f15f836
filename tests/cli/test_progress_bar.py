"""The bar of a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from fewstep.cli.progress_bar import Bar, _columns


def test_brackets_are_text_and_no_markup() -> None:
    """Names of files and notes may hold what rich takes for a style, or for the end of one."""
    bar, screen = Bar("a[/b]", 2), io.StringIO()
    bar.rich = _columns()
    bar.rich.live.console = bar.rich.live._live_render.console = Console(file=screen, width=100)
    bar.task = bar.rich.add_task(bar.title, total=2, note="")
    with bar:
        bar.update(1, "skipped [red]")
        bar.say("finished: runs/[bold]/[/x]")
    shown = screen.getvalue()
    assert "finished: runs/[bold]/[/x]\n" in shown
    assert "a[/b]" in shown
    assert "skipped [red]" in shown
