"""Whole models over the layers: language model, classifier, registry, generation, checkpoints.

import zoo
text = zoo.generate(params, cfg, "def ", 100, tokenizer=tokenizer)
"""

import importlib
from typing import Any

# What is asked for by itself, and where it is; nothing is imported before.
_EXPORTS = {
    "generate": "zoo.generation",
    "load_pretrained": "zoo.pretrained",
    "load_state": "zoo.states",
    "save_pretrained": "zoo.pretrained",
    "save_state": "zoo.states",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
