"""The one suite that every layer passes: values and gradients, in float64 to 1e-9.

Rows come from `tests/rows.py`; a new architecture adds a row there and nothing here.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import Link, assert_close, smooth, through, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from rows import CHAOTIC, FIRST_ROWS, LONG_ROWS, ROWS, WIDTH

from pallas_kernels import sequence
from zoo import registry, shards

# Relative RMS error of bfloat16 activations against float32 ones.
BF16_BOUND = 4e-2
# 37 = 1 + 3 * 12: cut into one token and pieces, no boundary is one of a chunk. No other length is compiled.
LENGTH, PIECE = 37, 12
# Tokens of each of 4 devices.
SHARD = 9


# Checked at every change of the project, but not needed in every round of work: `make test-deep`.
deep = pytest.mark.deep


def rows(names, core=FIRST_ROWS):
    """One case per row; conftest.py runs all tests of a row in one process, one after the other."""
    marked = [pytest.param(name, marks=() if name in core else deep) for name in names]
    return pytest.mark.parametrize("name", marked)


by_row = rows(ROWS)

# One row for every way of crossing from device to device: `make test`. The others: `make test-deep`.
OVER_DEVICES = {
    "gla",
    "gated_delta_net",
    "mamba",
    "lru",
    "s4",
    "attention",
    "attention-sinks",
    "gru",
    "rwkv6",
}


_present = []


@pytest.fixture(autouse=True)
def programs_of_one_row_at_a_time(request):
    """What was compiled for a row goes when the next one comes: a process can map only so much code."""
    name = request.node.callspec.params.get("name")
    if _present != [name]:
        _present[:] = [name]
        for cached in (parameters, verbs, whole_arguments, whole, along_time):
            cached.cache_clear()
        jax.clear_caches()


@functools.cache
def parameters(name, noise=0.1):
    """What `init` gives, perturbed, so that no gate sits at a symmetric point."""
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        # A generator that is quick to compile.
        params = registry.module(ROWS[name]).init(jax.random.key(0, impl="rbg"), ROWS[name])
    return jax.tree.map(lambda p: np.asarray(p) + noise * random.standard_normal(p.shape), params)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def setup(name, length=LENGTH, batch=2):
    """Layer module, Config, parameters, inputs; in float32 where the test runs without 64-bit types."""
    cfg = ROWS[name]
    params = jax.tree.map(jnp.asarray, parameters(name))
    return registry.module(cfg), cfg, params, normal(batch, length, cfg.width)


class Verbs(NamedTuple):
    plain: Callable  # apply, not compiled
    apply: Callable  # links of a chain
    step: Callable


@functools.cache
def verbs(name):
    """`apply(params, x, state, ids) -> (y, state)` and `step(params, x_t, state, None)`."""
    cfg = ROWS[name]
    layer = registry.module(cfg)

    def apply(params, x, state, ids=None):
        return layer.apply(params, cfg, x, state, segment_ids=ids)[:2]

    def step(params, x_t, state, _):
        return layer.step(params, cfg, x_t, state)

    return Verbs(apply, with_gradients(apply), with_gradients(step))


def in_pieces(name, x, *cuts):
    return [Link(verbs(name).apply, piece) for piece in jnp.split(x, cuts, 1)]


def by_steps(name, x):
    return [Link(verbs(name).step, x_t) for x_t in np.moveaxis(np.asarray(x), 1, 0)]


def warm_state(name, params):
    """A state that has seen something, of a length that fits no chunk."""
    layer, cfg, *_ = setup(name)
    past = normal(2, PIECE, cfg.width, seed=9)
    return through(in_pieces(name, past), params, layer.init_state(cfg, 2)).outputs[1]


@functools.cache
def whole_arguments(name):
    """Parameters, inputs, a warm state."""
    _, _, params, x = setup(name)
    return params, x, warm_state(name, params)


@functools.cache
def whole(name):
    """`whole_arguments`, and values and gradients of `apply` there."""
    params, x, state = whole_arguments(name)
    return (params, x, state), through(in_pieces(name, x), params, state)


@by_row
def test_step_equals_apply(name):
    (params, x, state), result = whole(name)
    assert_close(result, through(by_steps(name, x), params, state))


@by_row
def test_pieces_equal_the_whole(name):
    """One token, then pieces that begin and end inside chunks."""
    (params, x, state), result = whole(name)
    assert_close(through(in_pieces(name, x, *range(1, LENGTH, PIECE)), params, state), result)


@deep
@by_row
def test_no_state_is_the_empty_state(name):
    layer, cfg, params, x = setup(name, PIECE)
    empty = through(in_pieces(name, x), params, layer.init_state(cfg, 2))
    assert_close(jax.jit(verbs(name).plain)(params, x, None), empty.outputs)


@by_row
@pytest.mark.parametrize("length", [1, PIECE])
def test_short_sequences(name, length):
    (params, x, state), _ = whole(name)
    expected = through(by_steps(name, x[:, :length]), params, state)
    assert_close(through(in_pieces(name, x[:, :length]), params, state), expected)


@by_row
def test_implementations_agree(name):
    layer, cfg, *_ = setup(name)
    arguments, result = whole(name)

    def run(implementation):
        return lambda params, *args: layer.apply(params, cfg, *args, implementation=implementation)[:2]

    assert_close(jax.jit(run("reference"))(*arguments), result.outputs)
    with pytest.raises(ValueError, match="no implementation 'abacus'"):
        jax.eval_shape(run("abacus"), *arguments)


@by_row
def test_causal_in_time_and_across_the_batch(name):
    """d y[b, t] / d x[b', t'] is exactly zero for t' > t and for b' != b."""
    (params, x, state), result = whole(name)
    direction = np.random.default_rng(3).standard_normal(x.shape[-1])
    nothing = jax.tree.map(np.zeros_like, result.outputs[1])
    for t in range(0, LENGTH, 4):
        dy = np.zeros(x.shape)
        dy[0, t] = direction
        g = through(in_pieces(name, x), params, state, dy, nothing).gradients[1]
        assert np.all(g[0, t + 1 :] == 0)
        assert np.all(g[1] == 0)
        assert np.any(g[0, t] != 0)


def probed(name, links):
    """One token more, whose output tells the meaning of the state: what a ring buffer holds in slots that are
    never read again is not part of it.
    """
    return [*links, Link(verbs(name).step, normal(2, WIDTH, seed=4))]


def packed_and_apart(name, ids, verb=None):
    """A row of documents in one call of `verb`, by default `apply`, and each document step by step from an
    empty state of its own."""
    layer, cfg, *_ = setup(name)
    params, x, state = whole_arguments(name)
    x, verb = x[:, : ids.shape[1]], verb or verbs(name).apply
    begins = np.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    apart = [link._replace(fresh=b) for link, b in zip(by_steps(name, x), begins.T, strict=True)]
    return [
        through(
            probed(name, links),
            params,
            state,
            dstate=jax.tree.map(np.zeros_like, state),
            empty=layer.init_state(cfg, 2),
        )
        for links in ([Link(verb, x, jnp.asarray(ids))], apart)
    ]


def assert_same_meaning(packed, apart):
    assert_close((packed.outputs[0], packed.gradients), (apart.outputs[0], apart.gradients))


@by_row
def test_packed_equals_separate(name):
    """Boundaries inside and at the end of chunks; in each row a document of one token."""
    lengths = [PIECE, 1, PIECE, PIECE], [PIECE, PIECE, 1, PIECE]
    # The same id comes again in later documents: what counts is where it changes.
    assert_same_meaning(*packed_and_apart(name, np.array([np.repeat([3, 4, 3, 4], d) for d in lengths])))


def drawn(test):
    """A few examples, the same in every run; their shapes are compiled already."""
    return settings(max_examples=4, derandomize=True, deadline=None, database=None)(test)


@by_row
@drawn
@given(
    pieces=st.lists(st.sampled_from([1, PIECE, LENGTH]), min_size=1, max_size=4),
    scale=st.floats(0.1, 10.0),
    seed=st.integers(0, 2**16),
)
def test_any_split(name, pieces, scale, seed):
    """Pieces from a warm state, inputs small and large, against one step at a time."""
    (params, _, state), _ = whole(name)
    x = scale * normal(2, sum(pieces), WIDTH, seed=seed)
    expected = through(by_steps(name, x), params, state)
    assert_close(through(in_pieces(name, x, *np.cumsum(pieces)[:-1]), params, state), expected)


@by_row
@drawn
@given(st.lists(st.integers(0, 2), min_size=2 * LENGTH, max_size=2 * LENGTH))
def test_any_documents(name, ids):
    """Documents of any length, even of one token each, other ones in each row."""
    assert_same_meaning(*packed_and_apart(name, np.reshape(ids, (2, LENGTH))))


@by_row
def test_one_document_ids_change_nothing(name):
    (params, x, state), plain = whole(name)
    ids = jnp.full((2, LENGTH), 7, jnp.int64)
    assert_close(through([Link(verbs(name).apply, x, ids)], params, state), plain)


@deep
@by_row
def test_bfloat16(name, float32):
    """Activations in bfloat16, parameters and state in float32, against float64."""
    layer, cfg, params, x = setup(name)
    with jax.enable_x64(True):
        (_, _, state), exact = whole(name)
    state = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, state))
    y, last = through(in_pieces(name, x.astype(jnp.bfloat16)), params, state).outputs
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(lambda s: s.dtype, last) == jax.tree.map(lambda s: s.dtype, layer.init_state(cfg, 2))
    error = np.sqrt(np.mean((y.astype(float) - exact.outputs[0]) ** 2) / np.mean(exact.outputs[0] ** 2))
    assert error < BF16_BOUND, f"relative RMS error {error:.3f}"


@deep
@by_row
@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_extreme_gates(name, scale, float32):
    """From a state that ordinary inputs left, inputs that drive every gate to its ends (or leave it at its
    bias) give finite values and gradients."""
    layer, cfg, params, x = setup(name)
    _, state = through(in_pieces(name, x), params, layer.init_state(cfg, 2)).outputs
    for leaf in jax.tree.leaves(through(in_pieces(name, scale * x), params, state)):
        assert leaf.dtype != np.float64
        assert np.all(np.isfinite(leaf))


@deep
@rows(LONG_ROWS)
def test_very_long_sequence(name, float32):
    layer, cfg, params, x = setup(name, 65_536, batch=1)
    if name in CHAOTIC:
        params = jax.tree.map(jnp.asarray, parameters(name, noise=0.0))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        y, state, _ = layer.apply(params, cfg, x)
        ends = [jnp.sum(jnp.abs(s)) for s in jax.tree.leaves(state) if smooth(s)]
        return jnp.mean(y**2) + 1e-3 * sum(ends)

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


@deep
@by_row
def test_vmap_remat_and_donation(name):
    (params, x, state), _ = whole(name)
    x = x[:, :PIECE]

    def one_by_one(params, x, state, _):
        """Every row of the batch by itself, as a batch of one."""
        x, state = jax.tree.map(lambda a: a[:, None], (x, state))
        out = jax.vmap(jax.checkpoint(verbs(name).plain), in_axes=(None, 0, 0))(params, x, state)
        return jax.tree.map(lambda a: a[:, 0], out)

    expected = through(in_pieces(name, x), params, state)
    assert_close(through([Link(with_gradients(one_by_one), x)], params, state), expected)
    donating = jax.jit(verbs(name).plain, donate_argnums=2)
    assert_close(donating(params, x, jax.tree.map(jnp.array, state)), expected.outputs)


@deep
@by_row
def test_no_product_has_eight_axes_under_two_vmaps(name, float32):
    """XLA's CPU ends the process there, and the axes of blocks and chunks add to those of vmap."""
    layer, cfg, params, x = setup(name, 64)
    gradient = jax.grad(lambda params, x: jnp.sum(layer.apply(params, cfg, x)[0]), (0, 1))
    twice = jax.vmap(jax.vmap(gradient, (None, 0)), (None, 0))
    text = jax.jit(twice).lower(params, jnp.broadcast_to(x, (2, 2, *x.shape))).as_text()
    products = re.findall(r"dot_general.*: \(tensor<([^>]*)>, tensor<([^>]*)>\)", text)
    assert products and max(shape.count("x") for pair in products for shape in pair) < 8


@deep
@by_row
def test_sharded_over_batch_and_time(name):
    """Batch: shards know nothing of each other. Time: the state travels from shard to shard."""
    (params, x, state), result = whole(name)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "time"))

    def shard(x, state):
        me, y = jax.lax.axis_index("time"), jnp.zeros_like(x)
        for turn in range(2):
            mine, new = verbs(name).plain(params, x, state)
            y = jnp.where(me == turn, mine, y)
            state = jax.tree.map(lambda s: jax.lax.ppermute(s, "time", [(0, 1), (1, 0)]), new)
        return y

    specs = PartitionSpec("batch", "time"), PartitionSpec("batch")
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    assert_close(jax.jit(sharded)(x[:, : 2 * PIECE], state), result.outputs[0][:, : 2 * PIECE])


@functools.cache
def along_time(name):
    """`apply` with 4 devices that hold a quarter of the tokens each."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("time",))
    axis, cut, whole = sequence.Axis("time", 4), PartitionSpec(None, "time"), PartitionSpec()

    def shard(params, x, state, ids):
        with sequence.along(axis):
            run = functools.partial(registry.module(ROWS[name]).apply, params, ROWS[name])
            y, state, _ = shards.apply(run, ROWS[name], x, state, segment_ids=ids)
        return y, axis.of_last(state)

    specs = {"in_specs": (whole, cut, whole, cut), "out_specs": (cut, whole)}
    return with_gradients(jax.shard_map(shard, mesh=mesh, check_vma=False, **specs))


@rows(ROWS, OVER_DEVICES)
def test_time_over_devices(name):
    """Documents that go on over two devices' ends, that end with a device's tokens, and of one token."""
    lengths = [7, 16, 4, 1, 8], [18, 9, 8, 1]
    ids = np.array([np.repeat([3, 4, 3, 4, 3][: len(d)], d) for d in lengths])
    assert_same_meaning(*packed_and_apart(name, ids, along_time(name)))


@deep
@by_row
def test_one_document_over_devices(name):
    ids = np.full((2, 4 * SHARD), 7)
    assert_same_meaning(*packed_and_apart(name, ids, along_time(name)))


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
