"""MiniMax: lightning attention and attention, experts in every block, residuals after the norms."""

from types import SimpleNamespace

import numpy as np

from layers import attention, lightning_attention
from zoo import lm, mlp
from zoo.blocks import Block
from zoo.pretrained.links import Link, below, interleaved, matrix, same
from zoo.pretrained.options import ROPE, Option, flag, integer, listed, number, only, rope
from zoo.pretrained.parts import attention_projections, ends, experts, trunk

LINEAR, FULL = "linear_attention", "full_attention"
OPTIONS: dict[str, Option | None] = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "num_hidden_layers": integer(),
    "num_attention_heads": integer(),
    "num_key_value_heads": integer(),
    "head_dim": integer(None),
    "intermediate_size": integer(),
    "num_local_experts": integer(8),
    "num_experts_per_tok": integer(2),
    "router_aux_loss_coef": number(0.001),
    "layer_types": listed(None),
    "block_size": integer(256),
    "max_position_embeddings": integer(131072),
    "rms_norm_eps": number(1e-5),
    "tie_word_embeddings": flag(False),
    **{
        f"{kind}_{side}_factor": number(1)
        for kind in ("full_attn", "linear_attn", "mlp")
        for side in ("alpha", "beta")
    },
    "hidden_act": only("silu"),
    "sliding_window": Option((int,), None, ()),
    "attention_dropout": only(0.0),
    "router_jitter_noise": None,  # training alone
    **ROPE,
}


def _slope(o: SimpleNamespace, place: int) -> float:
    """All decays of a layer fall with its depth."""
    return 1 - place / (o.num_hidden_layers - 1 + 1e-5) + 1e-5


def _types(o: SimpleNamespace) -> list[str]:
    return o.layer_types or [FULL if (i + 1) % 2 else LINEAR for i in range(o.num_hidden_layers)]


def _scales(o: SimpleNamespace, kind: str) -> tuple[float, float]:
    return float(getattr(o, f"{kind}_alpha_factor")), float(getattr(o, f"{kind}_beta_factor"))


def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    base, share, problems = rope(o)
    problems += [] if share == 1 else [f"option partial_rotary_factor={share} is not supported, only 1"]
    kinds = _types(o)
    wrong = set(kinds) - {LINEAR, FULL}
    problems += [f"option layer_types has {kind!r}, not only {LINEAR!r} and {FULL!r}" for kind in wrong]
    if len(kinds) != o.num_hidden_layers:
        problems.append(f"option layer_types has {len(kinds)} entries for {o.num_hidden_layers} layers")
    sizes = {"width": o.hidden_size, "heads": o.num_attention_heads, "head_dim": o.head_dim}
    full = attention.Config(
        **sizes, kv_heads=o.num_key_value_heads, rope_base=base,
        max_length=min(max_length, o.max_position_embeddings),
    )  # fmt: skip
    mixture = mlp.Config(
        hidden=o.intermediate_size, experts=o.num_local_experts, experts_per_token=o.num_experts_per_tok,
        balance=o.router_aux_loss_coef,
    )  # fmt: skip
    more = {"mlp": mixture, "eps": o.rms_norm_eps, "residual": "normed", "mlp_scales": _scales(o, "mlp")}

    def one(place: int, kind: str) -> Block:
        if kind == FULL:
            return Block(mixer=full, mixer_scales=_scales(o, "full_attn"), **more)
        layer = lightning_attention.Config(**sizes, slope=_slope(o, place))
        return Block(mixer=layer, mixer_scales=_scales(o, "linear_attn"), **more)

    blocks = trunk([one(*each) for each in enumerate(kinds)])
    return lm.Config(
        vocab_size=o.vocab_size, width=o.hidden_size, tie=o.tie_word_embeddings, **blocks
    ), problems


def model(cfg: lm.Config) -> list[Link]:
    return ends(cfg, "model.embed_tokens.weight", "model.norm.weight")


def _lightning(layer: lightning_attention.Config) -> list[Link]:
    """Theirs keeps q, k and v of one head together."""
    H, K = layer.heads, layer.K
    parts = [(i * K, (i + 1) * K, (i * H * K, (i + 1) * H * K)) for i in range(3)]
    return [
        *(interleaved("w_qkv", "qkv_proj.weight", (H, a, b), columns, 3 * K) for a, b, columns in parts),
        matrix("w_gate", "output_gate.weight"),
        same("norm_scale", "norm.weight"),
        matrix("w_out", "out_proj.weight"),
    ]


def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    at, layer = f"model.layers.{place}", cfg.layers[place]
    if isinstance(layer, lightning_attention.Config):
        mixer = below("mixer/", f"{at}.self_attn.", _lightning(layer))
    else:
        mixer = below("", f"{at}.self_attn.", attention_projections(layer))
    mixture = experts(o.num_local_experts, o.intermediate_size, ("w1", "w3", "w2"))
    return [
        same("norm_mixer", f"{at}.input_layernorm.weight"),
        *mixer,
        same("norm_mlp", f"{at}.post_attention_layernorm.weight"),
        *below("", f"{at}.block_sparse_moe.", mixture),
    ]


def constants(o: SimpleNamespace, cfg: lm.Config) -> dict[str, np.ndarray]:
    """Decays by head, and their powers over a block of tokens, which their files carry along."""
    found = {}
    steps = np.arange(1, o.block_size + 1, dtype=np.float64)
    apart = steps[:, None] - steps
    for place, layer in enumerate(cfg.layers):
        if isinstance(layer, lightning_attention.Config):
            at = f"model.layers.{place}.self_attn"
            rate = (layer.slope * 2.0 ** (-8.0 * np.arange(1, layer.heads + 1) / layer.heads))[:, None, None]
            found[f"{at}.slope_rate"] = rate
            found[f"{at}.query_decay"] = np.exp(-rate * steps[:, None])
            found[f"{at}.key_decay"] = np.exp(-rate * (o.block_size - steps[:, None]))
            inside = np.where(apart >= 0, -rate * np.abs(apart), -np.inf)
            found[f"{at}.diagonal_decay"] = np.exp(inside)[None]
    return found
