"""The op behind Titans: dual form against the definition, values and gradients, and known special cases."""

import functools
from itertools import pairwise

import chains
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import titans
from pallas_kernels.gated_linear_attention import gated_linear_attention
from pallas_kernels.memory_update import empty_memory, memory_update, memory_update_step

B, H, D, CHUNK = 2, 2, 4, 8
TOLERANCE = 1e-10


def problem(length, depth=2, momentum=True, seed=0):
    """`(initial, q, k, v, rate, log_keep, log_momentum)` with unit keys and gates all over their range."""
    keys = iter(jax.random.split(jax.random.key(seed), 7 + depth))
    widths = [D, *[6] * (depth - 1), D]
    initial = tuple(jax.random.normal(next(keys), (H, i, o)) * i**-0.5 for i, o in pairwise(widths))
    q, k, v = (jax.random.normal(next(keys), (B, length, H, D)) for _ in range(3))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    rate, keep, stay = (jax.random.normal(next(keys), (B, length, H)) for _ in range(3))
    log_momentum = jax.nn.log_sigmoid(stay + 1) if momentum else None
    return initial, q, k, v, 0.1 * jax.nn.sigmoid(rate), jax.nn.log_sigmoid(keep + 3), log_momentum


def busy_memory(initial, momentum=True):
    """A state in the middle of chunks: phase 3 in the first row, the last place of a chunk in the second."""
    empty = empty_memory([w.shape for w in initial], B, momentum=momentum)
    leaves, tree = jax.tree.flatten(empty)
    keys = jax.random.split(jax.random.key(8), len(leaves))
    leaves = [0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, leaves).replace(phase=jnp.array([3, CHUNK - 1], jnp.int32))


def documents(length, seed=0):
    """Ids of runs from 1 to 13 tokens; an id comes back later as another document."""
    rng = np.random.default_rng(seed)
    rows = [np.repeat(rng.permutation(40) % 3, rng.integers(1, 14, 40))[:length] for _ in range(B)]
    return jnp.array(rows)


def values_and_gradients(arrays, state, **settings):
    return chains.values_and_gradients(
        lambda arrays, state: memory_update(*arrays, state, **settings), arrays, state
    )


assert_close = functools.partial(chains.assert_close, tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("length", "depth", "momentum", "carried", "packed", "more"),
    [
        (1, 2, True, True, False, {}),
        (3, 2, True, True, True, {}),
        (CHUNK - 1, 2, False, False, False, {"clip": 1.0}),
        (CHUNK, 3, True, True, True, {}),
        (CHUNK + 1, 1, True, False, True, {}),
        (37, 2, True, False, False, {"activation": "gelu"}),
        (37, 2, True, True, False, {"residual": True, "clip": 0.5}),
        (37, 2, True, True, True, {"clip": 2.0}),
        (37, 1, False, True, True, {}),
    ],
)
def test_dual_form_is_the_definition(length, depth, momentum, carried, packed, more):
    arrays = problem(length, depth, momentum)
    state = busy_memory(arrays[0], momentum) if carried else None
    settings = {"chunk": CHUNK, "segment_ids": documents(length) if packed else None, **more}
    expected = values_and_gradients(arrays, state, implementation="reference", **settings)
    assert_close(values_and_gradients(arrays, state, **settings), expected)


@pytest.mark.parametrize("chunk", [5, 16])
def test_cut_anywhere(chunk):
    """The grid of chunks belongs to the document: cuts at random points change no number."""
    initial, *streams = problem(37)
    cuts = sorted(np.random.default_rng(chunk).choice(np.arange(1, 37), 3, replace=False))

    @jax.jit
    def whole():
        return memory_update(initial, *streams, chunk=chunk)

    @jax.jit
    def pieces():
        state, outputs = None, []
        for lo, hi in zip([0, *cuts], [*cuts, 37], strict=True):
            out, state = memory_update(initial, *(x[:, lo:hi] for x in streams), state, chunk=chunk)
            outputs.append(out)
        return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *outputs), state

    assert_close(pieces(), whole())


def test_packed_documents_are_separate():
    """Many boundaries in one chunk; the second row is one document."""
    lengths = [3, 1, 2, 9, 1, 14]
    arrays = problem(sum(lengths))
    initial, *streams = arrays
    ids = jnp.array([np.repeat([1, 2, 1, 5, 1, 0], lengths), np.zeros(sum(lengths), int)])
    (y, _), state = jax.jit(functools.partial(memory_update, chunk=CHUNK, segment_ids=ids))(*arrays)
    alone = jax.jit(functools.partial(memory_update, chunk=CHUNK))
    outputs = []
    for end, n in zip(np.cumsum(lengths), lengths, strict=True):
        (out, _), last = alone(initial, *(x[:1, end - n : end] for x in streams))
        outputs.append(out)
    assert_close(y[:1], jnp.concatenate(outputs, 1))
    assert_close(jax.tree.map(lambda s: s[:1], state), last)
    (out, _), last = alone(initial, *(x[1:] for x in streams))
    assert_close((y[1:], jax.tree.map(lambda s: s[1:], state)), (out, last))


def test_steps_are_the_op():
    initial, *streams = problem(11)
    start = busy_memory(initial)

    @jax.jit
    def steps():
        def body(state, inputs):
            return memory_update_step(initial, *inputs, state, chunk=CHUNK, clip=1.0)[::-1]

        state, out = jax.lax.scan(body, start, [jnp.swapaxes(x, 0, 1) for x in streams])
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), out), state

    op = jax.jit(functools.partial(memory_update, chunk=CHUNK, clip=1.0))
    assert_close(op(initial, *streams, start), steps())


def test_linear_chunk_of_one_is_a_delta_rule():
    """W = (1 - a) W - 2 r k (W^T k - v)^T: the error is that of the weights before they decay."""
    initial, q, k, v, rate, log_keep, _ = problem(21, depth=1, momentum=False)
    (y, surprise), state = jax.jit(functools.partial(memory_update, chunk=1))(
        initial, q, k, v, rate, log_keep
    )
    w = np.broadcast_to(initial[0], (B, H, D, D))
    for t in range(21):
        error = np.einsum("bhi,bhio->bho", k[:, t], w) - v[:, t]
        np.testing.assert_allclose(surprise[:, t], (error**2).sum(-1), rtol=1e-12)
        write = 2 * rate[:, t, :, None, None] * k[:, t, :, :, None] * error[..., None, :]
        w = np.exp(log_keep[:, t])[..., None, None] * w - write
        np.testing.assert_allclose(y[:, t], np.einsum("bhi,bhio->bho", q[:, t], w), atol=1e-12)
    np.testing.assert_allclose(state.weights[0] + initial[0], w, atol=1e-12)


def test_linear_endless_chunk_is_linear_attention():
    """No forgetting, no momentum, all gradients at W = 0: the memory is the sum of 2 r k v^T."""
    initial, q, k, v, rate, log_keep, _ = problem(21, depth=1, momentum=False)
    zero = jax.tree.map(jnp.zeros_like, initial)
    (y, _), state = memory_update(zero, q, k, v, rate, jnp.zeros_like(log_keep), chunk=32)
    expected, memory = gated_linear_attention(q, k, 2 * rate[..., None] * v)
    assert_close((y, state.weights[0]), (expected, memory))


def test_clip_bounds_every_gradient():
    initial, q, k, v, rate, log_keep, _ = problem(1, momentum=False)
    _, state = memory_update(initial, q, k, 1e6 * v, rate, jnp.zeros_like(log_keep), chunk=CHUNK, clip=0.5)
    for change in state.weights:
        size = jnp.sqrt(jnp.sum(change**2, (-2, -1)))
        np.testing.assert_allclose(size, 0.5 * rate[:, 0], rtol=1e-3)


@pytest.mark.deep
@pytest.mark.parametrize("gate", [0.0, -60.0])
def test_extreme_gates_are_finite(gate, float32):
    """Everything kept or everything forgotten, large repeated keys and values, in float32."""
    initial, q, k, v, rate, log_keep, _ = problem(60)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    gates = jnp.full_like(log_keep, gate)
    arrays = (initial, q, k, 100 * v, rate, gates, gates)
    for leaf in jax.tree.leaves(values_and_gradients(arrays, None, chunk=16, clip=1.0)):
        assert np.all(np.isfinite(leaf))


def test_dtypes():
    """bfloat16 in, bfloat16 out; the surprise and the state stay wide."""
    arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem(9))
    (y, surprise), state = jax.eval_shape(functools.partial(memory_update, chunk=CHUNK), *arrays)
    assert (y.dtype, surprise.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if chains.smooth(leaf)} == {jnp.dtype("float32")}


def test_loud_errors():
    arrays = problem(3)
    run = functools.partial(memory_update, *arrays)
    with pytest.raises(ValueError, match="activation='tanh'"):
        run(chunk=4, activation="tanh")
    with pytest.raises(ValueError, match="chunk=0"):
        run(chunk=0)
    with pytest.raises(ValueError, match="do not lead from 4 to 4"):
        memory_update(arrays[0][:1], *arrays[1:], chunk=4)
    with pytest.raises(ValueError, match="holds momentum exactly when"):
        run(busy_memory(arrays[0], momentum=False), chunk=4)
    with pytest.raises(ValueError, match="no implementation 'abacus'"):
        run(chunk=4, implementation="abacus")


@pytest.mark.parametrize(
    "bad", [{"depth": 0}, {"chunk": 0}, {"max_rate": 0.0}, {"clip": -1.0}, {"activation": "tanh"}]
)
def test_config_names_the_bad_field(bad):
    with pytest.raises(ValueError, match=f"titans: {next(iter(bad))}="):
        titans.Config(width=8, **bad)


def test_memory_survives_a_long_stream(float32):
    """Forgetting pulls a deep memory to 0, where it could never learn again: it must not get there."""
    cfg = titans.Config(width=16, heads=2)
    params = titans.init(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(1), (1, 8192, 16))
    y, _, aux = jax.jit(functools.partial(titans.apply, cfg=cfg))(params, x=x)
    early, late = jnp.std(y[:, :512]), jnp.std(y[:, -512:])
    assert late > 0.3 * early
    assert aux["surprise"] > 0
