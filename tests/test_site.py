"""The documentation site has every page and every public name, and asks no other server."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
FETCHED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}
"""Tag -> its attribute whose address a browser fetches by itself."""


class Addresses(HTMLParser):
    """Anchors of a page, what it links to, and what a browser fetches for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if FETCHED.get(tag) in given:
            self.fetched.append(given[FETCHED[tag]])


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """`tools/doc_site.py`, as MkDocs loads it."""
    pytest.importorskip("mkdocs", reason="the site needs pip install -e '.[docs]'")
    spec = spec_from_file_location("doc_site", ROOT / "tools" / "doc_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Addresses]:
    """Page -> what is in it, of the site as `make site` builds it."""
    pytest.importorskip("mkdocs", reason="the site needs pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert built.returncode == 0, built.stderr
    pages = {p.relative_to(out).as_posix(): p for p in out.rglob("*.html")}
    styles = "".join(p.read_text(encoding="utf-8") for p in out.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)|@import", styles) == []
    return {name: Addresses(page.read_text(encoding="utf-8")) for name, page in pages.items()}


@pytest.mark.slow
def test_every_page_and_every_public_name_is_there(
    site: dict[str, Addresses], hook: ModuleType
) -> None:
    pages = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"index.html", "contributing.html", "changelog.html"} <= site.keys()
    names = [f"{module}.{name}" for module, some in hook.public().items() for name in some]
    assert len(names) > 100
    known = {anchor for page in site.values() for anchor in page.anchors}
    assert [name for name in names if name not in known] == []
    assert "fewstep.methods.sid.Nothing" not in known


@pytest.mark.slow
def test_a_browser_is_sent_nowhere_else(site: dict[str, Addresses]) -> None:
    """Fonts, scripts, pictures and styles are files of the site, which are there."""
    assert sum(len(page.fetched) for page in site.values()) > 100
    for name, page in site.items():
        assert [a for a in page.fetched if urlsplit(a).netloc] == [], name


def broken(site: dict[str, Addresses]) -> Iterator[str]:
    """Links between the pages that lead to no page, or to no anchor of it."""
    for name, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or name == "404.html":
                continue
            steps = [*name.split("/")[:-1], *parts.path.split("/")] if parts.path else [name]
            places: list[str] = []
            for step in steps:
                places = places[:-1] if step == ".." else [*places, *({step} - {".", ""})]
            target = "/".join(places) or "index.html"
            anchors = site[target].anchors | {""} if target in site else set()
            if unquote(parts.fragment) not in anchors:
                yield f"{name}: {link}"


@pytest.mark.slow
def test_every_link_leads_to_its_anchor(site: dict[str, Addresses]) -> None:
    """The navigation on each page and the links in its text; a planted one is noticed."""
    assert [link for link in broken(site) if "#__" not in link] == []
    planted = {"a.html": Addresses('<a href="b.html#x"></a><a href="c.html"></a>')}
    planted["b.html"] = Addresses('<p id="y"><a href="#y"></a>')
    assert list(broken(planted)) == ["a.html: b.html#x", "a.html: c.html"]


def test_the_navigation_names_every_page(hook: ModuleType) -> None:
    """Each file of docs/, of the root, and each room with a public name, once."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"- (?:\w+: )?([\w/-]+\.md)$", text, re.M)
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    pages += [*hook.FROM_ROOT, *(f"reference/{room}.md" for room in hook.rooms())]
    assert sorted(listed) == sorted(pages)


def test_docstrings_are_plain_text(hook: ModuleType) -> None:
    """Stars and angles are characters; code, *emphasis* and indented lines stay Markdown."""
    assert hook.plain("x: (B, *), t: (B, *)") == r"x: (B, \*), t: (B, \*)"
    assert hook.plain("the *mean* of <a, b>") == "the *mean* of &lt;a, b>"
    assert hook.plain("`(B, *)` and a*b*c") == r"`(B, *)` and a\*b\*c"
    assert hook.plain("so\n\n    c * <a, b> * d") == "so\n\n    c * <a, b> * d"
    said = hook.plain("Attributes:\n    x: (B, *), <a>\n\nso\n\n    c * d")
    assert said == "Attributes:\n    x: (B, \\*), &lt;a>\n\nso\n\n    c * d"


def test_links_that_leave_the_site_are_text(hook: ModuleType) -> None:
    def moved(text: str, file: str) -> str:
        return str(hook.LINK.sub(lambda found: hook.linked(found, ROOT / file), text))

    assert moved("![a](docs/images/digits.png)", "README.md") == "![a](images/digits.png)"
    assert moved("[x](docs/plan.md#plan), [c](CONTRIBUTING.md)", "README.md") == (
        "[x](plan.md#plan), [c](contributing.md)"
    )
    assert moved("[log](../CHANGELOG.md)", "docs/plan.md") == "[log](changelog.md)"
    assert moved("the [script](../examples/own_method.py)", "docs/plan.md") == "the script"
    assert moved("[p](https://arxiv.org/abs/1), [h](#here)", "docs/plan.md") == (
        "[p](https://arxiv.org/abs/1), [h](#here)"
    )
