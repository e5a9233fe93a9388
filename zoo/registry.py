"""Names of layers: one line per architecture.

`config("gla", width=64, heads=2)` makes a layer's Config; `module(cfg)` finds the functions it belongs to.
"""

import dataclasses
import difflib
import importlib
import sys
from types import ModuleType
from typing import Any

# name: (layer module, settings that make the name out of the module)
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {}),
    "s4": ("s4", {}),
    "s4d": ("s4d", {}),
    "mamba": ("mamba", {}),
    "gla": ("gated_linear_attention", {}),
    "linear_attention": (
        "gated_linear_attention",
        {"decay": "none", "feature_map": "elu+1", "normalize": True},
    ),
    "retention": ("gated_linear_attention", {"decay": "constant"}),
    "mixture_of_memories": ("mixture_of_memories", {}),
    "titans": ("titans", {}),
}


def unknown(kind: str, name: str, choices) -> ValueError:
    """The error for a wrong name: what was asked, the nearest match, all valid choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; choose from {', '.join(choices)}")


def config(name: str, width: int, **settings):
    """The Config of the layer called `name`. Raises ValueError for unknown names, fields or bad values."""
    if name not in LAYERS:
        raise unknown("layer", name, LAYERS)
    module_name, preset = LAYERS[name]
    module = importlib.import_module(f"layers.{module_name}")
    fields = {f.name for f in dataclasses.fields(module.Config)}
    for field in settings:
        if field not in fields:
            raise unknown(f"field of layer {name!r}:", field, fields)
    return module.Config(width=width, **{**preset, **settings})


def module(cfg) -> ModuleType:
    """The layer module that a Config belongs to. Raises ValueError for anything that is no layer Config."""
    found = sys.modules.get(type(cfg).__module__)
    if getattr(found, "Config", None) is not type(cfg) or not hasattr(found, "apply"):
        raise ValueError(f"{cfg!r} is not a layer config; give a layer's name or its Config")
    assert found is not None
    return found


def summary(name: str) -> str:
    """The first line of a layer's documentation, and the settings that make the name."""
    module_name, preset = LAYERS[name]
    doc = importlib.import_module(f"layers.{module_name}").__doc__ or ""
    line = doc.strip().splitlines()[0]
    settings = ", ".join(f"{key}={value!r}" for key, value in preset.items())
    return f"{line} ({settings})" if settings else line
