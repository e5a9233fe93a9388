"""Names of layers: one line per architecture.

`config("gla", width=64, heads=2)` makes a layer's Config; `module(cfg)` finds the functions it belongs to.
"""

import dataclasses
import difflib
import importlib
import re
import sys
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One name: `layers/module.py`, how `apply` computes, settings that make the name out of the module."""

    module: str
    form: str  # blocks, chunkwise, convolution, scan, sequential
    settings: Mapping[str, Any] = MappingProxyType({})
    paper: str = ""  # arXiv number; default the first one in the module's docstring
    what: str = ""  # one line; default the docstring's first


LAYERS: dict[str, Entry] = {
    "attention": Entry("attention", "blocks"),
    "latent_attention": Entry("latent_attention", "blocks"),
    "s4": Entry("s4", "convolution"),
    "s4d": Entry("s4d", "convolution"),
    "lru": Entry("lru", "scan"),
    "rg_lru": Entry("rg_lru", "scan"),
    "s5": Entry("s5", "scan"),
    "min_gru": Entry("min_gru", "scan"),
    "min_lstm": Entry("min_lstm", "scan"),
    "gru": Entry("gru", "sequential"),
    "lstm": Entry("lstm", "sequential"),
    "dss": Entry(
        "s4d",
        "convolution",
        {"sets": 1, "separate_dt": True},
        paper="2203.14343",
        what="DSS: a diagonal state space whose modes all channels share.",
    ),
    "mamba": Entry("mamba", "scan"),
    "mamba2": Entry("mamba2", "chunkwise"),
    "mamba3": Entry("mamba3", "chunkwise"),
    "gla": Entry("gated_linear_attention", "chunkwise"),
    "linear_attention": Entry(
        "gated_linear_attention",
        "chunkwise",
        {"decay": "none", "feature_map": "elu+1", "normalize": True},
        paper="2006.16236",
        what="Linear attention: keys through elu + 1, reads as weighted means.",
    ),
    "retention": Entry(
        "gated_linear_attention",
        "chunkwise",
        {"decay": "constant"},
        paper="2307.08621",
        what="Retention's fixed decay per head in the GLA layer.",
    ),
    "delta_net": Entry(
        "gated_delta_net",
        "chunkwise",
        {"decay": False, "gate": False},
        paper="2406.06484",
        what="DeltaNet: the delta rule without decay and gate.",
    ),
    "gated_delta_net": Entry("gated_delta_net", "chunkwise"),
    "kda": Entry("kda", "chunkwise"),
    "gdn2": Entry("gdn2", "chunkwise"),
    "delta_product": Entry(
        "gated_delta_product",
        "chunkwise",
        {"decay": False},
        paper="2502.10297",
        what="DeltaProduct: several delta-rule steps a token, without decay.",
    ),
    "gated_delta_product": Entry("gated_delta_product", "chunkwise"),
    "comba": Entry("comba", "chunkwise"),
    "rwkv7": Entry("rwkv7", "chunkwise"),
    "rwkv_channel_mix": Entry("rwkv_channel_mix", "convolution"),
    "momentum_delta": Entry("momentum_delta", "chunkwise"),
    "retnet": Entry("retnet", "chunkwise"),
    "lightning_attention": Entry("lightning_attention", "chunkwise"),
    "hgrn2": Entry("hgrn2", "chunkwise"),
    "based": Entry("based", "chunkwise"),
    "rwkv6": Entry("rwkv6", "chunkwise"),
    "mlstm": Entry("mlstm", "chunkwise"),
    "slstm": Entry("slstm", "sequential"),
    "log_linear_attention": Entry("log_linear_attention", "chunkwise"),
    "base_conv": Entry("base_conv", "convolution"),
    "mixture_of_memories": Entry("mixture_of_memories", "chunkwise"),
    "bmojo": Entry("bmojo", "chunkwise"),
    "titans": Entry("titans", "chunkwise"),
    "omega_net": Entry(
        "atlas",
        "chunkwise",
        paper="2505.23735",
        what="OmegaNet: ATLAS without Muon, gradients over a window of tokens.",
    ),
    "atlas": Entry(
        "atlas",
        "chunkwise",
        {"muon": True},
        what="ATLAS: gradients over a window of tokens, orthogonal steps (Muon).",
    ),
    "lact": Entry("lact", "chunkwise"),
    "titans_mac": Entry("titans_mac", "chunkwise"),
    "titans_mag": Entry(
        "titans_attention",
        "chunkwise",
        {"combine": "gate"},
        paper="2501.00663",
        what="Titans MAG: window attention gated by the neural memory.",
    ),
    "titans_mal": Entry(
        "titans_attention",
        "chunkwise",
        {"combine": "layer", "max_rate": 0.1},
        paper="2501.00663",
        what="Titans MAL: the neural memory feeds window attention.",
    ),
    "moneta": Entry(
        "miras",
        "chunkwise",
        {"loss": "cube", "retention": "l4"},
        paper="2504.13173",
        what="Moneta (MIRAS): cubic loss on the recall, an L4 retention.",
    ),
    "yaad": Entry(
        "miras",
        "chunkwise",
        {"loss": "huber", "retention": "linear"},
        paper="2504.13173",
        what="Yaad (MIRAS): Huber loss on the recall, weight decay.",
    ),
    "memora": Entry(
        "miras",
        "chunkwise",
        {"loss": "square", "retention": "softmax"},
        paper="2504.13173",
        what="Memora (MIRAS): squared loss on the recall, softmax retention.",
    ),
    "ttt_linear": Entry("ttt", "chunkwise"),
    "ttt_mlp": Entry(
        "ttt",
        "chunkwise",
        {"inner": "mlp"},
        paper="2407.04620",
        what="TTT-MLP: the hidden state is a two-layer network, trained on the stream.",
    ),
}


def unknown(kind: str, name: str, choices) -> ValueError:
    """The error for a wrong name: what was asked, the nearest match, all valid choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; choose from {', '.join(choices)}")


def fields(name: str) -> set[str]:
    """The fields of a layer's Config."""
    module = importlib.import_module(f"layers.{LAYERS[name].module}")
    return {f.name for f in dataclasses.fields(module.Config)}


def config(name: str, width: int, **settings):
    """The Config of the layer called `name`. Raises ValueError for unknown names, fields or bad values."""
    if name not in LAYERS:
        raise unknown("layer", name, LAYERS)
    entry = LAYERS[name]
    module = importlib.import_module(f"layers.{entry.module}")
    known = fields(name)
    for field in settings:
        if field not in known:
            raise unknown(f"field of layer {name!r}:", field, known)
    return module.Config(width=width, **{**entry.settings, **settings})


def module(cfg) -> ModuleType:
    """The layer module that a Config belongs to. Raises ValueError for anything that is no layer Config."""
    found = sys.modules.get(type(cfg).__module__)
    if getattr(found, "Config", None) is not type(cfg) or not hasattr(found, "apply"):
        raise ValueError(f"{cfg!r} is not a layer config; give a layer's name or its Config")
    assert found is not None
    return found


def _doc(name: str) -> str:
    return (importlib.import_module(f"layers.{LAYERS[name].module}").__doc__ or "").strip()


def summary(name: str) -> str:
    """What a layer is, in one line."""
    return LAYERS[name].what or _doc(name).splitlines()[0]


def paper(name: str) -> str:
    """The arXiv number of a layer's first source, or an empty string."""
    found = re.search(r"arXiv\s+([\w.-]+/\d{7}|\d{4}\.\d{4,5})", _doc(name))
    return LAYERS[name].paper or (found[1] if found else "")
