"""Transformer blocks that several places share: one set of weights, a state for every call, the same numbers
by steps, in pieces and in documents of their own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import assert_close, values_and_gradients

import zoo
from experiments import config
from experiments.measure import reaching
from layers import attention
from zoo import blocks, lm, mlp, registry, shared, trunk

WIDTH = 8
MIXER = registry.config("gru", WIDTH, hidden=6)


def attentive(**fields):
    fields = {"heads": 2, "head_dim": 6, "max_length": 64, "scale": 0.3, "adapter": 2} | fields
    return attention.Config(2 * WIDTH, out_width=WIDTH, **fields)


ONE = shared.Config(attention=attentive(), mlp=mlp.Config(hidden=12, kind="geglu", exact=True, adapter=3))
OTHER = shared.Config(attention=attentive(window=5, adapter=0), mlp=mlp.Config(hidden=9), eps=1e-3)
# Twice a plain block and two that call, the second one before an MLP of its own.
PATTERN = (
    blocks.Block(mixer=MIXER),
    blocks.Block(mixer=MIXER, calls=1),
    blocks.Block(mixer=MIXER, calls=0, mlp=mlp.Config(hidden=10)),
)
CFG = lm.Config(vocab_size=11, width=WIDTH, depth=6, pattern=PATTERN, shared=(ONE, OTHER))
# The same block called by both of two, in one scan.
SMALL = dataclasses.replace(CFG, depth=2, pattern=(dataclasses.replace(PATTERN[1], calls=0),), shared=(ONE,))
both = pytest.mark.parametrize(
    "cfg", [SMALL, pytest.param(CFG, marks=pytest.mark.deep)], ids=["small", "whole"]
)


def perturbed(cfg, size=0.3):
    """Parameters of which none is at a special value."""
    params = lm.init(jax.random.key(0), cfg)
    random = np.random.default_rng(1)
    return jax.tree.map(lambda p: p + size * random.standard_normal(p.shape), params)


def tokens(length=19):
    return jax.random.randint(jax.random.key(2), (2, length), 0, CFG.vocab_size)


@both
def test_steps_are_the_whole(cfg):
    """Values and gradients, from a state that three tokens left."""
    params, x = perturbed(cfg), tokens(14)
    _, state, _ = lm.apply(params, cfg, x[:, :3])

    def whole(params, state):
        return lm.apply(params, cfg, x[:, 3:], state)[:2]

    def by_steps(params, state):
        def body(state, token):
            logits, state = lm.step(params, cfg, token, state)
            return state, logits

        state, logits = jax.lax.scan(body, state, x[:, 3:].T)
        return jnp.swapaxes(logits, 0, 1), state

    assert_close(values_and_gradients(by_steps, params, state), values_and_gradients(whole, params, state))


@both
def test_pieces_are_the_whole(cfg):
    params, x = perturbed(cfg), tokens()
    ids = jnp.asarray([[0] * 3 + [1] * 5 + [2] * 11, [7] * 8 + [3] * 8 + [7] * 3])

    def run(piece):
        here = dataclasses.replace(cfg, piece=piece)
        return values_and_gradients(lambda p: lm.apply(p, here, x, segment_ids=ids)[0], params)

    assert_close(run(8), run(0))


def test_documents_do_not_see_each_other():
    params, x = perturbed(SMALL), tokens()
    ids = jnp.asarray([[0] * 6 + [1] * 13, [0] * 19])
    packed, _, _ = lm.apply(params, SMALL, x, segment_ids=ids)
    apart, _, _ = lm.apply(params, SMALL, x[:1, 6:])
    assert_close(packed[:1, 6:], apart)


@pytest.mark.deep
def test_the_gradient_of_what_is_shared_is_that_of_all_its_copies():
    """Two calls of one block against one call each of two equal ones."""
    calls = [blocks.Block(mixer=MIXER, calls=n) for n in (0, 0, 1)]
    fields = {"width": WIDTH, "depth": 2, "remat": False}
    once = blocks.Config(pattern=(calls[0], calls[1]), shared=(ONE,), **fields)
    twice = blocks.Config(pattern=(calls[0], calls[2]), shared=(ONE, ONE), **fields)
    x = jax.random.normal(jax.random.key(3), (2, 7, WIDTH))

    @jax.jit
    def gradients(common):
        params = trunk.init(jax.random.key(0), once)[:-1]

        def loss(common, cfg):
            return jnp.sum(jnp.sin(trunk.apply([*params, common], cfg, x)[0]))

        return jax.grad(loss)([common], once)[0], jax.grad(loss)([common, common], twice)

    common = trunk.init(jax.random.key(0), once)[-1][0]
    together, (first, second) = gradients(common)
    assert_close(together, jax.tree.map(jnp.add, first, second))


def test_additions_of_low_rank_are_in_the_matrices():
    """The same layer without adapters, their products added to its matrices, `scale` too, and all outputs."""
    layer = attentive()
    params = attention.init(jax.random.key(0), layer)
    own = jax.tree.map(lambda p: p + 0.3, params.pop("adapter"))
    products = [own[f"w_{name}_down"] @ own[f"w_{name}_up"] for name in "qkv"]
    merged = {"w_qkv": params["w_qkv"] + jnp.concatenate(products, 1)}
    queries = jnp.arange(layer.channels) < layer.heads * layer.K
    merged["w_qkv"] = merged["w_qkv"] * jnp.where(queries, layer.scale * layer.K**0.5, 1)
    merged["w_out"] = jnp.pad(params["w_out"], ((0, 0), (0, WIDTH)))
    plain = dataclasses.replace(layer, adapter=0, scale=None, out_width=None)
    x = jax.random.normal(jax.random.key(1), (2, 9, 2 * WIDTH))
    y, _, _ = attention.apply(params | {"adapter": own}, layer, x)
    expected, _, _ = attention.apply(merged, plain, x)
    assert_close(y, expected[..., :WIDTH])


def test_an_mlp_with_an_addition_and_exact_gelu():
    params = mlp.init(*jax.random.split(jax.random.key(0), 3), ONE.mlp, WIDTH)
    own = jax.tree.map(lambda p: p + 0.3, params["adapter"])
    x = np.asarray(jax.random.normal(jax.random.key(1), (5, WIDTH)))
    gate, value = np.split(x @ np.asarray(params["w_in"] + own["w_in_down"] @ own["w_in_up"]), 2, -1)
    gelu = gate / 2 * (1 + np.asarray(jax.lax.erf(gate / 2**0.5)))
    y, _ = mlp.apply(params | {"adapter": own}, ONE.mlp, jnp.asarray(x))
    assert_close(y, jnp.asarray((gelu * value) @ params["w_out"]))


def test_counts(float32):
    """Shared weights once, of every caller its own; a state for every call; FLOPs of every call."""
    params, state = lm.init(jax.random.key(0), CFG), lm.init_state(CFG, 1)
    assert lm.param_count(CFG) == sum(p.size for p in jax.tree.leaves(params))
    assert lm.state_bytes(CFG) == sum(s.nbytes for s in jax.tree.leaves(state))
    bare = dataclasses.replace(
        CFG, shared=(), pattern=tuple(dataclasses.replace(b, calls=None) for b in PATTERN)
    )
    common = sum(p.size for p in jax.tree.leaves(params["blocks"][-1]))
    own = WIDTH**2 + 2 * (3 * 16 + 3 * 12) + 3 * (8 + 24)
    assert lm.param_count(CFG) - lm.param_count(bare) == common + 2 * own + 2 * WIDTH**2
    calls = 2 * (ONE.flops_per_token(9) + OTHER.flops_per_token(9))
    assert lm.flops_per_token(CFG, 9) - lm.flops_per_token(bare, 9) == calls


def test_flops_are_what_xla_counts(float32):
    """Attention over a span of one token: all else is products of matrices."""
    full = attention.Config(128, out_width=64, heads=1, window=1, rope_base=None, adapter=16)
    block = shared.Config(attention=full, mlp=mlp.Config(hidden=128, adapter=16))
    mixer = registry.config("attention", 64, heads=1, window=1, rope_base=None)
    pattern = (blocks.Block(mixer=mixer, calls=0),)
    cfg = lm.Config(vocab_size=128, width=64, depth=1, pattern=pattern, shared=(block,), remat=False)
    params = jax.eval_shape(lambda: lm.init(jax.random.key(0), cfg))
    x = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    compiled = jax.jit(lambda p, x: lm.apply(p, cfg, x)[0]).lower(params, x).compile()
    assert lm.flops_per_token(cfg, 32) == pytest.approx(compiled.cost_analysis()["flops"] / 32, rel=0.05)


def test_generation_and_states_on_disk(tmp_path, float32):
    """Greedy text is the argmax of the whole sequence; a saved session goes on where it stopped."""
    params, prompt = perturbed(SMALL), tokens(7)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    text = zoo.generate(params, SMALL, prompt, 6, temperature=0)
    logits, _, _ = lm.apply(params, SMALL, jnp.concatenate([prompt, text], 1))
    np.testing.assert_array_equal(text, jnp.argmax(logits[:, 6:-1], -1))
    first, session = zoo.generate(params, SMALL, prompt, 3, temperature=0, with_session=True)
    zoo.save_state(tmp_path / "state", session, params, SMALL)
    session = zoo.load_state(tmp_path / "state", params, SMALL)
    rest = zoo.generate(params, SMALL, None, 3, session=session, temperature=0)
    np.testing.assert_array_equal(jnp.concatenate([first, rest], 1), text)


def test_configs_are_written_and_read_and_others_stay_as_they_were():
    saved = config.to_dict(CFG)
    assert config.from_dict(json.loads(json.dumps(saved))) == CFG
    plain = config.to_dict(lm.Config(vocab_size=7, width=8, depth=1, pattern=(PATTERN[0],)))
    assert "shared" not in plain and "calls" not in plain["pattern"][0]
    for name in ("attention", "mamba2", "mlstm"):
        new = {"out_width", "scale", "adapter", "dt_min", "up_projection", "gate_cap", "divisor_eps"}
        assert not new & config.to_dict(registry.config(name, 16)).keys()


def test_room_for_more_tokens_is_in_shared_attention_too():
    grown = reaching(CFG, 100)
    assert [block.attention.span for block in grown.shared] == [100, 5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared": (ONE,)}, "calls number 1 of 1 shared blocks"),
        ({"width": 16, "pattern": ("gla",)}, "shared block: width=8 in a model of width=16"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **fields)


def test_bad_shared_blocks_are_refused():
    with pytest.raises(ValueError, match="from width=16 to out_width=None, not from twice a width to it"):
        shared.Config(attention=attention.Config(16), mlp=mlp.Config(hidden=8))
    with pytest.raises(ValueError, match="its MLP has no experts"):
        shared.Config(attention=attentive(), mlp=mlp.Config(hidden=8, experts=3))
    with pytest.raises(ValueError, match="experts have no adapters"):
        mlp.Config(hidden=8, experts=3, adapter=2)
    with pytest.raises(ValueError, match="adapter=-1 must be >= 0"):
        attention.Config(16, adapter=-1)
