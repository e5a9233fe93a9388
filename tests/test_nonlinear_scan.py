"""The scan of nonlinear cells against its definition, and LSTM and GRU written out in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import assert_close, values_and_gradients

from layers import gru, lstm
from pallas_kernels.nonlinear_scan import nonlinear_scan, xla


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def cell(weight, state, inputs):
    """A cell with a nested state, parameters of its own and an output that is not its state."""
    u, gate = inputs["u"], inputs["gate"]
    h = jnp.tanh(state["h"] @ weight + u)
    return {"h": h, "count": 0.5 * state["count"] + gate}, (h * gate[:, None], state["count"])


# One token, one chunk, a chunk and a tail, whole chunks; the boundaries at their edges and between.
@pytest.mark.parametrize("length", [1, 16, 37, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_definition(length, packed):
    weight, state = normal(0, 3, 3), {"h": normal(1, 2, 3), "count": normal(2, 2)}
    inputs = {"u": normal(3, 2, length, 3), "gate": normal(4, 2, length)}
    fresh = {"h": normal(5, 2, 3), "count": normal(6, 2)}
    time = jnp.arange(length)
    ids = 3 - (time >= jnp.array([[16], [20]])) - (time >= 33) if packed else None

    def run(implementation):
        def op(weight, inputs, state, fresh):
            return nonlinear_scan(
                functools.partial(cell, weight),
                inputs,
                state,
                segment_ids=ids,
                reset_state=fresh,
                implementation=implementation,
            )

        return values_and_gradients(op, weight, inputs, state, fresh)

    assert_close(run("xla"), run("reference"))


def test_memory_grows_like_the_root_of_the_length():
    """A cell of many steps inside keeps much for its backward pass: for one chunk at a time only."""
    length, size = 1024, 32

    def busy(state, u):
        for _ in range(8):
            state = jnp.tanh(state + u)
        return state, state[:, :1]

    def temporary(implementation):
        def loss(u):
            out, _ = nonlinear_scan(busy, u, jnp.zeros((1, size)), implementation=implementation)
            return jnp.sum(out)

        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((1, length, size))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary("xla") < temporary("reference") / 3


def test_chunks():
    assert [xla.chunk_for(n) for n in (1, 16, 17, 256, 1024, 65_536)] == [1, 16, 16, 16, 32, 256]
    with pytest.raises(ValueError, match="no implementation 'abacus'"):
        nonlinear_scan(lambda s, u: (s, u), jnp.ones((1, 2)), jnp.ones(1), implementation="abacus")


def perturbed(layer, cfg):
    leaves, tree = jax.tree.flatten(layer.init(jax.random.key(0), cfg))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [p + 0.5 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_lstm_equals_naive_numpy():
    cfg = lstm.Config(width=4, hidden=3)
    params, x = perturbed(lstm, cfg), normal(3, 1, 20, 4)
    y, state, aux = jax.jit(lstm.apply, static_argnums=1)(params, cfg, x)
    p, h, c = jax.tree.map(np.asarray, params), np.zeros(3), np.zeros(3)
    for t, u in enumerate(np.asarray(x[0])):
        i, f, g, o = np.split(u @ p["w_in"] + h @ p["w_hidden"] + p["bias"], 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        np.testing.assert_allclose(y[0, t], h @ p["w_out"], rtol=1e-11, atol=1e-11)
    assert_close((state.memory[0], state.cell[0], aux), (h, c, {}))


def test_gru_equals_naive_numpy():
    cfg = gru.Config(width=4, hidden=3)
    params, x = perturbed(gru, cfg), normal(3, 1, 20, 4)
    y, state, aux = jax.jit(gru.apply, static_argnums=1)(params, cfg, x)
    p, h = jax.tree.map(np.asarray, params), np.zeros(3)
    (w_r, w_z, w_n), (u_r, u_z, u_n) = (np.split(p[n], 3, 1) for n in ("w_in", "w_hidden"))
    b_r, b_z, b_n = np.split(p["bias"], 3)
    for t, u in enumerate(np.asarray(x[0])):
        r, z = sigmoid(u @ w_r + h @ u_r + b_r), sigmoid(u @ w_z + h @ u_z + b_z)
        n = np.tanh(u @ w_n + b_n + r * (h @ u_n + p["hidden_bias"]))
        h = (1 - z) * n + z * h
        np.testing.assert_allclose(y[0, t], h @ p["w_out"], rtol=1e-11, atol=1e-11)
    assert_close((state.memory[0], aux), (h, {}))


@pytest.mark.parametrize(("layer", "gates"), [(lstm, 4), (gru, 3)])
def test_initial_values(layer, gates):
    cfg = layer.Config(width=8, hidden=6)
    params = layer.init(jax.random.key(0), cfg)
    for matrix in np.split(np.asarray(params["w_hidden"]), gates, 1):
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(6), atol=1e-12)
    expected = np.zeros(6 * gates)
    if layer is lstm:
        expected[6:12] = 1
    np.testing.assert_array_equal(params["bias"], expected)
    with pytest.raises(ValueError, match="hidden=0"):
        layer.Config(width=8, hidden=0)
