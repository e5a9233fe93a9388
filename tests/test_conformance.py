"""The one suite that every layer passes: values and gradients, in float64 to 1e-9.

Rows come from `tests/rows.py`; a new architecture adds a row there and nothing here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from rows import LONG_ROWS, ROWS, WIDTH

from zoo import registry

TOLERANCE = 1e-9
# Relative RMS error of bfloat16 activations against float32 ones.
BF16_BOUND = 4e-2
LENGTH = 37


def rows(names):
    """One case per row; conftest.py runs all tests of a row in one process, one after the other."""
    return pytest.mark.parametrize("name", list(names))


by_row = rows(ROWS)


_present = []


@pytest.fixture(autouse=True)
def programs_of_one_row_at_a_time(request):
    """What was compiled for a row goes when the next one comes: a process can map only so much code."""
    name = request.node.callspec.params.get("name")
    if _present != [name]:
        _present[:] = [name]
        all_at_once.cache_clear()
        verbs.cache_clear()
        jax.clear_caches()


def setup(name, length=LENGTH, batch=2, seed=0):
    """Layer module, Config, parameters (perturbed, so that no gate sits at a symmetric point), inputs."""
    cfg = ROWS[name]
    layer = registry.module(cfg)
    keys = jax.random.split(jax.random.key(seed), 3)
    params = layer.init(keys[0], cfg)
    leaves, tree = jax.tree.flatten(params)
    noise = jax.random.split(keys[1], len(leaves))
    leaves = [p + 0.1 * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, noise, strict=True)]
    x = jax.random.normal(keys[2], (batch, length, cfg.width))
    return layer, cfg, jax.tree.unflatten(tree, leaves), x


@jax.jit
def functional(tree):
    """A generic smooth number of a pytree: every float and complex leaf counts, with its own weights."""
    total = 0.0
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            weights = jnp.cos(jnp.arange(leaf.size) * 0.7 + i).reshape(leaf.shape)
            for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
                total = total + jnp.sum(weights * part) + 0.1 * jnp.sum(part * part)
    return total


def values_and_gradients(run, *args):
    """Outputs of `run(*args) -> (y, state)` and the gradients of a functional of both.

    `run` is not compiled as a whole: tests compose it of verbs that are compiled once (`verbs`).
    """

    def loss(*args):
        out = run(*args)
        return functional(out), out

    gradients, out = jax.grad(loss, argnums=tuple(range(len(args))), has_aux=True, allow_int=True)(*args)
    return out, gradients


def values_and_gradients_at_once(run, *args):
    """The same in one program of its own, for a `run` that is composed of nothing compiled."""
    return jax.jit(functools.partial(values_and_gradients, run))(*args)


def assert_close(actual, desired, tolerance=TOLERANCE):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        if a.dtype == jax.dtypes.float0:
            continue
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def compiled(run):
    """`run` as two programs per shape, forward and pull-back, however little of either a test asks for.

    Most of the time of these tests is compilation, so they share programs instead of compiling their own.
    """
    forward = jax.jit(lambda *args: jax.vjp(run, *args))
    call = jax.custom_vjp(lambda *args: forward(*args)[0])
    call.defvjp(forward, jax.jit(lambda pull, cotangents: pull(cotangents)))
    return call


@functools.cache
def verbs(name):
    """`apply(params, x, state)`, the same with segment ids, and `step(params, x_t, state)`, compiled."""
    layer, cfg, *_ = setup(name)

    def apply(params, x, state, ids=None):
        return layer.apply(params, cfg, x, state, segment_ids=ids)[:2]

    return Verbs(
        apply, compiled(apply), compiled(lambda params, x_t, state: layer.step(params, cfg, x_t, state))
    )


class Verbs(NamedTuple):
    plain: Callable  # apply, not compiled
    apply: Callable  # (params, x, state, ids=None) -> (y, state)
    step: Callable  # (params, x_t, state) -> (y_t, state)


def by_steps(name):
    def run(params, x, state):
        out = []
        for x_t in jnp.unstack(x, axis=1):
            y, state = verbs(name).step(params, x_t, state)
            out.append(y)
        return jnp.stack(out, 1), state

    return run


def in_pieces(name, *cuts):
    def run(params, x, state):
        out = []
        for piece in jnp.split(x, cuts, 1):
            y, state = verbs(name).apply(params, piece, state)
            out.append(y)
        return jnp.concatenate(out, 1), state

    return run


def warm_state(name, params):
    """A state that has seen something, of a length that fits no chunk."""
    layer, cfg, *_ = setup(name)
    past = jax.random.normal(jax.random.key(9), (2, 4, cfg.width))
    return verbs(name).apply(params, past, layer.init_state(cfg, 2))[1]


@functools.cache
def all_at_once(name):
    """Arguments (parameters, inputs, a warm state), and values and gradients of `apply` there."""
    _, _, params, x = setup(name)
    arguments = (params, x, warm_state(name, params))
    return arguments, values_and_gradients(verbs(name).apply, *arguments)


@by_row
def test_step_equals_apply(name):
    arguments, result = all_at_once(name)
    assert_close(result, values_and_gradients(by_steps(name), *arguments))


@by_row
def test_pieces_equal_the_whole(name):
    """One token, a piece that ends inside a chunk, and one that begins there and ends inside the next."""
    arguments, result = all_at_once(name)
    assert_close(values_and_gradients(in_pieces(name, 1, 5), *arguments), result)


@by_row
def test_no_state_is_the_empty_state(name):
    layer, cfg, params, x = setup(name)
    with_state = verbs(name).apply(params, x, layer.init_state(cfg, 2))
    assert_close(jax.jit(verbs(name).plain)(params, x, None), with_state)


@by_row
@pytest.mark.parametrize("length", [1, 4])
def test_short_sequences(name, length):
    (params, x, state), _ = all_at_once(name)
    expected = values_and_gradients(by_steps(name), params, x[:, :length], state)
    assert_close(values_and_gradients(verbs(name).apply, params, x[:, :length], state), expected)


@by_row
def test_implementations_agree(name):
    layer, cfg, *_ = setup(name)
    (params, x, state), (expected, _) = all_at_once(name)
    reference = jax.jit(lambda *args: layer.apply(args[0], cfg, *args[1:], implementation="reference")[:2])
    assert_close(reference(params, x, state), expected)
    with pytest.raises(ValueError, match="no implementation 'abacus'"):
        layer.apply(params, cfg, x, implementation="abacus")


@by_row
def test_causal_in_time_and_across_the_batch(name):
    """d y[b, t] / d x[b', t'] is exactly zero for t' > t and for b' != b."""
    (params, x, state), _ = all_at_once(name)
    direction = jax.random.normal(jax.random.key(3), (x.shape[-1],))
    y, pull = jax.vjp(lambda x: verbs(name).apply(params, x, state)[0], x)
    for t in range(0, LENGTH, 4):
        cotangent = np.zeros(y.shape)
        cotangent[0, t] = direction
        g = np.asarray(pull(jnp.asarray(cotangent))[0])
        assert np.all(g[0, t + 1 :] == 0)
        assert np.all(g[1] == 0)
        assert np.any(g[0, t] != 0)


# Boundaries inside and at the end of chunks; in each row a document of one token.
DOCUMENTS = [[32, 1, 4], [4, 1, 32]]


@by_row
def test_packed_equals_separate(name):
    layer, cfg, *_ = setup(name)
    arguments, _ = all_at_once(name)
    # The same id comes again in later documents: what counts is where it changes.
    ids = jnp.array([np.repeat([3, 4, 3], d) for d in DOCUMENTS])

    def packed(params, x, state):
        return verbs(name).apply(params, x, state, ids)

    def separate(params, x, state):
        """Each document twice in a batch of its own: shapes that are compiled already."""
        rows, states = [], []
        for b, lengths in enumerate(DOCUMENTS):
            own, out = jax.tree.map(lambda s, b=b: s[jnp.array([b, b])], state), []
            for piece in jnp.split(x[b], np.cumsum(lengths)[:-1]):
                y, last = verbs(name).apply(params, jnp.stack([piece] * 2), own)
                out.append(y[:1])
                own = layer.init_state(cfg, 2)
            rows.append(jnp.concatenate(out, 1))
            states.append(jax.tree.map(lambda s: s[:1], last))
        return jnp.concatenate(rows), jax.tree.map(lambda *s: jnp.concatenate(s), *states)

    def comparable(run):
        """What a ring buffer holds in slots it never reads again is not part of the state's meaning."""

        def outputs(params, x, state):
            y, state = run(params, x, state)
            probe = jax.random.normal(jax.random.key(4), (2, cfg.width))
            return y, verbs(name).step(params, probe, state)[0]

        return outputs

    expected = values_and_gradients(comparable(separate), *arguments)
    assert_close(values_and_gradients(comparable(packed), *arguments), expected)


def drawn(test):
    """A few examples, the same in every run; their shapes are compiled already."""
    return settings(max_examples=4, derandomize=True, deadline=None, database=None)(test)


@by_row
@drawn
@given(
    pieces=st.lists(st.sampled_from([1, 4, 32]), min_size=1, max_size=4).filter(lambda p: sum(p) <= 40),
    scale=st.floats(0.1, 10.0),
    seed=st.integers(0, 2**16),
)
def test_any_split(name, pieces, scale, seed):
    """Pieces from a warm state, inputs small and large, against one step at a time."""
    (params, _, state), _ = all_at_once(name)
    x = scale * jax.random.normal(jax.random.key(seed), (2, sum(pieces), ROWS[name].width))
    cuts = np.cumsum(pieces)[:-1]
    expected = values_and_gradients(by_steps(name), params, x, state)
    assert_close(values_and_gradients(in_pieces(name, *cuts), params, x, state), expected)


@by_row
@drawn
@given(boundaries=st.lists(st.booleans(), min_size=LENGTH - 1, max_size=LENGTH - 1))
def test_any_documents(name, boundaries):
    """Documents that begin anywhere, the same in both rows, against steps from an empty state at each."""
    layer, cfg, *_ = setup(name)
    (params, x, state), _ = all_at_once(name)
    ids = np.broadcast_to(np.cumsum([0, *boundaries]), (2, LENGTH))
    out, own = [], state
    for x_t, begins in zip(jnp.unstack(x, axis=1), [False, *boundaries], strict=True):
        own = layer.init_state(cfg, 2) if begins else own
        y, own = verbs(name).step(params, x_t, own)
        out.append(y)
    y, last = verbs(name).apply(params, x, state, jnp.array(ids))
    assert_close(y, jnp.stack(out, 1))
    probe = jax.random.normal(jax.random.key(4), (2, cfg.width))
    assert_close(*(verbs(name).step(params, probe, s)[0] for s in (last, own)))


@by_row
def test_one_document_ids_change_nothing(name):
    arguments, (plain, _) = all_at_once(name)
    assert_close(verbs(name).apply(*arguments, jnp.full((2, LENGTH), 7)), plain)


@by_row
def test_bfloat16(name, float32):
    layer, cfg, params, x = setup(name)
    state = layer.init_state(cfg, 2)
    y32, state32 = verbs(name).apply(params, x, state)
    y16, state16 = jax.jit(verbs(name).plain)(params, x.astype(jnp.bfloat16), state)
    assert y16.dtype == jnp.bfloat16
    assert jax.tree.map(lambda s: s.dtype, state16) == jax.tree.map(lambda s: s.dtype, state32)
    error = jnp.sqrt(jnp.mean((y16.astype(jnp.float32) - y32) ** 2) / jnp.mean(y32**2))
    assert error < BF16_BOUND, f"relative RMS error {error:.3f}"


@by_row
@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_extreme_gates(name, scale, float32):
    """Inputs that drive every gate to its ends (or leave it at its bias) give finite values, gradients."""
    _, _, params, x = setup(name)
    out = values_and_gradients(verbs(name).apply, params, scale * x, warm_state(name, params))
    for leaf in jax.tree.leaves(out):
        assert leaf.dtype == jax.dtypes.float0 or np.all(np.isfinite(leaf))


@rows(LONG_ROWS)
def test_very_long_sequence(name, float32):
    layer, cfg, params, x = setup(name, 65_536, batch=1)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        y, state, _ = layer.apply(params, cfg, x)
        return jnp.mean(y**2) + 1e-3 * functional(state)

    for leaf in jax.tree.leaves(loss(params)):
        assert np.all(np.isfinite(leaf))


@by_row
def test_state_is_constant_and_documented(name, float32):
    """Same structure, shapes and dtypes in and out, whatever T; bytes as `state_bytes` says."""
    layer, cfg, params, _ = setup(name)
    empty = layer.init_state(cfg, 3)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(empty)) == 3 * cfg.state_bytes()
    shapes = jax.tree.map(lambda s: (s.shape, s.dtype), empty)
    for length in (1, 50):
        x = jnp.ones((3, length, cfg.width), jnp.bfloat16)
        state = jax.eval_shape(lambda p, x: layer.apply(p, cfg, x)[1], params, x)
        assert jax.tree.map(lambda s: (s.shape, s.dtype), state) == shapes
    _, stepped = jax.eval_shape(lambda p, x, s: layer.step(p, cfg, x, s), params, x[:, 0], empty)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), stepped) == shapes


@by_row
def test_vmap_and_remat(name):
    (params, x, state), _ = all_at_once(name)
    arguments = params, x[:, :4], state
    expected = values_and_gradients(verbs(name).apply, *arguments)
    assert_close(values_and_gradients(jax.jit(jax.checkpoint(verbs(name).plain)), *arguments), expected)
    x, state = jax.tree.map(lambda a: a[:, None], arguments[1:])
    y, _ = jax.jit(jax.vmap(functools.partial(verbs(name).plain, params)))(x, state)
    assert_close(y[:, 0], expected[0][0])


@by_row
def test_donated_state(name):
    (params, x, state), (expected, _) = all_at_once(name)
    donating = jax.jit(verbs(name).plain, donate_argnums=2)
    assert_close(donating(params, x, jax.tree.map(jnp.copy, state)), expected)


@by_row
def test_sharded_over_batch_and_time(name):
    """Batch: shards know nothing of each other. Time: the state travels from shard to shard."""
    layer, cfg, params, x = setup(name)
    x = x[:, :32]
    mesh = Mesh(np.array(jax.devices()[:2]), ("shard",))
    expected, _ = verbs(name).apply(params, x, layer.init_state(cfg, 2))

    def batch_shard(x):
        return layer.apply(params, cfg, x)[0]

    def time_shard(x):
        state, me = layer.init_state(cfg, x.shape[0]), jax.lax.axis_index("shard")
        y = jnp.zeros_like(x)
        for turn in range(2):
            mine, new, _ = layer.apply(params, cfg, x, state)
            y = jnp.where(me == turn, mine, y)
            state = jax.tree.map(lambda s: jax.lax.ppermute(s, "shard", [(0, 1), (1, 0)]), new)
        return y

    for run, spec in [
        (batch_shard, PartitionSpec("shard")),
        (time_shard, PartitionSpec(None, "shard")),
    ]:
        sharded = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        assert_close(jax.jit(sharded)(x), expected)


@by_row
def test_config_is_static_and_checked(name):
    cfg = ROWS[name]
    layer = registry.module(cfg)
    assert hash(cfg) == hash(type(cfg)(**{f: getattr(cfg, f) for f in cfg.__dataclass_fields__}))
    assert cfg.width == WIDTH
    assert cfg.flops_per_token(64) > 2 * WIDTH * WIDTH
    with pytest.raises(ValueError, match="width"):
        layer.Config(width=0)


@by_row
def test_parameter_names_tell_the_optimiser(name):
    """`w_*` has at least two axes and exactly one `w_out` leads back to the width (layers/__init__.py)."""
    _, _, params, _ = setup(name)
    paths = {
        "/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for path, leaf in paths.items():
        if path.rsplit("/", 1)[-1].startswith("w_"):
            assert leaf.ndim >= 2, path
    assert sum(path.rsplit("/", 1)[-1] == "w_out" for path in paths) == 1
