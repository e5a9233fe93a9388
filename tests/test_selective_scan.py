"""The selective scan against its definition, and Mamba against a recurrence written out in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import mamba
from pallas_kernels.gated_linear_attention import gated_linear_attention
from pallas_kernels.selective_scan import flops_per_token, selective_scan, selective_scan_step, xla

BATCH, CHANNELS, STATES = 2, 3, 4
TOLERANCE = 1e-10


def inputs(length, seed=0, dt_shift=-1.0):
    """`x, dt, a, b, c, d, state` with decays between nearly 0 and nearly 1."""
    keys = jax.random.split(jax.random.key(seed), 7)
    x, dt = (jax.random.normal(k, (BATCH, length, CHANNELS)) for k in keys[:2])
    b, c = (jax.random.normal(k, (BATCH, length, STATES)) for k in keys[2:4])
    a = -jnp.exp(jax.random.normal(keys[4], (CHANNELS, STATES)))
    state = jax.random.normal(keys[5], (BATCH, CHANNELS, STATES))
    return x, jax.nn.softplus(2 * dt + dt_shift), a, b, c, jax.random.normal(keys[6], (CHANNELS,)), state


def run(*args, ids=None, implementation=None):
    return selective_scan(*args, segment_ids=ids, implementation=implementation)


def loss(*args, **options):
    """A smooth number in which every output and every entry of the final state has its own weight."""
    total = 0.0
    for out in run(*args, **options):
        weights = jnp.cos(0.7 * jnp.arange(out.size)).reshape(out.shape)
        total = total + jnp.sum(weights * out + 0.1 * out**2)
    return total


def values_and_gradients(args, **options):
    gradients = jax.grad(functools.partial(loss, **options), argnums=tuple(range(7)))
    return jax.jit(lambda *args: (run(*args, **options), gradients(*args)))(*args)


def assert_close(actual, desired, tolerance=TOLERANCE):
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, rtol=tolerance, atol=tolerance), actual, desired
    )


def assert_equals_reference(args, **options):
    assert_close(
        values_and_gradients(args, **options),
        values_and_gradients(args, implementation="reference", **options),
    )


@pytest.mark.parametrize("length", [1, 5, 17, 64, 67])
def test_equals_the_definition(length):
    assert_equals_reference(inputs(length))


def test_many_short_chunks(monkeypatch):
    monkeypatch.setattr(xla, "CHUNK_STATES", 1)
    assert xla.chunk_for(67, BATCH * CHANNELS * STATES) == 16
    assert_equals_reference(inputs(67), ids=jnp.array([[0] * 16 + [1] * 51, [0] * 30 + [2] * 37]))


# Boundaries on, before and after the end of the first chunk of 64; documents of one token; one document.
@pytest.mark.parametrize("lengths", [[64, 3], [63, 1, 1, 2], [1, 66], [10, 55, 2], [67]])
def test_segments(lengths):
    args = inputs(67)
    ids = jnp.broadcast_to(jnp.repeat(jnp.arange(len(lengths)), np.array(lengths)), (BATCH, 67))
    assert_equals_reference(args, ids=ids)
    x, dt, a, b, c, d, state = args
    pieces, start = [], 0
    for length in lengths:
        cut = [z[:, start : start + length] for z in (x, dt, b, c)]
        y, last = run(cut[0], cut[1], a, cut[2], cut[3], d, state)
        pieces.append(y)
        state, start = None, start + length
    assert_close(run(*args, ids=ids), (jnp.concatenate(pieces, 1), last))


def test_different_segments_in_each_row():
    assert_equals_reference(inputs(67), ids=jnp.array([[4] * 20 + [5] * 47, [1] * 65 + [0] * 2]))


@pytest.mark.deep
@pytest.mark.parametrize("dt", [0.0, 1e-12, 50.0, 1e4])
def test_extreme_steps(dt):
    """From a decay of exactly 1 to one of exactly 0, also in float32."""
    x, mixed, *rest = inputs(67)
    mixed = mixed.at[:, ::3].set(dt)
    assert_equals_reference((x, mixed, *rest))
    single = jax.tree.map(lambda z: z.astype(jnp.float32), (x, mixed, *rest))
    for leaf in jax.tree.leaves(values_and_gradients(single)):
        assert leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf))


def test_zero_steps_leave_the_state():
    x, dt, *rest = inputs(17)
    _, state = run(x, 0 * dt, *rest)
    np.testing.assert_array_equal(state, rest[-1])


def test_without_state_and_skip():
    x, dt, a, b, c, _, _ = inputs(5)
    expected = run(x, dt, a, b, c, jnp.zeros(CHANNELS), jnp.zeros((BATCH, CHANNELS, STATES)))
    assert_close(run(x, dt, a, b, c), expected)


def test_steps_equal_the_scan():
    x, dt, a, b, c, d, state = args = inputs(9)
    y, last = run(*args)
    for t in range(9):
        out, state = selective_scan_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], d, state)
        assert_close(out, y[:, t])
    assert_close(state, last)


def test_second_derivatives():
    """The adjoint is itself differentiable."""
    args = inputs(5)

    def hessian_product(implementation):
        def slope(*args):
            g = jax.grad(loss, argnums=(1, 2, 6))(*args, implementation=implementation)
            return sum(jnp.sum(jnp.sin(z)) for z in g)

        return jax.jit(jax.grad(slope, argnums=tuple(range(7))))(*args)

    assert_close(hessian_product(None), hessian_product("reference"))


def test_equal_decays_are_gated_linear_attention():
    """One step size and one decay for all channels: keys b, queries c, values dt x (the Mamba-2 core)."""
    x, dt, a, b, c, _, state = inputs(67)
    dt, rate = jnp.broadcast_to(dt[..., :1], dt.shape), a[0, 0]
    y, last = run(x, dt, jnp.full_like(a, rate), b, c, None, state)
    decay = (rate * dt[..., :1])[..., None]
    expected, memory = gated_linear_attention(
        c[:, :, None], b[:, :, None], (dt * x)[:, :, None], decay, jnp.swapaxes(state, 1, 2)[:, None]
    )
    assert_close((y, last), (expected[:, :, 0], jnp.swapaxes(memory[:, 0], 1, 2)))


def test_states_of_all_tokens_are_never_stored(float32):
    length, channels, states = 4096, 32, 16
    sequence, map_ = jnp.ones((1, length, channels)), jnp.ones((1, length, states))

    def gradient(x, dt, b, c):
        return jax.grad(lambda *z: jnp.sum(selective_scan(z[0], z[1], a, *z[2:])[0]), (0, 1, 2, 3))(
            x, dt, b, c
        )

    a = -jnp.ones((channels, states))
    compiled = jax.jit(gradient).lower(sequence, sequence, map_, map_).compile()
    dense = 4 * length * channels * states
    assert compiled.memory_analysis().temp_size_in_bytes < dense / 2


def test_chunk_length_follows_the_size_of_the_state():
    assert xla.chunk_for(1000, 4096) == 64
    assert xla.chunk_for(1000, 1 << 14) == 32
    assert xla.chunk_for(1000, 1 << 20) == 16
    assert xla.chunk_for(5, 4096) == 8


def test_bfloat16_in_and_out(float32):
    args = inputs(17)
    narrow = [z.astype(jnp.bfloat16) for z in args[:5]]
    y, state = run(*narrow)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    expected, _ = run(*(z.astype(jnp.float32) for z in narrow))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="no implementation 'abacus'"):
        run(*inputs(2), implementation="abacus")


def test_flops():
    assert flops_per_token(10, 16) == 10 * (7 * 16 + 3)


CFG = mamba.Config(width=6, state_dim=3, dt_rank=2)


def perturbed(cfg, seed=0):
    leaves, tree = jax.tree.flatten(mamba.init(jax.random.key(seed), cfg))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    )


def naive_mamba(params, cfg, u):
    """The whole mixer for one sequence `u [T, width]`: loops over time and channels, nothing shared."""
    p = jax.tree.map(np.asarray, params)
    E, N, R, taps = cfg.expand * cfg.width, cfg.state_dim, cfg.dt_rank, cfg.conv
    length = len(u)
    xz = u @ p["w_in"]
    x, z = xz[:, :E], xz[:, E:]
    past = np.concatenate([np.zeros((taps - 1, E)), x])
    h, out = np.zeros((E, N)), np.zeros((length, cfg.width))
    for t in range(length):
        v = p["conv_bias"] + sum(p["conv"][s] * past[t + s] for s in range(taps))
        v = v / (1 + np.exp(-v))
        row = v @ p["w_x"]
        r, b, c = row[:R], row[R : R + N], row[R + N :]
        dt = np.log1p(np.exp(r @ p["w_dt"] + p["dt_bias"]))
        y = np.zeros(E)
        for e in range(E):
            h[e] = np.exp(-dt[e] * np.exp(p["A_log"][e])) * h[e] + dt[e] * v[e] * b
            y[e] = h[e] @ c + p["D"][e] * v[e]
        out[t] = (y * z[t] / (1 + np.exp(-z[t]))) @ p["w_out"]
    return out, h


def test_layer_equals_naive_numpy():
    params, u = perturbed(CFG), jax.random.normal(jax.random.key(5), (BATCH, 70, CFG.width))
    y, state, aux = jax.jit(mamba.apply, static_argnums=1)(params, CFG, u)
    for row in range(BATCH):
        expected, memory = naive_mamba(params, CFG, np.asarray(u[row]))
        assert_close((y[row], state.memory[row]), (expected, memory))
    assert aux == {}


def test_layer_initial_values():
    cfg = mamba.Config(width=48)
    params = mamba.init(jax.random.key(0), cfg)
    assert cfg.rank == 3 and params["w_dt"].shape == (3, 96)
    np.testing.assert_allclose(jnp.exp(params["A_log"]), np.tile(np.arange(1, 17), (96, 1)), rtol=1e-12)
    np.testing.assert_array_equal(params["D"], np.ones(96))
    dt = jax.nn.softplus(params["dt_bias"])
    assert 1e-3 * (1 - 1e-9) <= dt.min() < 3e-3 and 3e-2 < dt.max() <= 0.1 * (1 + 1e-9)
    for name, fan_in in [
        ("w_in", 48),
        ("w_x", 96),
        ("w_dt", 3),
        ("w_out", 96),
        ("conv", 4),
        ("conv_bias", 4),
    ]:
        largest = jnp.abs(params[name]).max() * fan_in**0.5
        assert 0.95 < largest <= 1, name


def test_layer_sizes():
    cfg = mamba.Config(width=1024)
    assert cfg.state_bytes() == 4 * 2048 * (16 + 3)
    assert mamba.Config(width=17).rank == 2
    matrices = 1024 * 4096 + 2048 * (64 + 32) + 64 * 2048 + 2048 * 1024
    assert cfg.flops_per_token(100) == 2 * (matrices + 4 * 2048) + flops_per_token(2048, 16)


@pytest.mark.parametrize("field", ["width", "expand", "state_dim", "conv", "dt_rank"])
def test_layer_rejects_sizes_below_one(field):
    with pytest.raises(ValueError, match=f"mamba: {field}=0"):
        mamba.Config(**{"width": 8, field: 0})


def test_layer_without_neighbours():
    """A convolution of one tap: an empty window in the state."""
    cfg = mamba.Config(width=4, state_dim=2, conv=1)
    params, u = perturbed(cfg), jax.random.normal(jax.random.key(5), (BATCH, 6, 4))
    y, state, _ = mamba.apply(params, cfg, u)
    assert state.conv.shape == (BATCH, 0, 8)
    out, _ = mamba.step(params, cfg, u[:, 0], mamba.init_state(cfg, BATCH))
    assert_close(out, y[:, 0])
