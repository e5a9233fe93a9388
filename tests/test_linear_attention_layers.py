"""Layers made of gated linear attention, against their papers' equations written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import (
    based,
    gated_linear_attention,
    hgrn2,
    lightning_attention,
    log_linear_attention,
    mamba2,
    mamba3,
    mlstm,
    retnet,
    rwkv6,
    slstm,
)
from pallas_kernels import gated_linear_attention as op

LENGTH, WIDTH = 11, 8
TOLERANCE = 1e-10


def setup(layer, cfg, noise=0.3):
    """Parameters away from their special initial values, and two sequences."""
    leaves, tree = jax.tree.flatten(layer.init(jax.random.key(0), cfg))
    rng = np.random.default_rng(1)
    params = tree.unflatten([np.asarray(p) + noise * rng.normal(size=p.shape) for p in leaves])
    return params, rng.normal(size=(2, LENGTH, cfg.width))


def assert_equals(layer, cfg, oracle, params, x):
    y = jax.jit(lambda params, x: layer.apply(params, cfg, x)[0])(params, x)
    expected = np.stack([oracle(params, cfg, sequence) for sequence in x])
    np.testing.assert_allclose(y, expected, rtol=TOLERANCE, atol=TOLERANCE)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, eps=1e-5):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)


def layer_norm(x, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)


def conv(x, filters):
    """`x [T,D]`, `filters [taps,D]`, the last tap on the token itself."""
    padded = np.concatenate([np.zeros((len(filters) - 1, x.shape[1])), x])
    return np.stack([np.sum(filters * padded[t : t + len(filters)], 0) for t in range(len(x))])


def blocks(x, w):
    """`x @ blockdiag(w)`."""
    size = w.shape[1]
    return np.concatenate([x[:, i * size : (i + 1) * size] @ w[i] for i in range(len(w))], -1)


def heads(x, count):
    """`[T, H K] -> [H, T, K]`."""
    return np.moveaxis(x.reshape(len(x), count, -1), 1, 0)


def merge(x):
    return np.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def mamba2_oracle(p, cfg, u):
    E, N, G = cfg.channels, cfg.state_dim, cfg.groups
    z, stream, dt = np.split(u @ p["w_in"], [E, 2 * E + 2 * G * N], -1)
    x, b, c = np.split(silu(conv(stream, p["conv"]) + p["conv_bias"]), [E, E + G * N], -1)
    x, b, c = heads(x, cfg.heads), heads(b, G), heads(c, G)
    dt = softplus(dt + p["dt_bias"])
    y = np.zeros_like(x)
    for h in range(cfg.heads):
        state, g = np.zeros((N, cfg.P)), h * G // cfg.heads
        for t in range(len(u)):
            state = np.exp(-dt[t, h] * np.exp(p["A_log"][h])) * state
            state += dt[t, h] * np.outer(b[g, t], x[h, t])
            y[h, t] = state.T @ c[g, t] + p["D"][h] * x[h, t]
    y = (merge(y) * silu(z)).reshape(len(u), G, -1)
    return (rms(y).reshape(len(u), -1) * p["norm_scale"]) @ p["w_out"]


def mamba3_oracle(p, cfg, u):
    """Two terms per write, and absolute angles that turn keys and queries as complex numbers."""
    H, A, R = cfg.heads, cfg.angles, cfg.rank
    z, x, b, c, dt, a, share, theta = np.split(u @ p["w_in"], np.cumsum(cfg.columns)[:-1], -1)
    dt, share, x, z = softplus(dt + p["dt_bias"]), sigmoid(share), heads(x, H), heads(z, H)
    rate = -np.maximum(np.where(a >= 0, 1 + a, 1 / (1 - np.minimum(a, 0))), 1e-4)

    def turned(m, scale, bias, angle):
        m = rms(m.reshape(R, -1)) * scale + bias
        pairs = (m[:, :A] + 1j * m[:, A : 2 * A]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag, m[:, 2 * A :]], -1)

    y = np.zeros_like(x)
    for h in range(H):
        state, angle, last = np.zeros((cfg.state_dim, cfg.P)), 0, np.zeros((cfg.state_dim, cfg.P))
        mix = [p[name][:, h] if R > 1 else np.ones((1, 1)) for name in ("mix_value", "mix_gate", "mix_out")]
        for t in range(len(u)):
            angle = angle + np.pi * dt[t, h] * np.tanh(theta[t])
            k = turned(b[t], p["key_scale"], p["key_bias"][:, h], angle)
            q = turned(c[t], p["query_scale"], p["query_bias"][:, h], angle)
            v = mix[0] * x[h, t]
            decay, write = np.exp(rate[t, h] * dt[t, h]), k.T @ v
            state = decay * state + (1 - share[t, h]) * dt[t, h] * decay * last
            state, last = state + share[t, h] * dt[t, h] * write, write
            reads = q @ state + p["D"][h] * v
            y[h, t] = np.sum(reads * silu(mix[1] * z[h, t]) * mix[2], 0)
    return merge(y) @ p["w_out"]


def hgrn2_oracle(p, cfg, x):
    bound = sigmoid(p["bound"]) if cfg.lower_bound else 0.0
    f = heads(bound + (1 - bound) * sigmoid(x @ p["w_forget"]), cfg.heads)
    q, v = heads(silu(x @ p["w_q"]), cfg.heads), heads(x @ p["w_v"], cfg.heads)
    o = np.zeros_like(v)
    for h in range(cfg.heads):
        state = np.zeros((cfg.K, cfg.K))
        for t in range(len(x)):
            state = f[h, t][:, None] * state + np.outer(1 - f[h, t], v[h, t])
            o[h, t] = state.T @ q[h, t] * cfg.K**-0.5
    return (rms(merge(o)) * p["norm_scale"]) @ p["w_out"]


def elementwise_hgrn_oracle(p, cfg, x):
    """With K = 1 the state is a vector: h = f h + (1 - f) v."""
    f, h, out = sigmoid(x @ p["w_forget"]), np.zeros(cfg.width), []
    for t in range(len(x)):
        h = f[t] * h + (1 - f[t]) * (x @ p["w_v"])[t]
        out.append(silu(x @ p["w_q"])[t] * h)
    return (rms(np.stack(out)) * p["norm_scale"]) @ p["w_out"]


def retnet_oracle(p, cfg, x):
    """The parallel form (Q K^T * D) V, with rotations as complex phases of differences of positions."""
    T, half = len(x), cfg.K // 2
    age = np.arange(T)[:, None] - np.arange(T)
    q, k, v = (heads(x @ p[name], cfg.heads) for name in ("w_q", "w_k", "w_v"))
    q, k = (m[..., :half] + 1j * m[..., half:] for m in (q, k))
    phase = np.exp(1j * age[..., None] * 10000.0 ** (-np.arange(half) / half))
    scores = np.einsum("hik,hjk,ijk->hij", q, k.conj(), phase).real * cfg.K**-0.5
    gamma = 1 - 2.0 ** (-5 - np.arange(cfg.heads))
    decay = np.where(age >= 0, gamma[:, None, None] ** np.maximum(age, 0), 0)
    return (silu(x @ p["w_gate"]) * merge(rms(scores * decay @ v, 1e-8))) @ p["w_out"]


def lightning_oracle(p, cfg, x):
    q, k, v = (heads(m, cfg.heads) for m in np.split(silu(x @ p["w_qkv"]), 3, -1))
    age = np.arange(len(x))[:, None] - np.arange(len(x))
    slope = cfg.slope * 2.0 ** (-8 * np.arange(1, cfg.heads + 1) / cfg.heads)
    decay = np.where(age >= 0, np.exp(-slope[:, None, None] * np.maximum(age, 0)), 0)
    o = (q @ np.swapaxes(k, 1, 2) * cfg.K**-0.5 * decay) @ v
    return (sigmoid(x @ p["w_gate"]) * rms(merge(o), 1e-6) * p["norm_scale"]) @ p["w_out"]


def based_oracle(p, cfg, x):
    """The kernel 1 + s + s^2 / 2 itself."""
    q, k, v = (heads(x @ p[name], cfg.heads) for name in ("w_q", "w_k", "w_v"))
    s = q @ np.swapaxes(k, 1, 2) * cfg.feature_dim**-0.5
    weights = np.tril(1 + s + s**2 / 2)
    return merge(weights @ v / weights.sum(-1, keepdims=True)) @ p["w_out"]


def rwkv6_oracle(p, cfg, x):
    H, before = cfg.heads, np.concatenate([np.zeros((1, cfg.width)), x[:-1]])
    z = x + (before - x) * p["mix"]

    def mixed(m):
        low = np.tanh(z @ p["w_mix_down"][:, m]) @ p["w_mix_up"][:, m]
        return x + (before - x) * (p["mix_streams"][m] + low)

    r, k, v = (heads(mixed(m) @ p[f"w_{name}"], H) for m, name in enumerate("rkv"))
    low = np.tanh(mixed(4) @ p["w_decay_down"]) @ p["w_decay_up"]
    w = heads(np.exp(-np.exp(p["decay_bias"] + low)), H)
    o = np.zeros_like(v)
    for h in range(H):
        state = np.zeros((cfg.K, cfg.K))
        for t in range(len(x)):
            write = np.outer(k[h, t], v[h, t])
            o[h, t] = (state + p["bonus"][h][:, None] * write).T @ r[h, t]
            state = w[h, t][:, None] * state + write
    o = layer_norm(o, 1e-5 * cfg.K) * p["norm_scale"][:, None] + p["norm_bias"][:, None]
    return (merge(o) * silu(mixed(3) @ p["w_gate"])) @ p["w_out"]


def mlstm_oracle(p, cfg, u):
    """Without any stabiliser: i = e^(...) as it stands, and the 1 in the maximum."""
    H = cfg.heads
    x, z = np.split(u @ p["w_up"], 2, -1)
    c = silu(conv(x, p["conv"]) + p["conv_bias"])
    q, k, v = blocks(c, p["w_q"]), blocks(c, p["w_k"]), blocks(x, p["w_v"])
    log_i, f = np.split(np.concatenate([q, k, v], -1) @ p["w_gates"], 2, -1)
    i, f = np.exp(log_i + p["input_bias"]), sigmoid(f + p["forget_bias"])
    q, k, v = heads(q, H), heads(k, H) * cfg.K**-0.5, heads(v, H)
    out = np.zeros_like(v)
    for h in range(H):
        memory, n = np.zeros((cfg.K, cfg.K)), np.zeros(cfg.K)
        for t in range(len(u)):
            memory = f[t, h] * memory + i[t, h] * np.outer(k[h, t], v[h, t])
            n = f[t, h] * n + i[t, h] * k[h, t]
            out[h, t] = memory.T @ q[h, t] / max(abs(n @ q[h, t]), 1)
    out = merge(layer_norm(out) * p["norm_scale"][:, None])
    return ((out + p["skip"] * c) * silu(z)) @ p["w_out"]


def mlstm_after_oracle(p, cfg, u):
    """With m as it stands in the paper: the divisor's eps is measured against e^m."""
    H, cap = cfg.heads, cfg.gate_cap
    q, k, v = (heads(m, H) for m in np.split(u @ p["w_qkv"], [H * cfg.K, 2 * H * cfg.K], -1))
    log_i, f = np.split(u @ p["w_gates"], 2, -1)
    log_i, f = cap * np.tanh((log_i + p["input_bias"]) / cap), cap * np.tanh((f + p["forget_bias"]) / cap)
    out = np.zeros_like(v)
    for h in range(H):
        memory, n, m = np.zeros((cfg.K, cfg.V)), np.zeros(cfg.K), 0.0
        for t in range(len(u)):
            decay, gain = sigmoid(f[t, h]), np.exp(log_i[t, h]) * cfg.K**-0.5
            memory = decay * memory + gain * np.outer(k[h, t], v[h, t])
            n = decay * n + gain * k[h, t]
            m = max(np.log(decay) + m, log_i[t, h])
            out[h, t] = memory.T @ q[h, t] / (max(abs(n @ q[h, t]), 1) + cfg.divisor_eps * np.exp(m))
    out = merge(layer_norm(out, cfg.eps) * p["norm_scale"][:, None])
    return (out * sigmoid(u @ p["w_gate"])) @ p["w_out"]


def slstm_oracle(p, cfg, x):
    """Without any stabiliser."""
    H, K = cfg.heads, cfg.K
    c_in = silu(conv(x, p["conv"]) + p["conv_bias"])
    sources = (c_in, "w_input"), (c_in, "w_forget"), (x, "w_value"), (x, "w_output")
    inputs = [heads(blocks(source, p[name]), H) for source, name in sources]
    out = np.zeros((H, len(x), K))
    for head in range(H):
        c, n, h = np.zeros(K), np.zeros(K), np.zeros(K)
        for t in range(len(x)):
            recurrent = (h @ p["w_recurrent"][head]).reshape(4, K) + p["gate_bias"][head]
            i, f, z, o = (m[head, t] + r for m, r in zip(inputs, recurrent, strict=True))
            c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
            n = sigmoid(f) * n + np.exp(i)
            h = out[head, t] = sigmoid(o) * c / n
    return merge(layer_norm(out) * p["norm_scale"][:, None]) @ p["w_out"]


def fenwick(q, k, v, decay, weights):
    """One head by the paper's recurrence: a full block's states are merged into the next larger one."""
    states, out = np.zeros((weights.shape[-1] + 1, q.shape[-1], v.shape[-1])), np.zeros_like(v)
    for t in range(len(q)):
        if t:
            zeros = (t & -t).bit_length() - 1
            merged = states[: zeros + 1].sum(0)
            states[: zeros + 1] = 0
            states[zeros + 1] += merged
        states *= decay[t]
        states[0] = np.outer(k[t], v[t])
        out[t] = sum(w * state.T @ q[t] for w, state in zip(weights[t], states[:-1], strict=True))
    assert not states[-1].any()
    return out


def log_linear_oracle(p, cfg, x):
    H, keys = cfg.heads, cfg.heads * cfg.K
    qkv = np.split(silu(conv(x @ p["w_qkv"], p["conv"])), [keys, 2 * keys], -1)
    q, k, v = (heads(m, H) for m in qkv)
    dt = softplus(x @ p["w_dt"] + p["dt_bias"])
    decay = np.exp(-np.exp(p["A_log"]) * dt)
    weights = softplus(p["level_scale"] * np.tensordot(x, p["w_level"], 1))
    o = [
        fenwick(q[h] * cfg.K**-0.5, k[h], dt[:, h, None] * v[h], decay[:, h], weights[:, h]) for h in range(H)
    ]
    return (merge(rms(np.stack(o)) * p["norm_scale"]) * silu(x @ p["w_gate"])) @ p["w_out"]


CASES = {
    "mamba2": (mamba2, mamba2.Config(WIDTH, state_dim=3, head_dim=4, groups=2), mamba2_oracle),
    "mamba3": (mamba3, mamba3.Config(WIDTH, state_dim=8, head_dim=8), mamba3_oracle),
    "mamba3-mimo": (mamba3, mamba3.Config(WIDTH, state_dim=8, head_dim=8, rank=3), mamba3_oracle),
    "hgrn2": (hgrn2, hgrn2.Config(WIDTH, head_dim=4, lower_bound=0.6), hgrn2_oracle),
    "hgrn2-no-bound": (hgrn2, hgrn2.Config(WIDTH, head_dim=1), elementwise_hgrn_oracle),
    "retnet": (retnet, retnet.Config(WIDTH, heads=2), retnet_oracle),
    "lightning_attention": (
        lightning_attention,
        lightning_attention.Config(WIDTH, heads=2, slope=0.5),
        lightning_oracle,
    ),
    "based": (based, based.Config(WIDTH, heads=2, feature_dim=3), based_oracle),
    "based-unpacked": (based, based.Config(WIDTH, heads=2, feature_dim=3, packed=False), based_oracle),
    "rwkv6": (rwkv6, rwkv6.Config(WIDTH, head_dim=4, mix_rank=2, decay_rank=3), rwkv6_oracle),
    "mlstm": (mlstm, mlstm.Config(WIDTH, heads=2), mlstm_oracle),
    "mlstm-after": (
        mlstm,
        mlstm.Config(
            WIDTH, heads=2, up_projection="after", value_dim=6, gate_cap=3.0, eps=1e-3, divisor_eps=0.05
        ),
        mlstm_after_oracle,
    ),
    "slstm": (slstm, slstm.Config(WIDTH, heads=2), slstm_oracle),
    "log_linear_attention": (
        log_linear_attention,
        log_linear_attention.Config(WIDTH, heads=2, max_length=16),
        log_linear_oracle,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layer_is_its_papers_equations(name):
    layer, cfg, oracle = CASES[name]
    assert_equals(layer, cfg, oracle, *setup(layer, cfg))


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_mlstm_is_stabilised_exactly(shift):
    """e^200 is no problem in float64, so that the bare equations still tell what is right."""
    layer, cfg, oracle = CASES["mlstm"]
    params, x = setup(layer, cfg)
    params["input_bias"] = params["input_bias"] + shift
    assert_equals(layer, cfg, oracle, params, x)


def test_slstm_is_stabilised_exactly():
    layer, cfg, oracle = CASES["slstm"]
    params, x = setup(layer, cfg)
    params["gate_bias"][:, 0] += np.linspace(-200, 200, cfg.K)
    assert_equals(layer, cfg, oracle, params, x)


def test_mamba3_without_its_novelties_is_mamba2():
    """lambda = 1 and no rotation: keys B, values dt x, log decay dt A."""
    cfg = mamba3.Config(WIDTH, state_dim=8, head_dim=8)
    params, x = setup(mamba3, cfg)
    x[..., 0] = 1
    ends = np.cumsum(cfg.columns)
    params["w_in"][:, ends[5] : ends[6]] = np.eye(WIDTH, 1) * 60
    params["w_in"][:, ends[6] :] = 0

    @jax.jit
    def both(params, x):
        t = mamba3._inputs(params, cfg, x)
        query, key = t.query[:, :, 0], t.key[:, :, 0]
        y, _ = op.gated_linear_attention(query, key, t.late[..., None] * t.x, t.log_decay)
        return mamba3.apply(params, cfg, x)[0], mamba3._output(params, x, t, y[:, :, None])

    np.testing.assert_allclose(*both(params, x), rtol=TOLERANCE, atol=TOLERANCE)


def test_log_linear_attention_with_equal_weights_is_gated_linear_attention():
    cfg = log_linear_attention.Config(WIDTH, heads=2, max_length=64)
    params, _ = setup(log_linear_attention, cfg)
    x = np.random.default_rng(2).normal(size=(2, 45, WIDTH))
    params["level_scale"][:] = 0  # every weight is softplus(0) = log 2

    @jax.jit
    def both(params, x):
        qkv = log_linear_attention.short_conv(x @ params["w_qkv"], params["conv"])[0]
        q, k, v, decay = log_linear_attention._inputs(params, cfg, x, qkv)
        o = np.log(2) * op.gated_linear_attention(q, k, v, decay)[0]
        return log_linear_attention.apply(params, cfg, x)[0], log_linear_attention._output(params, x, o)

    np.testing.assert_allclose(*both(params, x), rtol=TOLERANCE, atol=TOLERANCE)


def test_log_linear_attention_says_when_a_sequence_is_too_long():
    cfg = log_linear_attention.Config(WIDTH, heads=2, max_length=4)
    params, x = setup(log_linear_attention, cfg)
    with pytest.raises(ValueError, match="11 tokens are more than max_length=4"):
        log_linear_attention.apply(params, cfg, x)


def hedgehog(x):
    e = np.exp(np.concatenate([x, -x], -1))
    return e / e.sum(-1, keepdims=True)


def dpfp(x):
    r = np.maximum(np.concatenate([x, -x], -1), 0)
    return r * np.concatenate([r[..., -1:], r[..., :-1]], -1)


FEATURE_MAPS = {
    "relu^2": lambda x, w, b: np.maximum(x, 0) ** 2,
    "t2r": lambda x, w, b: np.maximum(np.einsum("thk,hkf->thf", x, w) + b, 0),
    "hedgehog": lambda x, w, b: hedgehog(np.einsum("thk,hkf->thf", x, w)),
    "dpfp": lambda x, w, b: dpfp(x),
    "hadamard": lambda x, w, b: (
        np.einsum("thk,hkf->thf", x, w[..., :4]) * np.einsum("thk,hkf->thf", x, w[..., 4:])
    ),
}


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_map(name):
    cfg = gated_linear_attention.Config(WIDTH, heads=2, key_dim=4, feature_map=name)
    params, _ = setup(gated_linear_attention, cfg)
    x = np.random.default_rng(3).normal(size=(5, 2, 4))
    features = gated_linear_attention._features(params, cfg, jnp.asarray(x), "k")
    assert features.shape[-1] == cfg.F
    weights = params.get("w_feature_k"), params.get("feature_bias_k")
    np.testing.assert_allclose(features, FEATURE_MAPS[name](x, *weights), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("layer", "settings", "message"),
    [
        (mamba2, {"head_dim": 5}, "mamba2: head_dim=5 does not divide"),
        (mamba2, {"head_dim": 4, "groups": 3}, "mamba2: groups=3 does not divide the 4 heads"),
        (mamba3, {"state_dim": 4, "pairs": 3}, r"mamba3: pairs=3 must be in 0\.\.2"),
        (hgrn2, {"lower_bound": 1.0}, "hgrn2: lower_bound=1.0"),
        (retnet, {"heads": 8}, "retnet: rotation needs an even key_dim, not 1"),
        (lightning_attention, {"slope": -1.0}, "lightning_attention: slope=-1.0"),
        (based, {"feature_dim": 0}, "based: feature_dim=0"),
        (rwkv6, {"head_dim": 3}, "rwkv6: head_dim=3 does not divide width=8"),
        (mlstm, {"block": 3}, "mlstm: block=3 does not divide"),
        (mlstm, {"key_dim": 2}, "mlstm: key_dim and value_dim are of up_projection='after'"),
        (mlstm, {"up_projection": "after", "heads": 3}, "mlstm: heads=3 does not divide width=8"),
        (mlstm, {"divisor_eps": 1e-6}, "mlstm: divisor_eps=1e-06 must be >= 0 and needs gate_cap"),
        (mlstm, {"gate_cap": 0.0}, "mlstm: gate_cap=0.0 must be > 0"),
        (slstm, {"heads": 3}, "slstm: heads=3 does not divide width=8"),
        (log_linear_attention, {"max_length": 1}, "log_linear_attention: max_length=1"),
        (
            gated_linear_attention,
            {"normalize": True, "feature_map": "hadamard"},
            "gated_linear_attention: normalize needs",
        ),
    ],
)
def test_bad_settings_are_named(layer, settings, message):
    with pytest.raises(ValueError, match=message):
        layer.Config(WIDTH, **settings)


@pytest.mark.parametrize("name", ["mlstm", "slstm"])
def test_stabilisers_are_no_path_of_gradients(name):
    """What is held constant in the backward pass changes nothing, not even through a given state."""
    layer, cfg, _ = CASES[name]
    params, x = setup(layer, cfg)

    @jax.jit
    def outputs(params, state):
        y, state, _ = layer.apply(params, cfg, jnp.asarray(x), state)
        return jnp.sum(jnp.sin(3 * y)), state

    _, state = outputs(params, layer.init_state(cfg, 2))
    rng = np.random.default_rng(4)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (params, state))
    ahead = jax.tree.map(lambda p, d: p + 1e-7 * d, (params, state), direction)
    behind = jax.tree.map(lambda p, d: p - 1e-7 * d, (params, state), direction)
    exact = jax.jvp(lambda *args: outputs(*args)[0], (params, state), direction)[1]
    np.testing.assert_allclose(exact, (outputs(*ahead)[0] - outputs(*behind)[0]) / 2e-7, rtol=1e-6)
