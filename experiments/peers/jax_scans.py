"""`linear_scan` of recurrentgemma's JAX code; run as `clock.py` says."""

import jax
import jax.numpy as jnp
from clock import jax_work, load, main

Complex = load("recurrentgemma.jax.complex_lib").Complex
linear_scan = load("recurrentgemma.jax.scan").linear_scan


def draw(batch, length, width):
    x = jax.random.normal(jax.random.key(0), (batch, length, width))
    return x, jnp.exp(-0.1 * jax.random.uniform(jax.random.key(1), x.shape))


def recurrentgemma_scan(*sizes):
    return jax_work(lambda x, a: linear_scan(x, a)[0], *draw(*sizes))


def recurrentgemma_complex_scan(*sizes):
    x, a = draw(*sizes)

    def run(x_real, x_imag, a_real, a_imag):
        o = linear_scan(Complex(x_real, x_imag), Complex(a_real, a_imag))[0]
        return jnp.stack([o.real, o.imag])

    return jax_work(run, x, -x, a * jnp.cos(a), a * jnp.sin(a))


if __name__ == "__main__":
    main(globals())
