"""Ops against the reference functions of other projects: values, states and gradients (tests/oracles).

Theirs ran in float64 on numbers that float32 holds, so the bound is that of float64. Each function below is
named after its fixture and puts their arguments into the form of our op.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from layers import based, log_linear_attention, rwkv6
from pallas_kernels import dplr as dplr_op
from pallas_kernels import gated_delta_rule as delta_op
from pallas_kernels import gated_linear_attention as linear_op
from pallas_kernels.diagonal_scan import diagonal_scan
from pallas_kernels.memory_update import memory_update
from pallas_kernels.momentum_delta_rule import momentum_delta_rule
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.short_conv import short_conv

# Compiled once for all fixtures of a shape.
gated_linear_attention = jax.jit(linear_op.gated_linear_attention)
gated_delta_rule = jax.jit(delta_op.gated_delta_rule)
dplr = jax.jit(dplr_op.dplr)

FOLDER = pathlib.Path(__file__).parent / "oracles" / "fixtures"
# Relative RMS error of each array; up to 5e-15 seen.
BOUND = 1e-13
# The first gradients have rank one, and Newton-Schulz multiplies what rounding adds to it by hundreds: two of
# our own implementations differ as much (values by 1e-11, gradients by 2e-9).
BOUNDS = {"titans_orthogonal": 1e-7}


def load(name):
    """Dicts of inputs, outputs, cotangents and gradients."""
    with safe_open(FOLDER / f"{name}.safetensors", "numpy") as file:
        groups = {"input": {}, "output": {}, "cotangent": {}, "gradient": {}}
        for path in file.keys():  # noqa: SIM118
            group, key = path.split("/")
            groups[group][key] = jnp.array(file.get_tensor(path), jnp.float64)
        return tuple(groups.values())


def named(result):
    return dict(zip(("o", "state"), result, strict=True))


def unscaled(q):
    """Theirs divides by the root of K where it cannot be told not to."""
    return q * q.shape[-1] ** -0.5


def fla_gla(q, k, v, log_decays, state):
    return named(gated_linear_attention(unscaled(q), k, v, log_decays, state))


def fla_simple_gla(q, k, v, log_decay, state):
    return named(gated_linear_attention(q, k, v, log_decay, state))


@jax.jit
def fla_retention(q, k, v):
    decay = jnp.log1p(-(2.0 ** (-5 - jnp.arange(q.shape[2]))))
    return {"o": gated_linear_attention(unscaled(q), k, v, decay)[0]}


def fla_linear_attn(q, k, v, state):
    return fla_simple_gla(q, k, v, 0 * k[..., 0], state)


def fla_rwkv6(q, k, v, log_decays, bonus, state):
    """The layer's own reading of the state before the write."""
    B, T, H, K = q.shape
    cfg = rwkv6.Config(width=H * K, head_dim=K)
    start = rwkv6.State(memory=state, last=jnp.zeros((B, H * K)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rwkv6, "gated_linear_attention", lambda *inputs, **_: gated_linear_attention(*inputs))
        patch.setattr(rwkv6, "_inputs", lambda *_: ((q, k, v, log_decays), None))
        patch.setattr(rwkv6, "_output", lambda params, cfg, inputs, o, gate: o)
        o, end, _ = rwkv6.apply({}, cfg, jnp.zeros((B, T, H * K)), start)
    return {"o": o + jnp.sum(q * bonus * k, -1, keepdims=True) * v, "state": end.memory}


@jax.jit
def fla_based(q, k, v):
    cfg = based.Config(width=8, heads=q.shape[2], feature_dim=q.shape[3])
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
    return {"o": gated_linear_attention(based._taylor(cfg, q), based._taylor(cfg, k), v)[0]}


@jax.jit
def fla_log_linear(q, k, v, log_decay, levels):
    """The layer's own sum over levels."""
    B, T, H, K = q.shape
    cfg = log_linear_attention.Config(
        width=8, heads=H, key_dim=K, value_dim=v.shape[3], max_length=2 ** (levels.shape[3] - 1)
    )
    params = log_linear_attention.init(jax.random.key(0), cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_linear_attention, "_inputs", lambda *_: (q, k, v, log_decay))
        patch.setattr(log_linear_attention, "_level_weights", lambda *_: levels)
        patch.setattr(log_linear_attention, "_output", lambda params, x, o: o)
        o, _, _ = log_linear_attention.apply(params, cfg, jnp.zeros((B, T, 8)))
    return {"o": o}


def fla_delta_rule(q, k, v, beta, state):
    beta = beta[..., None]
    return named(gated_delta_rule(unscaled(q), k, beta * v, beta * k, 0 * beta[..., 0], state))


def fla_gated_delta_rule(q, k, v, beta, log_decay, state):
    beta = beta[..., None]
    return named(gated_delta_rule(q, k, beta * v, beta * k, log_decay, state))


@jax.jit
def fla_gated_delta_product(q, k_steps, v_steps, beta_steps, log_decay, state):
    """The decay at the first step of a token, the read at its last."""
    steps = k_steps.shape[1] // q.shape[1]
    beta = beta_steps[..., None]
    decay = jnp.zeros(beta_steps.shape).at[:, ::steps].set(log_decay)
    o, state = gated_delta_rule(
        jnp.repeat(q, steps, 1), k_steps, beta * v_steps, beta * k_steps, decay, state
    )
    return {"o": o[:, steps - 1 :: steps], "state": state}


def fla_kda(q, k, v, log_decays, beta, state):
    return fla_gated_delta_rule(q, k, v, beta, log_decays, state)


def fla_gdn2(q, k, v, log_decays, erase, write, state):
    return named(gated_delta_rule(q, k, write * v, erase * k, log_decays, state))


def fla_comba_recurrent(q, k, v, p, beta, log_decay, state):
    beta = beta[..., None]
    return named(gated_delta_rule(q, k, beta * v, beta * p, log_decay, state))


@jax.jit
def fla_comba_chunk(q, k, v, p, beta, log_decay, state):
    """What is recalled is the memory before its decay."""
    beta = beta[..., None]
    return named(dplr(q, None, v, -p, beta * k, log_decay, state))


def fla_dplr(q, k, v, p, b, log_decays, state):
    return named(dplr(unscaled(q), k, v, p, b, log_decays, state))


def fla_iplr(q, k, v, p, b, state):
    return fla_dplr(q, k, v, p, b, 0 * k, state)


@jax.jit
def fla_momentum_delta_rule(q, k, v, p, eta, log_decay, log_momentum, state, momentum):
    """Theirs keeps the gradient, ours the step against it."""
    both = jnp.stack([state, -momentum], 2)
    o, both = momentum_delta_rule(q, eta[..., None] * k, v, p, log_decay, log_momentum, both)
    return {"o": o, "state": both[:, :, 0], "momentum": -both[:, :, 1]}


@jax.jit
def fla_hgrn(x, x_decay, x_state):
    return named(diagonal_scan(jnp.exp(x_decay), x, x_state))


@jax.jit
def fla_ttt(q, k, target, scale, bias, eta, weights, weights_bias):
    """Theirs puts the rate where it reads, and gives z + LN(z) where ours, as the paper, gives q + LN(z).

    So z is their output less our LN(z), which has to be the LN of that z.
    """
    B, T, H, K = q.shape
    initial = jnp.concatenate([weights, weights_bias], 2).reshape(1, B * H, K + 1, K)[0]
    ours = [jnp.moveaxis(x, 0, 1).reshape(1, T, B * H, -1) for x in (q, k, target, eta)]
    norm = tuple(jnp.tile(x, (B, 1)) for x in (scale, bias))
    half = jnp.full((1, T, B * H), 0.5)
    (y, _), memory = memory_update(
        (initial,), *ours[:3], half, jnp.zeros_like(half), norm=norm, read_scale=ours[3][..., 0],
        chunk=7, residual=True,
    )  # fmt: skip
    last = (initial + memory.weights[0][0]).reshape(B, H, K + 1, K)
    normed = jnp.moveaxis((y - ours[0]).reshape(T, B, H, K), 0, 1)
    return {"weights": last[:, :, :K], "weights_bias": last[:, :, K:], "normed": normed}


@jax.jit
def recurrentgemma_rnn_scan(x, a, state):
    return named(diagonal_scan(a, x, state))


@jax.jit
def recurrentgemma_complex_scan(x_real, x_imag, a_real, a_imag, state_real, state_imag):
    o, state = diagonal_scan(a_real + 1j * a_imag, x_real + 1j * x_imag, state_real + 1j * state_imag)
    return {"o_real": o.real, "o_imag": o.imag, "state_real": state.real, "state_imag": state.imag}


@jax.jit
def recurrentgemma_conv(x, weight, bias, state):
    """Their documents are of 11 tokens."""
    B, T, _ = x.shape
    documents, _ = short_conv(x, weight, segment_ids=jnp.broadcast_to(jnp.arange(T) // 11, (B, T)))
    o, state = short_conv(x, weight, state)
    return {"documents": documents + bias, "o": o + bias, "state": state}


@jax.jit
def mamba_ssm_selective_scan(x, dt, a, b, c, d):
    return named(selective_scan(x, dt, a, b, c, d))


def mamba_ssm_ssd(q, k, v, log_decay, state):
    return fla_simple_gla(q, k, v, log_decay, state)


def titans(q, k, v, step, momentum, decay, *weights, chunk, **settings):
    """Gates are logits; their loss is a mean over channels."""
    gates = jax.nn.sigmoid(step) / v.shape[-1], jax.nn.log_sigmoid(-decay), jax.nn.log_sigmoid(momentum)
    (o, _), memory = memory_update(weights, q, k, v, *gates, chunk=chunk, **settings)
    last = {f"weights_{i}": w + w0 for i, (w, w0) in enumerate(zip(memory.weights, weights, strict=True))}
    return {"o": o, **last, **{f"momentum_{i}": m for i, m in enumerate(memory.momentum)}}


@jax.jit
def titans_deep(q, k, v, step, momentum, decay, w1, w2):
    return titans(q, k, v, step, momentum, decay, w1, w2, chunk=5)


@jax.jit
def titans_document(q, k, v, step, momentum, decay, w0):
    return titans(q, k, v, step, momentum, decay, w0, chunk=None)


@jax.jit
def titans_orthogonal(q, k, v, step, momentum, decay, w0):
    ones = jnp.ones(step.shape)
    return titans(q, k, v, step, momentum, decay, w0, chunk=5, orthogonal=ones)


FUNCTIONS = {
    f.__name__: f
    for f in (
        fla_gla, fla_simple_gla, fla_retention, fla_linear_attn, fla_rwkv6, fla_based, fla_log_linear,
        fla_delta_rule, fla_gated_delta_rule, fla_gated_delta_product, fla_kda, fla_gdn2,
        fla_comba_recurrent, fla_comba_chunk, fla_dplr, fla_iplr, fla_momentum_delta_rule, fla_hgrn, fla_ttt,
        recurrentgemma_rnn_scan, recurrentgemma_complex_scan, recurrentgemma_conv,
        mamba_ssm_selective_scan, mamba_ssm_ssd, titans_document, titans_deep,
        titans_orthogonal,
    )
}  # fmt: skip


@functools.cache
def both(name):
    """Ours beside theirs: `(inputs, outputs, our outputs, gradients, our gradients)`."""
    inputs, outputs, cotangents, gradients = load(name)

    def total(inputs):
        ours = FUNCTIONS[name](**inputs)
        return sum(jnp.sum(y * cotangents.get(key, 0)) for key, y in ours.items()), ours

    (_, ours), our_gradients = jax.value_and_grad(total, has_aux=True)(inputs)
    return inputs, outputs, ours, gradients, our_gradients


def error(ours, theirs):
    """Relative; 0 where both are 0."""
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-300))


@pytest.mark.deep
@pytest.mark.parametrize("name", FUNCTIONS)
def test_op_equals_published_code(name):
    _, outputs, ours, gradients, our_gradients = both(name)
    compared = ours.keys() & outputs.keys()
    found = {key: error(ours[key], outputs[key]) for key in compared}
    found |= {f"d{key}": error(our_gradients[key], theirs) for key, theirs in gradients.items()}
    assert len(compared) == len(outputs) - (name == "fla_ttt")
    assert max(found.values()) < BOUNDS.get(name, BOUND), found


def test_ttt_output_equals_published_code():
    """What theirs adds to LN(z) is z: ours has to be the LN of it."""
    inputs, outputs, ours, *_ = both("fla_ttt")
    normed = ours["normed"]
    z = outputs["o"] - normed
    z = (z - jnp.mean(z, -1, keepdims=True)) / jnp.sqrt(jnp.var(z, -1, keepdims=True) + 1e-6)
    assert error(z * inputs["scale"] + inputs["bias"], normed) < BOUND


def test_every_fixture_of_an_op_is_compared():
    packages = {name.split("_")[0] for name in FUNCTIONS}
    files = {path.stem for path in FOLDER.glob("*.safetensors") if path.stem.split("_")[0] in packages}
    assert files == set(FUNCTIONS)
