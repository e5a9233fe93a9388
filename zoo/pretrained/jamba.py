"""Jamba: Mamba with norms inside, attention without positions once in a while, experts in some blocks."""

from types import SimpleNamespace

from layers import attention, mamba
from zoo import lm, mlp
from zoo.blocks import Block
from zoo.pretrained.links import Link, below, same
from zoo.pretrained.mamba import selective
from zoo.pretrained.options import Option, flag, integer, number, only
from zoo.pretrained.parts import attention_projections, ends, experts, gated_mlp, trunk

OPTIONS: dict[str, Option | None] = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "num_hidden_layers": integer(),
    "num_attention_heads": integer(),
    "num_key_value_heads": integer(8),
    "intermediate_size": integer(),
    "num_experts": integer(16),
    "num_experts_per_tok": integer(2),
    "expert_layer_period": integer(2),
    "expert_layer_offset": integer(1),
    "attn_layer_period": integer(8),
    "attn_layer_offset": integer(4),
    "mamba_d_state": integer(16),
    "mamba_d_conv": integer(4),
    "mamba_expand": integer(2),
    "mamba_dt_rank": Option((int, str), "auto"),
    "router_aux_loss_coef": number(0.001),
    "max_position_embeddings": integer(262144),
    "rms_norm_eps": number(1e-6),
    "tie_word_embeddings": flag(False),
    "sliding_window": Option((int,), None, ()),
    "hidden_act": only("silu"),
    "mamba_conv_bias": only(True),
    "mamba_proj_bias": only(False),
    "attention_dropout": only(0.0),
    **dict.fromkeys(
        (
            "calc_logits_for_entire_prompt", "mamba_inner_layernorms", "num_logits_to_keep",
            "use_associative_scan", "use_mamba_kernels", "use_mambapy",
        )
    ),
}  # fmt: skip


def _mixture(o: SimpleNamespace, place: int) -> bool:
    return o.num_experts > 1 and place % o.expert_layer_period == o.expert_layer_offset


def _channels(o: SimpleNamespace, mixture: bool) -> mlp.Config:
    if not mixture:
        return mlp.Config(hidden=o.intermediate_size)
    return mlp.Config(
        hidden=o.intermediate_size, experts=o.num_experts, experts_per_token=o.num_experts_per_tok,
        renormalise=False, balance=o.router_aux_loss_coef,
    )  # fmt: skip


def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    mixer = mamba.Config(
        width=o.hidden_size, expand=o.mamba_expand, state_dim=o.mamba_d_state, conv=o.mamba_d_conv,
        dt_rank=None if o.mamba_dt_rank == "auto" else o.mamba_dt_rank, inner_norm=True,
        inner_eps=o.rms_norm_eps,
    )  # fmt: skip
    full = attention.Config(
        width=o.hidden_size, heads=o.num_attention_heads, kv_heads=o.num_key_value_heads, rope_base=None,
        max_length=min(max_length, o.max_position_embeddings),
    )  # fmt: skip
    blocks = [
        Block(
            mixer=full if place % o.attn_layer_period == o.attn_layer_offset else mixer,
            mlp=_channels(o, _mixture(o, place)),
            eps=o.rms_norm_eps,
        )
        for place in range(o.num_hidden_layers)
    ]
    ends = {"vocab_size": o.vocab_size, "tie": o.tie_word_embeddings}
    return lm.Config(width=o.hidden_size, **ends, **trunk(blocks)), []


def model(cfg: lm.Config) -> list[Link]:
    return ends(cfg, "model.embed_tokens.weight", "model.final_layernorm.weight")


def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    at, layer = f"model.layers.{place}.", cfg.layers[place]
    if isinstance(layer, mamba.Config):
        norms = [same(f"mixer/{name}_scale", f"mamba.{name}_layernorm.weight") for name in ("dt", "b", "c")]
        mixer = selective("mamba") + norms
    else:
        mixer = below("", "self_attn.", attention_projections(layer))
    names = ("gate_proj", "up_proj", "down_proj")
    if _mixture(o, place):
        channels = experts(o.num_experts, o.intermediate_size, names, "router.weight")
    else:
        channels = gated_mlp(o.intermediate_size)
    norms = [same("norm_mixer", "input_layernorm.weight"), same("norm_mlp", "pre_ff_layernorm.weight")]
    return below("", at, [*norms, *mixer, *below("", "feed_forward.", channels)])
