"""The README's table of layers, written from the registry.

    python -m experiments.readme

Replaces what stands between the two markers in README.md of the current directory.
"""

import sys
from pathlib import Path

from zoo import registry

BEGIN, END = "<!-- layers: python -m experiments.readme -->", "<!-- end of layers -->"


def table() -> str:
    """One row per name: what it is, the form it computes in, its paper and its file."""
    lines = ["| name | what it is | form of `apply` | arXiv |", "|---|---|---|---|"]
    for name, entry in registry.LAYERS.items():
        file = f"layers/{entry.module}.py"
        number = registry.paper(name)
        paper = f"[{number}](https://arxiv.org/abs/{number})" if number else ""
        lines.append(f"| [`{name}`]({file}) | {registry.summary(name)} | {entry.form} | {paper} |")
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    """`text` with the present table. Raises ValueError when a marker is missing."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{table()}{END}{tail}"


def main() -> int:
    path = Path("README.md")
    path.write_text(updated(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
