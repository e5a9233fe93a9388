"""Blocks whose MLP is a mixture of experts: against a loop over tokens, by steps, and in numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import blocks, lm, presets, registry, trunk

# A mixer that does nothing: what remains of a block is its MLP.
STILL = registry.config("attention", 8, heads=2, window=1)
CFG = blocks.Config(
    width=8, depth=4, pattern=(STILL,), moe_every=2, experts=5, experts_per_token=2, balance=0.5
)


def still(params):
    """With the mixers' outputs at 0."""

    def silence(path, leaf):
        mixer = jax.tree_util.keystr(path).endswith("['mixer']['w_out']")
        return 0 * leaf if mixer else leaf

    return jax.tree_util.tree_map_with_path(silence, params)


def expert(mlp, x, e=None):
    w_in, w_out = (w if e is None else w[:, e] for w in (mlp["w_in"], mlp["w_out"]))
    gate, value = np.split(x @ w_in, 2)
    return (gate / (1 + np.exp(-gate)) * value) @ w_out


def test_a_mixture_is_the_experts_of_each_token():
    """Block for block and token for token; the loss from counts; the same one step at a time."""
    params = still(trunk.init(jax.random.key(0), CFG))
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))
    y, state, aux = jax.jit(lambda x: trunk.apply(params, CFG, x))(x)
    expected, losses, loads = np.array(x), [], []
    for repeat, place in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        block = jax.tree.map(lambda p, r=repeat: np.asarray(p[r]), params[0][place])
        assert ("w_router" in block["mlp"]) == (place == 1)
        chosen, shares = np.zeros(5), []
        for here in expected.reshape(-1, 8):
            normed = here / np.sqrt(np.mean(here**2) + 1e-5) * block["norm_mlp"]
            if place == 0:
                here += expert(block["mlp"], normed)
                continue
            logits = normed @ block["mlp"]["w_router"]
            p = np.exp(logits) / np.exp(logits).sum()
            best = np.argsort(-p)[:2]
            chosen[best] += 1 / 12
            shares.append(p)
            here += sum(p[e] / p[best].sum() * expert(block["mlp"], normed, e) for e in best)
        if place == 1:
            losses.append(0.5 * 5 * chosen @ np.mean(shares, 0))
            loads.append(chosen)
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(aux["expert_balance_loss"], sum(losses), rtol=1e-10)
    np.testing.assert_allclose(aux["expert_load"], np.mean(loads, 0), rtol=1e-10)
    state, step = trunk.init_state(CFG, 2), jax.jit(lambda x, s: trunk.step(params, CFG, x, s))
    for t in range(6):
        y_t, state = step(x[:, t], state)
        np.testing.assert_allclose(y_t, y[:, t], rtol=1e-10, atol=1e-10)


def test_one_expert_is_an_mlp():
    for mlp in ("swiglu", "gelu"):
        plain = blocks.Config(width=8, depth=1, pattern=(STILL,), mlp=mlp)
        one = dataclasses.replace(plain, moe_every=1, experts=1, experts_per_token=1)
        params, x = trunk.init(jax.random.key(0), plain), jax.random.normal(jax.random.key(1), (1, 5, 8))
        mixture = trunk.init(jax.random.key(0), one)
        own = mixture[0][0]["mlp"]
        for name in ("w_in", "w_out"):
            assert own[name].shape == (1, own[name].shape[1], 1, own[name].shape[-1])
            own[name] = params[0][0]["mlp"][name][:, :, None]
        y, _, aux = trunk.apply(mixture, one, x)
        np.testing.assert_allclose(y, trunk.apply(params, plain, x)[0], rtol=1e-12)
        np.testing.assert_allclose(aux["expert_balance_loss"], one.balance)


def test_no_token_sees_another_and_the_loss_teaches_the_router():
    cfg = dataclasses.replace(CFG, depth=2)
    params, x = still(trunk.init(jax.random.key(0), cfg)), jax.random.normal(jax.random.key(1), (2, 6, 8))
    reach = jax.jit(jax.grad(lambda x: trunk.apply(params, cfg, x)[0][1, 3].sum()))(x)
    assert np.argwhere(np.any(reach != 0, -1)).tolist() == [[1, 3]]
    teach = jax.jit(jax.grad(lambda p: trunk.apply(p, cfg, x)[2]["expert_balance_loss"]))(params)
    assert np.any(teach[0][1]["mlp"]["w_router"] != 0)


def test_patterns_of_mixers_and_mixtures_share_a_period(float32):
    """Three mixers and every second MLP: six blocks repeat, and the tail goes on in step."""
    cfg = lm.Config(vocab_size=11, width=8, depth=10, pattern=("gru", STILL, STILL), moe_every=2, experts=4)
    assert [(len(layers), repeats) for layers, repeats in cfg.groups] == [(6, 1), (4, 1)]
    params = jax.eval_shape(lambda: lm.init(jax.random.key(0), cfg))
    mixtures = ["w_router" in block["mlp"] for group in params["blocks"] for block in group]
    assert mixtures == [False, True] * 5
    assert lm.param_count(cfg) == sum(leaf.size for leaf in jax.tree.leaves(params))
    few = dataclasses.replace(cfg, experts=2)
    assert lm.active_param_count(cfg) == lm.active_param_count(few) + 5 * 2 * 8
    assert lm.active_param_count(few) == lm.param_count(few)
    plain = dataclasses.replace(cfg, moe_every=0)
    more = lm.flops_per_token(cfg, 16) - lm.flops_per_token(plain, 16)
    assert more == 2 * 5 * (cfg.mlp_weights() + 8 * 4)


def test_jamba_has_its_active_parameters():
    """52B parameters of which 12B are active (arXiv 2403.19887)."""
    assert lm.active_param_count(presets.model("jamba-52b")) == pytest.approx(12e9, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_every": -1}, "moe_every=-1"),
        ({"moe_every": 1, "mlp": "none"}, "moe_every=1 .* mlp='none'"),
        ({"experts": 1}, "experts_per_token=2 exceeds experts=1"),
        ({"experts_per_token": 0}, "experts_per_token=0"),
        ({"balance": -1.0}, "balance=-1.0"),
    ],
)
def test_bad_mixtures_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **fields)


def test_bfloat16_stays(float32):
    params = trunk.init(jax.random.key(0), CFG)
    y, _, aux = trunk.apply(params, CFG, jnp.ones((1, 3, 8), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert aux["expert_balance_loss"].dtype == jnp.float32
