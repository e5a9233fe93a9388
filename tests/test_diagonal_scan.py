"""The diagonal scan against numpy loops, and the layers made of it against their papers' equations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import assert_close, values_and_gradients

from layers import lru, min_gru, min_lstm, rg_lru, s4d, s5
from layers.state_spaces import hippo_legs
from pallas_kernels.diagonal_scan import diagonal_scan, diagonal_scan_step, flops_per_token
from pallas_kernels.long_conv import long_conv
from zoo import registry


def normal(seed, *shape, dtype=float):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def naive_scan(a, b, h):
    """Loops over time and batch; `a [B,T,...]`."""
    out = np.zeros_like(b)
    for row in range(len(b)):
        now = h[row]
        for t in range(b.shape[1]):
            now = a[row, t] * now + b[row, t]
            out[row, t] = now
    return out


SIZES = (3, 2)


@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("length", "packed"), [(1, False), (21, True)])
def test_equals_the_definition_and_numpy(length, packed, constant, dtype):
    a = normal(0, *(() if constant else (2, length)), *SIZES, dtype=dtype)
    a = a / (1 + jnp.abs(a))
    b, state = normal(1, 2, length, *SIZES, dtype=dtype), normal(2, 2, *SIZES, dtype=dtype)
    ids = jnp.array([[4] * 7 + [5] + [4] * 13, [1] * 20 + [0]]) if packed else None

    def run(implementation):
        def op(a, b, state):
            return diagonal_scan(a, b, state, segment_ids=ids, implementation=implementation)

        return values_and_gradients(op, a, b, state)

    result = run("xla")
    assert_close(result, run("reference"))
    full = np.array(jnp.broadcast_to(a, b.shape))
    if packed:
        full[0, [7, 8]] = full[1, 20] = 0
    h, last = result[0]
    np.testing.assert_allclose(h, naive_scan(full, b, state), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(last, h[:, -1])


def test_step_broadcasting_and_dtypes():
    """Axes of size 1, mixed real and complex, bfloat16: the step agrees with the scan."""
    a, b = normal(0, 2, 5, 1, 2) / 5, normal(1, 2, 5, *SIZES, dtype=complex)
    h, last = diagonal_scan(a, b)
    assert h.dtype == complex
    state = jnp.zeros((2, *SIZES), complex)
    for t in range(5):
        state = diagonal_scan_step(a[:, t], b[:, t], state)
    assert_close(state, last)
    constant = diagonal_scan_step(a[0, 0], b[:, 0], state)
    assert_close(constant, a[0, 0] * state + b[:, 0])
    narrow = diagonal_scan(a.astype(jnp.bfloat16), b.real.astype(jnp.bfloat16))
    assert narrow[0].dtype == narrow[1].dtype == jnp.float32


def test_decays_of_zero_and_one_are_exact():
    """Zero forgets even the largest number; one sums; gradients stay finite."""
    b, big = normal(1, 1, 6, 1), jnp.full((1, 1), 1e30)
    a = jnp.array([0.0, 1, 1, 0, 1, 1])[None, :, None]
    h, _ = diagonal_scan(a, b, big)
    expected = jnp.concatenate([jnp.cumsum(b[:, :3], 1), jnp.cumsum(b[:, 3:], 1)], 1)
    assert_close(h, expected)
    gradients = jax.grad(lambda a, b: jnp.sum(diagonal_scan(a, b, big)[0]), (0, 1))(a, b)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_backward_keeps_nothing_but_inputs_and_states():
    """Compiled memory of the gradient, in units of one `[B,T,...]` array."""
    length, size = 512, 64

    def loss(a, b):
        return jnp.sum(diagonal_scan(a, b)[0] ** 2)

    arrays = jnp.ones((1, length, size)), jnp.ones((1, length, size))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 7 * arrays[0].nbytes


def test_second_derivatives():
    """The adjoint is itself differentiable: gradients of gradients are those of the definition."""
    a, b, direction = normal(0, 2, 9, 3) / 3, normal(1, 2, 9, 3), normal(2, 2, 9, 3)

    @functools.partial(jax.jit, static_argnums=2)
    def twice(a, b, implementation):
        def loss(a):
            return jnp.sum(jnp.sin(diagonal_scan(a, b, implementation=implementation)[0]))

        return jax.grad(lambda a: jnp.sum(direction * jax.grad(loss)(a)))(a)

    assert_close(twice(a, b, "xla"), twice(a, b, "reference"))


@pytest.mark.parametrize("shape", [(3,), (2, 5, 2, 2), (5, 3, 2), (4, 2)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="does not fit b of shape"):
        diagonal_scan(jnp.ones(shape), jnp.ones((2, 5, *SIZES)))
    with pytest.raises(ValueError, match="no implementation 'abacus'"):
        diagonal_scan(jnp.ones(SIZES), jnp.ones((2, 5, *SIZES)), implementation="abacus")


def test_flops():
    assert flops_per_token(10) == 20
    assert flops_per_token(10, complex_numbers=True) == 80


def perturbed(layer, cfg, seed=0, scale=0.3):
    """Parameters away from any symmetric point."""
    leaves, tree = jax.tree.flatten(layer.init(jax.random.key(seed), cfg))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [p + scale * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def run_layer(layer, cfg, params, x):
    """`(y, State)` of one sequence `x [T, width]`."""
    y, state, aux = jax.jit(layer.apply, static_argnums=1)(params, cfg, x[None])
    assert aux == {}
    return np.asarray(y[0]), jax.tree.map(lambda s: np.asarray(s[0]), state)


def close(a, b, tolerance=1e-11):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def erf_gelu(x):
    return x * np.array([0.5 * (1 + math.erf(v / 2**0.5)) for v in x])


def glu(v):
    value, gate = np.split(v, 2)
    return value * sigmoid(gate)


def numbers(params):
    return {name: np.asarray(value) for name, value in params.items()}


def test_lru_equals_naive_numpy():
    cfg = lru.Config(width=4, state_dim=3)
    params, x = perturbed(lru, cfg), np.asarray(normal(3, 20, 4))
    y, state = run_layer(lru, cfg, params, x)
    p, h = numbers(params), np.zeros(3, complex)
    lam = np.exp(-np.exp(p["ssm_nu"]) + 1j * np.exp(p["ssm_theta"]))
    for t, u in enumerate(x):
        h = lam * h + np.exp(p["ssm_gamma_log"]) * (u @ (p["ssm_B_re"] + 1j * p["ssm_B_im"]))
        s = (h @ (p["C_re"] + 1j * p["C_im"])).real + p["D"] * u
        close(y[t], glu(erf_gelu(s) @ p["w_out"]))
    close(state.memory, h)


def test_lru_starts_on_its_ring_and_normalised():
    """Also where |lam| is nearly 1, which the formula of gamma must survive."""
    cfg = lru.Config(width=256, state_dim=512, r_min=0.9, r_max=0.999, max_phase=0.3)
    params = lru.init(jax.random.key(0), cfg)
    lam = np.exp(-np.exp(params["ssm_nu"]) + 1j * np.exp(params["ssm_theta"]))
    radius, phase = np.abs(lam), np.angle(lam)
    assert 0.9 <= radius.min() < 0.902 and 0.998 < radius.max() <= 0.999
    assert 0 < phase.min() < 0.01 and 0.29 < phase.max() <= 0.3
    assert abs(np.mean(radius**2) - (0.81 + 0.998) / 2) < 0.01
    close(np.exp(2 * params["ssm_gamma_log"]), 1 - radius**2, 1e-9)
    assert abs(np.mean(np.abs(params["ssm_B_re"] + 1j * params["ssm_B_im"]) ** 2) * 256 - 1) < 0.02


@pytest.mark.parametrize("gate", ["half", "full"])
def test_s5_equals_naive_numpy(gate):
    cfg = s5.Config(width=4, state_dim=8, blocks=2, gate=gate)
    params, x = perturbed(s5, cfg), np.asarray(normal(3, 20, 4))
    y, state = run_layer(s5, cfg, params, x)
    p, h = numbers(params), np.zeros(4, complex)
    lam, dt = -np.exp(p["ssm_A_log"]) + 1j * p["ssm_A_im"], np.exp(p["ssm_log_dt"])
    for t, u in enumerate(x):
        write = u @ (p["ssm_B_re"] + 1j * p["ssm_B_im"])
        h = np.exp(lam * dt) * h + (np.exp(lam * dt) - 1) / lam * write
        z = erf_gelu(2 * (h @ (p["C_re"] + 1j * p["C_im"])).real + p["D"] * u)
        close(y[t], glu(z @ p["w_out"]) if gate == "full" else z * sigmoid(z @ p["w_out"]))
    close(state.memory, h)


def test_s5_of_one_channel_is_s4d():
    """One input, one dt for all states: the same system, B moved into C."""
    small, large = s5.Config(width=1, state_dim=8, gate="full"), s4d.Config(width=1, state_dim=8)
    params, x = perturbed(s5, small), np.asarray(normal(3, 150, 1))
    params["ssm_log_dt"] = jnp.full(4, -3.0)
    b, c = (jax.lax.complex(params[f"{n}_re"].ravel(), params[f"{n}_im"].ravel()) for n in ("ssm_B", "C"))
    same = {
        "ssm_A_log": params["ssm_A_log"][None],
        "ssm_A_im": params["ssm_A_im"][None],
        "ssm_log_dt": params["ssm_log_dt"][:1],
        "C_re": (b * c).real[None],
        "C_im": (b * c).imag[None],
        "D": params["D"],
        "w_out": params["w_out"],
    }
    close(run_layer(s5, small, params, x)[0], run_layer(s4d, large, same, x)[0])


def test_s5_starts_as_if_it_changed_the_basis():
    """Moments of V* B and C V for real Gaussian B and complex Gaussian C, and their modes, J times over."""
    params = numbers(s5.init(jax.random.key(0), s5.Config(width=200, state_dim=200, blocks=2)))
    modes = hippo_legs(100)[0]
    close(-np.exp(params["ssm_A_log"]) + 1j * params["ssm_A_im"], np.tile(modes, 2))
    for name, variance in [("ssm_B", 0.5 / 200), ("C", 1 / 200)]:
        for part in ("re", "im"):
            assert abs(np.var(params[f"{name}_{part}"]) / variance - 1) < 0.05
    steps = np.exp(params["ssm_log_dt"])
    assert steps.shape == (100,) and 1e-3 <= steps.min() < 2e-3 and 5e-2 < steps.max() <= 0.1


RG = rg_lru.Config(width=4, channels=6, heads=2, conv=3)


def naive_rg_lru(p, x, cfg, first=(0,)):
    """`(y, h)`; documents start at the tokens in `first`."""
    half = cfg.E // cfg.heads
    h, past, out = np.zeros(cfg.E), np.zeros((cfg.conv, cfg.E)), []
    for t, token in enumerate(x):
        if t in first:
            past = np.zeros_like(past)
        past = np.concatenate([past[1:], [token @ p["w_x"] + p["x_bias"]]])
        u = p["conv_bias"] + sum(p["conv"][s] * past[s] for s in range(cfg.conv))
        blocks = [u[k * half : (k + 1) * half] for k in range(cfg.heads)]
        r, i = (
            sigmoid(
                np.concatenate([b @ w for b, w in zip(blocks, p[f"w_{n}"], strict=True)]) + p[f"{n}_bias"]
            )
            for n in "ri"
        )
        a = np.exp(-8 * r * np.log1p(np.exp(p["Lambda"])))
        h = i * u if t in first else a * h + np.sqrt(1 - a**2) * i * u
        gate = token @ p["w_gate"] + p["gate_bias"]
        gate = 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        out.append((h * gate) @ p["w_out"] + p["out_bias"])
    return np.stack(out), h


def test_rg_lru_equals_naive_numpy():
    params, x = perturbed(rg_lru, RG), np.asarray(normal(3, 20, 4))
    y, state = run_layer(rg_lru, RG, params, x)
    expected, h = naive_rg_lru(numbers(params), x, RG)
    close(y, expected)
    close(state.memory, h)
    ids = jnp.array([[0] * 9 + [1] * 11])
    packed = jax.jit(lambda x: rg_lru.apply(params, RG, x, segment_ids=ids)[0])(x[None])
    close(packed[0], naive_rg_lru(numbers(params), x, RG, first=(0, 9))[0])


def test_rg_lru_with_constant_gates_is_a_convolution():
    """Kernel `i sqrt(1 - a^2) a^l` on everything but the first token, which is not scaled."""
    cfg = rg_lru.Config(width=5, heads=1, conv=1)
    params, x = perturbed(rg_lru, cfg), np.asarray(normal(3, 40, 5))
    zero = jnp.zeros((1, 5, 5))
    params = {**params, "w_r": zero, "w_i": zero, "conv": jnp.ones((1, 5)), "conv_bias": jnp.zeros(5)}
    params = {**params, "w_x": jnp.eye(5), "x_bias": jnp.zeros(5)}
    # As if the gate were open: y = h.
    params = {**params, "w_gate": 0 * params["w_gate"], "gate_bias": jnp.full(5, 30.0)}
    params = {**params, "w_out": jnp.eye(5) / 30, "out_bias": jnp.zeros(5)}
    p = numbers(params)
    a = np.exp(-8 * sigmoid(p["r_bias"]) * np.log1p(np.exp(p["Lambda"])))
    kernel = np.sqrt(1 - a[:, None] ** 2) * a[:, None] ** np.arange(40)
    u = sigmoid(p["i_bias"]) * x
    u[0] /= np.sqrt(1 - a**2)
    close(run_layer(rg_lru, cfg, params, x)[0], jax.jit(long_conv)(u[None], kernel)[0])


def test_rg_lru_root_has_a_bounded_slope():
    """1000 at most, as it is elsewhere; also in the layer, where a closed gate makes a exactly 1."""
    slope = jax.vmap(jax.grad(rg_lru._sqrt))(jnp.array([0.0, 1e-9, 1e-4, 0.25]))
    close(slope, [1000, 1000, 50, 1])
    params = rg_lru.init(jax.random.key(0), RG)
    params["r_bias"] = jnp.full(6, -1e3)
    x = normal(1, 1, 9, 4)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(rg_lru.apply(p, RG, x)[0])))(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


def test_rg_lru_initial_decays():
    for ring, power in [("a", 1), ("a^c", 8)]:
        params = rg_lru.init(jax.random.key(0), rg_lru.Config(width=1000, ring=ring))
        at_open_gate = np.exp(-power * jax.nn.softplus(params["Lambda"]))
        assert 0.9 <= at_open_gate.min() < 0.901 and 0.998 < at_open_gate.max() <= 0.999
    assert abs(np.std(params["conv"]) - 0.05) < 0.003


def naive_min_rnn(kind, p, u):
    """In logarithms: log h = A + logcumsumexp(log value - A), A the running sum of log decays."""
    gates = u @ p["w_in"] + p["bias"]
    if kind == "gru":
        z, c = np.split(gates, 2, -1)
        log_keep, log_write = -np.logaddexp(0, z), -np.logaddexp(0, -z)
    else:
        f, i, c = np.split(gates, 3, -1)
        balance = np.logaddexp(0, -f) - np.logaddexp(0, -i)
        log_keep, log_write = -np.logaddexp(0, balance), -np.logaddexp(0, -balance)
    value = log_write + np.where(c >= 0, np.log(np.maximum(c, 0) + 0.5), -np.logaddexp(0, -c))
    total = np.cumsum(log_keep, 0)
    h = np.exp(total + np.logaddexp.accumulate(value - total, 0))
    return h @ p["w_out"], h[-1]


@pytest.mark.parametrize(("layer", "kind"), [(min_gru, "gru"), (min_lstm, "lstm")])
def test_minimal_rnns_equal_their_log_space_form(layer, kind):
    cfg = layer.Config(width=4)
    params, x = perturbed(layer, cfg), np.asarray(normal(3, 30, 4))
    y, state = run_layer(layer, cfg, params, x)
    expected, h = naive_min_rnn(kind, numbers(params), x)
    close(y, expected)
    close(state.memory, h)
    cfg = layer.Config(width=4, conv=2)
    params = {**params, "conv": jnp.array([[0.0] * 4, [1.0] * 4])}
    close(run_layer(layer, cfg, params, x)[0], expected)
    params = {**params, "conv": jnp.array([[1.0] * 4, [0.0] * 4])}
    delayed = np.concatenate([np.zeros((1, 4)), x[:-1]])
    close(run_layer(layer, cfg, params, x)[0], naive_min_rnn(kind, numbers(params), delayed)[0])


def test_balanced_min_lstm_is_min_gru():
    """An input gate of logit -f makes f + i = 1, and then f / (f + i) = 1 - z for z of logit -f."""
    params, x = perturbed(min_gru, min_gru.Config(width=4)), np.asarray(normal(3, 30, 4))
    (z, c), (z_bias, c_bias) = (jnp.split(params[n], 2, -1) for n in ("w_in", "bias"))
    other = {
        "w_in": jnp.concatenate([-z, z, c], 1),
        "bias": jnp.concatenate([-z_bias, z_bias, c_bias]),
        "w_out": params["w_out"],
    }
    same = run_layer(min_lstm, min_lstm.Config(width=4), other, x)[0]
    close(same, run_layer(min_gru, min_gru.Config(width=4), params, x)[0])


def test_dss_equals_its_convolution():
    """DSS-exp from its definition: `K_l = Re sum_n W_n (e^{dt lam_n} - 1) / lam_n e^{l dt lam_n}`."""
    cfg = registry.config("dss", 3, state_dim=8)
    params, x = perturbed(s4d, cfg), np.asarray(normal(3, 100, 3))
    assert params["ssm_A_log"].shape == (1, 4) and params["ssm_log_dt_im"].shape == (3,)
    y, _ = run_layer(s4d, cfg, params, x)
    p = numbers(params)
    real, imag = -np.exp(p["ssm_A_log"]), p["ssm_A_im"]
    scaled = np.exp(p["ssm_log_dt"])[:, None] * real + 1j * np.exp(p["ssm_log_dt_im"])[:, None] * imag
    weights = 2 * (p["C_re"] + 1j * p["C_im"]) * (np.exp(scaled) - 1) / (real + 1j * imag)
    kernel = np.einsum("dn,dnl->dl", weights, np.exp(scaled[..., None] * np.arange(100))).real
    for t in range(100):
        s = sum(kernel[:, l] * x[t - l] for l in range(t + 1)) + p["D"] * x[t]
        close(y[t], glu(erf_gelu(s) @ p["w_out"]), 1e-10)
    plain = s4d.Config(width=3, state_dim=8)
    start = s4d.init(jax.random.key(0), cfg)
    untied = {**start, "ssm_A_log": jnp.tile(start["ssm_A_log"], (3, 1))}
    untied["ssm_A_im"] = jnp.tile(start["ssm_A_im"], (3, 1))
    close(run_layer(s4d, cfg, start, x)[0], run_layer(s4d, plain, untied, x)[0])


@pytest.mark.parametrize(
    ("layer", "bad", "field"),
    [
        (lru, {"state_dim": 0}, "state_dim=0"),
        (lru, {"r_min": 0.9, "r_max": 0.5}, "r_min=0.9"),
        (lru, {"max_phase": 0.0}, "max_phase"),
        (s5, {"state_dim": 6, "blocks": 2}, "state_dim=6"),
        (s5, {"gate": "third"}, "gate='third'"),
        (s5, {"dt_min": 0.2}, "dt_min=0.2"),
        (rg_lru, {"channels": 6}, "heads=4"),
        (rg_lru, {"ring": "b"}, "ring='b'"),
        (rg_lru, {"conv": 0}, "conv=0"),
        (min_gru, {"expand": 0}, "expand=0"),
        (min_gru, {"conv": -1}, "conv=-1"),
        (min_lstm, {"conv": -1}, "conv=-1"),
        (s4d, {"separate_dt": True, "init": "real"}, "separate_dt"),
        (s4d, {"separate_dt": True, "discretization": "bilinear"}, "separate_dt"),
    ],
)
def test_bad_configs_name_the_layer_and_the_field(layer, bad, field):
    with pytest.raises(ValueError, match=f"{layer.__name__.split('.')[-1]}: .*{field}"):
        layer.Config(width=8, **bad)
