"""Attention to sinks and to chosen tokens: one softmax over several sources, against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import assert_close, values_and_gradients

from layers import attention as layer
from layers import bmojo, mamba
from layers.common import rms_norm
from pallas_kernels.attention import attention, attention_part, chosen_attention, merge
from pallas_kernels.running_top import Top, running_top


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rotated(x, position, base=10000.0):
    """`x [..., K]` turned by `position`, pairs (i, i + K/2)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * position * base ** (-np.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)


def softmax_read(logits, values):
    weights = np.exp(logits - np.max(logits))
    return weights @ values / weights.sum()


def streaming_llm(cfg, params, x):
    """One document, token by token, with the cache of StreamingLLM: positions are places in the cache."""
    qkv = np.asarray(x @ params["w_qkv"]).reshape(len(x), -1, cfg.K)
    q, k, v = np.split(qkv, [cfg.heads, cfg.heads + cfg.G], 1)
    cache, out = [], np.zeros((len(x), cfg.heads, cfg.K))
    for t in range(len(x)):
        cache = [*cache, t]
        cache = cache[: cfg.sinks] + cache[cfg.sinks :][-cfg.window :]
        for h in range(cfg.heads):
            g = h // (cfg.heads // cfg.G)
            query = rotated(q[t, h], len(cache) - 1) * cfg.K**-0.5
            logits = [query @ rotated(k[j, g], place) for place, j in enumerate(cache)]
            values = [v[j, g] for j in cache]
            if cfg.sink_logit:
                logits, values = [*logits, float(params["sink_logit"][h])], [*values, np.zeros(cfg.K)]
            out[t, h] = softmax_read(np.array(logits), np.array(values))
    return out.reshape(len(x), -1) @ params["w_out"]


@pytest.mark.parametrize("settings", [{"sinks": 6, "sink_logit": True}, {"sink_logit": True}])
def test_sinks_are_the_cache_of_streaming_llm(settings):
    """Documents shorter than the sinks, than the window and longer than a block; then one more in pieces."""
    cfg = layer.Config(8, heads=4, kv_heads=2, head_dim=4, window=5, **settings)
    params = {name: np.asarray(p) for name, p in layer.init(jax.random.key(0), cfg).items()}
    if cfg.sink_logit:
        params["sink_logit"] = normal(2, 4)
    lengths = [2, 7, 130, 11]
    x, cuts = normal(1, 1, sum(lengths), 8), np.cumsum(lengths)[:-1]
    ids = np.repeat(np.arange(4), lengths)[None]
    expected = np.concatenate(
        [streaming_llm(cfg, params, piece) for piece in np.split(np.asarray(x[0]), cuts)]
    )
    apply = jax.jit(lambda x, state, ids: layer.apply(params, cfg, x, state, segment_ids=ids)[:2])
    y, state = apply(x, None, ids)
    np.testing.assert_allclose(y[0], expected, rtol=1e-10, atol=1e-10)
    out, state = [], layer.init_state(cfg, 1)
    for start in range(9, 33, 4):
        y, state = apply(x[:, start : start + 4], state, None)
        out.append(y[0])
    np.testing.assert_allclose(np.concatenate(out), expected[9:33], rtol=1e-10, atol=1e-10)


def test_bad_sinks_are_refused():
    for bad in ({"sinks": -1, "window": 4}, {"sinks": 2}):
        with pytest.raises(ValueError, match="attention: sinks="):
            layer.Config(8, **bad)


def test_parts_of_a_window_make_the_window(length=150):
    """B'MOJO's fading tokens, were they the tokens themselves: a window and one before it are one of 2 w."""
    q, k, v = normal(0, 2, length, 4, 6), normal(1, 2, length, 2, 6), normal(2, 2, length, 2, 3)
    ids = jnp.sort(jax.random.randint(jax.random.key(5), (2, length), 0, 5), 1)

    def parts(q, k, v, implementation):
        how = {"segment_ids": ids, "implementation": implementation}
        near, _ = attention_part(q, k, v, 9, **how)
        far, _ = attention_part(q, k, v, 18, delay=9, **how)
        return merge([near, far])

    expected = values_and_gradients(lambda *a: attention(*a, 18, segment_ids=ids)[0], q, k, v)
    for implementation in ("xla", "reference"):
        assert_close(values_and_gradients(lambda *a, i=implementation: parts(*a, i), q, k, v), expected)


def test_chosen_attention(length=150):
    """Some queries choose nothing; a logit that they all share keeps the softmax in existence."""
    q, k, v = normal(0, 2, length, 4, 6), normal(1, 2, 20, 2, 6), normal(2, 2, 20, 2, 3)
    index = jax.random.randint(jax.random.key(3), (2, length, 3), -8, 20)
    index = jnp.maximum(index, -1)

    def run(implementation):
        def op(q, k, v, null):
            return merge([chosen_attention(q, k, v, index, implementation=implementation)], null)

        return values_and_gradients(op, q, k, v, normal(4, 4))

    fast = run("xla")
    assert_close(fast, run("reference"))
    out, null = fast[0], normal(4, 4)
    for t in range(length):
        own = [j for j in np.asarray(index[1, t]) if j >= 0]
        logits = np.array([*(q[1, t, 3] @ k[1, j, 1] for j in own), null[3]])
        np.testing.assert_allclose(
            out[1, t, 3], softmax_read(logits, np.array([*(v[1, j, 1] for j in own), 0 * v[0, 0, 0]]))
        )


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_running_top_is_a_sorted_list(implementation):
    """Scores of few values, so that ties abound; lists from before; documents; absent entries."""
    rng = np.random.default_rng(0)
    score, there = rng.integers(0, 4, (2, 40)) * 1.0, rng.random((2, 40)) < 0.8
    ids = np.sort(rng.integers(0, 3, (2, 40)), 1)
    index = np.broadcast_to(3 + np.arange(40, dtype=np.int32), (2, 40))
    past = Top(
        jnp.array([[2.0, 2.0, 0.0], [1.0, -1.0, -1.0]]), jnp.array([[0, 1, 2], [0, -1, -1]], jnp.int32)
    )
    run = jax.jit(
        lambda s, i, t, p: running_top(s, i, t, p, segment_ids=jnp.array(ids), implementation=implementation)
    )
    top = run(score, index, there, past)
    for b in range(2):
        entries = [(-s, i) for s, i in zip(past.score[b], past.place[b], strict=True) if s >= 0]
        for t in range(40):
            if t and ids[b, t] != ids[b, t - 1]:
                entries = []
            if there[b, t]:
                entries.append((-score[b, t], index[b, t]))
            best = sorted(entries)[:3] + [(1, -1)] * 3
            np.testing.assert_array_equal(top.score[b, t], [-s for s, _ in best[:3]])
            np.testing.assert_array_equal(top.place[b, t], [i for _, i in best[:3]])


def naive_bmojo(cfg, params, x):
    """One document, token by token: lists of what is in the window, before it, and kept."""
    ssm = {**params["ssm"], "w_out": params["w_ssm"]}
    y = rms_norm(mamba.apply(ssm, cfg.ssm, jnp.asarray(x)[None])[0][0], params["fading_scale"])
    y, length = np.asarray(y), len(x)
    before = np.concatenate([0 * y[:1], y[:-1]])
    error = np.mean((x - before @ params["w_predict"]) ** 2, -1)
    tokens, faded = (
        np.asarray(a @ w).reshape(length, 3, cfg.heads, cfg.K)
        for a, w in ((x, params["w_qkv"]), (y, params["w_qkv" if cfg.tied else "w_fading"]))
    )
    out = np.zeros((length, cfg.heads, cfg.K))
    for t in range(length):
        left = sorted(range(t - cfg.window + 1), key=lambda j: (-error[j], j))[: cfg.memories]
        near = [*left, *range(max(t - cfg.window + 1, 0), t + 1)]
        far = range(max(t - cfg.window - cfg.F + 1, 0), t - cfg.window + 1)
        for h in range(cfg.heads):
            logits, values = [], []
            for source, places in ((tokens, near), (faded, far)):
                query = tokens[t, 0, h] if cfg.tied else source[t, 0, h]
                logits += [rotated(query, t) @ rotated(source[j, 1, h], j) * cfg.K**-0.5 for j in places]
                values += [source[j, 2, h] for j in places]
            out[t, h] = softmax_read(np.array(logits), np.array(values))
    return out.reshape(length, -1) @ params["w_out"]


@pytest.mark.parametrize("settings", [{}, {"tied": False, "memories": 0, "fading": None}])
def test_bmojo_equals_its_definition(settings):
    cfg = bmojo.Config(8, **{"heads": 2, "window": 4, "fading": 2, "memories": 3, "state_dim": 4, **settings})
    params = bmojo.init(jax.random.key(0), cfg)
    params["w_predict"] = 0.3 * normal(2, 8, 8)
    lengths = [3, 30, 9]
    x, cuts = np.asarray(normal(1, 1, sum(lengths), 8)), np.cumsum(lengths)[:-1]
    ids = jnp.array(np.repeat([1, 0, 1], lengths)[None])
    y, _, aux = jax.jit(lambda x: bmojo.apply(params, cfg, x, segment_ids=ids))(x)
    expected = np.concatenate([naive_bmojo(cfg, params, piece) for piece in np.split(x[0], cuts)])
    np.testing.assert_allclose(y[0], expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(aux["prediction_loss"], cfg.predict * aux["innovation"])


def test_bmojo_recalls_a_surprise_from_far_away():
    """A gradient reaches the kept token 60 tokens back as an exact key and value, and nothing near it but the
    state space's path; the loss of the predictor moves the predictor alone."""
    cfg = bmojo.Config(8, heads=2, window=4, fading=1, memories=1, state_dim=4)
    params = bmojo.init(jax.random.key(0), cfg)
    x = 0.1 * normal(1, 1, 64, 8)
    x = x.at[0, 3].set(3.0)
    _, state, _ = jax.jit(lambda x: bmojo.apply(params, cfg, x))(x)
    np.testing.assert_allclose(state.kept_innovation, [[9.0]])
    loss = jax.jit(jax.grad(lambda p, x: bmojo.apply(p, cfg, x)[2]["prediction_loss"], (0, 1)))
    reached = [
        path[-1].key if hasattr(path[-1], "key") else "x"
        for path, leaf in jax.tree_util.tree_leaves_with_path(loss(params, x))
        if np.any(leaf != 0)
    ]
    assert reached == ["w_predict"]


def test_bad_bmojo_configs_are_refused():
    for bad in (
        {"window": 0},
        {"fading": 0},
        {"memories": -1},
        {"predict": -1.0},
        {"heads": 3},
        {"heads": 8},
    ):
        with pytest.raises(ValueError, match="bmojo: "):
            bmojo.Config(8, **bad)
