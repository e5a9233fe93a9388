"""Whole layers on kernels, in the interpreter: what they give on XLA, values and gradients."""

import jax
import jax.numpy as jnp
import pytest
from kernels import relative_rms, results

from pallas_kernels import dispatch
from zoo import registry

LENGTH = 21
# One layer for every op that has kernels.
LAYERS = ("gla", "gated_delta_net", "rwkv7", "mamba", "rg_lru", "titans")


@pytest.mark.deep
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_tpu_kernels(name, float32):
    cfg = registry.config(name, 16)
    layer = registry.module(cfg)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), layer.init(jax.random.key(0), cfg))
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, 16), jnp.float32)
    ids = jnp.sort(jax.random.randint(jax.random.key(2), (2, LENGTH), 0, 3), 1)

    def run(params, x, implementation):
        y, state, _ = layer.apply(params, cfg, x, segment_ids=ids, implementation=implementation)
        return y, state

    kernels, xla = results(run, (params, x), "tpu"), results(run, (params, x), "xla")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(kernels), jax.tree.leaves(xla), strict=True):
        assert relative_rms(a, b) <= 1e-4, path


def test_an_op_without_a_kernel_says_so():
    cfg = registry.config("s4", 16)
    layer = registry.module(cfg)
    params, x = layer.init(jax.random.key(0), cfg), jnp.zeros((1, 4, 16))
    with dispatch.interpreted(), pytest.raises(ValueError, match="no implementation 'tpu'; this op has: "):
        layer.apply(params, cfg, x, implementation="tpu")
