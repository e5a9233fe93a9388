"""Test-time memories against plain NumPy, one token and one matrix at a time, and against each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import atlas, attention, lact, miras, titans, titans_attention, titans_mac, ttt
from pallas_kernels.attention import attention as attend
from pallas_kernels.attention import empty_cache
from pallas_kernels.chunk_update import chunk_update
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.memory_update import memory_update
from pallas_kernels.orthogonal import CLASSICAL, VARIED, orthogonalize

B, H, D, E, T = 1, 2, 4, 6, 11
TOLERANCE = 1e-11


def close(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=TOLERANCE, atol=TOLERANCE)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def perturbed(layer, cfg, seed=0):
    """Parameters with no gate, norm or bias at a special value."""
    leaves, tree = jax.tree.flatten(layer.init(jax.random.key(seed), cfg))
    noise = [0.1 * random(seed + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [leaf + n for leaf, n in zip(leaves, noise, strict=True)])


def run(layer, cfg, params, x):
    return jax.jit(lambda params, x: layer.apply(params, cfg, x)[0])(params, x)


# The definition in NumPy, for one sequence and head.


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def slope(f, x, h=1e-30):
    """The derivative of an analytic f, by a complex step: exact."""
    return np.imag(f(x + 1j * h)) / h


def layer_norm(z, norm):
    z = z - z.mean()
    return z / np.sqrt((z**2).mean() + 1e-6) * norm[0] + norm[1]


def forward(weights, x, activation, norm=None, residual=False):
    """The output, and the inputs of all layers and their products."""
    inputs, products, y = [], [], x
    for i, w in enumerate(weights):
        y = activation(y) if i else y
        y = np.append(y, 1.0) if len(w) == len(y) + 1 else y
        inputs.append(y)
        y = y @ w
        products.append(y)
    y = y if norm is None else layer_norm(y, norm)
    return (x + y if residual else y), inputs, products


def gradients(weights, k, v, activation, loss_slope, norm, residual):
    out, inputs, products = forward(weights, k, activation, norm, residual)
    delta = loss_slope(out - v)
    if norm is not None:
        z = products[-1]
        deviation = np.sqrt(z.var() + 1e-6)
        unit, u = (z - z.mean()) / deviation, delta * norm[0]
        delta = (u - u.mean() - unit * (u * unit).mean()) / deviation
    result = []
    for i in reversed(range(len(weights))):
        result.insert(0, np.outer(inputs[i], delta))
        if i:
            below = products[i - 1]
            delta = (weights[i] @ delta)[: len(below)] * slope(activation, below)
    return result


def newton_schulz(x, steps, floor=0.0):
    x = x / np.sqrt((x**2).sum() + floor**2)
    for a, b, c in steps:
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def remember(
    initial,
    q,
    k,
    v,
    rate,
    keep,
    momentum=None,
    *,
    chunk,
    activation,
    loss_slope=lambda e, t: 2 * e,
    retention=lambda a: a,
    norm=None,
    residual=False,
    clip=None,
    window=1,
    gain=None,
    scale=None,
    orthogonal=None,
    steps=((3.4445, -4.7750, 2.0315),) * 5,
    floor=0.0,
):
    """Reads `[T, V]` of one head; gates `[T]`."""
    start, now = list(initial), list(initial)
    speed = [np.zeros_like(w) for w in initial]
    reads = []
    for t in range(len(q)):
        total = [np.zeros_like(w) for w in initial]
        for u in range(max(t - window + 1, 0), t + 1):
            at = [retention(w) for w in start]
            each = gradients(
                at, k[u], v[u], activation, functools.partial(_slope, loss_slope, t), norm, residual
            )
            for i, g in enumerate(each):
                size = 1.0 if clip is None else 1 / np.sqrt(1 + (g**2).sum() / clip**2)
                total[i] += g * size * (1.0 if gain is None else gain[u])
        for i in range(len(now)):
            speed[i] = (0 if momentum is None else momentum[t]) * speed[i] - rate[t] * total[i]
            move = speed[i]
            if orthogonal is not None:
                move = orthogonal[t] * newton_schulz(move, steps, floor)
            now[i] = keep[t] * now[i] + move
        r = 1.0 if scale is None else scale[t]
        used = [s + r * (w - s) for s, w in zip(start, now, strict=True)]
        reads.append(forward([retention(w) for w in used], q[t], activation, norm, residual)[0])
        if (t + 1) % chunk == 0:
            start, now = used, list(used)
    return np.array(reads)


def _slope(loss_slope, t, error):
    return loss_slope(error, t)


def streams(seed=0, value_dim=D):
    """`(q, k, v, rate, keep, momentum)`."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(T, H, n)) for n in (D, D, value_dim))
    rate, keep, momentum = (rng.uniform(*span, size=(T, H)) for span in ((0.02, 0.2), (0.8, 1), (0.3, 0.9)))
    return q, k, v, rate, keep, momentum


def op(initial, q, k, v, rate, keep, momentum, **more):
    """The op on one sequence; arrays `[T, H, ...]`."""

    @jax.jit
    def program(initial, *inputs):
        return memory_update(initial, *inputs[:6], **dict(zip(arrays, inputs[6:], strict=True)), **static)[0][
            0
        ][0]

    arrays = {n: x for n, x in more.items() if n in ("read_scale", "threshold", "gain", "orthogonal")}
    static = {n: x for n, x in more.items() if n not in arrays}
    logs = np.log(keep), None if momentum is None else np.log(momentum)
    batch = [None if x is None else jnp.asarray(x)[None] for x in (q, k, v, rate, *logs, *arrays.values())]
    return program(tuple(map(jnp.asarray, initial)), *batch)


def by_heads(f):
    return np.stack([f(h) for h in range(H)], 1)


L3 = {"loss_slope": lambda e, t: 3 * e * np.sqrt(e**2 + 1e-6)}
L4 = {"retention": lambda a: a / np.sqrt((a**4).sum() + 1)}


def row_softmax(a):
    e = np.exp(a)
    return e / e.sum(-1, keepdims=True) * a.shape[1] / np.sqrt(a.shape[0])


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("name", ["ttt", "moneta", "yaad", "memora", "omega", "atlas", "classical"])
def test_rules_in_numpy(name, chunk):
    """Every rule on a network of two layers: biases, inner norm, losses, retentions, windows, Muon."""
    q, k, v, rate, keep, momentum = streams()
    rng = np.random.default_rng(1)
    bias = name == "ttt"
    initial = [0.5 * rng.normal(size=(H, i + bias, o)) for i, o in ((D, E), (E, D))]
    norm = [1 + 0.1 * rng.normal(size=(H, D)), 0.1 * rng.normal(size=(H, D))]
    gate = rng.uniform(0.2, 1, size=(T, H))
    inner = {"activation": "gelu", "residual": True, "norm": tuple(map(jnp.asarray, norm))}
    theirs = {
        "ttt": {**inner, "read_scale": gate},
        "moneta": {**inner, "loss": "cube", "retention": "l4", "clip": 1.0},
        "yaad": {**inner, "loss": "huber", "threshold": 3 * gate},
        "memora": {**inner, "retention": "softmax"},
        "omega": {"window": 3, "gain": gate, "clip": 1.0},
        "atlas": {"window": 3, "gain": gate, "orthogonal": 0.1 * gate, "clip": 1.0},
        "classical": {"orthogonal": 0.1 * gate, "newton_schulz": "classical", "floor": 0.3},
    }[name]
    if name in ("ttt", "moneta", "yaad", "memora"):
        momentum = None

    def head(h):
        def huber(e, t):
            small = np.sqrt((e**2).sum()) <= 3 * gate[t, h]
            return 2 * e if small else 3 * gate[t, h] * e / np.sqrt(e**2 + 1e-6)

        mine = {
            "ttt": {"scale": gate[:, h]},
            "moneta": {**L3, **L4, "clip": 1.0},
            "yaad": {"loss_slope": huber},
            "memora": {"retention": row_softmax},
            "omega": {"window": 3, "gain": gate[:, h], "clip": 1.0},
            "atlas": {"window": 3, "gain": gate[:, h], "orthogonal": 0.1 * gate[:, h], "clip": 1.0},
            "classical": {"orthogonal": 0.1 * gate[:, h], "steps": ((1.5, -0.5, 0.0),) * 5, "floor": 0.3},
        }[name]
        if "norm" in theirs:
            mine |= {"norm": [n[h] for n in norm], "residual": True}
        gates = [None if g is None else g[:, h] for g in (rate, keep, momentum)]
        activation = gelu if "norm" in theirs else silu
        return remember(
            [w[h] for w in initial],
            q[:, h],
            k[:, h],
            v[:, h],
            *gates,
            chunk=chunk,
            activation=activation,
            **mine,
        )

    close(op(initial, q, k, v, rate, keep, momentum, chunk=chunk, **theirs), by_heads(head))


def test_ttt_linear_is_a_delta_rule():
    """Mini-batches of one token without the inner norm; the bias is one more key that is always 1."""
    cfg = ttt.Config(2 * D, heads=H, chunk=1, inner_norm=False, conv=0, gate=False, rope_base=None)
    params = perturbed(ttt, cfg)
    params["read_offset"] = jnp.zeros(1)
    x = jnp.asarray(random(1, B, 21, 2 * D))
    q, k, v = (y.reshape(B, 21, H, D) for y in jnp.split(x @ params["w_qkv"], 3, -1))
    rate = jax.nn.sigmoid(x @ params["w_rate"] + params["rate_bias"])[..., None] / D
    q, k = (jnp.concatenate([y, jnp.ones_like(y[..., :1])], -1) for y in (q, k))
    residual = jnp.concatenate([jnp.eye(D), jnp.zeros((1, D))])
    o, _ = gated_delta_rule(q, k, rate * v, rate * k, None, (params["memory_0"] + residual)[None])
    o = o.reshape(B, 21, -1)
    o = (o - o.mean(-1, keepdims=True)) / jnp.sqrt(o.var(-1, keepdims=True) + 1e-6)
    expected = (o * params["norm_scale"] + params["norm_bias"]) @ params["w_out"]
    close(run(ttt, cfg, params, x), expected)


def test_gradients_of_the_document_are_one_long_chunk():
    x = jnp.asarray(random(2, 2, 70, 8))
    cfg = {"width": 8, "heads": 2, "conv": 3}
    params = perturbed(titans, titans.Config(**cfg))
    whole, document = (
        run(titans, titans.Config(**cfg, **more), params, x)
        for more in ({"chunk": 128}, {"gradients": "document"})
    )
    close(document, whole)
    assert jnp.max(jnp.abs(whole - run(titans, titans.Config(**cfg), params, x))) > 1e-4


def test_omega_net_without_a_window_is_titans():
    cfg = atlas.Config(8, heads=2, degree=1, window=1, muon=False, chunk=4)
    params = perturbed(atlas, cfg)
    params["coefficients"] = jnp.array([0.0, 1.0])  # phi(x) = (0, x)
    theirs = {n: p for n, p in params.items() if n != "coefficients"}
    theirs["memory_0"] = params["memory_0"][:, 1:]
    x = jnp.asarray(random(3, 2, 21, 8))
    close(run(atlas, cfg, params, x), run(titans, titans.Config(8, heads=2, chunk=4), theirs, x))


def test_atlas_with_a_high_floor_is_omega_net():
    """Far below the floor an orthogonal step is a multiple of what it is made of."""
    omega = atlas.Config(8, heads=2, window=3, chunk=4)
    floor, slope = 1e9, 1.5**5
    cfg = dataclasses.replace(
        omega, muon=True, floor=floor, step_size=2 * floor * omega.max_rate * omega.clip / slope
    )
    params = perturbed(atlas, cfg)
    params |= {"w_step": jnp.zeros((8, 2)), "step_bias": jnp.zeros(2)}  # mu = step_size / 2
    x = jnp.asarray(random(3, 2, 21, 8))
    close(run(atlas, cfg, params, x), run(atlas, omega, params, x))


def test_yaad_with_a_high_threshold_is_the_square_loss():
    x = jnp.asarray(random(4, 2, 21, 8))
    yaad, square = (miras.Config(8, heads=2, loss=loss, retention="linear") for loss in ("huber", "square"))
    params = perturbed(miras, yaad)
    params["threshold_bias"] = jnp.full(2, 1e3)
    close(run(miras, yaad, params, x), run(miras, square, params, x))


def test_polynomial_features_are_a_truncated_exponential():
    cfg = atlas.Config(8, heads=2)
    params = atlas.init(jax.random.key(0), cfg)
    q, k = (jnp.asarray(random(s, 5, 4)) for s in (1, 2))
    s = jnp.sum(q * k, -1)
    close(jnp.sum(atlas._features(params, cfg, q) * atlas._features(params, cfg, k), -1), 1 + s + s**2 / 2)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_orthogonal_factor(shape):
    x = random(5, 2, *shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.linalg.norm(s, axis=-1, keepdims=True)
    for a, b, c in VARIED:
        s = a * s + b * s**3 + c * s**5
    close(orthogonalize(jnp.asarray(x), VARIED), u * s[:, None] @ vt)
    assert np.all(np.abs(s - 1) < 0.2)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_slope_of_an_orthogonal_step(shape):
    """At 0 it is the product of the linear coefficients over the floor."""
    x = jnp.asarray(random(5, *shape))
    _, change = jax.jvp(
        functools.partial(orthogonalize, steps=CLASSICAL, floor=0.3), (jnp.zeros(shape),), (x,)
    )
    close(change, 1.5**5 / 0.3 * x)


@pytest.mark.parametrize(("orthogonal", "normalize"), [(True, True), (False, False)])
def test_chunk_update_in_numpy(orthogonal, normalize):
    chunk, rng = 4, np.random.default_rng(6)
    initial = [rng.normal(size=(H, *s)) for s in ((D, E), (D, E), (E, D))]
    q, k, v = (rng.normal(size=(T, H, D)) for _ in range(3))
    rate, momentum = rng.uniform(0, 0.3, size=(T, H, 3)), rng.uniform(size=(T, H))

    def head(h):
        w, last, out = [m[h] for m in initial], [0.0, 0.0, 0.0], []
        for c in range(0, T, chunk):
            total = [0.0, 0.0, 0.0]
            for t in range(c, min(c + chunk, T)):
                out.append((silu(q[t, h] @ w[0]) * (q[t, h] @ w[1])) @ w[2])
                a, up, back = k[t, h] @ w[0], k[t, h] @ w[1], w[2] @ v[t, h]
                each = (
                    np.outer(k[t, h], back * up * slope(silu, a)),
                    np.outer(k[t, h], back * silu(a)),
                    np.outer(silu(a) * up, v[t, h]),
                )
                total = [s + rate[t, h, i] * g for i, (s, g) in enumerate(zip(total, each, strict=True))]
            echo = momentum[c : c + chunk, h].mean()
            last = [g + echo * s for g, s in zip(total, last, strict=True)]
            moves = [newton_schulz(s, VARIED) if orthogonal else s for s in last]
            w = [m + d for m, d in zip(w, moves, strict=True)]
            if normalize:
                norms = [np.linalg.norm(m, axis=0) for m in w]
                w = [
                    m / n * np.linalg.norm(m0[h], axis=0) for m, n, m0 in zip(w, norms, initial, strict=True)
                ]
        return np.array(out)

    program = jax.jit(
        functools.partial(chunk_update, chunk=chunk, orthogonal=orthogonal, normalize=normalize)
    )
    arrays = [jnp.asarray(x)[None] for x in (q, k, v, rate, momentum)]
    out, _ = program(tuple(map(jnp.asarray, initial)), *arrays)
    np.testing.assert_allclose(out[0], by_heads(head), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_attention_with_extra_keys(implementation):
    """They are seen by all, through the edges of windows, blocks and documents; a carried cache too."""
    q, k, v = (random(s, 1, T, n, D) for s, n in ((1, 4), (2, 2), (3, 2)))
    extra, span, ids = (random(4, 3, 2, D), random(5, 3, 2, D)), 3, [0] * 5 + [1] * 6

    @jax.jit
    def program(q, k, v, extra):
        cache = empty_cache(1, span, 2, D, D)
        how = {"extra": extra, "implementation": implementation}
        first, cache = attend(q[:, :2], k[:, :2], v[:, :2], span, cache, **how)
        rest, _ = attend(q[:, 2:], k[:, 2:], v[:, 2:], span, cache, segment_ids=jnp.array([ids[2:]]), **how)
        return jnp.concatenate([first, rest], 1)

    expected = np.zeros((T, 4, D))
    for i in range(T):
        seen = [j for j in range(T) if 0 <= i - j < span and ids[i] == ids[j]]
        for h in range(4):
            keys, values = (
                np.concatenate([e[:, h // 2], x[0, seen, h // 2]]) for e, x in zip(extra, (k, v), strict=True)
            )
            weights = np.exp(keys @ q[0, i, h])
            expected[i, h] = weights @ values / weights.sum()
    close(program(*map(jnp.asarray, (q, k, v)), tuple(map(jnp.asarray, extra)))[0], expected)


def test_memory_as_a_layer_is_attention_after_titans():
    settings = {"width": 8, "heads": 2, "chunk": 4}
    cfg = titans_attention.Config(**settings, combine="layer", window=5, persistent=0)
    params = perturbed(titans_attention, cfg)
    x = jnp.asarray(random(7, 2, 21, 8))
    memory = {**params["memory"], "w_out": params["w_memory"]}
    remembered = run(titans, titans.Config(**settings), memory, x)
    above = {name: params[name] for name in ("w_qkv", "w_out")}
    expected = run(attention, attention.Config(8, heads=2, window=5), above, remembered)
    close(run(titans_attention, cfg, params, x), expected)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def test_memory_as_context_in_numpy():
    """Token by token, with what was recalled kept in a list; no rotation."""
    cfg = titans_mac.Config(8, heads=2, segment=4, persistent=2, rope_base=None, clip=None)
    params = perturbed(titans_mac, cfg)
    x = random(8, T, 8)
    p = jax.tree.map(np.asarray, params)

    def split(z):
        return z.reshape(H, -1)

    initial = [p["memory_0"], p["memory_1"]]
    start, now = ([w.copy() for w in initial] for _ in range(2))
    speed = [np.zeros_like(w) for w in initial]
    keys, values, out = [], [], []
    for t in range(T):
        if t % 4 == 0:
            start, keys, values = [w.copy() for w in now], [], []
        query = unit(split(silu(x[t] @ p["w_memory_q"])))
        recalled = [forward([w[h] for w in start], query[h], silu)[0] for h in range(H)]
        told = rms(np.concatenate(recalled), p["recall_scale"])
        for source in (told, x[t]):
            _, k, v = np.split(source @ p["w_qkv"], 3)
            keys.append(split(k))
            values.append(split(v))
        q = split(np.split(x[t] @ p["w_qkv"], 3)[0]) / np.sqrt(4)
        all_k = np.concatenate([p["persistent_k"], np.array(keys)])
        all_v = np.concatenate([p["persistent_v"], np.array(values)])
        weights = np.exp(np.einsum("hk,jhk->jh", q, all_k))
        y = np.einsum("jh,jhk->hk", weights / weights.sum(0), all_v).reshape(-1) @ p["w_attention"]
        k, v = np.split(silu(y @ p["w_memory_kv"]), 2)
        k, v, query = unit(split(k)), split(v), unit(split(silu(y @ p["w_memory_q"])))
        gate = {n: sigmoid(y @ p[f"w_{n}"] + p[f"{n}_bias"]) for n in ("rate", "forget", "momentum")}
        rate = cfg.max_rate * gate["rate"] * (1 - gate["momentum"])
        reads = []
        for h in range(H):
            each = gradients([w[h] for w in start], k[h], v[h], silu, lambda e: 2 * e, None, False)
            for i, g in enumerate(each):
                speed[i][h] = gate["momentum"][h] * speed[i][h] - rate[h] * g
                now[i][h] = (1 - gate["forget"][h]) * now[i][h] + speed[i][h]
            reads.append(forward([w[h] for w in now], query[h], silu)[0])
        o = rms(y, p["norm_scale"]) * sigmoid(rms(np.concatenate(reads), p["gate_scale"]))
        out.append(o @ p["w_out"])
    close(run(titans_mac, cfg, params, jnp.asarray(x)[None])[0], np.array(out))


@pytest.mark.parametrize(
    ("layer", "bad"),
    [
        (ttt, {"inner": "tree"}),
        (ttt, {"base_rate": 0.0}),
        (titans, {"gradients": "token"}),
        (miras, {"loss": "hinge"}),
        (miras, {"retention": "l1"}),
        (titans_attention, {"combine": "sum"}),
        (titans_attention, {"persistent": -1}),
        (titans_mac, {"segment": 0}),
        (lact, {"chunk": 0}),
        (atlas, {"degree": 3}),
        (atlas, {"step_size": 0.0}),
    ],
)
def test_config_names_the_bad_field(layer, bad):
    name = layer.__name__.rsplit(".", 1)[-1]
    with pytest.raises(ValueError, match=f"{name}: {next(iter(bad))}="):
        layer.Config(width=8, **bad)


def test_loud_errors():
    q, k, v, rate, keep, _ = streams()
    initial = [random(0, H, D, D)]
    for more, message in [
        ({"loss": "huber"}, "needs a threshold"),
        ({"loss": "hinge"}, "loss='hinge'; choose from square, cube, huber"),
        ({"retention": "l1"}, "retention='l1'; choose from"),
        ({"window": 0}, "window=0"),
        ({"window": 2, "threshold": rate}, "threshold and window"),
        ({"retention": "l4", "read_scale": rate}, "read_scale goes with"),
    ]:
        with pytest.raises(ValueError, match=message):
            op(initial, q, k, v, rate, keep, None, chunk=4, **more)
