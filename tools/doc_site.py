"""What `make site` shows beside the files of docs/: a hook of MkDocs, and an extension of griffe.

    index, contributing, changelog    the files of the repository's root
    reference/ROOM                    the public names of a room, from their docstrings

Docstrings are plain text: (B, *) is a shape and <a, b> a product, neither Markdown nor HTML.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
FROM_ROOT |= {"changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def public() -> dict[str, list[str]]:
    """Module -> its public names, as `fewstep/__init__.pyi` has them."""
    tree = ast.parse((ROOT / "fewstep/__init__.pyi").read_text(encoding="utf-8"))
    return {
        str(node.module): [alias.name for alias in node.names]
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
    }


def rooms() -> dict[str, dict[str, list[str]]]:
    """Room -> its modules with their public names."""
    found: dict[str, dict[str, list[str]]] = {}
    for module, names in public().items():
        found.setdefault(module.split(".")[1], {})[module] = names
    return found


def reference(room: str, modules: dict[str, list[str]]) -> str:
    """The page of a room, as mkdocstrings reads it."""
    lines = [f"# fewstep.{room}", ""]
    for module, names in modules.items():
        lines += [f"::: {module}", "    options:", f"      members: [{', '.join(names)}]", ""]
    return "\n".join(lines)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs asks for the files of the site: add those that are not in docs/."""
    for page, source in FROM_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for room, modules in rooms().items():
        page = f"reference/{room}.md"
        files.append(File.generated(config, page, content=reference(room, modules)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as the site needs them; MkDocs gives a page's text before it is read."""
    source = FROM_ROOT.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return "".join(
        part if code else LINK.sub(lambda found: linked(found, ROOT / source), part)
        for code, part in parted(markdown)
    )


def parted(markdown: str) -> Iterator[tuple[bool, str]]:
    """(whether it is a fenced block, text) of each part of a page."""
    for number, part in enumerate(re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)):
        yield number % 2 == 1, part


def linked(found: re.Match[str], source: Path) -> str:
    """A link of the repository's file `source` as one of the site; plain text where it leaves it.

    Files of the repository that are no pages, such as an example, are not part of the site.
    """
    image, text, target = found.groups()
    name, hash_, anchor = target.partition("#")
    if not name or re.match(r"[a-z]+:", target):
        return found[0]
    place = (source.parent / name).resolve()
    if place.is_relative_to(ROOT / "docs"):
        address = place.relative_to(ROOT / "docs").as_posix()
    else:
        pages = {ROOT / file: page for page, file in FROM_ROOT.items()}
        if place not in pages:
            return text
        address = pages[place]
    return f"{image}[{text}]({address}{hash_}{anchor})"


class PlainText(Extension):  # type: ignore[misc]
    """Docstrings as the plain text that they are."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """griffe has read an object."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


KEPT = re.compile(r"(`[^`]*`|(?<![\w)])\*\w[^*]*\w\*(?!\w))")
"""What is Markdown in a docstring: code and *emphasis* within a line."""


SECTION = re.compile(r"(Attributes|Args|Arguments|Returns|Raises):")
"""The heads of what a docstring says of one thing a line; Fields are attributes to griffe."""


def plain(text: str) -> str:
    """A docstring whose other stars and angles are characters; formulas stay as they are.

    A formula is an indented line that stands under no head.
    """
    lines, listed = [], False
    for line in text.splitlines():
        if line and not line.startswith(" "):
            listed = SECTION.fullmatch(line) is not None
        if listed or not line.startswith("    "):
            parts = KEPT.split(line)
            parts[::2] = [p.replace("*", r"\*").replace("<", "&lt;") for p in parts[::2]]
            line = "".join(parts)
        lines.append(line)
    return "\n".join(lines)
