"""Configs by name or file, and changing their fields from the command line.

A config file is Python that defines `config`: a `Run`, or a `Comparison` of several. An override
`--optimizer.lr=3e-4` replaces one field of it; in a comparison, of every run.
"""

import ast
import dataclasses
import difflib
import importlib.util
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from layers.checks import require
from zoo.registry import unknown

CONFIGS = Path(__file__).parent / "configs"


def config_names() -> list[str]:
    """Names of the configs that ship with the zoo."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")


def description(name: str) -> str:
    """The first line of a shipped config's documentation; the file is not run."""
    doc = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text())) or ""
    return doc.splitlines()[0]


def module(name: str) -> ModuleType:
    """The config called `name`, or the file `name`, as a module that was run.

    Raises ValueError for an unknown name or a file without `config`, FileNotFoundError for a missing file.
    """
    path = CONFIGS / f"{name}.py"
    if name.endswith(".py") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"no config file {name!r}")
    elif not path.is_file():
        raise unknown("config", name, config_names())
    spec = importlib.util.spec_from_file_location(f"zoo_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    require(hasattr(module, "config"), f"{path} defines no `config`")
    return module


def load(name: str) -> tuple[Any, str]:
    """The `config` and the docstring of the config called `name`, or of the file `name`; see `module`."""
    found = module(name)
    return found.config, found.__doc__ or ""


def parse(arguments: list[str]) -> dict[str, str]:
    """`["--a.b=1", "--c", "2"] -> {"a.b": "1", "c": "2"}`. Raises ValueError for anything else."""
    found, rest = {}, list(arguments)
    while rest:
        word = rest.pop(0)
        require(word.startswith("--") and len(word) > 2, f"unexpected {word!r}: overrides read --field=value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            require(bool(rest), f"--{name} has no value")
            value = rest.pop(0)
        found[name.replace("-", "_")] = value
    return found


def override(config: Any, changes: dict[str, str]) -> Any:
    """`config` with fields replaced, `{"optimizer.lr": "3e-4"}`; the new config validates itself anew.

    All changes are made at once, so that fields that must fit together can be given together.
    Raises ValueError for an unknown field (naming the valid ones) or a value of the wrong type.
    """
    return _replaced(config, changes, _convert)


def replaced(config: Any, changes: dict[str, Any]) -> Any:
    """As `override`, with values instead of text: `{"optimizer.lr": 3e-4}`."""
    return _replaced(config, changes, lambda config, name, value: value)


def _replaced(config: Any, changes: dict[str, Any], convert: Callable[[Any, str, Any], Any]) -> Any:
    direct: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if name not in _fields(config):
            paths = field_paths(config)
            close = difflib.get_close_matches(path, paths, 1) or [p for p in paths if p.endswith("." + name)]
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            kind = type(config).__name__
            raise ValueError(
                f"unknown field {name!r} of {kind}{hint}; choose from {', '.join(_fields(config))}"
            )
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            direct[name] = convert(config, name, value)
    for name, inner in nested.items():
        require(
            dataclasses.is_dataclass(getattr(config, name)),
            f"field {name!r} of {type(config).__name__} has no fields of its own",
        )
        direct[name] = _replaced(getattr(config, name), inner, convert)
    return dataclasses.replace(config, **direct)


def _fields(config: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(config)]


def field_paths(config: Any, prefix: str = "") -> list[str]:
    """Every field that `override` can change, as `optimizer.lr`."""
    found = []
    for name in _fields(config):
        value = getattr(config, name)
        inner = dataclasses.is_dataclass(value)
        found += field_paths(value, f"{prefix}{name}.") if inner else [prefix + name]
    return found


def _convert(config: Any, name: str, text: str) -> Any:
    kind = typing.get_type_hints(type(config))[name]
    require(
        not dataclasses.is_dataclass(getattr(config, name)),
        f"{name!r} of {type(config).__name__} is a config: set one of its fields, as in --{name}.field=value",
    )
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)[0]
        words = [word.strip() for word in text.split(",")]
        return tuple(words if items is Any else [_value(word, items, name, text) for word in words])
    if text.lower() == "none" and type(None) in typing.get_args(kind):
        return None
    return _value(text, kind, name, text)


def _value(word: str, kind: Any, name: str, text: str) -> Any:
    try:
        return msgspec.convert(word, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"--{name}={text}: {error}") from None
