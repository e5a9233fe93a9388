"""Zamba2: Mamba-2, and one or several shared transformer blocks that some of its layers call in turn."""

from types import SimpleNamespace

from layers import attention, mamba2
from zoo import lm, mlp, shared
from zoo.blocks import Block
from zoo.pretrained.links import Link, below, matrix, same
from zoo.pretrained.mamba import state_space
from zoo.pretrained.options import ROPE, Option, derived, flag, integer, listed, number, only, rope
from zoo.pretrained.parts import attention_projections, ends, trunk

PLAIN, CALLS = ("mamba", "linear_attention"), "hybrid"
# 54 layers, of which the calling ones stand six apart and, towards the end, closer.
_PUBLISHED = [n in {*range(6, 43, 6), 47, 51} for n in range(54)]
OPTIONS: dict[str, Option | None] = {
    "vocab_size": integer(32000),
    "hidden_size": integer(2560),
    "num_hidden_layers": integer(54),
    "layers_block_type": listed([CALLS if calls else PLAIN[0] for calls in _PUBLISHED]),
    "mamba_d_state": integer(64),
    "mamba_d_conv": integer(4),
    "mamba_expand": integer(2),
    "mamba_ngroups": integer(1),
    "n_mamba_heads": integer(8),
    "time_step_min": number(0.001),
    "time_step_limit": Option((list,), None, ()),
    "intermediate_size": integer(None),
    "num_attention_heads": integer(32),
    "num_key_value_heads": integer(None),
    "num_mem_blocks": integer(1),
    "use_shared_attention_adapter": flag(False),
    "adapter_rank": integer(128),
    "use_mem_rope": flag(False),
    "max_position_embeddings": integer(4096),
    "rms_norm_eps": number(1e-5),
    "tie_word_embeddings": only(True),  # without it theirs does not share the blocks either
    "hidden_act": only("gelu"),
    "use_conv_bias": only(True),
    "add_bias_linear": only(False),
    "attention_dropout": only(0.0),
    "use_long_context": only(False),
    **ROPE,
    "mamba_headdim": derived(lambda o: o.mamba_expand * o.hidden_size // o.n_mamba_heads),
    "attention_hidden_size": derived(lambda o: 2 * o.hidden_size),
    "attention_head_dim": derived(lambda o: 2 * o.hidden_size // o.num_attention_heads),
    "kv_channels": derived(lambda o: o.hidden_size // o.num_attention_heads),
    "num_query_groups": derived(lambda o: o.num_attention_heads),
    "hybrid_layer_ids": derived(lambda o: [n for n, k in enumerate(o.layers_block_type) if k == CALLS]),
    **dict.fromkeys(
        (
            "chunk_size", "num_logits_to_keep", "time_step_floor", "time_step_max", "use_mamba_kernels",
            "use_mem_eff_path",
        )
    ),
}  # fmt: skip


def _problems(o: SimpleNamespace) -> list[str]:
    problems, kinds = [], o.layers_block_type
    wrong = sorted({str(kind) for kind in kinds if kind not in (*PLAIN, CALLS)})
    problems += [f"option layers_block_type has {kind!r}, not only 'mamba' and 'hybrid'" for kind in wrong]
    if len(kinds) != o.num_hidden_layers:
        problems.append(f"option layers_block_type has {len(kinds)} entries for {o.num_hidden_layers} layers")
    if o.mamba_expand * o.hidden_size % o.n_mamba_heads:
        problems.append(f"option n_mamba_heads={o.n_mamba_heads} does not divide mamba_expand * hidden_size")
    if 2 * o.hidden_size % o.num_attention_heads:
        problems.append(f"option num_attention_heads={o.num_attention_heads} does not divide 2 * hidden_size")
    if o.adapter_rank < 1:
        problems.append(f"option adapter_rank={o.adapter_rank} must be >= 1")
    grouped = o.num_key_value_heads not in (None, o.num_attention_heads)
    if o.use_shared_attention_adapter and grouped:
        problems.append("option use_shared_attention_adapter=True needs as many heads of keys as of queries")
    return problems


def _mixer(o: SimpleNamespace) -> mamba2.Config:
    return mamba2.Config(
        width=o.hidden_size, expand=o.mamba_expand, state_dim=o.mamba_d_state, conv=o.mamba_d_conv,
        head_dim=o.mamba_expand * o.hidden_size // o.n_mamba_heads, groups=o.mamba_ngroups,
        dt_min=float(o.time_step_min),
    )  # fmt: skip


def _shared(o: SimpleNamespace, base: float, max_length: int) -> shared.Config:
    head = 2 * o.hidden_size // o.num_attention_heads
    full = attention.Config(
        width=2 * o.hidden_size, out_width=o.hidden_size, heads=o.num_attention_heads, head_dim=head,
        kv_heads=o.num_key_value_heads, scale=(head / 2) ** -0.5, rope_base=base if o.use_mem_rope else None,
        adapter=o.adapter_rank if o.use_shared_attention_adapter else 0,
        max_length=min(max_length, o.max_position_embeddings),
    )  # fmt: skip
    hidden = o.intermediate_size or 4 * o.hidden_size
    channels = mlp.Config(hidden=hidden, kind="geglu", exact=True, adapter=o.adapter_rank)
    return shared.Config(attention=full, mlp=channels, eps=o.rms_norm_eps)


def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    problems = _problems(o)
    base, _, more = rope(o) if o.use_mem_rope else (0.0, 0.0, [])
    calling = [n for n, kind in enumerate(o.layers_block_type) if kind == CALLS]
    calls = {place: use % o.num_mem_blocks for use, place in enumerate(calling)}
    mixer = _mixer(o)
    blocks = [
        Block(mixer=mixer, eps=o.rms_norm_eps, calls=calls.get(place)) for place in range(o.num_hidden_layers)
    ]
    common = (_shared(o, base, max_length),) * min(o.num_mem_blocks, len(calling))
    tops = {"vocab_size": o.vocab_size, "shared": common}
    return lm.Config(width=o.hidden_size, **tops, **trunk(blocks)), problems + more


def _callers(cfg: lm.Config) -> list[tuple[int, int]]:
    """The place of every call and the number of the block it is for, bottom to top."""
    return [(place, block.calls) for place, block in enumerate(cfg.blocks) if block.calls is not None]


def _at(cfg: lm.Config, called: int) -> str:
    """Where a shared block's tensors are: at the first layer that calls it."""
    first = next(place for place, asked in _callers(cfg) if asked == called)
    return f"model.layers.{first}.shared_transformer."


def model(cfg: lm.Config) -> list[Link]:
    links = ends(cfg, "model.embed_tokens.weight", "model.final_layernorm.weight")
    for called, block in enumerate(cfg.shared):
        parts = [
            same("norm_attention", "input_layernorm.weight"),
            *below("", "self_attn.", attention_projections(block.attention, "attention/")),
            same("norm_mlp", "pre_ff_layernorm.weight"),
            matrix("mlp/w_in", "feed_forward.gate_up_proj.weight"),
            matrix("mlp/w_out", "feed_forward.down_proj.weight"),
        ]
        links += below(f"blocks/{len(cfg.block_groups)}/{called}/", _at(cfg, called), parts)
    return links


def _adapter(name: str, key: str) -> list[Link]:
    return [matrix(f"w_{name}_down", f"{key}.0.weight"), matrix(f"w_{name}_up", f"{key}.1.weight")]


def _call(cfg: lm.Config, place: int, called: int) -> list[Link]:
    """What the layer at `place` has itself of the block that it calls."""
    use = [place for place, _ in _callers(cfg)].index(place)
    own = below("mlp/", "feed_forward.", _adapter("in", f"gate_up_proj_adapter_list.{use}"))
    for name in "qkv" if cfg.shared[called].attention.adapter else "":
        own += below("attention/", "self_attn.", _adapter(name, f"linear_{name}_adapter_list.{use}"))
    out = matrix("call/w_out", f"model.layers.{place}.linear.weight")
    return [out, *below("call/", _at(cfg, called), own)]


def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    at, called = f"model.layers.{place}.", cfg.blocks[place].calls
    inside = at if called is None else f"{at}mamba_decoder."
    own = below("", inside, [same("norm_mixer", "input_layernorm.weight"), *state_space("mamba")])
    return own if called is None else [*own, *_call(cfg, place, called)]
