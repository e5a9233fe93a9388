"""Kernels in Pallas' interpreters against the definition of their op in float64, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from chains import pulled, smooth, weights
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments.kernel_cases import VARIANTS
from pallas_kernels import dispatch, gpu_chunk_kernel, gpu_chunks, gpu_decay

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


def cut_into_spans(monkeypatch):
    """GPU kernels of chunks: states are kept every 2 chunks for the decay's gradient; 4 chunks are walked
    through in two spans."""
    monkeypatch.setattr(gpu_chunks, "SHORTEST_SPAN", 2)
    for module in (gpu_chunk_kernel, gpu_decay):
        monkeypatch.setattr(module, "KEPT_EVERY", 2)


def head_inputs(length, decay, B=1, G=None, H=1, K=64, V=64):
    """q, k (of G heads, or H), v, log decay per "head", per "channel" or None ("none"), a float32 state."""
    keys, normal = jax.random.split(jax.random.key(0), 5), jax.random.normal
    q, k = (normal(key, (B, length, G or H, K)) for key in keys[:2])
    shape = {"none": None, "head": (B, length, H), "channel": (B, length, H, K)}[decay]
    g = None if shape is None else -0.2 * jax.random.exponential(keys[4], shape).astype(jnp.float32)
    state = normal(keys[3], (B, H, K, V)).astype(jnp.float32)
    return q * K**-0.5, k, normal(keys[2], (B, length, H, V)), g, state


def unit_keys(k, correlation=0.0):
    """The directions of `k`; the higher the correlation, the more of one direction is in them all."""
    k = k + correlation * jax.random.normal(jax.random.key(6), k.shape[-1:])
    return k / jnp.linalg.norm(k, axis=-1, keepdims=True)


def rates(k):
    """A number from 0 to 1 for every vector in `k`."""
    return jax.nn.sigmoid(jax.random.normal(jax.random.key(7), (*k.shape[:-1], 1)))


def on_documents(op, batch, length, packed):
    """`op` with the segment ids of five documents at most, if `packed`."""
    ids = jnp.sort(jax.random.randint(jax.random.key(5), (batch, length), 0, 5), 1) if packed else None
    return functools.partial(op, segment_ids=ids)


def assert_no_races(op, arguments, monkeypatch):
    """On GPUs: copies that are on their way against reads and writes, forward and backward."""
    found = plgpu.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(dispatch, "interpretation", lambda platform: found)
    jax.block_until_ready(results(op, arguments, "gpu"))
    assert not gpu_callbacks.get_races().races_found
