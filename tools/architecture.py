"""Draw docs/images/architecture.svg from the imports as they are: python tools/architecture.py"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent / "fewstep"
OUT = ROOT.parent / "docs" / "images" / "architecture.svg"
LAYERS = (
    ("a person", ("cli",)),
    ("of a run", ("report", "compare", "export", "plan", "recipes", "web")),
    ("a run", ("runs", "domains")),
    ("measures", ("eval", "data")),
    ("models", ("teachers", "safe_pickle", "storage")),
    ("the loop", ("training",)),
    ("algorithms", ("methods", "distillation")),
    ("nouns", ("nets", "losses", "diffusion", "config", "signals")),
)
"""The rooms of tests/test_structure.py, `ORDER`, as they are drawn."""


def imports() -> dict[str, set[str]]:
    """part -> the parts of the package it imports."""
    edges: dict[str, set[str]] = defaultdict(set)
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fewstep."):
                edges[part].add(str(node.module).split(".")[1])
            elif isinstance(node, ast.ImportFrom) and node.module == "fewstep":
                edges[part] |= {alias.name for alias in node.names}
    return {part: targets - {part} for part, targets in edges.items()}


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The edges that no longer path implies."""

    def reach(part: str) -> set[str]:
        direct = edges.get(part, set())
        return direct.union(*map(reach, direct))

    return {
        part: targets - set().union(*(reach(other) for other in targets))
        for part, targets in edges.items()
    }


def main() -> None:
    places = {
        name: ((i + 0.5) / len(names) * 10, -row * 1.3)
        for row, (_, names) in enumerate(LAYERS)
        for i, name in enumerate(names)
    }
    edges = imports()
    missing = sorted((set(edges) | set().union(*edges.values())) - set(places))
    missing = [name for name in missing if not name.startswith("__")]
    if missing:
        raise SystemExit(f"give these a layer in tools/architecture.py: {', '.join(missing)}")
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fewstep", "font.size": 10})
    figure, axes = plt.subplots(figsize=(10.5, 8.6))
    for row, (title, _) in enumerate(LAYERS):
        axes.axhspan(-row * 1.3 - 0.5, -row * 1.3 + 0.5, color="#eef1f5" if row % 2 else "#f7f8fa")
        axes.text(-0.1, -row * 1.3, title, ha="right", va="center", style="italic", color="#555")
    for part, targets in sorted(reduced(edges).items()):
        for target in sorted(targets & places.keys()):
            if part in places:
                (x, y), (u, v) = places[part], places[target]
                bend = 0.25 if y == v else 0.04
                axes.add_patch(
                    FancyArrowPatch(
                        (x, y),
                        (u, v),
                        arrowstyle="-|>",
                        mutation_scale=9,
                        shrinkA=18,
                        shrinkB=18,
                        linewidth=0.8,
                        color="#3b6ea5",
                        alpha=0.45,
                        connectionstyle=f"arc3,rad={bend}",
                    )
                )
    for name, (x, y) in places.items():
        width = 0.09 * len(name) + 0.25
        package = (ROOT / name).is_dir()
        axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - 0.17),
                width,
                0.34,
                boxstyle="round,pad=0.06",
                facecolor="#fff6e5" if package else "white",
                edgecolor="#333",
                zorder=3,
            )
        )
        axes.text(x, y, f"{name}/" if package else name, ha="center", va="center", zorder=4)
    axes.set_xlim(-1.4, 10.2)
    axes.set_ylim(-len(LAYERS) * 1.3 + 0.2, 0.7)
    axes.axis("off")
    figure.savefig(OUT, bbox_inches="tight", metadata={"Date": None})
    print(OUT)


if __name__ == "__main__":
    main()
