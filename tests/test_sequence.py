"""Language models with time cut over devices: the numbers of one device. Layers: test_conformance.py."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import assert_close
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import bench_sequence
from experiments.losses import cross_entropy
from zoo import lm, registry, sequence, shards

# A mixture of experts whose load is that of all tokens, a layer that knows shards and one that takes turns.
MODEL = lm.Config(vocab_size=11, width=8, depth=2, pattern=("rg_lru", "gru"), moe_every=2, experts=3)
IDS = np.array([np.repeat([5, 6, 5], [3, 9, 4]), np.repeat([1, 2], [8, 8])])


def devices(*shape, names=("data", "sequence")):
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names[-len(shape) :])


@pytest.fixture(scope="module")
def batch():
    """Parameters, tokens and targets `[2,16]`."""
    tokens, targets = np.random.default_rng(0).integers(0, 11, (2, 2, 16))
    return lm.init(jax.random.key(0), MODEL), jnp.asarray(tokens), jnp.asarray(targets)


def loss(cfg, hidden, params, tokens, targets):
    """`(loss, aux)` of a model whose `hidden` takes and runs `then`."""

    def read(params, h, targets):
        return cross_entropy(partial(lm.logits, params, cfg), h, targets, 4)[0]

    each, _, aux = hidden(params, cfg, tokens, segment_ids=jnp.asarray(IDS), then=read, given=(targets,))
    losses = sum(value for name, value in aux.items() if name.endswith("_loss"))
    return jnp.mean(each) + losses, aux


def here(params, cfg, tokens, *, then, given, **how):
    h, state, aux = lm.hidden(params, cfg, tokens, **how)
    return then(params, h, *given), state, aux


def graded(cfg, hidden):
    return jax.jit(jax.value_and_grad(partial(loss, cfg, hidden), has_aux=True))


@pytest.fixture(scope="module")
def alone(batch):
    return graded(MODEL, here)(*batch)


@pytest.mark.parametrize("rows", [(), ("data",)], ids=["rows by XLA", "rows by hand"])
def test_loss_gradients_and_aux_are_those_of_one_device(batch, alone, rows):
    """The batch over two devices and time over two; the load of experts is that of the whole batch."""
    mesh = devices(2, 2)
    params, *data = batch
    data = jax.device_put(data, NamedSharding(mesh, PartitionSpec("data", "sequence")))
    assert_close(graded(MODEL, partial(sequence.hidden, mesh=mesh, rows=rows))(params, *data), alone)


@pytest.mark.deep
def test_pieces_within_shards(batch):
    """Devices take turns with whole blocks, and each works on 3 tokens at a time."""
    cfg = dataclasses.replace(MODEL, piece=3, moe_every=0)
    params = lm.init(jax.random.key(0), cfg)
    sharded = graded(cfg, partial(sequence.hidden, mesh=devices(4)))
    plain = graded(dataclasses.replace(cfg, piece=0), here)
    assert_close(sharded(params, *batch[1:]), plain(params, *batch[1:]))


def test_logits_and_state_on_the_ambient_mesh(batch):
    """From a state, and without documents."""
    params, tokens, _ = batch
    _, state, _ = jax.jit(lambda p, x: lm.apply(p, MODEL, x))(params, tokens[:, :5])
    plain = jax.jit(lambda p, x, s: lm.apply(p, MODEL, x, s))(params, tokens, state)
    with jax.set_mesh(devices(4)):
        cut = jax.jit(lambda p, x, s: sequence.apply(p, MODEL, x, s))(params, tokens, state)
    assert_close(jax.tree.map(np.asarray, cut), jax.tree.map(np.asarray, plain))


def test_what_does_not_divide_is_refused(batch):
    params, tokens, _ = batch
    with pytest.raises(ValueError, match="a sequence of 15 tokens is not divided by the 2 devices of mesh"):
        sequence.hidden(params, MODEL, tokens[:, :15], mesh=devices(2))
    with pytest.raises(ValueError, match="no axis 'time' in a mesh of data, sequence"):
        sequence.hidden(params, MODEL, tokens, mesh=devices(2, 2), axis="time")
    with pytest.raises(ValueError, match="1 rows are not divided by the 2 of mesh axis 'data'"):
        sequence.hidden(params, MODEL, tokens[:1], mesh=devices(2, 2), rows=("data",))


def test_the_table_says_how_each_layer_crosses():
    ways = dict(line.split(" | ") for line in sequence.table().splitlines()[2:])
    assert len(ways) == len(registry.LAYERS)
    assert (ways["| `mamba`"], ways["| `attention`"]) == ("scan |", "ring |")
    assert (ways["| `base_conv`"], ways["| `titans`"]) == ("halo |", "relay |")
    assert shards.way(registry.config("attention", 8, heads=2, window=3)) == "halo"


def test_row_groups():
    assert [shards.groups_of(batch, 2) for batch in (1, 6, 8, 9, 22)] == [1, 6, 8, 3, 2]


@pytest.mark.deep
def test_memory_falls_with_devices(float32):
    cfg = lm.Config(vocab_size=11, width=8, depth=1, pattern=("gla",))
    one, four = (bench_sequence.step_bytes(cfg, 1 << 14, count) for count in (1, 4))
    assert four < one / 3


# Steps of training, each from parameters of the one before, in float64: training itself magnifies rounding
# (in float32, at ten times this rate, GLA's losses are apart by 1e-5 from step 12 on).
STEPS, RATE, DRIFT = 50, 0.01, 1e-5


@pytest.mark.deep
@pytest.mark.parametrize("name", registry.LAYERS)
def test_training_stays_together(name):
    """Losses of 50 steps, on one device and on four."""
    cfg = lm.Config(vocab_size=11, width=16, depth=1, pattern=(name,), mlp="none")
    data = np.random.default_rng(0).integers(0, 11, (STEPS, 2, 2, 16))

    def train(hidden):
        run = graded(cfg, hidden)
        params, losses = lm.init(jax.random.key(0), cfg), []
        for tokens, targets in data:
            (value, _), gradient = run(params, jnp.asarray(tokens), jnp.asarray(targets))
            params = jax.tree.map(lambda p, g: p - RATE * g, params, gradient)
            losses.append(float(value))
        return losses

    np.testing.assert_allclose(train(partial(sequence.hidden, mesh=devices(4))), train(here), rtol=DRIFT)
