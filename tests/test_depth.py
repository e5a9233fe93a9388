"""What blocks of a model share over its depth: bounds of forget gates, and values that go upwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import assert_close, values_and_gradients

from layers import hgrn2, rwkv7, rwkv_channel_mix
from zoo import blocks, depth, lm, registry, trunk
from zoo.blocks import Block

WIDTH = 4
BOUNDED = hgrn2.Config(width=WIDTH, head_dim=2, cumulative=True)
OTHER = registry.config("min_gru", WIDTH)
RANKS = {"head_dim": 2, "decay_rank": 2, "rate_rank": 2, "gate_rank": 2, "value_rank": 2}
NORMS = {"layer_norm": True, "norm_bias": True}
CHANNELS = Block(mixer=rwkv_channel_mix.Config(width=WIDTH, hidden=6), **NORMS)
GIVES, TAKES = (
    Block(mixer=rwkv7.Config(width=WIDTH, values=values, **RANKS), **NORMS) for values in ("first", "mixed")
)
RWKV = lm.Config(
    vocab_size=7,
    width=WIDTH,
    depth=6,
    first=(GIVES, CHANNELS),
    pattern=(TAKES, CHANNELS),
    mlp="none",
    norm_embed=True,
)
HGRN = lm.Config(vocab_size=7, width=WIDTH, depth=3, pattern=(BOUNDED,), mlp="none")


def perturbed(init, cfg):
    """Parameters of which no two are equal."""
    random = np.random.default_rng(0)
    params = init(jax.random.key(0), cfg)
    return jax.tree.map(lambda p: p + 0.3 * random.standard_normal(p.shape), params)


@pytest.mark.parametrize("pattern", [(BOUNDED,), (BOUNDED, OTHER, BOUNDED)], ids=["all", "some"])
def test_bounds_are_one_cumulative_softmax(pattern):
    """By the formula, over repeats of a pattern, places in it and its tail."""
    cfg = blocks.Config(width=WIDTH, depth=8, pattern=pattern, mlp="none")
    params = perturbed(trunk.init, cfg)
    heights = [i for i, layer in enumerate(cfg.layers) if layer == BOUNDED]

    def bounds(params):
        """One row a block, bottom to top."""
        rows = {}
        start = 0
        for (group, repeats), stacked in zip(cfg.block_groups, params, strict=True):
            for place, (block, own) in enumerate(zip(group, stacked, strict=True)):
                for repeat in range(repeats if block.mixer == BOUNDED else 0):
                    rows[start + repeat * len(group) + place] = own["mixer"]["bound"][repeat]
            start += repeats * len(group)
        return np.stack([rows[height] for height in heights])

    share = np.exp(bounds(params))
    share /= share.sum(0)
    expected = np.cumsum(share, 0) - share[0]
    made = depth.shared(params, cfg.block_groups)
    np.testing.assert_allclose(jax.nn.sigmoid(bounds(made)), expected, atol=1e-14)
    assert np.all(expected[1:] > 0) and len(heights) > 4


def test_models_without_shared_parameters_keep_theirs():
    cfg = blocks.Config(width=WIDTH, depth=2, pattern=(OTHER,))
    params = trunk.init(jax.random.key(0), cfg)
    assert depth.shared(params, cfg.block_groups) is params


def by_steps(cfg, tokens):
    def run(params, state):
        def body(state, token):
            logits, state = lm.step(params, cfg, token, state)
            return state, logits

        state, logits = jax.lax.scan(body, state, tokens.T)
        return jnp.swapaxes(logits, 0, 1), state

    return run


MODELS = pytest.mark.parametrize("cfg", [RWKV, HGRN], ids=["rwkv7", "hgrn2"])


@MODELS
def test_models_by_steps(cfg):
    params = perturbed(lm.init, cfg)
    tokens = jax.random.randint(jax.random.key(1), (2, 4), 0, 7)
    whole = jax.jit(lambda params: lm.apply(params, cfg, tokens)[:2])(params)
    assert_close(jax.jit(by_steps(cfg, tokens))(params, lm.init_state(cfg, 2)), whole)


@pytest.mark.deep
@MODELS
def test_gradients_by_steps_and_in_pieces_are_those_of_the_whole(cfg):
    """From the state that a prefix left."""
    params = perturbed(lm.init, cfg)
    tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 7)
    _, state, _ = jax.jit(lambda p: lm.apply(p, cfg, tokens[:, :3]))(params)

    def whole(piece):
        here = dataclasses.replace(cfg, piece=piece)
        return lambda params, state: lm.apply(params, here, tokens[:, 3:], state)[:2]

    expected = values_and_gradients(whole(0), params, state)
    assert_close(values_and_gradients(whole(3), params, state), expected)
    assert_close(values_and_gradients(by_steps(cfg, tokens[:, 3:]), params, state), expected)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(expected))


def test_documents_do_not_see_each_other():
    params = perturbed(lm.init, RWKV)
    tokens = jax.random.randint(jax.random.key(1), (1, 9), 0, 7)
    packed, _, _ = lm.apply(params, RWKV, tokens, segment_ids=jnp.array([[0] * 4 + [1] * 5]))
    apart = [lm.apply(params, RWKV, part)[0] for part in (tokens[:, :4], tokens[:, 4:])]
    assert_close(packed, jnp.concatenate(apart, 1))


def test_values_of_the_first_layer_reach_all_others():
    """Block by block, the values handed on by hand: v of the first is W_v of its shifted input."""
    cfg = blocks.Config(width=WIDTH, depth=4, first=(GIVES, CHANNELS), pattern=(TAKES, CHANNELS), mlp="none")
    params = perturbed(trunk.init, cfg)
    x = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    y, side = x, jnp.zeros((2, 5, WIDTH))
    for block, own in zip(cfg.blocks, [p for group in params for p in group], strict=True):
        own = jax.tree.map(lambda leaf: leaf[0], own)
        normed = block.norm(y, own["norm_mixer"])
        if block == CHANNELS:
            out, *_ = rwkv_channel_mix.apply(own["mixer"], block.mixer, normed)
        else:
            out, _, _, side = rwkv7.apply(own["mixer"], block.mixer, normed, side=side)
        if block == GIVES:
            before = jnp.pad(normed, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            shifted = normed + (before - normed) * own["mixer"]["mix"][3]
            assert_close(side, shifted @ own["mixer"]["w_v"])
        y = y + out
    assert_close(trunk.apply(params, cfg, x)[0], y)


def test_blocks_below_a_pattern():
    """They are those of a longer pattern; the pattern above them is still one program."""
    gla = registry.config("gla", WIDTH, heads=2)
    below = blocks.Config(width=WIDTH, depth=5, first=(OTHER,), pattern=(gla, OTHER))
    long = dataclasses.replace(below, first=(), pattern=below.layers)
    assert [(len(group), repeats) for group, repeats in below.groups] == [(1, 1), (2, 2)]
    params = perturbed(trunk.init, below)
    one_by_one = [
        jax.tree.map(lambda leaf, r=repeat: leaf[r : r + 1], own)
        for group, (_, repeats) in zip(params, below.groups, strict=True)
        for repeat in range(repeats)
        for own in group
    ]
    x = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    assert_close(trunk.apply(params, below, x)[0], trunk.apply([one_by_one], long, x)[0])


def test_layer_norm_of_a_block():
    x = jax.random.normal(jax.random.key(1), (3, WIDTH))
    scale, bias = jnp.arange(1.0, 5.0), jnp.arange(4.0)
    plain = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale
    assert_close(Block(mixer=OTHER, layer_norm=True).norm(x, scale), plain)
    assert_close(CHANNELS.norm(x, {"scale": scale, "bias": bias}), plain + bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Block(mixer=OTHER, norm_bias=True), "norm_bias needs layer_norm"),
        (lambda: Block(mixer=OTHER, layer_norm=True, unit_offset=True), "layer_norm has no unit_offset"),
        (lambda: dataclasses.replace(RWKV, depth=1), "must be a tuple of at most depth=1 entries"),
        (lambda: dataclasses.replace(RWKV, moe_every=2, mlp="gelu"), "need moe_every=0"),
        (lambda: hgrn2.Config(width=4, lower_bound=0.5, cumulative=True), "exclude each other"),
        (lambda: rwkv7.Config(width=4, values="none"), "choose from own, first, mixed"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
