"""Mamba, Falcon Mamba and Mamba-2: a stack of mixers without MLPs."""

from types import SimpleNamespace

from layers import mamba, mamba2
from zoo import lm
from zoo.blocks import Block
from zoo.pretrained.links import Link, matrix, same, taps
from zoo.pretrained.options import Option, derived, flag, integer, number, only
from zoo.pretrained.parts import ends, trunk

# How weights were first drawn, kernels, and names of the original code.
_NO_MATTER = dict.fromkeys(
    (
        "fused_add_norm", "pad_vocab_size_multiple", "rescale_prenorm_residual", "residual_in_fp32",
        "time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale",
        "use_associative_scan", "use_falcon_mambapy", "use_mambapy",
    )
)  # fmt: skip
_COMMON: dict[str, Option | None] = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "num_hidden_layers": integer(),
    "expand": integer(2),
    "conv_kernel": integer(4),
    "layer_norm_epsilon": number(1e-5),
    "hidden_act": only("silu", "swish"),
    "use_bias": only(False),
    "use_conv_bias": only(True),
    "rms_norm": only(True),
    "ssm_cfg": Option((dict,), None, ({},)),
    "d_model": derived(lambda o: o.hidden_size),
    "d_inner": derived(lambda o: o.expand * o.hidden_size),
    "n_layer": derived(lambda o: o.num_hidden_layers),
    **_NO_MATTER,
}
OPTIONS: dict[str, Option | None] = {
    **_COMMON,
    "state_size": integer(16),
    "time_step_rank": Option((int, str), "auto"),
    "tie_word_embeddings": flag(True),
    "intermediate_size": derived(lambda o: o.expand * o.hidden_size),
}
FALCON: dict[str, Option | None] = {**OPTIONS, "mixer_rms_eps": number(1e-6)}
OPTIONS2: dict[str, Option | None] = {
    **_COMMON,
    "state_size": integer(128),
    "num_heads": integer(128),
    "head_dim": integer(64),
    "n_groups": integer(8),
    "norm_before_gate": only(False),
    "rms_norm": only(True),
    "time_step_limit": Option((list,), [0.0, float("inf")]),
    "tie_word_embeddings": flag(False),
    "time_step_rank": None,
    "chunk_size": None,
}


def _model(o: SimpleNamespace, layer: mamba.Config | mamba2.Config) -> lm.Config:
    block = Block(mixer=layer, eps=o.layer_norm_epsilon)
    blocks = trunk([block] * o.num_hidden_layers)
    return lm.Config(vocab_size=o.vocab_size, width=o.hidden_size, tie=o.tie_word_embeddings, **blocks)


def _layer(o: SimpleNamespace, **norms) -> mamba.Config:
    rank = None if o.time_step_rank == "auto" else o.time_step_rank
    sizes = {"expand": o.expand, "state_dim": o.state_size, "conv": o.conv_kernel, "dt_rank": rank}
    return mamba.Config(width=o.hidden_size, **sizes, **norms)


def config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    return _model(o, _layer(o)), []


def falcon_config(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    norms = {"inner_norm": True, "inner_scale": False, "inner_eps": o.mixer_rms_eps}
    return _model(o, _layer(o, **norms)), []


def config2(o: SimpleNamespace, max_length: int) -> tuple[lm.Config, list[str]]:
    problems = []
    if [_number(x) for x in o.time_step_limit] != [0.0, float("inf")]:
        problems.append(f"option time_step_limit={o.time_step_limit} is not supported, only [0, Infinity]")
    if o.num_heads * o.head_dim != o.expand * o.hidden_size:
        problems.append(f"option num_heads={o.num_heads} times head_dim is not expand times hidden_size")
    sizes = {"expand": o.expand, "head_dim": o.head_dim, "state_dim": o.state_size, "conv": o.conv_kernel}
    layer = mamba2.Config(width=o.hidden_size, groups=o.n_groups, eps=o.layer_norm_epsilon, **sizes)
    return _model(o, layer), problems


def _number(value) -> float:
    """Infinity is no JSON: it is written as an object, or as the bare word, which Python's reader takes."""
    return float(value["__float__"]) if isinstance(value, dict) and "__float__" in value else value


def model(cfg: lm.Config) -> list[Link]:
    return ends(cfg, "backbone.embeddings.weight", "backbone.norm_f.weight")


def selective(at: str, prefix: str = "mixer/") -> list[Link]:
    """Mamba's own parameters, but for the norms that some have inside."""
    return [
        matrix(f"{prefix}w_in", f"{at}.in_proj.weight"),
        taps(f"{prefix}conv", f"{at}.conv1d.weight"),
        same(f"{prefix}conv_bias", f"{at}.conv1d.bias"),
        matrix(f"{prefix}w_x", f"{at}.x_proj.weight"),
        matrix(f"{prefix}w_dt", f"{at}.dt_proj.weight"),
        same(f"{prefix}dt_bias", f"{at}.dt_proj.bias"),
        same(f"{prefix}A_log", f"{at}.A_log"),
        same(f"{prefix}D", f"{at}.D"),
        matrix(f"{prefix}w_out", f"{at}.out_proj.weight"),
    ]


def block(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    at = f"backbone.layers.{place}"
    return [same("norm_mixer", f"{at}.norm.weight"), *selective(f"{at}.mixer")]


def state_space(at: str) -> list[Link]:
    """Mamba-2's own parameters."""
    return [
        matrix("mixer/w_in", f"{at}.in_proj.weight"),
        taps("mixer/conv", f"{at}.conv1d.weight"),
        same("mixer/conv_bias", f"{at}.conv1d.bias"),
        *(same(f"mixer/{name}", f"{at}.{name}") for name in ("dt_bias", "A_log", "D")),
        same("mixer/norm_scale", f"{at}.norm.weight"),
        matrix("mixer/w_out", f"{at}.out_proj.weight"),
    ]


def block2(o: SimpleNamespace, cfg: lm.Config, place: int, keys: frozenset[str]) -> list[Link]:
    at = f"backbone.layers.{place}"
    return [same("norm_mixer", f"{at}.norm.weight"), *state_space(f"{at}.mixer")]
