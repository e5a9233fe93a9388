"""Mamba-3: Mamba-2 without its convolution, with a two-term write and a state that rotates.

With E = expand * width channels in H heads of width P and N states, B and C shared by the heads,

    [z | x | B | C | dt | a | lambda | theta] = W_in u     E, E, R N, R N, H, H, H and N/4 columns
    dt = softplus(dt + b_dt),    A = -max(heavy(a), 1e-4),    heavy(a) = 1 + a (a >= 0), 1 / (1 - a) (a < 0)
    phi_t = phi_{t-1} + pi dt_t tanh(theta_t)                  per head and pair of states
    k = R_phi( RMSNorm(B) + b_B ),    q = R_phi( RMSNorm(C) + b_C ),    lambda = sigmoid(lambda)
    S_t = e^{dt A} S_{t-1} + (1 - lambda_t) dt_t e^{dt A} k_{t-1} x_{t-1}^T + lambda_t dt_t k_t x_t^T
    y_t = S_t^T q_t + D x_t,      out = W_out( y * silu(z) )

With rank R > 1 (MIMO) there are R keys and queries, v_r = m_x,r * x in place of x, a write is the sum of the
R products k_r v_r^T, each query has its own y_r = S^T q_r + D v_r, and sum_r m_o,r * y_r * silu(m_z,r * z)
goes to W_out: R times the work on a state of the same size. m_x and m_o start at 1/R, m_z at 1.

The write is the trapezoidal rule (lambda = 1/2; lambda = 1 is Mamba-2's), the rotation of B and C by a
running angle is a complex diagonal in A, and the two together take over the work of the convolution.

A token's key is written twice, with weight gamma_t = lambda_t dt_t at once and, before the next token's
decay, with beta_{t+1} = (1 - lambda_{t+1}) dt_{t+1}. Hence U_t = S_t + beta_{t+1} k_t x_t^T is plain gated
linear attention with weight gamma_t + beta_{t+1}, and
S_t^T q_t = e^{dt A} U_{t-1}^T q_t + gamma_t (k_t . q_t) x_t reads U before the token's own write, so that no
token sees a weight that depends on the next one.

Source: Lahoti et al. 2026 (arXiv 2603.15569; trapezoidal rule, rotations, MIMO, block). The form of A, the
biases of B and C (1 at the start), the share of rotated states (N/2) and the absence of a norm before W_out
are those of the published layer. Reading: D acts on v_r. Pairs are (i, i + N/4).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from layers.checks import require, require_expanded_heads, require_positive
from layers.common import Params, dense, rms_norm, rotate, token_shift, weight, wide
from layers.heads import ExpandedHeads, merge_heads, split_heads
from layers.state_spaces import dt_bias_init
from pallas_kernels import sequence
from pallas_kernels.chunks import segment_starts
from pallas_kernels.gated_linear_attention import flops_per_token, gated_linear_attention


@dataclass(frozen=True)
class Config(ExpandedHeads):
    """Raises ValueError for sizes below 1 or that do not fit together."""

    sequence_way = "scan"

    width: int
    expand: int = 2
    head_dim: int | None = None  # P; default the largest power of two up to 64 that divides E
    state_dim: int = 128  # N
    pairs: int | None = None  # rotated pairs of states; default N / 4
    rank: int = 1  # R

    def __post_init__(self):
        require_expanded_heads(self)
        require_positive(self, "state_dim", "rank")
        require(
            0 <= self.angles <= self.state_dim // 2,
            f"mamba3: pairs={self.pairs} must be in 0..{self.state_dim // 2} for state_dim={self.state_dim}",
        )

    @property
    def angles(self) -> int:
        return self.state_dim // 4 if self.pairs is None else self.pairs

    @property
    def columns(self) -> list[int]:
        """Of W_in: z, x, B, C, dt, a, lambda, theta."""
        return [*[self.channels] * 2, *[self.rank * self.state_dim] * 2, *[self.heads] * 3, self.angles]

    def state_bytes(self) -> int:
        """`4 (E N + R H N + E + H pairs)`: the memory, the last keys and x, the angles."""
        keys = self.rank * self.state_dim
        return 4 * (self.channels * (self.state_dim + 1) + self.heads * (keys + self.angles))

    def flops_per_token(self, length: int) -> int:
        """With each token's scores of its own and, for more ranks than one, those that came too late for
        `_read_before_write`; and what biases, rotates and weighs queries and keys."""
        projections = self.width * (sum(self.columns) + self.channels)
        sizes = self.heads, self.state_dim, self.P
        mix = self.rank * flops_per_token(length * self.rank, *sizes, channels=False)
        own = (1 + (self.rank > 1)) * self.rank**2 * self.heads * (self.state_dim + self.P)
        return 2 * (projections + own) + mix + 8 * self.rank * self.heads * self.state_dim


@struct.dataclass
class State:
    memory: Array  # [B, H, N, P]
    key: Array  # [B, R, H, N] the last token's, rotated
    value: Array  # [B, H, P] the last token's x
    angle: Array  # [B, H, pairs] in [-pi, pi]


def init(key: Array, cfg: Config) -> Params:
    """As in the docstring of this module; matrices with unit-variance outputs."""
    in_key, dt_key, out_key = jax.random.split(key, 3)
    params = {
        "w_in": weight(in_key, cfg.width, sum(cfg.columns)),
        "dt_bias": dt_bias_init(dt_key, (cfg.heads,)),
        "key_scale": jnp.ones(cfg.state_dim),
        "key_bias": jnp.ones((cfg.rank, cfg.heads, cfg.state_dim)),
        "query_scale": jnp.ones(cfg.state_dim),
        "query_bias": jnp.ones((cfg.rank, cfg.heads, cfg.state_dim)),
        "D": jnp.ones(cfg.heads),
        "w_out": weight(out_key, cfg.channels, cfg.width),
    }
    if cfg.rank > 1:
        shape = cfg.rank, cfg.heads, cfg.P
        params["mix_value"], params["mix_out"] = (jnp.full(shape, 1 / cfg.rank) for _ in range(2))
        params["mix_gate"] = jnp.ones(shape)
    return params


def init_state(cfg: Config, batch: int) -> State:
    return State(
        memory=jnp.zeros((batch, cfg.heads, cfg.state_dim, cfg.P)),
        key=jnp.zeros((batch, cfg.rank, cfg.heads, cfg.state_dim)),
        value=jnp.zeros((batch, cfg.heads, cfg.P)),
        angle=jnp.zeros((batch, cfg.heads, cfg.angles)),
    )


@struct.dataclass
class _Inputs:
    """What a token says, `[..., H, ...]`, at least float32; keys and queries before their rotation."""

    z: Array  # [..., H, P]
    x: Array  # [..., H, P]
    key: Array  # [..., R, H, N]
    query: Array  # [..., R, H, N]
    log_decay: Array  # [..., H]
    early: Array  # [..., H] beta: weight of the token before
    late: Array  # [..., H] gamma: weight of the token itself
    turn: Array  # [..., H, pairs] angle by which the state turns


def _heavy(a: Array) -> Array:
    """1 + a for a >= 0, 1 / (1 - a) below: positive, with one slope at 0."""
    return jnp.maximum(a, 0.0) + 1.0 / (1.0 - jnp.minimum(a, 0.0))


def _inputs(params: Params, cfg: Config, u: Array) -> _Inputs:
    ends = [sum(cfg.columns[: i + 1]) for i in range(len(cfg.columns) - 1)]
    z, x, b, c, dt, a, share, theta = map(wide, jnp.split(dense(u, params["w_in"]), ends, -1))
    b, c = (m.reshape(*m.shape[:-1], cfg.rank, 1, cfg.state_dim) for m in (b, c))
    dt, share = jax.nn.softplus(dt + params["dt_bias"]), jax.nn.sigmoid(share)
    return _Inputs(
        z=split_heads(z, cfg.heads),
        x=split_heads(x, cfg.heads),
        key=rms_norm(b, params["key_scale"]) + params["key_bias"],
        query=rms_norm(c, params["query_scale"]) + params["query_bias"],
        log_decay=-jnp.maximum(_heavy(a), 1e-4) * dt,
        early=(1 - share) * dt,
        late=share * dt,
        turn=jnp.pi * dt[..., None] * jnp.tanh(theta)[..., None, :],
    )


def _wrap(angle: Array) -> Array:
    """The same angle in [-pi, pi]."""
    return angle - 2 * jnp.pi * jnp.round(angle / (2 * jnp.pi))


def _angles(turn: Array, first: Array, segment_ids: Array | None) -> Array:
    """The running sum of turns in each document, from `first`, wrapped at every addition: `[B,T,H,pairs]`."""
    starts = jnp.zeros(turn.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)

    def combine(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], _wrap(a[1] + b[1]))

    def angles(first):
        turns = _wrap(turn.at[:, 0].add(first))
        return jax.lax.associative_scan(combine, (starts[..., None, None], turns), axis=1)[1]

    def summary(first):
        return None, angles(first)[:, -1]

    return angles(sequence.carried(first, segment_ids, summary, lambda _, first: first))


def _ranks(params: Params, name: str, x: Array) -> Array:
    """The R streams made of one: `[..., H, P] -> [..., R, H, P]`."""
    return x[..., None, :, :] * params.get(name, 1.0)


def _output(params: Params, u: Array, t: _Inputs, y: Array) -> Array:
    """Skip, gate, sum over ranks and projection of the reads `y [..., R, H, P]`."""
    y = y + params["D"][:, None] * _ranks(params, "mix_value", t.x)
    y = y * jax.nn.silu(_ranks(params, "mix_gate", t.z)) * params.get("mix_out", 1.0)
    return dense(merge_heads(jnp.sum(y, -3)).astype(u.dtype), params["w_out"])


def _entering(params: Params, t: _Inputs, state: State) -> Array:
    """The memory with the second write of the last token; `t` is the token that weighs it."""
    v = _ranks(params, "mix_value", state.value)
    return state.memory + t.early[..., None, None] * jnp.einsum("brhn,brhp->bhnp", state.key, v)


def _read_before_write(q, k, v, log_decay, state, segment_ids, implementation) -> tuple[Array, Array]:
    """All reads `U_{t-1}^T q_t [B,T,R,H,P]` and the last U, for `q, k [B,T,R,H,N]`, `v [B,T,R,H,P]`.

    The R writes of a token follow one another in time, and each query of the next token is asked after one
    of them; what the later ones would add is added directly.
    """
    batch, length, ranks = q.shape[:3]
    ahead = sequence.following(q)
    decay = jnp.pad(log_decay[:, :, None], ((0, 0), (0, 0), (0, ranks - 1), (0, 0)))
    reads, keys, values, decays = (
        x.reshape(batch, length * ranks, *x.shape[3:]) for x in (ahead, k, v, decay)
    )
    ids = None if segment_ids is None else jnp.repeat(segment_ids, ranks, 1)
    o, memory = gated_linear_attention(
        reads, keys, values, decays, state, segment_ids=ids, implementation=implementation
    )
    o = o.reshape(v.shape)
    if ranks > 1:
        missed = jnp.triu(jnp.ones((ranks, ranks), bool), 1)[:, :, None]
        scores = jnp.where(missed, jnp.einsum("btqhn,btkhn->btqkh", ahead, k), 0)
        o = o + jnp.einsum("btqkh,btkhp->btqhp", scores, v)
    first = jnp.einsum("bhnp,brhn->brhp", state, q[:, 0])
    return token_shift(o, first, segment_ids)[0], memory


def apply(params, cfg, x, state=None, *, segment_ids=None, implementation=None):
    """`x [B,T,D] -> (y [B,T,D], State, {})`; see the package docstring for the contract."""
    state = init_state(cfg, x.shape[0]) if state is None else state
    t = _inputs(params, cfg, x)
    angle = _angles(t.turn, state.angle, segment_ids)
    q, k = rotate(t.query, angle[:, :, None]), rotate(t.key, angle[:, :, None])
    v = _ranks(params, "mix_value", t.x)
    # The second write of each key belongs to the next token; the last one's is still to come.
    both = t.late + sequence.following(t.early)
    entering = _entering(params, jax.tree.map(lambda part: part[:, 0], t), state)
    read, memory = _read_before_write(
        q, both[:, :, None, :, None] * k, v, t.log_decay, entering, segment_ids, implementation
    )
    scores = t.late[:, :, None, None] * jnp.einsum("btqhn,btkhn->btqkh", q, k)
    own = jnp.einsum("btqkh,btkhp->btqhp", scores, v)
    y = jnp.exp(t.log_decay)[:, :, None, :, None] * read + own
    return _output(params, x, t, y), State(memory, k[:, -1], t.x[:, -1], angle[:, -1]), {}


def step(params, cfg, x_t, state):
    """One token: `x_t [B,D] -> (y_t [B,D], State)`."""
    t = _inputs(params, cfg, x_t)
    angle = _wrap(t.turn + state.angle)
    q, k = rotate(t.query, angle[:, None]), rotate(t.key, angle[:, None])
    write = jnp.einsum("brhn,brhp->bhnp", t.late[:, None, :, None] * k, _ranks(params, "mix_value", t.x))
    memory = jnp.exp(t.log_decay)[..., None, None] * _entering(params, t, state) + write
    y = jnp.einsum("bhnp,brhn->brhp", memory, q)
    return _output(params, x_t, t, y), State(memory, k, t.x, angle)
