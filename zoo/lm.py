"""The language model: embedding, blocks, norm, head. The same five verbs as a layer.

cfg = lm.Config(vocab_size=256, width=128, depth=4, pattern=("mamba", "mamba", "attention"))
params = lm.init(key, cfg)
logits, state, aux = lm.apply(params, cfg, tokens)          # [B,T] -> [B,T,vocab]
logits, state = lm.step(params, cfg, token, state)          # [B]   -> [B,vocab]
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from layers.checks import require, require_positive
from layers.common import Params, weight
from layers.fields import later
from zoo import blocks, trunk


@dataclass(frozen=True, kw_only=True)
class Config(blocks.Config):
    """A language model; fields of the trunk as in `blocks.Config`."""

    vocab_size: int
    tie: bool = True  # the head is the transposed embedding
    embed_scale: float = later(1.0)  # multiplies embeddings, not the head
    logit_cap: float | None = later(None)  # c: logits are c tanh(logits / c)
    norm_embed: bool = later(False)  # embeddings go through a norm as those of the first block

    def __post_init__(self):
        require_positive(self, "vocab_size")
        require(self.logit_cap is None or self.logit_cap > 0, f"logit_cap={self.logit_cap} must be > 0")
        super().__post_init__()


def init(key: Array, cfg: Config) -> Params:
    """Embedding normal with standard deviation 0.02 (GPT-2), head alike when it is not tied."""
    embed_key, trunk_key, head_key = jax.random.split(key, 3)
    params = {
        "w_embed": 0.02 * jax.random.normal(embed_key, (cfg.vocab_size, cfg.width)),
        "blocks": trunk.init(trunk_key, cfg),
        "norm_final": trunk.init_norm(cfg, cfg.blocks[-1]),
    }
    if cfg.norm_embed:
        params["norm_embed"] = trunk.init_norm(cfg, cfg.blocks[0])
    if not cfg.tie:
        params["w_head"] = weight(head_key, cfg.width, cfg.vocab_size)
    return params


def init_state(cfg: Config, batch: int):
    """The empty state: what every block remembers of an empty past."""
    return trunk.init_state(cfg, batch)


def _embedded(params: Params, cfg: Config, tokens: Array, dtype) -> Array:
    x = params["w_embed"].astype(dtype or params["w_embed"].dtype)[tokens]
    x = x if cfg.embed_scale == 1 else x * jnp.asarray(cfg.embed_scale, x.dtype)
    return cfg.blocks[0].norm(x, params["norm_embed"]) if cfg.norm_embed else x


def _final(params: Params, cfg: Config, x: Array) -> Array:
    """The final norm, which is as those of the last block."""
    return cfg.blocks[-1].norm(x, params["norm_final"])


def hidden(
    params: Params,
    cfg: Config,
    tokens: Array,
    state=None,
    *,
    segment_ids: Array | None = None,
    implementation: str | None = None,
    dtype=None,
):
    """`tokens [B,T] -> (h [B,T,D], state, aux)`, h after the final norm, computed in `dtype`.

    For losses that need logits only at some positions, or chunk by chunk: see `logits`.
    """
    x = _embedded(params, cfg, tokens, dtype)
    x, state, aux = trunk.apply(
        params["blocks"], cfg, x, state, segment_ids=segment_ids, implementation=implementation
    )
    return _final(params, cfg, x), state, aux


def logits(params: Params, cfg: Config, h: Array) -> Array:
    """The head: `h [..., D] -> [..., vocab]`, at least float32."""
    w = params["w_embed"].T if cfg.tie else params["w_head"]
    y = jnp.dot(h, w.astype(h.dtype), preferred_element_type=jnp.promote_types(h.dtype, jnp.float32))
    return y if cfg.logit_cap is None else cfg.logit_cap * jnp.tanh(y / cfg.logit_cap)


def apply(params, cfg, tokens, state=None, *, segment_ids=None, implementation=None, dtype=None):
    """`tokens [B,T] -> (logits [B,T,vocab], state, aux)`."""
    h, state, aux = hidden(
        params, cfg, tokens, state, segment_ids=segment_ids, implementation=implementation, dtype=dtype
    )
    return logits(params, cfg, h), state, aux


def step(params: Params, cfg: Config, token: Array, state, *, dtype=None):
    """One token: `token [B] -> (logits [B,vocab], state)`."""
    x = _embedded(params, cfg, token, dtype)
    x, state = trunk.step(params["blocks"], cfg, x, state)
    return logits(params, cfg, _final(params, cfg, x)), state


def param_count(cfg: Config) -> int:
    """Number of parameters, embeddings included; nothing is allocated."""
    return trunk.count(init, cfg)


def active_param_count(cfg: Config) -> int:
    """Parameters that one token meets: of a mixture, those of its own experts."""
    return param_count(cfg) - cfg.idle_weights()


def state_bytes(cfg: Config) -> int:
    """Bytes of float32 state for one sequence."""
    return cfg.trunk_state_bytes()


def flops_per_token(cfg: Config, length: int) -> int:
    """Forward FLOPs of one token of a sequence of `length`, head included."""
    return cfg.trunk_flops_per_token(length) + 2 * cfg.width * cfg.vocab_size


__all__ = [
    "Config", "active_param_count", "apply", "flops_per_token", "hidden", "init", "init_state", "logits",
    "param_count", "state_bytes", "step",
]  # fmt: skip
