"""Long convolutions and time-invariant state spaces: kernels, chunked forms, S4 and S4D around them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import s4, s4d
from layers.state_spaces import hippo_legs
from pallas_kernels.long_conv import (
    cauchy,
    diagonal_ssm,
    dplr_ssm,
    dplr_ssm_step,
    long_conv,
    vandermonde,
)

CHANNELS, MODES, BATCH = 3, 4, 2


def complex_normal(key, *shape):
    return jax.lax.complex(*jax.random.normal(key, (2, *shape)))


def dplr_system(seed=0, channels=CHANNELS, modes=MODES):
    """`lam, p, b, c, dt`: HiPPO-LegS with some noise, so that no channel is like another."""
    keys = jax.random.split(jax.random.key(seed), 5)
    lam, p, b = (
        v + 0.2 * complex_normal(k, channels, modes)
        for k, v in zip(keys, hippo_legs(2 * modes), strict=False)
    )
    lam = -jnp.abs(lam.real) + 1j * lam.imag
    dt = jnp.exp(jax.random.uniform(keys[4], (channels,), minval=-7.0, maxval=0.0))
    return lam, p, b, complex_normal(keys[3], channels, modes), dt


def diagonal_system(real, seed=0):
    """`a, b, c` with |a| < 1."""
    keys = jax.random.split(jax.random.key(seed), 3)
    draw = jax.random.normal if real else lambda k, s: complex_normal(k, *s)
    a, b, c = (draw(k, (CHANNELS, MODES)) for k in keys)
    return a / (0.1 + jnp.abs(a)), b, c


def dense_bilinear(lam, p, b, c, dt):
    """One channel as full complex matrices `A, B, C` over both conjugate halves."""
    lam, p, b, c = (np.concatenate([v, np.conj(v)]) for v in (lam, p, b, c))
    matrix, eye = np.diag(lam) - np.outer(p, np.conj(p)), np.eye(len(lam))
    inverse = np.linalg.inv(eye - dt / 2 * matrix)
    return inverse @ (eye + dt / 2 * matrix), inverse @ (dt * b), c


def markov(a, b, c, length):
    """`C A^j B` for j < length, by stepping."""
    out = []
    for _ in range(length):
        out.append((c @ b).real)
        b = a @ b
    return np.array(out)


def test_hippo_is_similar_to_its_diagonal_plus_low_rank_form():
    size = 16
    n = np.arange(size)
    b = np.sqrt(2 * n + 1.0)
    a = -np.outer(b, b) * np.tri(size, k=-1) - np.diag(n + 1.0)
    lam, p, q = hippo_legs(size)
    both = [np.concatenate([v, v.conj()]) for v in (lam, p, q)]
    form = np.diag(both[0]) - np.outer(both[1], both[1].conj())
    np.testing.assert_allclose(lam.real, -0.5, atol=0)
    assert np.all(lam.imag > 0)
    # The same moments B^T A^k B, and A's characteristic polynomial prod (s + n + 1).
    np.testing.assert_allclose(markov(form, both[2], both[2].conj(), 6), markov(a, b, b, 6), rtol=1e-11)
    for s in (0.3, 1.7j):
        ratio = np.linalg.det(s * np.eye(size) - form) / np.prod(s + n + 1)
        np.testing.assert_allclose(ratio, 1, rtol=1e-10)


@pytest.mark.parametrize(("length", "modes"), [(1, 2), (8, 1), (63, 4), (64, 32)])
def test_cauchy_kernel_is_the_dense_recurrence(length, modes):
    lam, p, b, c, dt = dplr_system(modes=modes)
    expected, c_tilde = [], []
    for system in zip(lam, p, b, c, np.array(dt), strict=True):
        a_bar, b_bar, row = dense_bilinear(*system)
        expected.append(markov(a_bar, b_bar, row, length))
        c_tilde.append((row - row @ np.linalg.matrix_power(a_bar, length))[:modes])
    actual = jax.jit(cauchy, static_argnums=5)(lam, p, b, jnp.array(c_tilde), dt, length)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-12)


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("length", [1, 7, 64, 100])
def test_vandermonde_kernel_is_the_recurrence(real, length):
    a, b, c = diagonal_system(real)
    actual = jax.jit(vandermonde, static_argnums=2)(a, b * c, length)
    total = np.sum(np.array(b * c)[..., None] * np.array(a)[..., None] ** np.arange(length), 1)
    np.testing.assert_allclose(actual, total if real else 2 * total.real, atol=1e-12)


def test_vandermonde_of_dead_modes_has_finite_gradients():
    zero = jnp.zeros((1, 2), complex)
    gradient = jax.grad(lambda a: jnp.sum(vandermonde(a, zero + 1, 20)))(zero)
    np.testing.assert_array_equal(gradient, 2)


@pytest.mark.parametrize("taps", [5, 37, 50])
def test_fft_convolution_is_the_direct_one(taps):
    u = jax.random.normal(jax.random.key(0), (2, 37, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, taps))

    def loss(u, kernel, implementation):
        y = long_conv(u, kernel, implementation=implementation)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    for actual, desired in zip(
        *(jax.tree.leaves(run(u, kernel, i)) for i in (None, "reference")), strict=True
    ):
        np.testing.assert_allclose(actual, desired, atol=1e-11)
    np.testing.assert_allclose(
        long_conv(u, kernel)[1, :, 2], np.convolve(u[1, :, 2], kernel[2])[:37], atol=1e-12
    )
    assert long_conv(u.astype(jnp.bfloat16), kernel).dtype == jnp.bfloat16


OPS = {
    "real": (diagonal_ssm, functools.partial(diagonal_system, True)),
    "complex": (diagonal_ssm, functools.partial(diagonal_system, False)),
    "dplr": (dplr_ssm, dplr_system),
}


def outputs_and_gradients(op, system, u, state, **kwargs):
    """Output, final state, and gradients of a number made of both with respect to everything."""

    def loss(system, u, state):
        y, last = op(u, *system, state, **kwargs)
        weights = jnp.cos(jnp.arange(last.size)).reshape(last.shape)
        return jnp.sum(jnp.sin(y)) + jnp.sum(weights * last.real) + jnp.sum(last.imag**2), (y, last)

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(system, u, state)


def assert_equals_reference(name, length, **kwargs):
    op, make = OPS[name]
    system = make()
    u = jax.random.normal(jax.random.key(5), (BATCH, length, CHANNELS))
    state = complex_normal(jax.random.key(6), BATCH, CHANNELS, MODES)
    state = state if jnp.iscomplexobj(system[0]) else state.real
    both = [
        jax.tree.leaves(outputs_and_gradients(op, system, u, state, implementation=i, **kwargs))
        for i in ("xla", "reference")
    ]
    for actual, desired in zip(*both, strict=True):
        scale = max(np.abs(desired).max(), 1)
        np.testing.assert_allclose(actual / scale, desired / scale, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "length"), [("real", 130), ("complex", 64), ("complex", 257), ("dplr", 7), ("dplr", 257)]
)
def test_chunks_equal_the_recurrence(name, length):
    assert_equals_reference(name, length)


IDS = {
    # Boundaries inside chunks, at the edge of one, an id that comes back, and a row of one-token documents.
    "mixed": [np.repeat([3, 4, 3, 5, 9], [10, 1, 53, 70, 16]), np.repeat([0, 1], [64, 86])],
    "single tokens": [np.arange(150), np.zeros(150, int)],
}


@pytest.mark.parametrize(
    ("name", "ids"), [("complex", "mixed"), ("real", "single tokens"), ("dplr", "mixed")]
)
def test_packed_chunks_equal_the_recurrence(name, ids):
    assert_equals_reference(name, 150, segment_ids=jnp.array(IDS[ids]))


def test_nothing_crosses_a_boundary():
    """Not small: zero, forwards and backwards, inside a chunk and from chunk to chunk."""
    system = dplr_system()
    ids = jnp.array(IDS["mixed"])
    u = jax.random.normal(jax.random.key(5), (BATCH, 150, CHANNELS))
    noise = jax.random.normal(jax.random.key(7), u.shape) * (ids == 4)[..., None] * 1e6
    run = jax.jit(lambda u: dplr_ssm(u, *system, segment_ids=ids)[0])
    changed = np.any(np.array(run(u + noise) != run(u)), -1)
    np.testing.assert_array_equal(changed, ids == 4)
    gradient = jax.jit(jax.grad(lambda u, t: jnp.sum(run(u)[0, t])))
    for first, t in ((10, 10), (11, 11), (64, 70), (64, 130), (134, 149)):
        reached = np.any(np.array(gradient(u, t)) != 0, -1)
        assert np.all(reached[0, first : t + 1])
        assert reached.sum() == t + 1 - first


def test_segments_under_vmap():
    a, b, c = diagonal_system(False)
    u = jax.random.normal(jax.random.key(5), (2, BATCH, 70, CHANNELS))
    ids = jnp.array([[np.repeat([0, 1], [30, 40])] * 2, [np.repeat([0, 1, 2, 3], [1, 2, 3, 64])] * 2])

    def loss(u, ids):
        return jnp.sum(jnp.sin(diagonal_ssm(u, a, b, c, segment_ids=ids)[0]))

    mapped = jax.jit(jax.vmap(jax.grad(loss)))(u, ids)
    alone = jnp.stack([jax.jit(jax.grad(loss))(*pair) for pair in zip(u, ids, strict=True)])
    np.testing.assert_allclose(mapped, alone, atol=1e-12)


def test_linear_time_step_is_the_dense_matrix():
    lam, p, b, c, dt = dplr_system()
    state = complex_normal(jax.random.key(1), BATCH, CHANNELS, MODES)
    u = jax.random.normal(jax.random.key(2), (BATCH, CHANNELS))
    y, new = dplr_ssm_step(u, lam, p, b, c, dt, state)
    for d in range(CHANNELS):
        a_bar, b_bar, row = dense_bilinear(lam[d], p[d], b[d], c[d], float(dt[d]))
        for i in range(BATCH):
            both = np.concatenate([state[i, d], np.conj(state[i, d])])
            expected = a_bar @ both + b_bar * u[i, d]
            np.testing.assert_allclose(new[i, d], expected[:MODES], atol=1e-12)
            np.testing.assert_allclose(y[i, d], (row @ expected).real, atol=1e-11)


@pytest.mark.parametrize("layer", [s4, s4d])
def test_float32_follows_float64(layer):
    """Full-sized systems over many chunks; parameters are the same float32 numbers in both."""
    cfg = layer.Config(4, state_dim=64)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), layer.init(jax.random.key(0), cfg))
    x = jax.random.normal(jax.random.key(1), (1, 3000, 4), jnp.float32)
    run = jax.jit(lambda p, x, s: layer.apply(p, cfg, x, s)[0])
    state = layer.init_state(cfg, 1)
    narrow = run(params, x, jax.tree.map(lambda s: s.astype(jnp.complex64), state))
    wide = run(jax.tree.map(lambda p: p.astype(float), params), x.astype(float), state)
    assert narrow.dtype == jnp.float32
    assert np.sqrt(np.mean((narrow - wide) ** 2) / np.mean(wide**2)) < 1e-5


@pytest.mark.parametrize(
    ("init", "discretization"), [("lin", "zoh"), ("inv", "bilinear"), ("legs", "bilinear"), ("real", "zoh")]
)
def test_s4d_settings(init, discretization):
    """Step equals apply with a carried state, the bytes are as stated, and all modes decay."""
    cfg = s4d.Config(3, state_dim=6, init=init, discretization=discretization)
    params = s4d.init(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (2, 70, 3))
    whole, last, _ = jax.jit(lambda x: s4d.apply(params, cfg, x))(x)
    state, out = s4d.init_state(cfg, 2), []
    one = jax.jit(lambda x, s: s4d.step(params, cfg, x, s))
    for t in range(70):
        y, state = one(x[:, t], state)
        out.append(y)
    np.testing.assert_allclose(whole, np.stack(out, 1), atol=1e-12)
    np.testing.assert_allclose(last.memory, state.memory, atol=1e-12)
    assert state.memory.nbytes == 2 * 2 * cfg.state_bytes()  # two sequences, in float64
    assert np.all(params["ssm_A_log"] < np.log(cfg.state_dim + 1))


@pytest.mark.parametrize("discretization", s4d.DISCRETIZATIONS)
def test_s4d_discretisation_follows_the_ode(discretization):
    """The response to a constant input tends to the continuous one as dt shrinks; ZOH has it exactly."""
    cfg = s4d.Config(1, state_dim=8, init="lin", discretization=discretization, dt_min=1e-3, dt_max=1e-3)
    params = {**s4d.init(jax.random.key(0), cfg)}
    state, steps = s4d.init_state(cfg, 1), 400
    _, last, _ = s4d.apply(params, cfg, jnp.ones((1, steps, 1)), state)
    lam = -0.5 + 1j * np.pi * np.arange(4)
    exact = np.expm1(lam * steps * 1e-3) / lam
    np.testing.assert_allclose(last.memory[0, 0], exact, atol=1e-12 if discretization == "zoh" else 1e-4)


@pytest.mark.parametrize("layer", [s4, s4d])
@pytest.mark.parametrize(
    "bad", [{"state_dim": 7}, {"state_dim": 0}, {"dt_min": 0.0}, {"dt_min": 0.2, "dt_max": 0.1}]
)
def test_configs_reject_what_cannot_be(layer, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        layer.Config(4, **bad)


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match="init='hippo'"):
        s4d.Config(4, init="hippo")
    with pytest.raises(ValueError, match="discretization='euler'"):
        s4d.Config(4, discretization="euler")
    with pytest.raises(ValueError, match="no implementation 'abacus'"):
        long_conv(jnp.ones((1, 2, 1)), jnp.ones((1, 2)), implementation="abacus")
