"""Convolution kernels K_j = C A^j B of a state space, without stepping through time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def powers(a: Array, length: int) -> Array:
    """`a^0 ... a^{length-1}` on a new last axis, by doubling: no logarithm, so a = 0 is no special case."""
    table, square = jnp.ones_like(a)[..., None], a[..., None]
    while table.shape[-1] < length:
        table = jnp.concatenate([table, table * square], -1)
        square = square * square
    # Without the barrier XLA on CPU fuses the doublings into every consumer and repeats them there.
    return jax.lax.optimization_barrier(table[..., :length])


def vandermonde(a: Array, weight: Array, length: int) -> Array:
    """`K_j = sum_n weight_n a_n^j` over all states; `a, weight [D,M] -> [D, length]`.

    With j = i m + r the powers factor into a^{im} a^r: about 2 sqrt(length) of them, and one product over n
    per channel in place of a `[D, M, length]` table.
    """
    m = 1 << ((length - 1).bit_length() + 1) // 2
    fine = powers(a, m)
    coarse = weight[..., None] * powers(fine[..., -1] * a, -(-length // m))
    rows = jnp.einsum("dni,dnr->dir", coarse.real, fine.real)
    if jnp.iscomplexobj(a):
        rows = 2 * (rows - jnp.einsum("dni,dnr->dir", coarse.imag, fine.imag))
    return rows.reshape(a.shape[0], -1)[:, :length]


def _inverse_dft(spectrum: Array, length: int) -> Array:
    """Real `[D, length]` from the half spectrum `[D, length//2 + 1]` at `e^{-2 pi i k / length}`.

    A product with a constant matrix: lengths are small, and no FFT runs beside those of other layers.
    """
    k, j = np.arange(length // 2 + 1)[:, None], np.arange(length)
    angle = 2 * np.pi * (k * j % length) / length
    weight = np.where((k == 0) | (2 * k == length), 1.0, 2.0) / length
    cos, sin = (jnp.asarray(weight * f(angle), spectrum.real.dtype) for f in (np.cos, np.sin))
    return spectrum.real @ cos - spectrum.imag @ sin


def cauchy(lam: Array, p: Array, b: Array, c_tilde: Array, dt: Array, length: int) -> Array:
    """Kernel of the bilinear discretisation of `A = diag(lam) - sum_r p_r p_r*`; arguments as in `api.py`.

    With s(u, v) = dt sum_n u_n v_n / (2 (1 - z) - dt lam_n (1 + z)) the generating function
    sum_j K_j z^j (j < length), at the roots of unity z, is for rank one

        2 s(C~, B) - 2 (1 + z) s(C~, P) s(P*, B) / (1 + (1 + z) s(P*, P)),

    and for more of them the same correction of all s(u, v), one rank after the other. The textbook factors
    2/(1 + z) are multiplied out: z = -1 is an ordinary point.
    """
    half = length // 2 + 1
    roots = np.exp(-2j * np.pi * np.arange(half) / length)
    z = jnp.asarray(np.concatenate([roots, roots.conj()]), lam.dtype)
    poles = dt[:, None, None] / (2 * (1 - z) - (dt[:, None] * lam)[..., None] * (1 + z))
    p = p.reshape(-1, *lam.shape)
    rows, columns = [c_tilde, *jnp.conj(p)], [b, *p]
    sums = jnp.einsum("dqn,dnz->dqz", jnp.stack([u * v for u in rows for v in columns], 1), poles)
    # The conjugate half at z is the conjugate of the stored half at conj(z): not twice a real part.
    flat = list(jnp.moveaxis(sums[..., :half] + jnp.conj(sums[..., half:]), 1, 0))
    table = [[flat.pop(0) for _ in columns] for _ in rows]
    shift = 1 + z[:half]
    for r in range(1, len(rows)):
        rest = (0, *range(r + 1, len(rows)))
        for i, j in itertools.product(rest, rest):
            table[i][j] -= shift * table[i][r] * table[r][j] / (1 + shift * table[r][r])
    return _inverse_dft(2 * table[0][0], length)


def truncate(c: Array, c_power: Array) -> Array:
    """`C~ = C - C A^L` for `cauchy`, from the row `c_power [D,2M]` = C A^L on stacked (Re, Im) states."""
    re, im = jnp.split(c_power, 2, -1)
    return c - jax.lax.complex(re, -im) / 2
