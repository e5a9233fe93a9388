"""S4 from HiPPO's measures and with shared sets, DSS-softmax: against dense matrices and sums in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import laguerre, legendre

from layers import s4, s4d
from layers.state_spaces import state_space_output
from zoo import registry

STATES = 8


def matrices(measure, size):
    """`A, B` of the measure, entry by entry."""
    r = np.sqrt(2 * np.arange(size) + 1.0)
    a, b = np.zeros((size, size)), r.copy()
    for n in range(size):
        for k in range(size):
            if measure == "legs":
                a[n, k] = -r[n] * r[k] if n > k else -(n + 1.0) * (n == k)
            elif measure == "legt":
                a[n, k] = -r[n] * r[k] * (1 if n >= k else (-1) ** (k - n))
            elif measure == "lagt":
                a[n, k] = -1.0 * (n >= k)
    if measure == "lagt":
        b = np.ones(size)
    if measure == "fout":
        f = np.zeros(size)
        f[::2] = np.sqrt(2)
        f[0] = 1
        for m in range(size // 2):
            a[2 * m, 2 * m + 1], a[2 * m + 1, 2 * m] = -2 * np.pi * m, 2 * np.pi * m
        a, b = a - 2 * np.outer(f, f), 2 * f
    return a, b


def response(measure, size, times):
    """`e^{tA} B`: what every state makes of an impulse t ago."""
    a, b = matrices(measure, size)
    eye, out = np.eye(size), []
    for t in times:
        small = a * t / 2**14
        fine = eye + small @ (eye + small @ (eye / 2 + small @ (eye / 6 + small / 24)))
        out.append(np.linalg.matrix_power(fine, 2**14) @ b)
    return np.array(out).T


def test_the_matrices_are_those_of_their_measures():
    """Legendre, Laguerre and Fourier functions of the age: LegS and LagT exactly, the windows nearly."""
    t = np.linspace(0.02, 2, 20)
    inside, away = t < 1, np.abs(t - 1) > 0.1
    for n in range(3):
        unit, r = np.eye(3)[n], np.sqrt(2 * n + 1)
        legs = r * legendre.legval(2 * np.exp(-t) - 1, unit) * np.exp(-t)
        lagt = laguerre.lagval(t, unit) * np.exp(-t)
        np.testing.assert_allclose(response("legs", 4, t)[n], legs, atol=1e-9)
        np.testing.assert_allclose(response("lagt", 4, t)[n], lagt, atol=1e-9)
        legt = r * legendre.legval(1 - 2 * t, unit) * inside
        assert np.mean((response("legt", 16, t)[n] - legt)[away] ** 2) < 0.08**2
        wave = (1, 0, np.sqrt(2))[n] * np.cos(np.pi * n * t) * inside
        assert np.mean((response("fout", 16, t)[n] - wave)[away] ** 2) < 0.08**2


@pytest.mark.parametrize(("measure", "sets"), [("legs", 1), ("legt", 2), ("lagt", None), ("fout", 4)])
def test_s4_is_the_dense_recurrence_of_its_measure(measure, sets):
    """Bilinear steps of the full matrix, read out along B; every set has a B of its own."""
    cfg = s4.Config(4, state_dim=STATES, measure=measure, sets=sets, dt_min=0.05, dt_max=0.3)
    params = s4.init(jax.random.key(0), cfg)
    assert params["ssm_B_re"].shape == (sets or 4, STATES // 2)
    size = 1 + np.arange(sets or 4)
    b_re, b_im = (size[:, None] * params[f"ssm_B_{part}"] for part in ("re", "im"))
    params |= {"ssm_B_re": b_re, "ssm_B_im": b_im}
    params |= {"C_re": jnp.tile(b_re, (4 // len(size), 1)), "C_im": -jnp.tile(b_im, (4 // len(size), 1))}
    x = jax.random.normal(jax.random.key(1), (1, 70, 4))
    a, b = matrices(measure, STATES)
    if measure in ("legt", "fout"):
        a = a - 1e-4 * np.eye(STATES)
    out = np.zeros((70, 4))
    for d, dt in enumerate(np.exp(params["ssm_log_dt"])):
        own, state, eye = size[d % len(size)] * b, np.zeros(STATES), np.eye(STATES)
        for t in range(70):
            state = (eye + dt / 2 * a) @ state + dt * own * float(x[0, t, d])
            state = np.linalg.solve(eye - dt / 2 * a, state)
            out[t, d] = own @ state
    expected = state_space_output(params, x[0], jnp.array(out))
    y, _, _ = jax.jit(lambda params, x: s4.apply(params, cfg, x))(params, x)
    np.testing.assert_allclose(y[0], expected, rtol=1e-9, atol=1e-9)


def test_shared_sets_are_equal_sets():
    """Repeated by hand, for S4D and for a matrix of two ranks."""
    x = jax.random.normal(jax.random.key(1), (1, 9, 4))
    for layer, settings in ((s4d, {}), (s4, {"measure": "legt"})):
        shared, own = (layer.Config(4, state_dim=STATES, sets=sets, **settings) for sets in (2, None))
        params = layer.init(jax.random.key(0), shared)
        names = [name for name in params if name.startswith("ssm") and params[name].ndim > 1]
        params |= {
            name: params[name] + jax.random.normal(jax.random.key(2), params[name].shape) for name in names
        }
        repeated = params | {name: jnp.concatenate([params[name]] * 2, -2) for name in names}
        run = jax.jit(layer.apply, static_argnums=1)
        np.testing.assert_allclose(run(params, shared, x)[0], run(repeated, own, x)[0], rtol=1e-12)


@pytest.mark.parametrize("guard", [0.0, 1e-7])
def test_dss_softmax_is_a_row_softmax(guard):
    """`K = Re W diag(1 / lam) softmax(lam_n dt l)` with the softmax over l < L, from its definition."""
    length = 40
    cfg = registry.config("dss", 3, state_dim=STATES, softmax_length=length, dt_min=0.05, dt_max=0.3)
    params, x = s4d.init(jax.random.key(0), cfg), jax.random.normal(jax.random.key(1), (1, length, 3))
    lam = -np.exp(params["ssm_A_log"]) + 1j * params["ssm_A_im"]
    exponent = lam * np.exp(params["ssm_log_dt"])[:, None]
    terms = np.exp(exponent[..., None] * np.arange(length))
    total = np.sum(terms, -1) * (1 - np.exp(exponent))
    total = total * (1 + guard / np.abs(total) ** 2) / (1 - np.exp(exponent))
    kernel = np.einsum("dn,dnl->dl", 2 * (params["C_re"] + 1j * params["C_im"]) / (lam * total), terms).real
    out = np.array([np.convolve(x[0, :, d], kernel[d])[:length] for d in range(3)]).T
    expected = state_space_output(params, x[0], jnp.array(out))
    y, _, _ = jax.jit(lambda params, x: s4d.apply(params, cfg, x))(params, x)
    np.testing.assert_allclose(y[0], expected, atol=1e-10 if guard else 1e-5)


@pytest.mark.parametrize(
    ("layer", "bad", "message"),
    [
        (s4, {"measure": "legz"}, "s4: measure='legz'; choose from"),
        (s4, {"sets": 3}, "s4: sets=3 does not divide width=8"),
        (s4d, {"sets": 0}, "s4d: sets=0"),
        (s4d, {"softmax_length": 0}, "s4d: softmax_length=0"),
        (s4d, {"softmax_length": 9, "init": "real"}, "s4d: softmax_length=9 with init='real'"),
    ],
)
def test_bad_configs_are_refused(layer, bad, message):
    with pytest.raises(ValueError, match=message):
        layer.Config(8, **bad)
