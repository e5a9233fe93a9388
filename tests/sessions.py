"""What of a state can be seen."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import Cache
from pallas_kernels.attention.cache import EMPTY


def visible(state):
    """`state` with zeros for the keys and values in slots of ring buffers that are marked as empty."""

    def one(node):
        if not isinstance(node, Cache):
            return node
        empty = (node.slots == EMPTY)[..., None, None]
        return node.replace(k=jnp.where(empty, 0, node.k), v=jnp.where(empty, 0, node.v))

    return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, Cache))
