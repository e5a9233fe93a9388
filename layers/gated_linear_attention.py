"""Gated linear attention (GLA), with plain linear attention and retention as settings of it.

Per head, with keys of width K and values of width V,

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,        o_t = S_t^T q_t / sqrt(K)

    decay = "channel"    alpha_t = sigmoid(W2 W1 x_t + b)^(1/tau) in (0,1)^K        GLA
            "head"       alpha_t = sigmoid(w x_t + b)^(1/tau), one number per head  simple GLA
            "constant"   alpha = 1 - 2^(-5-h) for head h                            retention's decay
            "none"       alpha = 1                                                  linear attention

and `y = W_out( RMSNorm_head(o) * silu(W_gate x) )`. With `normalize` the read is a weighted mean,
`o_t = S_t^T phi(q_t) / (phi(q_t) . n_t + eps)`, n_t = sum of alpha-decayed phi(k): then there is no norm.

`feature_map` is phi, of q and k alike; some have F features for a key of width K, or weights W per head:

    "identity", "elu+1", "relu", "relu^2", "silu"     elementwise, F = K
    "t2r"          relu(W x + b)                               F = K
    "hedgehog"     softmax([W x, -W x]), W = I at the start    F = 2 K
    "dpfp"         r * roll(r, 1), r = relu([x, -x])           F = 2 K
    "hadamard"     (W_1 x) * (W_2 x)                           F = K

Sources: Yang et al. 2023 (arXiv 2312.06635) eq. 3-4 and sec. 4.4 (GLA, tau = 16, gate of rank 16);
Katharopoulos et al. 2020 (arXiv 2006.16236) eq. 16-20 (linear attention, elu + 1);
Sun et al. 2023 (arXiv 2307.08621) sec. 2.1 (constant decay); Kasai et al. 2021 (arXiv 2103.13076, T2R),
Zhang et al. 2024 (arXiv 2402.04347, Hedgehog), Schlag et al. 2021 (arXiv 2102.11174, DPFP with nu = 1). The
maps with weights have their own for q and for k. `conv` adds the short convolution with SiLU on q, k, v that
later delta-rule layers use; GLA itself has none.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_choice, require_divides, require_not_negative, require_positive
from layers.common import (
    Params,
    conv_init,
    conv_state,
    convolved,
    convolved_step,
    dense,
    low_rank,
    rms_norm,
    weight,
    wide,
)
from layers.fields import later
from layers.heads import HeadDims, merge_heads, split_heads
from pallas_kernels.feature_maps import FEATURE_MAPS
from pallas_kernels.gated_linear_attention import (
    flops_per_token,
    gated_linear_attention,
    gated_linear_attention_step,
)

DECAYS = ("channel", "head", "constant", "none")


@dataclass(frozen=True)
class Config(HeadDims):
    """Raises ValueError for sizes that do not fit together or an unknown decay or feature map."""

    sequence_way = "scan"

    width: int
    heads: int = 4
    key_dim: int | None = None  # K per head; default width / (2 heads)
    value_dim: int | None = None  # V per head; default width / heads
    decay: str = "channel"
    gate_rank: int = 16  # rank of the channel decay's projection
    gate_temperature: float = 16.0  # tau: larger forgets more slowly
    feature_map: str = "identity"
    normalize: bool = False
    conv: int = 0  # taps of the short convolution on q, k, v; 0 for none
    eps: float = later(1e-5)  # of the norm of the read

    def __post_init__(self):
        require_positive(self, "width", "heads", "gate_rank")
        if self.key_dim is None or self.value_dim is None:
            require_divides(self, "heads", "width")
        require(self.K >= 1 and self.V >= 1, f"gated_linear_attention: key_dim={self.K}, value_dim={self.V}")
        require(
            self.gate_temperature > 0, f"gated_linear_attention: gate_temperature={self.gate_temperature}"
        )
        require_not_negative(self, "conv")
        require_choice(self, "decay", DECAYS)
        require_choice(self, "feature_map", tuple(FEATURE_MAPS))
        non_negative = [name for name, phi in FEATURE_MAPS.items() if phi.non_negative]
        require(
            not self.normalize or self.feature_map in non_negative,
            f"gated_linear_attention: normalize needs a feature map that is never negative "
            f"({', '.join(non_negative)}), not {self.feature_map!r}",
        )

    @property
    def K(self) -> int:
        return self.key_dim or max(self.width // (2 * self.heads), 1)

    @property
    def F(self) -> int:
        """Features of a key: rows of the memory."""
        return FEATURE_MAPS[self.feature_map].features * self.K

    @property
    def feature_columns(self) -> int:
        """Columns of the feature map's weights per head; 0 for none."""
        return FEATURE_MAPS[self.feature_map].columns * self.K

    def state_bytes(self) -> int:
        """`4 (H F V + (conv - 1)(2 H K + H V))`, and H F more with the normaliser."""
        memory = self.heads * self.F * (self.V + self.normalize)
        return 4 * (memory + max(self.conv - 1, 0) * self.stream)

    def flops_per_token(self, length: int) -> int:
        gate = {
            "channel": self.gate_rank * (self.width + self.heads * self.F),
            "head": self.width * self.heads,
        }
        projections = self.width * (self.stream + 2 * self.heads * self.V) + gate.get(self.decay, 0)
        projections += 2 * self.heads * self.K * self.feature_columns
        mix = flops_per_token(
            length, self.heads, self.F, self.V + self.normalize, channels=self.decay == "channel"
        )
        return 2 * (projections + self.conv * self.stream) + mix


@struct.dataclass
class State:
    memory: Array  # [B, H, F, V], V + 1 columns with the normaliser
    conv: Array  # [B, conv - 1, 2 H K + H V]


def init(key: Array, cfg: Config) -> Params:
    """Projections with unit-variance outputs; decay biases 0 (alpha = 2^(-1/tau) at the start)."""
    keys = iter(jax.random.split(key, 10))
    params = {
        "w_qkv": weight(next(keys), cfg.width, cfg.stream),
        "w_gate": weight(next(keys), cfg.width, cfg.heads * cfg.V),
        "w_out": weight(next(keys), cfg.heads * cfg.V, cfg.width),
    }
    if not cfg.normalize:
        params["norm_scale"] = jnp.ones(cfg.V)
    if cfg.conv:
        params["conv"] = conv_init(next(keys), cfg.conv, cfg.stream)
    if cfg.decay == "channel":
        params["w_decay_down"] = weight(next(keys), cfg.width, cfg.gate_rank)
        params["w_decay_up"] = weight(next(keys), cfg.gate_rank, cfg.heads * cfg.F)
        params["decay_bias"] = jnp.zeros(cfg.heads * cfg.F)
    if cfg.decay == "head":
        params["w_decay"] = weight(next(keys), cfg.width, cfg.heads)
        params["decay_bias"] = jnp.zeros(cfg.heads)
    if cfg.feature_columns:
        for name in ("q", "k"):
            params[f"w_feature_{name}"] = _feature_weight(next(keys), cfg)
            if cfg.feature_map == "t2r":
                params[f"feature_bias_{name}"] = jnp.zeros((cfg.heads, cfg.feature_columns))
    return params


def _feature_weight(key: Array, cfg: Config) -> Array:
    """`[H, K, columns]`."""
    if cfg.feature_map == "hedgehog":
        return jnp.broadcast_to(jnp.eye(cfg.K), (cfg.heads, cfg.K, cfg.K))
    return jnp.moveaxis(weight(key, cfg.K, cfg.heads, cfg.feature_columns), 0, 1)


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.F, cfg.V + cfg.normalize)),
        conv=conv_state(batch, cfg.conv, cfg.stream),
    )


def _log_decay(params: Params, cfg: Config, x: Array) -> Array | None:
    """`[..., H, F]`, `[..., H]`, `[H]` or None, <= 0."""
    if cfg.decay == "none":
        return None
    if cfg.decay == "constant":
        return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(cfg.heads))))
    if cfg.decay == "head":
        logits = wide(dense(x, params["w_decay"])) + params["decay_bias"]
        return jax.nn.log_sigmoid(logits) / cfg.gate_temperature
    logits = wide(low_rank(params, "decay", x)) + params["decay_bias"]
    return (jax.nn.log_sigmoid(logits) / cfg.gate_temperature).reshape(*x.shape[:-1], cfg.heads, cfg.F)


def _features(params: Params, cfg: Config, x: Array, name: str) -> Array:
    """phi of q or k: `[..., H, K] -> [..., H, F]`."""
    if cfg.feature_columns:
        x = jnp.einsum("...hk,hkf->...hf", x, params[f"w_feature_{name}"].astype(x.dtype))
    if cfg.feature_map == "t2r":
        x = x + params[f"feature_bias_{name}"].astype(x.dtype)
    return FEATURE_MAPS[cfg.feature_map].function(x)


def _heads(params: Params, cfg: Config, qkv: Array) -> tuple[Array, Array, Array]:
    """Split `[..., 2HK + HV]` into q (scaled), k and v, `[..., H, F or V]`, after the feature map."""
    if cfg.conv:
        qkv = jax.nn.silu(qkv)
    parts = jnp.split(qkv, [cfg.heads * cfg.K, 2 * cfg.heads * cfg.K], -1)
    q, k, v = (split_heads(p, cfg.heads) for p in parts)
    if cfg.normalize:
        # A column of ones in v makes the last column of the memory the normaliser.
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    return _features(params, cfg, q, "q") * cfg.K**-0.5, _features(params, cfg, k, "k"), v


def _output(params: Params, cfg: Config, x: Array, o: Array) -> Array:
    """Normalise the read `o [..., H, V]`, gate it by x and project."""
    if cfg.normalize:
        o = o[..., :-1] / (o[..., -1:] + 1e-6)
    else:
        o = rms_norm(o, params["norm_scale"], cfg.eps)
    return dense(merge_heads(o) * jax.nn.silu(dense(x, params["w_gate"])), params["w_out"])


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    qkv, conv = convolved(params, cfg, dense(x, params["w_qkv"]), state.conv, segment_ids)
    o, memory = gated_linear_attention(
        *_heads(params, cfg, qkv),
        _log_decay(params, cfg, x),
        state.memory,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return _output(params, cfg, x, o), State(memory=memory, conv=conv), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    qkv, conv = convolved_step(params, cfg, dense(x_t, params["w_qkv"]), state.conv)
    o, memory = gated_linear_attention_step(
        *_heads(params, cfg, qkv), _log_decay(params, cfg, x_t), state.memory
    )
    return _output(params, cfg, x_t, o), State(memory=memory, conv=conv)
