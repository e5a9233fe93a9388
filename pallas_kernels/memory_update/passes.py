"""What kernels are given of gates and document boundaries: passes over blocks, and their coefficients."""

import jax
import jax.numpy as jnp

from pallas_kernels.chunks import split_time
from pallas_kernels.memory_update.memory import Memory, Rule, Tokens
from pallas_kernels.memory_update.xla import Linear, coefficients, linear
from pallas_kernels.phases import Plan, plan


def passes(
    fresh: Memory, memory: Memory | None, tokens: Tokens, segment_ids, rule: Rule, block: int
) -> tuple[Plan, Linear]:
    """For n blocks of `block` tokens, at most a chunk: passes P, coefficients `[n,P,B,H,...]`, float32."""
    batch, length = tokens.q.shape[:2]
    steps = plan(length, block, rule.chunk, batch, None if memory is None else memory.phase, segment_ids)

    def of_gates(gates, group):
        return linear(coefficients(fresh, tokens._replace(q=None, k=None, v=None, **gates), group, rule))

    gates = {name: x for name, x in tokens._asdict().items() if name not in "qkv" and x is not None}
    gates = {name: jnp.swapaxes(split_time(x.astype(jnp.float32), block), 2, 3) for name, x in gates.items()}
    return steps, jax.vmap(jax.vmap(of_gates, (None, 0)), (0, 0))(gates, steps.groups)
