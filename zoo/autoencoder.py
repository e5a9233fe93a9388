"""The autoencoder: a sequence goes into one vector, its last output, and has to come out of it again.

cfg = autoencoder.Config(vocab_size=16, width=128, depth=2, pattern=("mamba",))
params = autoencoder.init(key, cfg)
logits, state, aux = autoencoder.apply(params, cfg, tokens)  # [B,T] -> [B,T,vocab]

The encoder is the trunk of a language model; the last token only collects. With e its normed output there,
and p_t the sine and cosine position of place t (Vaswani et al. 2017, arXiv 1706.03762, Section 3.5), an MLP
that sees one place at a time decodes (Poli et al. 2024, arXiv 2403.17844, the compression task)

    h_t = g(g(e + p_t)),   g(x) = gelu(W norm(x) + b),   logits_t = W_head norm(h_t) + b_head.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from layers.checks import require_positive
from layers.common import Params, dense, rms_norm, sinusoids, weight, wide
from zoo import blocks, trunk

DECODER_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class Config(blocks.Config):
    """An autoencoder of token sequences; fields of the trunk as in `blocks.Config`."""

    vocab_size: int

    def __post_init__(self):
        require_positive(self, "vocab_size")
        super().__post_init__()


def init(key: Array, cfg: Config) -> Params:
    """Embedding normal with standard deviation 0.02, biases zero."""
    embed_key, trunk_key, head_key, *keys = jax.random.split(key, 3 + DECODER_LAYERS)
    return {
        "w_embed": 0.02 * jax.random.normal(embed_key, (cfg.vocab_size, cfg.width)),
        "blocks": trunk.init(trunk_key, cfg),
        "norm_final": jnp.ones(cfg.width),
        "decoder": [
            {
                "norm": jnp.ones(cfg.width),
                "w_in": weight(k, cfg.width, cfg.width),
                "bias": jnp.zeros(cfg.width),
            }
            for k in keys
        ],
        "norm_head": jnp.ones(cfg.width),
        "w_head": weight(head_key, cfg.width, cfg.vocab_size),
        "bias_head": jnp.zeros(cfg.vocab_size),
    }


def hidden(params: Params, cfg: Config, tokens: Array, *, implementation: str | None = None, dtype=None):
    """`tokens [B,T] -> (h [B,T,D], state, aux)`: what the decoder makes of every place, before the head."""
    x = params["w_embed"].astype(dtype or params["w_embed"].dtype)[tokens]
    x, state, aux = trunk.apply(params["blocks"], cfg, x, implementation=implementation)
    code = rms_norm(x[:, -1], params["norm_final"])
    h = code[:, None] + sinusoids(jnp.arange(tokens.shape[1]), cfg.width).astype(code.dtype)
    for layer in params["decoder"]:
        h = jax.nn.gelu(dense(rms_norm(h, layer["norm"]), layer["w_in"]) + layer["bias"].astype(h.dtype))
    return rms_norm(h, params["norm_head"]), state, aux


def logits(params: Params, cfg: Config, h: Array) -> Array:
    """The head: `h [..., D] -> [..., vocab]`, at least float32."""
    return wide(dense(h, params["w_head"])) + params["bias_head"]


def apply(params, cfg, tokens, *, implementation=None, dtype=None):
    """`tokens [B,T] -> (logits [B,T,vocab], state, aux)`; logits depend on tokens only through one vector."""
    h, state, aux = hidden(params, cfg, tokens, implementation=implementation, dtype=dtype)
    return logits(params, cfg, h), state, aux


def param_count(cfg: Config) -> int:
    """Number of parameters, embedding and decoder included; nothing is allocated."""
    return trunk.count(init, cfg)


def state_bytes(cfg: Config) -> int:
    """Bytes of float32 state of the encoder for one sequence."""
    return cfg.trunk_state_bytes()


def flops_per_token(cfg: Config, length: int) -> int:
    """Forward FLOPs of one token of a sequence of `length`, in and out again."""
    decoder = 2 * DECODER_LAYERS * cfg.width**2 + 2 * cfg.width * cfg.vocab_size
    return cfg.trunk_flops_per_token(length) + decoder


__all__ = ["Config", "apply", "flops_per_token", "hidden", "init", "logits", "param_count", "state_bytes"]
