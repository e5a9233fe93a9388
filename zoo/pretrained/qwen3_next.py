"""Qwen3-Next: gated DeltaNet, gated attention once in a while, and many small experts beside a shared one."""

from types import SimpleNamespace

from layers import attention, gated_delta_net
from zoo import lm, mlp
from zoo.blocks import Block
from zoo.pretrained.links import Link, below, interleaved, matrix, same, taps
from zoo.pretrained.options import ROPE, Option, flag, integer, listed, number, only, rope
from zoo.pretrained.parts import ends, experts, gated_mlp, norms, trunk

LINEAR, FULL = "linear_attention", "full_attention"
OPTIONS: dict[str, Option | None] = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "num_hidden_layers": integer(),
    "num_attention_heads": integer(),
    "num_key_value_heads": integer(),
    "head_dim": integer(256),
    "intermediate_size": integer(),
    "linear_conv_kernel_dim": integer(4),
    "linear_key_head_dim": integer(128),
    "linear_value_head_dim": integer(128),
    "linear_num_key_heads": integer(16),
    "linear_num_value_heads": integer(32),
    "decoder_sparse_step": integer(1),
    "mlp_only_layers": listed(None),
    "moe_intermediate_size": integer(512),
    "shared_expert_intermediate_size": integer(512),
    "num_experts": integer(512),
    "num_experts_per_tok": integer(10),
    "norm_topk_prob": flag(True),
    "router_aux_loss_coef": number(0.001),
    "full_attention_interval": integer(4),
    "layer_types": listed(None),
    "max_position_embeddings": integer(32768),
    "rms_norm_eps": number(1e-6),
    "tie_word_embeddings": flag(False),
    "hidden_act": only("silu"),
    "attention_bias": only(False),
    "attention_dropout": only(0.0),
    "use_sliding_window": only(False),
    "sliding_window": None,  # of use_sliding_window
    "max_window_layers": None,
    **ROPE,
}
_NAMES = ("gate_proj", "up_proj", "down_proj")


def _types(o: SimpleNamespace) -> list[str]:
    every = o.full_attention_interval
    return o.layer_types or [LINEAR if (i + 1) % every else FULL for i in range(o.num_hidden_layers)]


def _mixture(o: SimpleNamespace, place: int) -> bool:
    dense = place in (o.mlp_only_layers or [])
    return not dense and o.num_experts > 0 and (place + 1) % o.decoder_sparse_step == 0


def _mlps(o: SimpleNamespace) -> dict[bool, mlp.Config]:
    dense = mlp.Config(hidden=o.intermediate_size)
    if not o.num_experts:
        return {False: dense}
    mixture = mlp.Config(
        hidden=o.moe_intermediate_size, experts=o.num_experts, experts_per_token=o.num_experts_per_tok,
        renormalise=o.norm_topk_prob, balance=o.router_aux_loss_coef,
        shared=o.shared_expert_intermediate_size, shared_gate=True,
    )  # fmt: skip
    return {False: dense, True: mixture}


def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    base, share, problems = rope(o, 0.25)
    kinds = _types(o)
    wrong = set(kinds) - {LINEAR, FULL}
    problems += [f"option layer_types has {kind!r}, not only {LINEAR!r} and {FULL!r}" for kind in wrong]
    if len(kinds) != o.num_hidden_layers:
        problems.append(f"option layer_types has {len(kinds)} entries for {o.num_hidden_layers} layers")
    scales = {"eps": o.rms_norm_eps, "unit_offset": True}
    full = attention.Config(
        width=o.hidden_size, heads=o.num_attention_heads, kv_heads=o.num_key_value_heads, head_dim=o.head_dim,
        max_length=min(max_length, o.max_position_embeddings), rope_base=base,
        rotary_channels=int(o.head_dim * share), qk_norm=True, gate=True, **scales,
    )  # fmt: skip
    linear = gated_delta_net.Config(
        width=o.hidden_size, heads=o.linear_num_value_heads, key_heads=o.linear_num_key_heads,
        key_dim=o.linear_key_head_dim, value_dim=o.linear_value_head_dim, conv=o.linear_conv_kernel_dim,
        eps=o.rms_norm_eps,
    )  # fmt: skip
    mlps = _mlps(o)
    blocks = [
        Block(mixer=full if kind == FULL else linear, mlp=mlps[_mixture(o, place)], **scales)
        for place, kind in enumerate(kinds)
    ]
    tops = {"vocab_size": o.vocab_size, "tie": o.tie_word_embeddings}
    return lm.Config(width=o.hidden_size, **tops, **trunk(blocks)), problems


def model(cfg: lm.Config) -> list[Link]:
    return ends(cfg, "model.embed_tokens.weight", "model.norm.weight")


def _full(layer: attention.Config) -> list[Link]:
    """Theirs keeps q and the gate of one head together."""
    H, K, q, k = layer.heads, layer.K, layer.heads * layer.K, layer.G * layer.K
    return [
        interleaved("w_qkv", "q_proj.weight", (H, 0, K), (0, q), 2 * K),
        interleaved("w_gate", "q_proj.weight", (H, K, 2 * K), (0, q), 2 * K),
        matrix("w_qkv", "k_proj.weight", q, q + k),
        matrix("w_qkv", "v_proj.weight", q + k),
        matrix("w_out", "o_proj.weight"),
        same("q_scale", "q_norm.weight"),
        same("k_scale", "k_norm.weight"),
    ]


def _linear(layer: gated_delta_net.Config) -> list[Link]:
    """Theirs keeps what belongs to one head of keys together: q, k, its heads' v and gates; so b and a."""
    G, K, r = layer.G, layer.K, layer.heads // layer.G
    V, keys, values = r * layer.V, layer.G * layer.K, layer.heads * layer.V
    wide = 2 * K + 2 * V
    return [
        interleaved("w_qkv", "in_proj_qkvz.weight", (G, 0, K), (0, keys), wide),
        interleaved("w_qkv", "in_proj_qkvz.weight", (G, K, 2 * K), (keys, 2 * keys), wide),
        interleaved(
            "w_qkv", "in_proj_qkvz.weight", (G, 2 * K, 2 * K + V), (2 * keys, 2 * keys + values), wide
        ),
        interleaved("w_gate", "in_proj_qkvz.weight", (G, 2 * K + V, wide), (0, values), wide),
        interleaved("w_beta", "in_proj_ba.weight", (G, 0, r), (0, layer.heads), 2 * r),
        interleaved("w_decay", "in_proj_ba.weight", (G, r, 2 * r), (0, layer.heads), 2 * r),
        taps("conv", "conv1d.weight"),
        same("A_log", "A_log"),
        same("dt_bias", "dt_bias"),
        same("norm_scale", "norm.weight"),
        matrix("w_out", "out_proj.weight"),
    ]


def _channels(o: SimpleNamespace, mixture: bool) -> list[Link]:
    if not mixture:
        return gated_mlp(o.intermediate_size)
    shared = gated_mlp(o.shared_expert_intermediate_size, "mlp/shared/")
    return [
        *experts(o.num_experts, o.moe_intermediate_size, _NAMES),
        *below("", "shared_expert.", shared),
        matrix("mlp/shared/w_gate", "shared_expert_gate.weight"),
    ]


def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    at, layer = f"model.layers.{place}.", cfg.layers[place]
    if isinstance(layer, attention.Config):
        mixer = below("mixer/", "self_attn.", _full(layer))
    else:
        mixer = below("mixer/", "linear_attn.", _linear(layer))
    return below("", at, [*norms(), *mixer, *below("", "mlp.", _channels(o, _mixture(o, place)))])
