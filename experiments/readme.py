"""The README's tables: layers, from the registry; tasks; kernels, from what is on record about them.

    python -m experiments.readme

Replaces what stands between the markers in README.md of the current directory.
"""

import sys
from pathlib import Path

from experiments import kernel_matrix, tasks
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


def task_table() -> str:
    """One row per file of tasks: its configs and what they ask."""
    configs: dict[str, list[str]] = {}
    for name, module in tasks.TASKS.items():
        configs.setdefault(module, []).append(name)
    lines = ["| configs | what is asked |", "|---|---|"]
    for module, names in configs.items():
        links = ", ".join(f"[`{name}`](experiments/tasks/{module}.py)" for name in names)
        lines.append(f"| {links} | {tasks.summary(names[0])} |")
    return "\n".join(lines) + "\n"


TABLES = {"layers": table, "tasks": task_table, "kernels": kernel_matrix.table}


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
