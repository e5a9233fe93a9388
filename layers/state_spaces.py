"""Parts of state spaces: initial values, step sizes and decays, complex maps, the block around them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from layers.common import Params, dense, wide

# FLOPs of an exact GELU: XLA writes the error function out, as polynomials for either range.
GELU_FLOPS = 66


def log_uniform(key: Array, shape: tuple[int, ...], low: float, high: float) -> Array:
    """Logarithms of numbers that are log-uniform in [low, high]."""
    return jax.random.uniform(key, shape, minval=np.log(low), maxval=np.log(high))


def hippo_legs(states: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegS as a diagonal minus a rank one: `(lam, P, B)`, each `[states/2]` complex128.

    A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k; A + P P^T = -I/2 + (skew), P_n = sqrt(n + 1/2),
    is normal, hence V diag(lam) V* with a unitary V; P and B (B_n = sqrt(2n+1)) are returned in its basis,
    one of each conjugate pair. Gu et al. 2021 (arXiv 2111.00396) theorem 1 and appendix C.1.
    """
    n = np.arange(states)
    b = np.sqrt(2 * n + 1.0)
    p = b / np.sqrt(2)
    skew = np.outer(b, b) / 2 * (np.tri(states, k=-1).T - np.tri(states, k=-1))
    # i times a skew-symmetric matrix is Hermitian: real frequencies, orthonormal modes, in pairs +-w.
    frequency, modes = np.linalg.eigh(-1j * skew)
    upper = modes[:, frequency > 0].conj().T
    return -0.5 + 1j * frequency[frequency > 0], upper @ p, upper @ b


def dt_bias_init(key: Array, shape: tuple[int, ...], low: float = 1e-3, high: float = 1e-1) -> Array:
    """b with softplus(b) log-uniform in [low, high] (Mamba, arXiv 2312.00752 sec. 3.6)."""
    dt = jnp.maximum(jnp.exp(log_uniform(key, shape, low, high)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))


def softplus_decay(logits: Array, A_log: Array, dt_bias: Array) -> Array:
    """The log decay `-exp(A_log) softplus(logits + dt_bias)`, at least float32."""
    return -jnp.exp(wide(A_log)) * jax.nn.softplus(wide(logits) + dt_bias)


def per_channel(x: Array, width: int) -> Array:
    """`[..., S, N] -> [..., D, N]`: channel d gets row d mod S."""
    return x if x.shape[-2] == width else jnp.tile(x, (width // x.shape[-2], 1))


def dense_to_complex(x: Array, re: Array, im: Array) -> Array:
    """`x @ (re + i im)` for real x, at least complex64."""
    return jax.lax.complex(wide(dense(x, re)), wide(dense(x, im)))


def dense_to_real(h: Array, re: Array, im: Array) -> Array:
    """`Re(h @ (re + i im))` for complex h."""
    return dense(h.real, re) - dense(h.imag, im)


def state_space_output(params: Params, x: Array, y: Array) -> Array:
    """The block around a state space: `GLU(W_out gelu(y + D x))`, w_out `[D, 2D]`, in x's dtype."""
    y = jax.nn.gelu((wide(y) + params["D"] * wide(x)).astype(x.dtype), approximate=False)
    value, gate = jnp.split(dense(y, params["w_out"]), 2, -1)
    return value * jax.nn.sigmoid(gate)
