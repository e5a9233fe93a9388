"""Layers of the delta rule: each against its paper's equations in NumPy, and where they are one another."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import comba, gated_delta_net, gated_delta_product, gdn2, kda, rwkv7
from layers import mixture_of_memories as mom
from zoo import registry

D, H, T = 8, 2, 13
DOCUMENTS = [slice(0, 2), slice(2, T)]  # the first is shorter than a convolution
IDS = jnp.array([[5] * 2 + [3] * (T - 2)])

apply = functools.partial(jax.jit, static_argnums=(0, 2))(
    lambda layer, params, cfg, x: layer.apply(params, cfg, x, segment_ids=IDS)[:2]
)


def setup(cfg, seed=0):
    """Perturbed parameters, so that none is at its symmetric start, and one row of inputs."""
    params = registry.module(cfg).init(jax.random.key(seed), cfg)
    noise = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: p + 0.2 * noise.normal(size=p.shape), params)
    return params, jnp.asarray(noise.normal(size=(1, T, D)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def heads(x):
    return x.reshape(len(x), H, -1)


def convolved(p, x):
    """q, k and v of the document together, after convolution and SiLU."""
    taps, stream = len(p["conv"]), x @ p["w_qkv"]
    padded = np.concatenate([np.zeros((taps - 1, stream.shape[1])), stream])
    return silu(sum(padded[j : j + len(x)] * p["conv"][j] for j in range(taps)))


def qkv(p, cfg, x):
    """q of length 1 / sqrt(K), k of length 1 and v, `[T, H, K or V]`."""
    q, k, v = np.split(convolved(p, x), [H * cfg.K, 2 * H * cfg.K], -1)
    return unit(heads(q)) / np.sqrt(cfg.K), unit(heads(k)), heads(v)


def softplus_decay(p, x, logits):
    return np.exp(-np.exp(p["A_log"]) * softplus(logits + p["dt_bias"]))


def normalised(p, o):
    """RMSNorm over each head, heads merged."""
    o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-5) * p["norm_scale"]
    return o.reshape(len(o), -1)


def recurrence(q, transition, written):
    """`S_t = transition_t S_{t-1} + written_t`, `o_t = S_t^T q_t`, per head."""
    s, out = np.zeros(written.shape[1:]), []
    for t in range(len(q)):
        s = transition[t] @ s + written[t]
        out.append(np.einsum("hkv,hk->hv", s, q[t]))
    return np.array(out), s


def outer(a, b):
    return a[..., :, None] * b[..., None, :]


def householder(cfg, beta, k):
    return np.eye(cfg.K) - outer(beta * k, k)


def gated_delta_net_document(p, cfg, x):
    q, k, v = qkv(p, cfg, x)
    beta = 2 * sigmoid(x @ p["w_beta"])[..., None]
    alpha = softplus_decay(p, x, x @ p["w_decay"])[..., None, None]
    o, s = recurrence(q, alpha * householder(cfg, beta, k), outer(beta * k, v))
    return (normalised(p, o) * silu(x @ p["w_gate"])) @ p["w_out"], s


def delta_net_document(p, cfg, x):
    q, k, v = qkv(p, cfg, x)
    beta = sigmoid(x @ p["w_beta"])[..., None]
    o, s = recurrence(q, householder(cfg, beta, k), outer(beta * k, v))
    return normalised(p, o) @ p["w_out"], s


def channel_decay(p, cfg, x):
    logits = heads(x @ p["w_decay_down"] @ p["w_decay_up"])
    if getattr(cfg, "bound", None):
        return np.exp(-cfg.bound * sigmoid(np.exp(p["A_log"]) * (logits + p["dt_bias"])))
    return softplus_decay(p, x, logits)


def low_rank_gate(p, x):
    return sigmoid(x @ p["w_gate_down"] @ p["w_gate_up"] + p["gate_bias"])


def kda_document(p, cfg, x):
    q, k, v = qkv(p, cfg, x)
    beta = sigmoid(x @ p["w_beta"])[..., None]
    transition = householder(cfg, beta, k) * channel_decay(p, cfg, x)[..., None, :]
    o, s = recurrence(q, transition, outer(beta * k, v))
    return (normalised(p, o) * low_rank_gate(p, x)) @ p["w_out"], s


def gdn2_document(p, cfg, x):
    q, k, v = qkv(p, cfg, x)
    erase, write = heads(sigmoid(x @ p["w_erase"])), heads(sigmoid(x @ p["w_write"]))
    transition = (np.eye(cfg.K) - outer(k, erase * k)) * channel_decay(p, cfg, x)[..., None, :]
    o, s = recurrence(q, transition, outer(k, write * v))
    return (normalised(p, o) * low_rank_gate(p, x)) @ p["w_out"], s


def comba_document(p, cfg, x):
    q, k, v = qkv(p, cfg, x)
    back = sigmoid(p["feedback"]) * k
    beta = sigmoid(x @ p["w_beta"])[..., None]
    alpha = softplus_decay(p, x, x @ p["w_decay"])[..., None, None]
    transition = alpha * np.eye(cfg.K) - outer(beta * k, back)
    o, s = recurrence(q - p["D"] * back / np.sqrt(cfg.K), transition, outer(beta * k, v))
    return (normalised(p, o) * sigmoid(x @ p["w_gate"])) @ p["w_out"], s


def gated_delta_product_document(p, cfg, x):
    n, K, V = cfg.steps, cfg.K, cfg.V
    q, k, v = np.split(convolved(p, x), [H * K, H * K * (1 + n)], -1)
    q, k = unit(heads(q)) / np.sqrt(K), unit(k.reshape(len(x), n, H, K))
    v, beta = v.reshape(len(x), n, H, V), 2 * sigmoid(x @ p["w_beta"]).reshape(len(x), n, H, 1)
    transition = softplus_decay(p, x, x @ p["w_decay"])[..., None, None] * np.eye(K)
    written = np.zeros((len(x), H, K, V))
    for j in range(n):
        step = householder(cfg, beta[:, j], k[:, j])
        transition, written = step @ transition, step @ written + outer(beta[:, j] * k[:, j], v[:, j])
    o, s = recurrence(q, transition, written)
    return (normalised(p, o) * silu(x @ p["w_gate"])) @ p["w_out"], s


def rwkv7_document(p, cfg, x):
    change = np.concatenate([np.zeros((1, D)), x[:-1]]) - x
    of = {name: x + change * mu for name, mu in zip("rwkvag", p["mix"], strict=True)}
    r, k, v = (of[name] @ p[f"w_{name}"] for name in "rkv")
    low = np.tanh(of["w"] @ p["w_decay_down"]) @ p["w_decay_up"]
    w = np.exp(-np.exp(-0.5) * sigmoid(p["decay_bias"] + low))
    a = sigmoid(p["rate_bias"] + of["a"] @ p["w_rate_down"] @ p["w_rate_up"])
    g = sigmoid(of["g"] @ p["w_gate_down"]) @ p["w_gate_up"]
    kappa, k = unit(heads(k * p["removal_scale"])), heads(k * (1 + (a - 1) * p["rate_scale"]))
    r, v, w, a = heads(r), heads(v), heads(w), heads(a)
    transition = w[..., None] * np.eye(cfg.K) - outer(a * kappa, kappa)
    o, s = recurrence(r, transition, outer(k, v))
    o = o - np.mean(o, -1, keepdims=True)
    o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + 1e-5 * cfg.K) * p["norm_scale"] + p["norm_bias"]
    o = o + np.sum(r * k * p["bonus"], -1, keepdims=True) * v
    return (o.reshape(len(x), D) * g) @ p["w_out"], s


def mom_document(p, cfg, x):
    """One memory, which every token reads and writes: what its inner rule does."""
    p = {**p, "w_qkv": np.concatenate([p["w_q"], p["w_kv"][:, 0]], 1)}
    q, k, v = qkv(p, cfg, x)
    decay = np.ones((len(x), H))
    if cfg.rule == "mamba2":
        dt = softplus(x @ p["w_decay"][:, 0] + p["dt_bias"])
        decay, v = np.exp(-dt * np.exp(p["A_log"])), dt[..., None] * v
    o, s = recurrence(q, decay[..., None, None] * np.eye(cfg.K), outer(k, v))
    return (normalised(p, o) * silu(x @ p["w_gate"])) @ p["w_out"], s


MOM = mom.Config(D, heads=H, memories=1, top_k=1, shared=False)
CASES = {
    "gated_delta_net": (gated_delta_net.Config(D, heads=H, key_dim=3, negative_eigenvalues=True), None),
    "delta_net": (registry.config("delta_net", D, heads=H), delta_net_document),
    "kda": (kda.Config(D, heads=H, value_dim=3), None),
    "kda-bound": (kda.Config(D, heads=H, bound=5.0, conv=2), kda_document),
    "gdn2": (gdn2.Config(D, heads=H, key_dim=3), None),
    "comba": (comba.Config(D, heads=H, value_dim=3), None),
    "gated_delta_product": (gated_delta_product.Config(D, heads=H, steps=3, value_dim=3), None),
    "rwkv7": (rwkv7.Config(D, head_dim=4, decay_rank=3, rate_rank=2, gate_rank=5), None),
    "mom-mamba2": (dataclasses.replace(MOM, rule="mamba2"), mom_document),
    "mom-linear": (dataclasses.replace(MOM, rule="linear"), mom_document),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_papers_equations(name):
    """Outputs over two packed documents, and the memory that the second leaves."""
    cfg, document = CASES[name]
    layer = registry.module(cfg)
    params, x = setup(cfg)
    y, state = apply(layer, params, cfg, x)
    document = document or globals()[f"{name}_document"]
    p = jax.tree.map(np.asarray, params)
    outputs, memories = zip(*(document(p, cfg, np.asarray(x[0, d])) for d in DOCUMENTS), strict=True)
    np.testing.assert_allclose(y[0], np.concatenate(outputs), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state.memory.reshape(memories[-1].shape), memories[-1], rtol=1e-10, atol=1e-10)


def assert_same(first, second, *, memory_only=False):
    """Two layers, `(Config, parameters)` each, on the same inputs."""
    _, x = setup(first[0])
    (y, state), (other_y, other_state) = (
        apply(registry.module(cfg), params, cfg, x) for cfg, params in (first, second)
    )
    np.testing.assert_allclose(state.memory, other_state.memory, rtol=1e-12, atol=1e-12)
    if not memory_only:
        np.testing.assert_allclose(y, other_y, rtol=1e-12, atol=1e-12)


def test_one_step_of_a_product_is_the_gated_delta_rule():
    cfg = gated_delta_product.Config(D, heads=H, steps=1)
    params, _ = setup(cfg)
    assert_same((cfg, params), (gated_delta_net.Config(D, heads=H, negative_eigenvalues=True), params))


def test_equal_gates_of_gdn2_are_kda():
    cfg, other = kda.Config(D, heads=H), gdn2.Config(D, heads=H)
    params, _ = setup(cfg)
    gates = jnp.repeat(params["w_beta"], cfg.K, 1)
    assert_same((cfg, params), (other, {**params, "w_erase": gates, "w_write": gates}))


def test_equal_decays_of_kda_are_the_gated_delta_rule():
    """The gates of the outputs differ, the memories do not."""
    cfg, other = gated_delta_net.Config(D, heads=H), kda.Config(D, heads=H, rank=H)
    params, _ = setup(cfg)
    channels = {
        **setup(other)[0],
        **{name: params[name] for name in ("w_qkv", "conv", "w_beta")},
        "w_decay_down": params["w_decay"],
        "w_decay_up": jnp.repeat(jnp.eye(H), other.K, 1),
        "A_log": params["A_log"][:, None],
        "dt_bias": jnp.repeat(params["dt_bias"][:, None], other.K, 1),
    }
    assert_same((cfg, params), (other, channels), memory_only=True)


def test_full_feedback_without_decay_is_the_delta_rule():
    """Comba's p = k and alpha = 1."""
    cfg, other = comba.Config(D, heads=H), registry.config("delta_net", D, heads=H)
    params, _ = setup(cfg)
    params = {**params, "feedback": jnp.full((H, 1), 50.0), "A_log": jnp.full(H, -50.0)}
    assert_same((cfg, params), (other, params), memory_only=True)


def test_reflections_track_a_parity():
    """One channel, beta = 2 and no values after the first: the memory changes sign with every token."""
    cfg = registry.config("delta_net", 1, heads=1, negative_eigenvalues=True, conv=0)
    params = {"w_qkv": jnp.ones((1, 3)), "w_beta": jnp.full((1, 1), 50.0), "norm_scale": jnp.ones(1)}
    params["w_out"] = jnp.ones((1, 1))
    state = gated_delta_net.State(memory=jnp.full((1, 1, 1, 1), 7.0), conv=jnp.zeros((1, 0, 3)))
    params["w_qkv"] = params["w_qkv"].at[0, 2].set(0.0)
    for turn in (-1, 1, -1):
        _, state = gated_delta_net.step(params, cfg, jnp.full((1, 1), 1e3), state)
        np.testing.assert_allclose(state.memory, 7.0 * turn, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gated_delta_net", "heads", 3),
        ("gated_delta_net", "conv", -1),
        ("delta_net", "key_dim", 0),
        ("kda", "bound", 0.0),
        ("kda", "rank", 0),
        ("gdn2", "value_dim", -2),
        ("gated_delta_product", "steps", 0),
        ("comba", "conv", -1),
        ("rwkv7", "head_dim", 3),
        ("rwkv7", "gate_rank", 0),
        ("momentum_delta", "max_rate", 0.0),
    ],
)
def test_bad_settings_are_named(name, field, value):
    module = registry.LAYERS[name][0]
    with pytest.raises(ValueError, match=f"{module}: .*{field}={value!r}"):
        registry.config(name, D, **{field: value})
