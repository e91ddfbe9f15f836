"""Every figure of a page is a field of the results: python benchmarks/pages.py [--write]

A page that tells figures has a template in benchmarks/pages/, with fields in their place:

    {emoji[scores][real][fd]:.4f}                  a number
    {digits[alpha][alpha 1][fd_digits]:±.2f}       mean ± standard deviation over the seeds
    {differences[steps][a - b][recall]:diff.2f}    mean difference (its 95 % interval)
    {differences[convergence][slope]:mean.2f}      the same, without the sign of a gain

Filled in from benchmarks/results/, the template is the page, or a passage of it where most of the
page tells no figures (`PASSAGES`). Outside of fields it may hold no
decimal number, no percentage and no number of thousands, but those that `STATED` has for it:
settings and published figures. This lists what is wrong, and then exits with 1; --write writes the
pages that are templates as a whole.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.storage.files import read_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TEMPLATES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "pages"
FIGURE = re.compile(
    r"(?<![\w.])(?<![A-Za-z]-)(?:\d+(?:,\d{3})+|\d*\.\d+|\d+(?= ?%))(?:e-?\d+)?(?: ?%)?"
)
PAGES = {
    "claims.md": "docs/claims.md",
    "emoji.md": "docs/emoji.md",
    "scenes.md": "docs/scenes.md",
    "assets.md": "benchmarks/assets/README.md",
    "adapt.md": "docs/adapt.md",
    "performance.md": "docs/performance.md",
}
"""Template -> the page that it is."""
PASSAGES = {
    "architecture-speed.md": "docs/architecture.md",
    "solvers.md": "docs/sampling.md",
    "serve.md": "docs/serve.md",
    "averages.md": "docs/averages.md",
    "pace.md": "docs/score-identity.md",
    "plan-sd15.md": "docs/plan.md",
    "plan-peaks.md": "docs/plan.md",
    "scale-counts.md": "docs/scale.md",
    "scale-methods.md": "docs/scale.md",
    "scale-steps.md": "docs/scale.md",
    "scale-limits.md": "docs/scale.md",
    "clients.md": "docs/export.md",
    "drill.md": "docs/reliability.md",
    "pairs.md": "docs/reliability.md",
    "lora-digits.md": "docs/lora.md",
    "lora-memory.md": "docs/lora.md",
    "memory.md": "docs/reliability.md",
    "overlap.md": "docs/reliability.md",
    "save-stall.md": "docs/reliability.md",
    "watch.md": "docs/watch.md",
    "watched.md": "docs/watch.md",
}
"""Template -> the page that holds it, whatever its line breaks."""
STATED: Mapping[str, frozenset[str]] = {
    "claims.md": frozenset(
        (
            *("5,000", "20,000", "2,000", "64,000", "95 %", "5 %", "1.0", "1.2"),
            *("0.25", "0.5", "0.75", "1.05", "1.1", "1.35", "1.5"),
        )
    ),
    "averages.md": frozenset(("0.03", "0.07", "0.13", "0.2", "0.25")),
    "performance.md": frozenset(("3,072", "0.9")),
    "scale-counts.md": frozenset(("1.5",)),
    "scale-steps.md": frozenset(("1.5", "1,024")),
    "scale-limits.md": frozenset(("1.5", "1,024")),
    "clients.md": frozenset(("1.5",)),
    "assets.md": frozenset(("766,516", "18,000", "2,000")),
    "scenes.md": frozenset(("2,000", "4,096", "6,000", "65,536")),
    "emoji.md": frozenset(("1.3", "1.5", "2,000", "14,000", "1,000", "1.2")),
}


class Field:
    """A value of the results, reached by keys and shown by a format, as str.format asks."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getitem__(self, key: str | int) -> Field:
        key = str(key)  # str.format reads digits as an int
        if not isinstance(self.value, Mapping) or key not in self.value:
            raise ValueError(f"a template asks for {key!r}, which the results do not have there")
        return Field(self.value[key])

    def __format__(self, spec: str) -> str:
        """`.2f` and the like of a number, or of a mean; with ±, diff and mean, see the module."""
        kind = next((k for k in ("±", "diff", "mean") if spec.startswith(k)), "")
        digits = spec.removeprefix(kind)
        row = self.value if isinstance(self.value, Mapping) else {"mean": self.value}
        mean = row["mean"]
        if isinstance(mean, str):
            return mean
        if kind == "diff":
            digits = "+" + digits
        shown = format(mean, digits)
        if kind == "±" and "std" in row:
            return f"{shown} ± {row['std']:{digits}}"
        if kind in ("diff", "mean"):
            if row["low"] is None:
                return f"{shown} (one seed)"
            return f"{shown} ({format(row['low'], digits)} to {format(row['high'], digits)})"
        return shown


def sources() -> dict[str, Field]:
    """What templates may name: the results, and the parts of the claims' summary."""
    found = {
        "emoji": read_json(RESULTS / "emoji.json"),
        "scenes": read_json(RESULTS / "scenes.json"),
        "study": read_json(RESULTS / "emoji-study.json"),
        "networks": read_json(RESULTS / "networks.json"),
        "solvers": read_json(RESULTS / "solvers.json"),
        "adapt": read_json(RESULTS / "adapt.json"),
        "serve": read_json(RESULTS / "serve.json"),
        "pairs": read_json(RESULTS / "pairs.json"),
        "derivatives": read_json(RESULTS / "derivatives.json"),
        "evaluation": read_json(RESULTS / "evaluation.json"),
        "lora": read_json(RESULTS / "adapters.json"),
        "averages": read_json(RESULTS / "averages.json"),
        "pace": read_json(RESULTS / "pace.json"),
        "plan": read_json(RESULTS / "plan.json"),
        "scale": read_json(RESULTS / "scale.json"),
        "memory": read_json(RESULTS / "memory.json"),
        "overlap": read_json(RESULTS / "overlap.json"),
        "stall": read_json(RESULTS / "save_stall.json"),
        "drill": read_json(RESULTS / "drill.json"),
        "steps": read_json(RESULTS / "steps.json"),
        "clients": read_json(RESULTS / "clients.json"),
        "browser": read_json(RESULTS / "browser.json"),
        "presets": read_json(RESULTS / "claims" / "digits-presets.json"),
        **read_json(RESULTS / "claims" / "summary.json"),
    }
    return {name: Field(value) for name, value in found.items()}


def unbacked(template: str, stated: frozenset[str]) -> list[str]:
    """Figures of a template that are neither a field nor stated.

    Code, links and pictures are passed over: they hold commands, addresses and names.
    """
    text = re.sub(r"^```.*?^```$", " ", template, flags=re.M | re.S)
    text = re.sub(r"\{[^}]*\}|`[^`]*`|\]\([^)]*\)|<[^>]*>", " ", text)
    return [figure for figure in FIGURE.findall(text) if figure not in stated]


def problems(name: str, page: str, fields: Mapping[str, Field]) -> list[str]:
    """What is wrong with the text of a page, by its template."""
    template = (TEMPLATES / name).read_text(encoding="utf-8")
    stated = STATED.get(name, frozenset())
    found = [f"{name}: {figure} is no field" for figure in unbacked(template, stated)]
    if name in PASSAGES:
        passage = " ".join(template.format(**fields).split())
        if passage not in " ".join(page.split()):
            found.append(f"{PASSAGES[name]} has not: {passage}")
        return found
    wanted, lines = template.format(**fields).splitlines(), page.splitlines()
    found += [f"{PAGES[name]} has not: {line}" for line in wanted if line not in lines]
    found += [f"{name} does not give: {line}" for line in lines if line not in wanted]
    if not found and wanted != lines:
        found.append(f"{PAGES[name]} has its lines in another order")
    return found


def main(args: list[str]) -> int:
    fields, wrong = sources(), []
    for name, place in (PAGES | PASSAGES).items():
        page = ROOT / place
        if "--write" in args and name in PAGES:
            text = (TEMPLATES / name).read_text(encoding="utf-8").format(**fields)
            page.write_text(text, encoding="utf-8")
        wrong += problems(name, page.read_text(encoding="utf-8"), fields)
    print("\n".join(wrong) or "every figure is a field of the results")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
