"""The chunkwise form of a time-invariant state space, and the FFT convolution.

Within a chunk of length C the kernel is a Toeplitz matrix, and tables lead in and out of the state s:

    y_i = sum_{j<=i} K_{i-j} u_j + (C A^{i+1}) s,      s' = A^C s + sum_j A^{C-1-j} B u_j.

The tables are made once for C tokens, whatever T, and all chunks share them: everything but the small
recurrence over s is one matrix product per channel with all chunks as columns. A tail of r < C tokens
is a chunk of its own with the tables cut to r, so that the final state is exact for every T.

States are real here: a complex one is stacked to (Re, Im), where A of a conjugate-symmetric system acts as a
real matrix even if, as with a low-rank term, it couples conjugate halves.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import chunk_segments
from pallas_kernels.long_conv.kernels import cauchy, powers, truncate, vandermonde
from pallas_kernels.long_conv.reference import Bilinear, bilinear, dplr_advance

# A power of two. 2 CPU cores, B=1 T=32k D=128 N=64: 32 and 256 are 1.1 to 1.5 times slower; 128 is up to a
# tenth faster, but short sequences then pay for tables twice as large.
CHUNK = 64
# A rounded power of A stays in the state for as long as it remembers: no shortened mantissas on accelerators.
FULL_PRECISION = functools.partial(jax.default_matmul_precision, "highest")


class Tables(NamedTuple):
    """A system on stacked states of S real numbers, for chunks of up to C tokens."""

    kernel: Array  # [D,C] K_j = C A^j B
    read: Array  # [D,S,C] C A^{j+1}
    write: Array  # [D,S,C] A^{C-1-j} B
    squares: tuple[Array, ...]  # A, A^2, A^4 ... A^C: `[D,S,S]`, or a diagonal `[D,M]`, real or complex

    def cut(self, length: int) -> "Tables":
        """For chunks of `length` <= C."""
        write = self.write[..., self.write.shape[-1] - length :]
        return self._replace(kernel=self.kernel[:, :length], read=self.read[..., :length], write=write)


def stack(x: Array, axis: int = -1) -> Array:
    """A vector of the stored half as real numbers (Re, Im); real vectors as they are."""
    return jnp.concatenate([x.real, x.imag], axis) if jnp.iscomplexobj(x) else x


def unstack(x: Array, like: Array) -> Array:
    """Inverse of `stack` on the last axis; complex where `like` is."""
    return jax.lax.complex(*jnp.split(x, 2, -1)) if jnp.iscomplexobj(like) else x


def stack_row(x: Array, axis: int = -1) -> Array:
    """The row r with `r . stack(s) = inner(x, s)`."""
    return 2 * stack(jnp.conj(x), axis) if jnp.iscomplexobj(x) else x


def diagonal_tables(a: Array, b: Array, c: Array) -> Tables:
    """Tables of `diagonal_step`'s system `a, b, c [D,M]`."""
    table = powers(a, CHUNK)
    squares = [a]
    while 1 << (len(squares) - 1) < CHUNK:
        squares.append(squares[-1] * squares[-1])
    return Tables(
        kernel=vandermonde(a, b * c, CHUNK),
        read=stack_row((a * c)[..., None] * table, 1),
        write=stack(b[..., None] * table[..., ::-1], 1),
        squares=tuple(squares),
    )


def _dplr_matrix(lam: Array, system: Bilinear) -> Array:
    """One token's map of stacked states, `[D,2M,2M]`."""
    channels, size = lam.shape[0], 2 * lam.shape[1]
    basis = jnp.broadcast_to(jnp.eye(size, dtype=lam.real.dtype)[:, None], (size, channels, size))
    return jnp.moveaxis(stack(dplr_advance(unstack(basis, lam), system)), 0, 2)


def dplr_power(lam: Array, p: Array, dt: Array, length: int) -> Array:
    """What `length` tokens of `dplr_ssm` without input do to a stacked state, `[D,2M,2M]`."""
    with FULL_PRECISION():
        matrix = _dplr_matrix(lam, bilinear(lam, p, jnp.zeros_like(lam), dt))
        return jnp.linalg.matrix_power(matrix, length)


def dplr_moved(power: Array, state: Array) -> Array:
    """`dplr_power` applied to `state [B,D,M]`."""
    with FULL_PRECISION():
        return unstack(jnp.einsum("dmn,bdn->bdm", power, stack(state)), state)


def dplr_tables(lam: Array, p: Array, b: Array, c: Array, dt: Array) -> Tables:
    """Tables of `dplr_step`'s system: powers by doubling, the kernel from its generating function."""
    system = bilinear(lam, p, b, dt)
    square = _dplr_matrix(lam, system)
    read = jnp.einsum("dmn,dm->dn", square, stack_row(c))[..., None]
    write = stack(dplr_advance(jnp.zeros_like(lam), system, system.b))[..., None]
    squares = [square]
    while read.shape[-1] < CHUNK:
        read = jnp.concatenate([read, jnp.einsum("dmn,dmj->dnj", square, read)], -1)
        write = jnp.concatenate([jnp.matmul(square, write), write], -1)
        square = jnp.matmul(square, square)
        squares.append(square)
    kernel = cauchy(lam, p, b, truncate(c, read[..., -1]), dt, CHUNK)
    return Tables(kernel, read, write, tuple(squares))


def _advance(squares: tuple[Array, ...], state: Array, steps: int) -> Array:
    """`A^steps` on stacked states `[B,D,S]`, `steps` <= C a Python integer."""
    for bit, square in enumerate(squares):
        if steps >> bit & 1:
            if square.ndim == 3:
                state = jnp.einsum("dmn,bdn->bdm", square, state)
            else:
                state = stack(square * unstack(state, square))
    return state


def toeplitz(kernel: Array) -> Array:
    """`[D,C] -> [D,C,C]`: entry (j, i) is K_{i-j}, or 0 where i < j. By reshaping: no gather, no scatter."""
    size = kernel.shape[1]
    row = jnp.pad(kernel, ((0, 0), (0, size)))
    rows = jnp.tile(row, (1, size))[:, : size * (2 * size - 1)]
    return rows.reshape(-1, size, 2 * size - 1)[..., :size]


@jax.custom_vjp
def _within_runs(x: Array, table: Array, run: Array) -> Array:
    """`y_i = sum_j [run_i == run_j] table_ji x_j`: `x [D,m,C]`, `table [D,C,C]`, `run [m,C]` from 0.

    One product for each run of the chunk with the most runs: the mask of one run is a mask of rows times a
    mask of columns. Exact zeros cross a boundary, and documents longer than a chunk need two products.
    """

    def add(r, y):
        here = run == r
        return y + jnp.where(here, jnp.matmul(jnp.where(here, x, 0), table), 0)

    return jax.lax.fori_loop(0, jnp.max(run) + 1, add, jnp.zeros_like(x))


def _within_runs_forward(x, table, run):
    return _within_runs(x, table, run), (x, table, run)


def _within_runs_backward(saved, dy):
    # Written out because a loop of unknown length has no reverse derivative; linear in x and in table.
    x, table, run = saved

    def add(r, gradients):
        here = run == r
        dx, dtable = gradients
        own = jnp.where(here, dy, 0)
        dx = dx + jnp.where(here, jnp.einsum("dmi,dji->dmj", own, table), 0)
        return dx, dtable + jnp.einsum("dmj,dmi->dji", jnp.where(here, x, 0), own)

    zeros = (jnp.zeros_like(x), jnp.zeros_like(table))
    return *jax.lax.fori_loop(0, jnp.max(run) + 1, add, zeros), None


_within_runs.defvjp(_within_runs_forward, _within_runs_backward)


def _chunks(u: Array, tables: Tables, state: Array, runs: tuple[Array, Array] | None):
    """Whole chunks `u [B,n,C,D]`, stacked `state [B,D,S]`, runs of each token and of the one before it."""
    batch, count, chunk, width = u.shape
    x = jnp.moveaxis(u, 3, 0).reshape(width, batch * count, chunk)
    keep = jnp.ones((count, batch, 1, 1), bool)
    source = x
    if runs is None:
        out = jnp.matmul(x, toeplitz(tables.kernel))
    else:
        run, before = (r.reshape(-1, chunk) for r in runs)
        segments = chunk_segments(run, before[:, 0])
        out = _within_runs(x, toeplitz(tables.kernel), run - run[:, :1])
        source = jnp.where(segments.into_carry, x, 0)
        keep = segments.keep.reshape(batch, count).T[..., None, None]
    write = jnp.einsum("dmj,dsj->dms", source, tables.write).reshape(width, batch, count, -1)

    def cross(state, chunk_inputs):
        keep, write = chunk_inputs
        return jnp.where(keep, _advance(tables.squares, state, chunk), 0) + write, state

    state, entering = jax.lax.scan(cross, state, (keep, write.transpose(2, 1, 0, 3)))
    entering = entering.transpose(2, 1, 0, 3).reshape(width, batch * count, -1)
    past = jnp.matmul(entering, tables.read)
    out = out + (past if runs is None else jnp.where(segments.from_carry, past, 0))
    return jnp.moveaxis(out.reshape(width, batch, count * chunk), 0, 2), state


def _cut(x: Array, span: slice, chunk: int) -> Array:
    """The tokens of `span` as chunks: `[B,T,...] -> [B,n,chunk,...]`."""
    x = x[:, span]
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])


def _run(u: Array, tables: Tables, state: Array, segment_ids: Array | None):
    """Full chunks, then the tail as a shorter one; `u [B,T,D]`, stacked `state [B,D,S]`."""
    length = u.shape[1]
    full = length - length % CHUNK
    runs = None
    if segment_ids is not None:
        runs = segment_ids, jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], 1)
    outputs = []
    for span, chunk in ((slice(0, full), CHUNK), (slice(full, length), length - full)):
        if span.start < span.stop:
            own = None if runs is None else (_cut(runs[0], span, chunk), _cut(runs[1], span, chunk))
            out, state = _chunks(_cut(u, span, chunk), tables.cut(chunk), state, own)
            outputs.append(out)
    return jnp.concatenate(outputs, 1), state


def diagonal_ssm(u, a, b, c, state, segment_ids=None):
    """Chunk by chunk; shapes as in `api.py`."""
    with FULL_PRECISION():
        out, final = _run(u, diagonal_tables(a, b, c), stack(state), segment_ids)
    return out, unstack(final, state)


def dplr_ssm(u, lam, p, b, c, dt, state, segment_ids=None):
    """Chunk by chunk; shapes as in `api.py`."""
    with FULL_PRECISION():
        out, final = _run(u, dplr_tables(lam, p, b, c, dt), stack(state), segment_ids)
    return out, unstack(final, state)


def long_conv(u, kernel):
    """By FFT of twice the length; `u [B,T,D]`, `kernel [D,T]`, float32 or wider."""
    size = 1 << (2 * u.shape[1] - 1).bit_length()
    # One transform for all: jax 0.11 on few CPU cores can deadlock on several independent ones.
    both = jnp.concatenate([jnp.swapaxes(u, 1, 2), kernel[None]])
    spectrum = jnp.fft.rfft(both, size, axis=-1)
    out = jnp.fft.irfft(spectrum[:-1] * spectrum[-1], size, axis=-1)
    return jnp.swapaxes(out[..., : u.shape[1]], 1, 2)
