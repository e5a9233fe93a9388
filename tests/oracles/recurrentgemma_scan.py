"""Fixtures from the JAX code of recurrentgemma (see README.md beside this file)."""

import jax
import jax.numpy as jnp
import numpy as np
from recording import B, T, load, write

jax.config.update("jax_enable_x64", True)
D, TAPS = 5, 4
DOCUMENT = 11  # tokens


def rnn_scan(x, a, state):
    scan = load("recurrentgemma.jax.scan")
    return dict(zip(("o", "state"), scan.linear_scan(x, a, state, acc_float_dtype=jnp.float64), strict=True))


def complex_scan(x_real, x_imag, a_real, a_imag, state_real, state_imag):
    Complex = load("recurrentgemma.jax.complex_lib").Complex
    pairs = Complex(x_real, x_imag), Complex(a_real, a_imag), Complex(state_real, state_imag)
    o, state = load("recurrentgemma.jax.scan").linear_scan(*pairs, acc_float_dtype=jnp.float64)
    return {"o_real": o.real, "o_imag": o.imag, "state_real": state.real, "state_imag": state.imag}


def conv(x, weight, bias, state):
    """Over documents of 11 tokens, and over one that continues `state`."""
    module = load("recurrentgemma.jax.layers").Conv1D(D, TAPS, dtype=jnp.float64, param_dtype=jnp.float64)
    params = {"params": {"w": weight, "b": bias}}
    position = jnp.broadcast_to(jnp.arange(T), (B, T))
    documents, _ = module.apply(params, x, position % DOCUMENT)
    outputs = []
    for t in range(T):
        y, state = module.apply(params, x[:, t : t + 1], position[:, t : t + 1] + TAPS, state)
        outputs.append(y)
    return {"documents": documents, "o": jnp.concatenate(outputs, 1), "state": state}


def draw(name: str) -> dict:
    rng = np.random.default_rng(sum(map(ord, name)))
    normal = rng.standard_normal
    angle, radius = rng.uniform(0, 6, (B, T, D)), rng.uniform(0.3, 1, (B, T, D))
    inputs = {
        "rnn_scan": {"x": normal((B, T, D)), "a": radius, "state": normal((B, D))},
        "complex_scan": {
            "x_real": normal((B, T, D)), "x_imag": normal((B, T, D)),
            "a_real": radius * np.cos(angle), "a_imag": radius * np.sin(angle),
            "state_real": normal((B, D)), "state_imag": normal((B, D)),
        },
        "conv": {
            "x": normal((B, T, D)), "weight": normal((TAPS, D)), "bias": normal(D),
            "state": normal((B, TAPS - 1, D)),
        },
    }  # fmt: skip
    return {key: x.astype(np.float32) for key, x in inputs[name].items()}


def record(run, source: str):
    name = run.__name__
    inputs = draw(name)
    wide = {key: x.astype(np.float64) for key, x in inputs.items()}
    outputs, pullback = jax.vjp(lambda inputs: run(**inputs), wide)
    rng = np.random.default_rng(0)
    cotangents = {key: rng.standard_normal(y.shape).astype(np.float32) for key, y in outputs.items()}
    (gradients,) = pullback({key: jnp.float64(y) for key, y in cotangents.items()})
    groups = {"input": inputs, "output": outputs, "cotangent": cotangents, "gradient": gradients}
    arrays = {f"{group}/{key}": np.asarray(x) for group, named in groups.items() for key, x in named.items()}
    assert all(y.dtype == np.float64 for y in outputs.values())
    write(f"recurrentgemma_{name}", arrays, f"recurrentgemma::recurrentgemma.jax.{source}", "Apache-2.0", {})


if __name__ == "__main__":
    record(rnn_scan, "scan.linear_scan")
    record(complex_scan, "scan.linear_scan")
    record(conv, "layers.Conv1D")
