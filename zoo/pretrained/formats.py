"""The model types of config.json and who reads them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from layers.checks import require
from zoo import lm
from zoo.pretrained import (
    fla,
    griffin,
    jamba,
    kimi_linear,
    mamba,
    minimax,
    qwen3_next,
    rwkv7,
    xlstm,
    zamba2,
)
from zoo.pretrained.links import Link
from zoo.pretrained.options import Option


@dataclass(frozen=True)
class Format:
    """A family's description.

    `config(options, max_length) -> (lm.Config, problems)`; `model(cfg)` are the links of what is no block,
    `block(options, cfg, place, keys)` those of one, `keys` being all of the file's.
    """

    options: dict[str, Option | None]
    config: Callable[[SimpleNamespace, int], tuple[lm.Config, list[str]]]
    model: Callable[[lm.Config], list[Link]]
    block: Callable[[SimpleNamespace, lm.Config, int, frozenset[str]], list[Link]]
    # Tensors that are no weights: key -> what it is by the config.
    constants: Callable[[SimpleNamespace, lm.Config], dict[str, Any]] = lambda options, cfg: {}


def _of(module: Any, **more: Any) -> Format:
    return Format(module.OPTIONS, module.config, module.model, module.block, **more)


def _fla(name: str) -> Format:
    config, block = fla.of(name)
    return Format(fla.MIXERS[name].options, config, fla.model, block)


FORMATS: dict[str, Format] = {
    "mamba": _of(mamba),
    "falcon_mamba": Format(mamba.FALCON, mamba.falcon_config, mamba.model, mamba.block),
    "mamba2": Format(mamba.OPTIONS2, mamba.config2, mamba.model, mamba.block2),
    "recurrent_gemma": _of(griffin),
    "minimax": _of(minimax, constants=minimax.constants),
    "qwen3_next": _of(qwen3_next),
    "kimi_linear": _of(kimi_linear),
    "jamba": _of(jamba),
    "xlstm": _of(xlstm),
    "zamba2": _of(zamba2),
    **{name: _fla(name) for name in fla.MIXERS},
    "rwkv7": _of(rwkv7),
    "samba": Format(fla.SAMBA, fla.samba_config, fla.samba_model, fla.samba_block),
}


def find(config: dict[str, Any]) -> Format:
    """The format of a config.json. ValueError for a type that is not supported."""
    name = config.get("model_type")
    supported = ", ".join(FORMATS)
    known = isinstance(name, str) and name in FORMATS
    require(known, f"model_type={name!r} is not supported; these are: {supported}")
    return FORMATS[str(name)]
