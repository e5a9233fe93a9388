"""The README's tables of layers, from the registry, and of kernels, from what is on record about them.

    python -m experiments.readme

Replaces what stands between the markers in README.md of the current directory.
"""

import sys
from pathlib import Path

from experiments import kernel_matrix
from zoo import registry


def table() -> str:
    """One row per name: what it is, the form it computes in, its paper and its file."""
    lines = ["| name | what it is | form of `apply` | arXiv |", "|---|---|---|---|"]
    for name, entry in registry.LAYERS.items():
        file = f"layers/{entry.module}.py"
        number = registry.paper(name)
        paper = f"[{number}](https://arxiv.org/abs/{number})" if number else ""
        lines.append(f"| [`{name}`]({file}) | {registry.summary(name)} | {entry.form} | {paper} |")
    return "\n".join(lines) + "\n"


TABLES = {"layers": table, "kernels": kernel_matrix.table}


def updated(text: str) -> str:
    """`text` with the present tables. Raises ValueError when a marker is missing."""
    for name, make in TABLES.items():
        opening, closing = f"<!-- {name}: python -m experiments.readme -->", f"<!-- end of {name} -->"
        head, begin, rest = text.partition(opening)
        _, end, tail = rest.partition(closing)
        if not begin or not end:
            raise ValueError(f"README.md needs the lines {opening!r} and {closing!r}")
        text = f"{head}{opening}\n{make()}{closing}{tail}"
    return text


def main() -> int:
    path = Path("README.md")
    path.write_text(updated(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
