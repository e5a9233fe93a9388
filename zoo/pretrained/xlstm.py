"""xLSTM 7B: mLSTM on the model's own width, with capped gates, SwiGLU after it, and capped logits."""

from types import SimpleNamespace

from layers import mlstm
from zoo import lm, mlp
from zoo.blocks import Block
from zoo.pretrained.links import Link, below, flat, matrix, same, vector
from zoo.pretrained.options import Option, derived, flag, integer, number, only
from zoo.pretrained.parts import ends, gated_mlp, trunk

# Kernels, how long their pieces are and in which precision they compute.
_NO_MATTER = dict.fromkeys(
    (
        "autocast_kernel_dtype", "chunk_size", "chunkwise_kernel",
        "inference_state_dtype", "max_inference_chunksize", "mode", "norm_reduction_force_float32",
        "return_last_states", "sequence_kernel", "step_kernel",
    )
)  # fmt: skip
OPTIONS: dict[str, Option | None] = {
    "vocab_size": integer(50304),
    "hidden_size": integer(4096),
    "num_hidden_layers": integer(32),
    "num_heads": integer(8),
    "qk_dim_factor": number(0.5),
    "v_dim_factor": number(1.0),
    "ffn_proj_factor": number(2.667),
    "ffn_round_up_to_multiple_of": integer(64),
    "gate_soft_cap": number(15.0),
    "output_logit_soft_cap": number(30.0),
    "norm_eps": number(1e-6),
    "eps": number(1e-6),
    "weight_mode": only("single", "fused"),
    "tie_word_embeddings": flag(False),
    "add_out_norm": only(True),
    "use_bias": only(False),
    "embedding_dim": derived(lambda o: o.hidden_size),
    "num_blocks": derived(lambda o: o.num_hidden_layers),
    **_NO_MATTER,
}


def _hidden(o: SimpleNamespace) -> int:
    """Rounded up in their way: what exceeds a multiple by less than one does not count."""
    multiple = o.ffn_round_up_to_multiple_of
    return int((o.hidden_size * o.ffn_proj_factor + multiple - 1) // multiple) * multiple


def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    keys, values = int(o.hidden_size * o.qk_dim_factor), int(o.hidden_size * o.v_dim_factor)
    problems = [
        f"option {name}: num_heads={o.num_heads} does not divide {size} channels"
        for name, size in (("qk_dim_factor", keys), ("v_dim_factor", values))
        if size % o.num_heads
    ]
    layer = mlstm.Config(
        width=o.hidden_size, heads=o.num_heads, up_projection="after", key_dim=keys // o.num_heads,
        value_dim=values // o.num_heads, gate_cap=float(o.gate_soft_cap), eps=o.norm_eps, divisor_eps=o.eps,
    )  # fmt: skip
    blocks = [Block(mixer=layer, mlp=mlp.Config(hidden=_hidden(o)), eps=o.norm_eps)] * o.num_hidden_layers
    tops = {"tie": o.tie_word_embeddings, "logit_cap": float(o.output_logit_soft_cap)}
    return lm.Config(vocab_size=o.vocab_size, width=o.hidden_size, **tops, **trunk(blocks)), problems


def model(cfg: lm.Config) -> list[Link]:
    return ends(cfg, "backbone.embeddings.weight", "backbone.out_norm.weight")


def _single(layer: mlstm.Config) -> list[Link]:
    """One matrix for each projection."""
    keys, heads = layer.heads * layer.K, layer.heads
    return [
        matrix("w_qkv", "q.weight", 0, keys),
        matrix("w_qkv", "k.weight", keys, 2 * keys),
        matrix("w_qkv", "v.weight", 2 * keys),
        matrix("w_gate", "ogate_preact.weight"),
        matrix("w_gates", "igate_preact.weight", 0, heads),
        matrix("w_gates", "fgate_preact.weight", heads),
        same("input_bias", "igate_preact.bias"),
        same("forget_bias", "fgate_preact.bias"),
    ]


def _rows(path: str, key: str, rows: tuple[int, int], of: int) -> Link:
    """Some rows of their matrix of `of` rows are all of ours."""
    return Link(path, key, lambda a: a.T, lambda a: a[slice(*rows)], (of, -1))


def _fused(layer: mlstm.Config) -> list[Link]:
    """q, k, v and the output gate in one matrix, the other two gates in another."""
    keys, values, heads = layer.heads * layer.K, layer.channels, layer.heads
    inner, wide = 2 * keys + values, 2 * keys + 2 * values
    gates = "ifgate_preact.bias"
    return [
        _rows("w_qkv", "qkv_opreact.weight", (0, inner), wide),
        _rows("w_gate", "qkv_opreact.weight", (inner, wide), wide),
        matrix("w_gates", "ifgate_preact.weight"),
        vector("input_bias", gates)._replace(theirs=lambda a: a[:heads], shape=(2 * heads,)),
        vector("forget_bias", gates)._replace(theirs=lambda a: a[heads:], shape=(2 * heads,)),
    ]


def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    layer, hidden = cfg.layers[place], _hidden(o)
    fused = o.weight_mode == "fused"
    if fused:
        channels = [matrix("mlp/w_in", "proj_up_gate_z.weight"), matrix("mlp/w_out", "proj_down.weight")]
    else:
        channels = gated_mlp(hidden, names=("proj_up_gate", "proj_up", "proj_down"))
    mixer = [
        *(_fused(layer) if fused else _single(layer)),
        flat("norm_scale", "multihead_norm.weight", (layer.heads, layer.V), (layer.channels,)),
        matrix("w_out", "out_proj.weight"),
    ]
    links = [
        same("norm_mixer", "norm_mlstm.weight"),
        *below("mixer/", "mlstm_layer.", mixer),
        same("norm_mlp", "norm_ffn.weight"),
        *below("", "ffn.", channels),
    ]
    return below("", f"backbone.blocks.{place}.", links)
