"""Kernels in Pallas' interpreters against the definition of their op in float64, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from chains import pulled, smooth, weights

from experiments.kernel_cases import VARIANTS
from pallas_kernels import dispatch

# Relative RMS.
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
# Kernels, (op, platform), that ran since a comparison began, and those that a comparison has confirmed.
ran: set[tuple[str, str]] = set()
confirmed: set[tuple[str, str]] = set()


def watch():
    """From now on `ran` and `confirmed` tell of every kernel."""
    for op, implementations in {v.op: v.implementations for v in VARIANTS.values()}.items():
        for platform in set(dispatch.PLATFORMS) & set(implementations):
            kernel = implementations[platform]
            implementations[platform] = kernel._replace(run=_noted(kernel.run, (op, platform)))


def _noted(run, name):
    @functools.wraps(run)
    def noting(*arguments):
        ran.add(name)
        return run(*arguments)

    return noting


def directions(outputs):
    """Generic cotangents, the same numbers in every dtype."""
    return jax.tree.map(lambda o: jnp.asarray(weights(o)).astype(jnp.bfloat16).astype(o.dtype), outputs)


def results(op, arguments, implementation):
    """`op(*arguments)` and its gradients, by the implementation of that name."""
    run = functools.partial(op, implementation=implementation)
    with dispatch.interpreted():
        return jax.jit(lambda *arguments: pulled(run, arguments, directions))(*arguments)


def relative_rms(actual, exact):
    """Absolute where the exact numbers are zero, or all but."""
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(actual - exact) / max(np.linalg.norm(exact), 1e-3)


def assert_parity(op, arguments, implementation, bound):
    """Every output and every gradient of `op`, within `bound` of the definition."""
    ran.clear()
    exact = jax.tree.map(lambda x: x.astype(jnp.float64) if smooth(x) else x, arguments)
    actual, exact = results(op, arguments, implementation), results(op, exact, "reference")
    assert jax.tree.structure(actual) == jax.tree.structure(exact)
    errors = {
        jax.tree_util.keystr(path): relative_rms(a, e)
        for (path, a), e in zip(
            jax.tree_util.tree_flatten_with_path(actual)[0], jax.tree.leaves(exact), strict=True
        )
    }
    wrong = {name: error for name, error in errors.items() if not error <= bound}
    assert not wrong, f"over {bound}: {wrong}"
    confirmed.update(ran)
