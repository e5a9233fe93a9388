"""What types of the flash-linear-attention package have in common: options, projections, attention."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from layers import attention
from zoo.pretrained.links import Link, matrix, same, taps
from zoo.pretrained.options import Option, flag, integer, number, only
from zoo.pretrained.parts import attention_projections

COMMON: dict[str, Option | None] = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "num_hidden_layers": integer(),
    "num_heads": integer(),
    "num_kv_heads": integer(None),
    "intermediate_size": integer(None),
    "max_position_embeddings": integer(2048),
    "norm_eps": number(1e-6),
    "tie_word_embeddings": flag(False),
    "attn": Option((dict, list), None),
    "hidden_act": only("swish", "silu"),
    "elementwise_affine": only(True),
    "attnres_block_size": Option((int,), None, ()),
    # Which kernels run, and training.
    **dict.fromkeys(
        (
            "attn_mode", "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu",
            "use_l2warp",
        )
    ),
}  # fmt: skip
RATIO: dict[str, Option | None] = {"hidden_ratio": Option((int, float), 4)}
# Of types that have no attention among their blocks: theirs of two of them cannot run it.
NO_ATTENTION: dict[str, Option | None] = {"attn": Option((dict, list), None, ())}
CONV: dict[str, Option | None] = {"use_short_conv": flag(True), "conv_size": integer(4)}
EXPANDED: dict[str, Option | None] = {"expand_k": number(1.0), "expand_v": number(1.0)}


class Mixer(NamedTuple):
    """A type: its options, our layer by them, and the links of that layer."""

    options: dict[str, Option | None]
    layer: Callable[[SimpleNamespace], Any]
    links: Callable[[Any], list[Link]]
    outside: Callable[[Any, int, int], list[Link]] = lambda layer, place, depth: []  # the block's own tensors


def head_width(o: SimpleNamespace, ratio: float) -> int:
    """Channels of each head where all of them have `ratio` times the model's."""
    return round(o.hidden_size * ratio) // o.num_heads


def projections(layer: Any, keys: int) -> list[Link]:
    """q, k and v, and the short convolution on each where there is one."""
    spans = {"q": (0, keys), "k": (keys, 2 * keys), "v": (2 * keys, None)}
    links = [matrix("w_qkv", f"{name}_proj.weight", *span) for name, span in spans.items()]
    if layer.conv:
        links += [taps("conv", f"{name}_conv1d.weight", *span) for name, span in spans.items()]
    return [*links, matrix("w_out", "o_proj.weight")]


def attention_layer(
    o: SimpleNamespace, spec: dict[str, Any], max_length: int, **more: Any
) -> attention.Config:
    return attention.Config(
        width=o.hidden_size, heads=spec["num_heads"], kv_heads=spec.get("num_kv_heads"),
        window=spec.get("window_size"), rope_base=spec.get("rope_theta", 10000.0),
        max_length=min(max_length, o.max_position_embeddings), **more,
    )  # fmt: skip


def attention_links(layer: attention.Config) -> list[Link]:
    links = [link._replace(path=link.path.removeprefix("mixer/")) for link in attention_projections(layer)]
    return links + [same(f"{n}_scale", f"{n}_norm.weight") for n in "qk" if layer.qk_norm]
