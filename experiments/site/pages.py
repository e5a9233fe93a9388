"""Pages of architectures, and what hand-written pages have put in: `<!-- layers -->` and the like."""

import importlib
import re
from pathlib import Path

from experiments import kernel_matrix, readme
from experiments.site import tables
from experiments.site.architectures import Architecture
from zoo import registry

ROOT = Path(__file__).parents[2]
MEMBERS = ("Config", "State", "init", "init_state", "apply", "step")

PAGE = """# {name}

{summary}
{names}
## In one picture

[![Data flow of {name}, and how its output depends on its input]({module}.svg)]({module}.svg){{ .picture }}

Left: what a token goes through; a box with a loop keeps a state from token to token. Right: `{first}` before
training, at width 32: the norm of the derivative of output t by input s, white where it is zero.

## Recurrence

{recurrence}

## When to use it

{use}

## Cost

{costs}
By the layer's own formulas at width {width} with its defaults; the state is that of one sequence in float32,
FLOPs are those of the forward pass.{lengths}
{measured}
## State

{state}
For one sequence. B is the batch; other letters are those of the recurrence and of the settings below.

## How to configure

{settings}
{blocks}
## Citation

{citation}

```bibtex
{bibtex}
```

## Reference

{reference}
"""

MEMBER = """::: layers.{module}.{member}
    options:
      heading_level: 3
      show_root_full_path: false"""

BLOCKS = """```python
import jax

from layers import {module}

cfg = {module}.Config(width=32)
params = {module}.init(jax.random.key(0), cfg)
x = jax.random.normal(jax.random.key(1), (2, 16, 32))  # [B, T, D]

y, state, aux = {module}.apply(params, cfg, x)  # all tokens at once
y_t, state = {module}.step(params, cfg, x[:, 0], state)  # one more token
```

In a model, by name with its defaults or as a Config:

```python
from zoo import lm

memory = {module}.Config(width=64)
cfg = lm.Config(vocab_size=256, width=64, depth=4, pattern=({pattern}))
lm.param_count(cfg), lm.state_bytes(cfg), lm.flops_per_token(cfg, 1024)
```
"""


def docstring(text: str) -> str:
    """A docstring as Markdown, in which a list begins after an empty line."""
    return re.sub(r"(?m)^((?!- |  ).+)\n(?=- )", r"\1\n\n", text)


def recurrence(module: str) -> str:
    """The module's docstring after its first line, which is the summary."""
    text = (importlib.import_module(f"layers.{module}").__doc__ or "").strip()
    return docstring(text.partition("\n")[2].strip())


def _names(names: list[str]) -> str:
    """What tells the names of one module apart."""
    if len(names) == 1:
        return f"\n`{names[0]}` in the registry; form of its `apply`: {registry.LAYERS[names[0]].form}.\n"
    rows = []
    for name in names:
        said = ", ".join(f"{key}={value!r}" for key, value in registry.LAYERS[name].settings.items())
        what = tables.plain(registry.summary(name))
        rows.append([tables.code(name), tables.code(said) or "defaults", what])
    return "\n" + tables.markdown(["name", "settings", "what it is"], rows)


def _lengths(names: list[str]) -> str:
    if "max_length" not in registry.fields(names[0]):
        return ""
    return " For T beyond `max_length` that is T, too: the state is then larger than the one stated."


def blocks(module: str, names: list[str]) -> str:
    """Code that configures the layer, alone and in a model."""
    others = [name for name in (*names, "attention") if name != "attention"]
    listed = [*(f'"{name}"' for name in others), "memory"]
    return BLOCKS.format(module=module, pattern=", ".join(listed) if others else "memory,")


def _measured(names: list[str]) -> str:
    found = tables.measured(names)
    return f"\nMeasured:\n\n{found}" if found else ""


def architecture(module: str, names: list[str], about: Architecture) -> str:
    """The page of one file of layers."""
    layer = importlib.import_module(f"layers.{module}")
    return PAGE.format(
        name=about.name,
        module=module,
        first=names[0],
        width=tables.WIDTH,
        summary=tables.plain((layer.__doc__ or "").strip().splitlines()[0]),
        names=_names(names),
        recurrence=recurrence(module),
        use=about.use.strip(),
        costs=tables.costs(names),
        lengths=_lengths(names),
        measured=_measured(names),
        state=tables.state(names),
        settings=tables.settings(layer),
        blocks=blocks(module, names),
        citation=about.citation.markdown(),
        bibtex=about.citation.bibtex(f"{module}{about.citation.year}"),
        reference="\n\n".join(MEMBER.format(module=module, member=member) for member in MEMBERS),
    )


def gallery(found: dict[str, list[str]], about: dict[str, Architecture]) -> str:
    """All names, with what they cost: a row each."""
    rows = []
    for module, names in found.items():
        for name in names:
            cfg = registry.config(name, tables.WIDTH)
            numbers = (f"{cfg.state_bytes():,}", f"{cfg.flops_per_token(1024):,}")
            link = f"[{about[module].name}]({module}.md)"
            form = registry.LAYERS[name].form
            rows.append([tables.code(name), link, tables.plain(registry.summary(name)), form, *numbers])
    heads = ["name", "page", "what it is", "form of `apply`", "state, bytes", "FLOPs per token, T = 1,024"]
    return tables.markdown(heads, rows)


def unlinked(text: str) -> str:
    """Without links to files of the repository, which the site does not hold."""
    text = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)
    # `python` is what this site's own blocks are called, which run on their own.
    return text.replace("```python\n", "```py\n")


def contributing(title: str) -> str:
    """A section of CONTRIBUTING.md. Raises ValueError if there is none of this title."""
    _, begin, rest = (ROOT / "CONTRIBUTING.md").read_text().partition(f"## {title}\n")
    if not begin:
        raise ValueError(f"CONTRIBUTING.md has no section {title!r}")
    return unlinked(re.split(r"^## ", rest, maxsplit=1, flags=re.M)[0].strip())


INSERTS = {
    "a new layer": lambda: contributing("A new layer in three steps"),
    "a new task": lambda: contributing("A new task"),
    "tasks": lambda: unlinked(readme.task_table()),
    "kernels": lambda: unlinked(kernel_matrix.table()),
}


def written(path: Path) -> str:
    """A hand-written page with what it has put in. Raises ValueError for an insert that does not exist."""

    def insert(found: re.Match) -> str:
        if found[1] not in INSERTS:
            raise registry.unknown(f"insert of {path.name}:", found[1], INSERTS)
        return INSERTS[found[1]]()

    return re.sub(r"<!-- insert: (.*?) -->", insert, path.read_text())
