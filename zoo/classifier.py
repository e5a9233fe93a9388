"""The sequence classifier over real-valued inputs: linear in, blocks, norm, mean over time, head."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from layers.checks import require, require_positive
from layers.common import Params, dense, rms_norm, weight, wide
from zoo import blocks, trunk


@dataclass(frozen=True, kw_only=True)
class Config(blocks.Config):
    """A classifier of `[T, features]` sequences; fields of the trunk as in `blocks.Config`."""

    features: int
    classes: int

    def __post_init__(self):
        require_positive(self, "features", "classes")
        require(self.classes >= 2, f"classes={self.classes} must be at least 2")
        super().__post_init__()


def init(key: Array, cfg: Config) -> Params:
    in_key, trunk_key, head_key = jax.random.split(key, 3)
    return {
        "w_in": weight(in_key, cfg.features, cfg.width),
        "bias_in": jnp.zeros(cfg.width),
        "blocks": trunk.init(trunk_key, cfg),
        "norm_final": jnp.ones(cfg.width),
        "w_head": weight(head_key, cfg.width, cfg.classes),
        "bias_head": jnp.zeros(cfg.classes),
    }


def init_state(cfg: Config, batch: int):
    """Running sum of features and token count beside the blocks' states: the mean of an empty past."""
    return {
        "blocks": trunk.init_state(cfg, batch),
        "sum": jnp.zeros((batch, cfg.width)),
        "count": jnp.zeros((batch, 1)),
    }


def _head(params: Params, total: Array, count: Array) -> Array:
    return dense(total / count, params["w_head"]) + params["bias_head"]


def apply(params, cfg, inputs, state=None, *, implementation=None, dtype=None):
    """`inputs [B,T,features] -> (logits [B,classes], state, aux)`; the state continues the sequence."""
    old = init_state(cfg, inputs.shape[0]) if state is None else state
    dtype = dtype or params["w_in"].dtype
    x = dense(inputs.astype(dtype), params["w_in"]) + params["bias_in"].astype(dtype)
    inner = None if state is None else state["blocks"]
    x, inner, aux = trunk.apply(params["blocks"], cfg, x, inner, implementation=implementation)
    total = old["sum"] + wide(rms_norm(x, params["norm_final"])).sum(1)
    count = old["count"] + x.shape[1]
    return _head(params, total, count), {"blocks": inner, "sum": total, "count": count}, aux


def step(params: Params, cfg: Config, input_t: Array, state, *, dtype=None):
    """One time step: `input_t [B,features] -> (logits [B,classes] so far, state)`."""
    dtype = dtype or params["w_in"].dtype
    x = dense(input_t.astype(dtype), params["w_in"]) + params["bias_in"].astype(dtype)
    x, inner = trunk.step(params["blocks"], cfg, x, state["blocks"])
    total = state["sum"] + wide(rms_norm(x, params["norm_final"]))
    count = state["count"] + 1
    return _head(params, total, count), {"blocks": inner, "sum": total, "count": count}


def param_count(cfg: Config) -> int:
    """Number of parameters; nothing is allocated."""
    return trunk.count(init, cfg)


def state_bytes(cfg: Config) -> int:
    """Bytes of float32 state for one sequence: the blocks', and `4 (D + 1)` for the running mean."""
    return cfg.trunk_state_bytes() + 4 * (cfg.width + 1)


def flops_per_token(cfg: Config, length: int) -> int:
    """Forward FLOPs of one time step of a sequence of `length`; the head runs once per sequence."""
    head = 2 * cfg.width * cfg.classes // length
    return cfg.trunk_flops_per_token(length) + 2 * cfg.features * cfg.width + head
