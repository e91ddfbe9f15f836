"""The arena as one file for a browser: docs/arena.md and docs/choosing.md with their pictures.

Made of the Markdown that those pages are, of which it knows what they use: headings, paragraphs,
lists, code, tables and pictures. The file refers to nothing outside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.arena.entries import ENTRIES
from fewstep.report.svg_chart import Chart

Row = Mapping[str, Any]
TEMPLATE = Path(__file__).parent / "templates" / "arena.html"
FAMILIES = {one.name: one.family for one in ENTRIES}
PLACES = {"choosing.md": "#choosing-a-method", "arena.md": "#the-arena"}
"""The pages that are parts of this one."""
BETWEEN = re.compile(r"\((\S+ to \S+)\)")
"""An interval behind its mean."""
TALL = 20
"""A table of more rows scrolls in a window of its own."""
WORDS = {1: "one call", 4: "four calls"}


def page(summary: Row, texts: Sequence[str], charts: Mapping[str, Chart]) -> str:
    """The file.

    summary: what the leaderboard holds, by scene; texts: the pages in Markdown, the first of which
    gives the title and the first paragraph; charts: by the names of their files.
    """
    first, *more = texts
    title, lead, body = first.strip().split("\n\n", 2)
    text = "\n\n".join([body, *("#" + re.sub(r"(?m)^#", "##", one.strip())[1:] for one in more)])
    sections = list(_sections(text, charts))
    css = (files("fewstep.report") / "style.css").read_text(encoding="utf-8")
    parts = {
        "STYLE": css,
        "TITLE": escape(title.lstrip("# ")),
        "LEAD": inline(lead),
        "CARDS": "\n".join(_cards(summary)),
        "LINKS": "".join(f'<a href="#{name}">{head}</a>' for name, head, _ in sections if name),
        "BODY": _numbered("\n".join(html for _, _, html in sections)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: parts[found[1]], template)


def _numbered(html: str) -> str:
    """With a number in the name of each table, for them to differ."""
    numbers = count(1)
    return re.sub('aria-label="Table', lambda found: f"{found[0]} {next(numbers)}", html)


def inline(text: str) -> str:
    """Code, emphasis and links of one passage; links to other files are their words alone."""
    text = escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)

    def link(found: re.Match[str]) -> str:
        place = PLACES.get(found[2].partition("#")[0])
        return f'<a href="{place}">{found[1]}</a>' if place else found[1]

    return re.sub(r"\[([^\]]+)\]\(([^)]*)\)", link, text)


def slug(head: str) -> str:
    """A heading as the name of a place."""
    return re.sub(r"\W+", "-", head.lower()).strip("-")


def _sections(text: str, charts: Mapping[str, Chart]) -> Iterator[tuple[str, str, str]]:
    """Name, heading and HTML of each part under a heading of the second level."""
    for part in re.split(r"(?m)^(?=## )", text):
        head = part.partition("\n")[0].lstrip("# ") if part.startswith("## ") else ""
        blocks = re.split(r"\n{2,}(?!\S* *\n?```$)", part.strip())
        body = "\n".join(_block(one, charts) for one in blocks)
        body = re.sub(r"(?:<figure>.*?</figure>\s*)+", _side_by_side, body, flags=re.DOTALL)
        name = slug(head)
        yield name, head, f'<section id="{name}">\n{body}\n</section>' if name else body


def _side_by_side(figures: re.Match[str]) -> str:
    return f'<div class="pair">\n{figures[0].strip()}\n</div>\n'


def _block(text: str, charts: Mapping[str, Chart]) -> str:
    lines = text.split("\n")
    if picture := re.fullmatch(r"!\[.*\]\(images/(.*)\)", text):
        one = charts[picture[1]]
        return f"<figure><h4>{escape(one.title)}</h4>{one.svg}</figure>"
    if lines[0].startswith("|"):
        return table([line[2:-2].split(" | ") for line in lines])
    if lines[0].startswith("#"):
        level = len(lines[0]) - len(lines[0].lstrip("#"))
        return f"<h{level}>{inline(lines[0].lstrip('# '))}</h{level}>"
    if lines[0].startswith("```"):
        return f"<pre>{escape(chr(10).join(lines[1:-1]))}</pre>"
    if lines[0].startswith("- "):
        items = re.split(r"\n- ", text[2:])
        return f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in items)}</ul>"
    return f"<p>{inline(text)}</p>"


def table(lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, split into cells: headings, the rule, rows.

    Columns of numbers stand on the right, intervals are muted, and methods have the colour of
    their family.
    """
    heads, rows = lines[0], lines[2:]
    kinds = [_kind(head, [row[i] for row in rows]) for i, head in enumerate(heads)]
    top = "".join(
        f'<th scope="col"{kind}>{inline(head)}</th>'
        for head, kind in zip(heads, kinds, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(_cell(*pair) for pair in zip(row, kinds, strict=True))}</tr>\n"
        for row in rows
    )
    tall = " tall" if len(rows) > TALL else ""
    inner = f"<table class='plain'><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table>"
    label = escape(f"Table: {', '.join(heads[:3])}")
    return (
        f'<div class="scroll{tall}" tabindex="0" role="region" aria-label="{label}">{inner}</div>'
    )


def _kind(head: str, cells: Sequence[str]) -> str:
    if head in ("method", "solver"):
        return ' class="name"'
    numbers = [cell for cell in cells if cell not in ("", "-", "diverged")]
    if head != "place" and numbers and all(re.match(r"-?[\d.]", cell) for cell in numbers):
        spread = any(BETWEEN.search(cell) for cell in numbers)
        return f' class="number{" spread" if spread else ""}"'
    return ""


def _cell(text: str, kind: str) -> str:
    shown = inline(text)
    if "number" in kind:
        shown = BETWEEN.sub(r'<span class="between">\1</span>', shown)
    elif kind and (family := FAMILIES.get(text.strip("`"))):
        shown = f'<i class="dot {slug(family)}" title="{family}"></i>{shown}'
    return f"<td{kind}>{shown}</td>"


def _cards(summary: Row) -> Iterator[str]:
    """Who is first, by scene and number of calls."""
    for scene, data in summary.items():
        for calls, words in WORDS.items():
            rows = [row for row in data["rows"] if row["calls"] == calls]
            if not rows:
                continue
            equal = 0
            for row in rows[1:]:
                if not row["tie"]:
                    break
                equal += 1
            beside = f"first of {len(rows)}" + (f", {equal} not clearly behind" if equal else "")
            yield f"<li><b>{rows[0]['name']}</b><span>{scene}, {words}</span>"
            yield f"<small>{beside}</small></li>"
