"""Transformer blocks that several places of a model share (Zamba2).

    t = W_out MLP( norm_2( Attention( norm_1([x | x_0]) ) ) )

x [D] is the residual stream where a block calls, x_0 what went into the first block. The caller's mixer works
on norm(x + t), and its output is added to x alone. The weights exist once; each caller has its own W_out,
low-rank additions (`adapter`) to the MLP's first matrix and to q, k and v, and keys and values.

Source: Glorioso et al. 2024 (arXiv 2405.16712, Zamba, eq. 6, and 2411.15242, Zamba2, sec. 2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers import attention
from layers.checks import require
from layers.common import Params, dense, rms_norm, weight
from zoo import mlp


@dataclass(frozen=True, kw_only=True)
class Config:
    """One shared block. Raises ValueError for an attention that does not lead from 2 D channels to D."""

    attention: attention.Config
    mlp: mlp.Config
    eps: float = 1e-5  # of the norms

    def __post_init__(self):
        wide, narrow = self.attention.width, self.attention.out_width
        require(
            wide == 2 * (narrow or wide),
            f"shared block: attention from width={wide} to out_width={narrow}, not from twice a width to it",
        )
        require(not self.mlp.experts, "shared block: its MLP has no experts")

    @property
    def width(self) -> int:
        """D."""
        return self.attention.width // 2

    def flops_per_token(self, length: int) -> int:
        """Of one call."""
        matrices = self.mlp.active(self.width) + self.width**2
        return self.attention.flops_per_token(length) + 2 * matrices


@struct.dataclass
class Calling:
    """The state of a block that calls."""

    mixer: Any
    attention: attention.State


Keep = Callable[[Any], Any]


class Side(NamedTuple):
    """What blocks of one model may look at beside the stream: the shared blocks, and the trunk's input."""

    blocks: tuple[Config, ...]
    params: list[Params]
    first: Array | None  # x_0, [B, T, D] or [B, D]; None where nothing is shared


def _whole(key: Array, cfg: Config) -> Params:
    """The shared block with the additions of one caller."""
    keys = jax.random.split(key, 4)
    return {
        "norm_attention": jnp.ones(cfg.attention.width),
        "attention": attention.init(keys[0], cfg.attention),
        "norm_mlp": jnp.ones(cfg.width),
        "mlp": mlp.init(keys[1], keys[2], keys[3], cfg.mlp, cfg.width),
    }


def _own(params: Params) -> Params:
    """Of `_whole`, what each caller has itself."""
    parts = {name: params[name] for name in ("attention", "mlp")}
    return {name: part["adapter"] for name, part in parts.items() if "adapter" in part}


@partial(jax.jit, static_argnums=1)
def init(key: Array, cfg: Config) -> Params:
    """What all callers share."""
    whole = _whole(key, cfg)
    return whole | {
        name: {k: v for k, v in whole[name].items() if k != "adapter"} for name in ("attention", "mlp")
    }


@partial(jax.jit, static_argnums=1)
def init_call(key: Array, cfg: Config) -> Params:
    """What one caller has itself."""
    return {"w_out": weight(key, cfg.width, cfg.width), **_own(_whole(jax.random.fold_in(key, 1), cfg))}


def _part(params: Params, own: Params, name: str) -> Params:
    return params[name] | ({"adapter": own[name]} if name in own else {})


def _output(params: Params, own: Params, cfg: Config, y: Array) -> Array:
    """From what attention gives to t."""
    normed = rms_norm(y, params["norm_mlp"], cfg.eps)
    return dense(mlp.apply(_part(params, own, "mlp"), cfg.mlp, normed)[0], own["w_out"])


def _input(params: Params, cfg: Config, x: Array, side: Side) -> Array:
    assert side.first is not None
    return rms_norm(jnp.concatenate([x, side.first], -1), params["norm_attention"], cfg.eps)


def _unpacked(state: Any) -> tuple[Any, Any]:
    return (None, None) if state is None else (state.mixer, state.attention)


def call(side: Side, number: int | None, own: Any, x: Array, state: Any, **how) -> tuple[Any, Any, Keep]:
    """Block `number` with a caller's `own` parameters at `x [B,T,D]`, or none of them.

    `(t [B,T,D] or None, the state of the caller's mixer, what makes its next state that of both)`.
    """
    if number is None:
        return None, state, lambda mixer: mixer
    params, cfg, (mixer, said) = side.params[number], side.blocks[number], _unpacked(state)
    u = _input(params, cfg, x, side)
    y, said, _ = attention.apply(_part(params, own, "attention"), cfg.attention, u, said, **how)
    return _output(params, own, cfg, y), mixer, lambda mixer: Calling(mixer, said)


def call_step(side: Side, number: int | None, own: Any, x_t: Array, state: Any) -> tuple[Any, Any, Keep]:
    """One token of `call`, `x_t [B,D]`."""
    if number is None:
        return None, state, lambda mixer: mixer
    params, cfg = side.params[number], side.blocks[number]
    u = _input(params, cfg, x_t, side)
    y, said = attention.step(_part(params, own, "attention"), cfg.attention, u, state.attention)
    return _output(params, own, cfg, y), state.mixer, lambda mixer: Calling(mixer, said)
