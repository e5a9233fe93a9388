"""Models at the sizes where they are compared in print, and hybrids: patterns of layers without code.

    cfg = presets.model("mamba-130m")       # a published model: an lm.Config
    cfg = presets.model("kda-370m")         # any registered layer at 130m, 370m or 1.3b
    presets.NAMES                           # all of them

Published models have the depth, width, heads and vocabulary of the paper or the released checkpoint, and
their parameter count in print stands beside them: an integer is exact, a float is as rounded as the paper's,
and a test holds ours against it. Every other layer gets the width of its size class and the depth that
brings it closest to the budget, with SwiGLU between layers and the GPT-NeoX vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from zoo import lm, registry

# 50,280 is GPT-NeoX's vocabulary padded to a multiple of 8 (Mamba), 50,288 of 16 (Mamba-2).
NEOX, LLAMA = 50_280, 32_000
# width and budget of each size class
SIZES = {"130m": (768, 130e6), "370m": (1024, 370e6), "1.3b": (2048, 1.3e9)}


class Published(NamedTuple):
    """`fields` of lm.Config; `layers(width)` is the pattern; `parameters` as printed in `source`."""

    layers: Callable[[int], tuple[Any, ...]]
    fields: dict[str, Any]
    parameters: float
    source: str


def _layer(name: str, **settings) -> Callable[[int], Any]:
    return lambda width: registry.config(name, width, **settings)


def _pattern(*layers: Callable[[int], Any]) -> Callable[[int], tuple[Any, ...]]:
    return lambda width: tuple(layer(width) for layer in layers)


def _model(width: int, depth: int, vocab_size: int, **more) -> dict[str, Any]:
    return {"width": width, "depth": depth, "vocab_size": vocab_size, **more}


def _samba(heads: int) -> Callable[[int], tuple[Any, ...]]:
    return _pattern(_layer("mamba"), _layer("attention", heads=heads, window=2048))


MAMBA, MAMBA2 = _pattern(_layer("mamba")), _pattern(_layer("mamba2"))
GRIFFIN = _pattern(*[_layer("rg_lru", heads=10)] * 2, _layer("attention", heads=10, kv_heads=1, window=2048))
MLSTM, SLSTM = _layer("mlstm"), _layer("slstm")
BARE = {"mlp": "none"}
JAMBA_MAMBA = _layer("mamba", inner_norm=True)
JAMBA = {"heads": 32, "kv_heads": 8, "rope_base": None, "max_length": 262_144}

PUBLISHED: dict[str, Published] = {
    "mamba-130m": Published(MAMBA, _model(768, 24, NEOX, **BARE), 129_135_360, "arXiv 2312.00752"),
    "mamba-370m": Published(MAMBA, _model(1024, 48, NEOX, **BARE), 371_516_416, "arXiv 2312.00752"),
    "mamba-1.4b": Published(MAMBA, _model(2048, 48, NEOX, **BARE), 1_372_178_432, "arXiv 2312.00752"),
    "mamba2-130m": Published(MAMBA2, _model(768, 24, 50_288, **BARE), 128_989_632, "arXiv 2405.21060"),
    "mamba2-370m": Published(MAMBA2, _model(1024, 48, 50_288, **BARE), 370e6, "arXiv 2405.21060"),
    "mamba2-1.3b": Published(MAMBA2, _model(2048, 48, 50_288, **BARE), 1.3e9, "arXiv 2405.21060"),
    "transformer-340m": Published(
        _pattern(_layer("attention", heads=16)), _model(1024, 24, LLAMA), 340e6, "arXiv 2312.06635"
    ),
    "transformer-1.3b": Published(
        _pattern(_layer("attention", heads=32)), _model(2048, 24, LLAMA), 1.3e9, "arXiv 2312.06635"
    ),
    "gla-340m": Published(_pattern(_layer("gla")), _model(1024, 24, LLAMA), 340e6, "arXiv 2312.06635"),
    "gla-1.3b": Published(_pattern(_layer("gla")), _model(2048, 24, LLAMA), 1.3e9, "arXiv 2312.06635"),
    "retnet-1.3b": Published(
        _pattern(_layer("retnet", heads=8)),
        _model(2048, 24, LLAMA, mlp="gelu", expansion=2.0),
        1.3e9,
        "arXiv 2307.08621",
    ),
    "delta_net-1.3b": Published(
        _pattern(_layer("delta_net", heads=16)), _model(2048, 24, LLAMA), 1.3e9, "arXiv 2406.06484"
    ),
    "hgrn2-1.3b": Published(_pattern(_layer("hgrn2")), _model(2048, 24, LLAMA), 1.3e9, "arXiv 2404.07904"),
    "samba-421m": Published(
        _samba(12), _model(1536, 12, LLAMA, expansion=4096 / 1536), 421e6, "arXiv 2406.07522"
    ),
    "samba-1.3b": Published(
        _samba(18), _model(2304, 18, LLAMA, expansion=6144 / 2304), 1.3e9, "arXiv 2406.07522"
    ),
    "griffin-2b": Published(
        GRIFFIN, _model(2560, 26, 256_000, expansion=3.0), 2.7e9, "RecurrentGemma, arXiv 2404.07839"
    ),
    "jamba-52b": Published(
        _pattern(*[JAMBA_MAMBA] * 4, _layer("attention", **JAMBA), *[JAMBA_MAMBA] * 3),
        _model(4096, 32, 65_536, expansion=3.5, tie=False, moe_every=2, experts=16),
        51_570_323_328,
        "arXiv 2403.19887",
    ),
}


# Hybrids in print without a size of their own here: patterns for any width.
HYBRIDS: dict[str, Callable[[int], tuple[Any, ...]]] = {
    "griffin": _pattern(*[_layer("rg_lru")] * 2, _layer("attention", kv_heads=1, window=1024)),
    "samba": _pattern(_layer("mamba"), _layer("attention", window=2048)),
    "jamba": _pattern(*[JAMBA_MAMBA] * 4, _layer("attention", rope_base=None), *[JAMBA_MAMBA] * 3),
    "based_hybrid": _pattern(
        _layer("base_conv"), _layer("based"), _layer("attention", window=128),
        _layer("base_conv"), _layer("base_conv"),
    ),
    "xlstm": _pattern(*[MLSTM] * 7, SLSTM),
    "gated_delta_net_h1": _pattern(_layer("gated_delta_net"), _layer("attention", window=2048)),
    "gated_delta_net_h2": _pattern(
        _layer("mamba2"), _layer("gated_delta_net"), _layer("attention", window=2048)
    ),
    "kimi_linear": _pattern(*[_layer("kda")] * 3, _layer("attention", rope_base=None)),
}  # fmt: skip


def _names() -> tuple[str, ...]:
    families = [*registry.LAYERS, *HYBRIDS]
    return tuple(PUBLISHED) + tuple(
        name for f in families for size in SIZES if (name := f"{f}-{size}") not in PUBLISHED
    )


NAMES = _names()


def model(name: str, **changes) -> lm.Config:
    """The lm.Config called `name`, with `changes` to its fields. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise registry.unknown("preset", name, NAMES)
    if name in PUBLISHED:
        preset = PUBLISHED[name]
        fields = {"pattern": preset.layers(preset.fields["width"]), **preset.fields}
        return lm.Config(**{**fields, **changes})
    family, _, size = name.rpartition("-")
    width, budget = SIZES[size]
    pattern = HYBRIDS[family](width) if family in HYBRIDS else (registry.config(family, width),)
    cfg = lm.Config(vocab_size=NEOX, width=width, depth=_depth(pattern, width, budget), pattern=pattern)
    return lm.Config(**{**{f: getattr(cfg, f) for f in cfg.__dataclass_fields__}, **changes})


def _depth(pattern: tuple[Any, ...], width: int, budget: float) -> int:
    """Blocks that bring a model closest to `budget` parameters: whole patterns, all of one cost."""
    period = len(pattern)
    one, two = (
        lm.param_count(lm.Config(vocab_size=NEOX, width=width, depth=n * period, pattern=pattern))
        for n in (1, 2)
    )
    return max(1, round((budget - one) / (two - one) + 1)) * period
