"""Kimi Linear: Kimi delta attention, latent attention without positions, sigmoid-routed experts."""

from types import SimpleNamespace
from typing import Any

from layers import kda, latent_attention
from zoo import lm, mlp
from zoo.blocks import Block
from zoo.pretrained.links import Link, below, flat, matrix, same, taps
from zoo.pretrained.options import Option, derived, flag, integer, listed, number, only, table
from zoo.pretrained.parts import ends, experts, gated_mlp, norms, trunk

LINEAR, FULL = "linear_attention", "full_attention"
OPTIONS: dict[str, Option | None] = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "num_hidden_layers": integer(),
    "num_attention_heads": integer(),
    "num_key_value_heads": derived(lambda o: o.num_attention_heads),
    "intermediate_size": integer(),
    "moe_intermediate_size": integer(1024),
    "kv_lora_rank": integer(512),
    "q_lora_rank": Option((int,), None, ()),
    "qk_rope_head_dim": integer(64),
    "qk_nope_head_dim": integer(128),
    "v_head_dim": integer(128),
    "linear_head_dim": integer(128),
    "linear_num_heads": integer(32),
    "linear_conv_kernel_dim": integer(4),
    "linear_attn_config": table(None),
    "layer_types": listed(None),
    "mlp_layer_types": listed(None),
    "first_k_dense_replace": integer(1),
    "num_experts": integer(256),
    "num_experts_per_token": integer(8),
    "num_shared_experts": integer(1),
    "num_expert_group": integer(1),
    "topk_group": integer(1),
    "moe_renormalize": flag(True),
    "routed_scaling_factor": number(2.446),
    "model_max_length": integer(1048576),
    "rms_norm_eps": number(1e-5),
    "tie_word_embeddings": flag(False),
    "hidden_act": only("silu"),
    "attention_bias": only(False),
    "attention_dropout": only(0.0),
    "mla_use_nope": only(True),
    "moe_layer_freq": only(1),
    "moe_router_activation_func": only("sigmoid"),
    "use_grouped_topk": only(True),
    "num_nextn_predict_layers": only(0),
    "rope_scaling": Option((dict,), None, ()),
    # Nothing is turned, and the width of a head is that of its parts.
    **dict.fromkeys(
        (
            "head_dim", "max_position_embeddings", "pretraining_tp", "qk_head_dim", "rope_theta",
            "rope_parameters",
        )
    ),
}  # fmt: skip
# The latent's norm has an eps of its own, which no option changes.
LATENT_EPS = 1e-6


def _linear_sizes(o: SimpleNamespace) -> tuple[dict[str, Any], list[str]]:
    """Sizes of the linear layers, from options of their own or a table, and what the table has besides."""
    names = {
        "head_dim": "linear_head_dim",
        "num_heads": "linear_num_heads",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
    }
    given = dict(o.linear_attn_config or {})
    for ours in ("kda_layers", "full_attn_layers"):
        given.pop(ours, None)
    problems = [
        f"option linear_attn_config.{name} is unknown" for name in sorted(given.keys() - names.keys())
    ]
    return {ours: given.get(name, getattr(o, ours)) for name, ours in names.items()}, problems


def _types(o: SimpleNamespace) -> list[str]:
    places = range(o.num_hidden_layers)
    if o.layer_types:
        return o.layer_types
    if "full_attn_layers" in (o.linear_attn_config or {}):  # counted from 1
        return [FULL if i + 1 in o.linear_attn_config["full_attn_layers"] else LINEAR for i in places]
    return [FULL if i and i % 4 == 0 else LINEAR for i in places]


def _mixtures(o: SimpleNamespace) -> list[bool]:
    if o.mlp_layer_types:
        return [kind == "sparse" for kind in o.mlp_layer_types]
    return [place >= o.first_k_dense_replace for place in range(o.num_hidden_layers)]


def _mixture(o: SimpleNamespace) -> mlp.Config:
    return mlp.Config(
        hidden=o.moe_intermediate_size, experts=o.num_experts, experts_per_token=o.num_experts_per_token,
        score="sigmoid", score_bias=True, renormalise=o.moe_renormalize, scale=float(o.routed_scaling_factor),
        expert_groups=o.num_expert_group, groups_per_token=o.topk_group,
        shared=o.moe_intermediate_size * o.num_shared_experts,
    )  # fmt: skip


def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    sizes, problems = _linear_sizes(o)
    kinds, mixtures = _types(o), _mixtures(o)
    for name, found in (("layer_types", kinds), ("mlp_layer_types", mixtures)):
        if len(found) != o.num_hidden_layers:
            problems.append(f"option {name} has {len(found)} entries for {o.num_hidden_layers} layers")
    problems += [f"option layer_types has {kind!r}" for kind in set(kinds) - {LINEAR, FULL}]
    K = sizes["linear_head_dim"]
    linear = kda.Config(
        width=o.hidden_size, heads=sizes["linear_num_heads"], key_dim=K, value_dim=K,
        conv=sizes["linear_conv_kernel_dim"], gate_bias=False, eps=o.rms_norm_eps,
    )  # fmt: skip
    full = latent_attention.Config(
        width=o.hidden_size, heads=o.num_attention_heads, latent=o.kv_lora_rank, shared=o.qk_rope_head_dim,
        key_dim=o.qk_nope_head_dim, value_dim=o.v_head_dim, eps=LATENT_EPS,
        max_length=min(max_length, o.model_max_length),
    )  # fmt: skip
    dense = mlp.Config(hidden=o.intermediate_size)
    blocks = [
        Block(
            mixer=full if kind == FULL else linear, mlp=_mixture(o) if mixture else dense, eps=o.rms_norm_eps
        )
        for kind, mixture in zip(kinds, mixtures, strict=False)
    ]
    tops = {"vocab_size": o.vocab_size, "tie": o.tie_word_embeddings}
    return lm.Config(width=o.hidden_size, **tops, **trunk(blocks)), problems


def model(cfg: lm.Config) -> list[Link]:
    return ends(cfg, "model.embed_tokens.weight", "model.norm.weight")


def _linear(layer: kda.Config) -> list[Link]:
    H, K, q = layer.heads, layer.K, layer.heads * layer.K
    spans = {"q": (0, q), "k": (q, 2 * q), "v": (2 * q, None)}
    return [
        *(matrix("w_qkv", f"{name}_proj.weight", *span) for name, span in spans.items()),
        *(taps("conv", f"{name}_conv1d.weight", *span) for name, span in spans.items()),
        matrix("w_beta", "b_proj.weight"),
        matrix("w_decay_down", "f_a_proj.weight"),
        matrix("w_decay_up", "f_b_proj.weight"),
        flat("A_log", "A_log", (H, 1), (1, 1, H, 1)),
        flat("dt_bias", "dt_bias", (H, K), (H * K,)),
        matrix("w_gate_down", "g_a_proj.weight"),
        matrix("w_gate_up", "g_b_proj.weight"),
        same("norm_scale", "o_norm.weight"),
        matrix("w_out", "o_proj.weight"),
    ]


def _full() -> list[Link]:
    return [
        matrix("w_q", "q_proj.weight"),
        matrix("w_latent", "kv_a_proj_with_mqa.weight"),
        same("latent_scale", "kv_a_layernorm.weight"),
        matrix("w_up", "kv_b_proj.weight"),
        matrix("w_out", "o_proj.weight"),
    ]


def _channels(o: SimpleNamespace, mixture: bool, at: str, keys: frozenset[str]) -> list[Link]:
    if not mixture:
        # Some files name all MLPs alike.
        folder = "block_sparse_moe." if f"{at}block_sparse_moe.up_proj.weight" in keys else "mlp."
        return below("", folder, gated_mlp(o.intermediate_size))
    shared = gated_mlp(o.moe_intermediate_size * o.num_shared_experts, "mlp/shared/")
    links = [
        *experts(o.num_experts, o.moe_intermediate_size, ("w1", "w3", "w2")),
        same("mlp/score_bias", "gate.e_score_correction_bias"),
        *below("", "shared_experts.", shared),
    ]
    return below("", "block_sparse_moe.", links)


def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    at, layer = f"model.layers.{place}.", cfg.layers[place]
    mixer = _linear(layer) if isinstance(layer, kda.Config) else _full()
    channels = _channels(o, _mixtures(o)[place], at, keys)
    return below("", at, [*norms(), *below("mixer/", "self_attn.", mixer), *channels])
