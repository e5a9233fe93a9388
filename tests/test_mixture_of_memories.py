"""Mixture of memories: what the contract's suite does not know, routing above all."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import mixture_of_memories as mom
from layers.common import dense, l2_norm, rms_norm
from layers.heads import merge_heads
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_linear_attention import gated_linear_attention

apply = jax.jit(mom.apply, static_argnums=1)

CONFIGS = {
    "default": mom.Config(8, heads=2),
    "gla": mom.Config(8, heads=2, memories=3, shared=False, rule="gla", key_dim=3, value_dim=5),
    "no-conv": mom.Config(8, heads=2, memories=2, top_k=1, conv=0),
}


def setup(cfg, length=21, batch=2):
    params = mom.init(jax.random.key(0), cfg)
    return params, jax.random.normal(jax.random.key(1), (batch, length, cfg.width))


def conv(x, filters):
    """`y_t = sum_j filters[j] x_{t - taps + 1 + j}` and SiLU."""
    taps, length = filters.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    return jax.nn.silu(sum(padded[:, j : j + length] * filters[j] for j in range(taps)))


def one_memory(params, cfg, m, x, q):
    """Memory m alone on the tokens `x [1,T,D]` that are all its own: what it answers to `q [1,T,H,K]`."""
    heads = (*x.shape[:2], cfg.heads, -1)
    kv = dense(x, params["w_kv"][:, m])
    if cfg.conv:
        kv = conv(kv, params["conv"][:, cfg.heads * cfg.K :])
    k = l2_norm(kv[..., : cfg.heads * cfg.K].reshape(heads))
    v = kv[..., cfg.heads * cfg.K :].reshape(heads)
    rate = jax.nn.softplus(dense(x, params["w_decay"][:, m]) + params["dt_bias"])
    log_decay = -jnp.exp(params["A_log"]) * rate
    if cfg.rule == "gla":
        return gated_linear_attention(q, k, v, log_decay, implementation="reference")[0]
    beta = jax.nn.sigmoid(dense(x, params["w_beta"][:, m]))[..., None]
    return gated_delta_rule(q, k, beta * v, beta * k, log_decay, implementation="reference")[0]


def one_document(params, cfg, x, chosen):
    """The layer on one document `x [1,T,D]`, each memory run on the packed subsequence of its tokens."""
    q = dense(x, params["w_q"])
    if cfg.conv:
        q = conv(q, params["conv"][:, : cfg.heads * cfg.K])
    q = l2_norm(q.reshape(*x.shape[:2], cfg.heads, cfg.K)) * cfg.K**-0.5
    scores = jax.nn.softmax(dense(x, params["w_router"])) * chosen
    weights = scores / scores.sum(-1, keepdims=True)
    o = jnp.zeros((*x.shape[:2], cfg.heads, cfg.V))
    for m in range(cfg.memories):
        own = np.flatnonzero(chosen[0, :, m])
        if own.size:
            said = one_memory(params, cfg, m, x[:, own], q[:, own])
            o = o.at[:, own].add(weights[:, own, m, None, None] * said)
    if cfg.shared:
        o = o + one_memory(params, cfg, cfg.memories, x, q)
    gate = jax.nn.silu(dense(x, params["w_gate"]))
    return dense(merge_heads(rms_norm(o, params["norm_scale"])) * gate, params["w_out"])


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_memories_run_on_their_own_tokens(name):
    """Values and gradients; packed documents, one of them shorter than the convolution."""
    cfg = CONFIGS[name]
    params, x = setup(cfg, 13)
    documents = [[2, 11], [13]]
    ids = jnp.array([np.repeat(np.arange(len(d)), d) for d in documents])
    probabilities = np.asarray(jax.nn.softmax(x @ params["w_router"]))
    rank = np.argsort(np.argsort(-probabilities, -1), -1)
    chosen = rank < cfg.top_k

    def naive(params, x):
        rows = []
        for b, lengths in enumerate(documents):
            cuts = np.cumsum([0, *lengths])
            for lo, hi in itertools.pairwise(cuts):
                rows.append(one_document(params, cfg, x[b : b + 1, lo:hi], chosen[b : b + 1, lo:hi]))
        return jnp.concatenate(rows, 1).reshape(x.shape)

    def loss(run):
        def scalar(params, x):
            y = run(params, x)
            return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

        return jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(params, x)

    actual = loss(lambda params, x: apply(params, cfg, x, segment_ids=ids)[0])
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(loss(naive)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_one_memory_is_a_gated_delta_layer():
    """M = k = 1 without a shared memory: the router has no say."""
    cfg = mom.Config(8, heads=2, memories=1, top_k=1, shared=False)
    params, x = setup(cfg)
    y, _, aux = apply(params, cfg, x)
    expected = jax.jit(lambda p, x: one_document(p, cfg, x, np.ones((2, 21, 1), bool)))(params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(aux["balance_loss"], cfg.balance)


def test_samples_know_nothing_of_each_other():
    """Bit for bit, under packing too: the defect that published code has in its convolution."""
    cfg = CONFIGS["default"]
    params, x = setup(cfg)
    ids = jnp.array([np.repeat(np.arange(2), [8, 13]), np.zeros(21, int)])
    run = jax.jit(lambda x: apply(params, cfg, x, segment_ids=ids)[:2])
    changed = x.at[1].set(-3 * x[1, ::-1])
    for a, b in zip(jax.tree.leaves(run(x)), jax.tree.leaves(run(changed)), strict=True):
        assert np.array_equal(a[0], b[0])
        assert not np.array_equal(a[1], b[1])


def routed_by_first_channel(cfg, length):
    """Parameters and inputs for which tokens choose memory 0 (memory 1) by the sign of channel 0."""
    params, x = setup(cfg, length, batch=1)
    router = jnp.zeros_like(params["w_router"]).at[0, 0].set(5.0)
    return {**params, "w_router": router}, x


def test_a_foreign_token_moves_nothing():
    cfg = mom.Config(8, heads=2, memories=2, top_k=1)
    params, x = routed_by_first_channel(cfg, 6)
    _, before, _ = apply(params, cfg, x)
    foreign = x.at[..., 0].set(-1.0)
    for after in (
        apply(params, cfg, foreign, before)[1],
        mom.step(params, cfg, foreign[:, 0], before)[1],
    ):
        for name, m, same in (("memory", 0, True), ("conv_write", 0, True), ("memory", 1, False)):
            old, new = getattr(before, name), getattr(after, name)
            assert np.array_equal(old[:, m], new[:, m]) == same


def test_a_boundary_resets_memories_that_the_new_document_has_not_met():
    cfg = mom.Config(8, heads=2, memories=2, top_k=1)
    params, x = routed_by_first_channel(cfg, 9)
    x = x.at[:, :5, 0].set(1.0).at[:, 5:, 0].set(-1.0)
    _, state, _ = apply(params, cfg, x, segment_ids=jnp.array([[0] * 5 + [1] * 4]))
    assert not np.any(state.memory[:, 0])
    assert not np.any(state.conv_write[:, 0])
    assert np.all(np.any(state.memory[:, 1:], (-1, -2)))


def test_load_and_balance_loss():
    cfg = dataclasses.replace(CONFIGS["default"], balance=0.5)
    params, x = setup(cfg, 50)
    _, _, aux = apply(params, cfg, x)
    np.testing.assert_allclose(aux["router_load"].sum(), cfg.top_k)
    np.testing.assert_allclose(aux["router_probability"].sum(), 1.0)
    expected = cfg.balance * cfg.memories * aux["router_load"] @ aux["router_probability"]
    np.testing.assert_allclose(aux["balance_loss"], expected)

    def loss(router):
        return apply({**params, "w_router": router}, cfg, x)[2]["balance_loss"]

    np.testing.assert_allclose(loss(jnp.zeros_like(params["w_router"])), cfg.balance * cfg.top_k)
    # All tokens alike and sure of themselves: the worst load there is.
    x = jnp.abs(x)
    collapsed = jnp.zeros_like(params["w_router"]).at[:, :2].set(9.0)
    np.testing.assert_allclose(loss(collapsed), cfg.balance * cfg.memories, rtol=1e-6)
    assert np.any(jax.grad(loss)(params["w_router"]) != 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_router_is_wide(dtype, float32):
    """Probabilities do not round to the activations' dtype."""
    cfg = CONFIGS["default"]
    params, x = setup(cfg)
    aux = jax.eval_shape(lambda x: apply(params, cfg, x)[2], x.astype(dtype))
    assert {a.dtype for a in aux.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 5), ("memories", 0), ("rule", "delta"), ("conv", -1), ("balance", -0.1), ("heads", 3)],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"mixture_of_memories: .*{field}={value!r}"):
        mom.Config(8, **{"heads": 2, field: value})
