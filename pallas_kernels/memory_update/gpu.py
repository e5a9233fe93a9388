"""The dual form of `xla.py` as Hopper kernels: the inner network stays on the chip from block to block.

What depends on gates and document boundaries alone, the coefficients, is made beforehand and streams in with
the tokens; the kernels do what needs the weights. A block of the GPU takes a sample and head and goes through
its tokens, `BLOCKS` at a time. Weights, momentum and the weights of the chunk's start lie in shared memory as
far as it has room for them in this order; what it has no room for is read and written in its place in main
memory, where it comes from the L2 cache.

The backward pass reads the states that entered each block, which the forward pass has written: to compute
them again costs it another forward pass, and to write and read them what a few blocks' products take. It
carries the cotangents of the states in their stead.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chunks import chunk_length, join_time, split_time
from pallas_kernels.gpu_math import BLOCK, F32, part_count, up_to
from pallas_kernels.memory_update import gpu_backward, gpu_forward
from pallas_kernels.memory_update.gpu_blocks import (
    BEGINS,
    END_MOVE,
    ENDS,
    FLAGS,
    FULL,
    IN_WEIGHTS,
    LOSS,
    PRESENT,
    Work,
)
from pallas_kernels.memory_update.gpu_tiles import Network
from pallas_kernels.memory_update.memory import Memory, Rule, Tokens, square
from pallas_kernels.memory_update.passes import passes
from pallas_kernels.memory_update.xla import Linear
from pallas_kernels.phases import Plan

# Tokens of a block: by dtype, for chunks of at least so many. Chosen by registers as compiled for sm_90a: a
# stack of 64 channels takes 8 of a thread's 255 with 16 tokens. Heads of 64 channels in bfloat16, forward and
# backward: linear memory 168 and 250, two layers with 128 hidden channels 228 and 255; nothing spilled, with
# documents too, since no address is held from one part of a step to the next (`gpu_stream.Zero`). Not timed.
BLOCKS = {"bfloat16": {1: 16}, "float32": {1: 16}}
ACTIVATIONS: dict[Any, str] = {jax.nn.silu: "silu", jax.nn.gelu: "gelu"}
# Channels of tokens, and numbers in the inner weights of one head.
WIDEST, LARGEST = 64, 1 << 15


class _Streams(NamedTuple):
    """What is differentiated, as the kernels take it; weights transposed, channels in multiples of 64."""

    initial: dict[str, list[Array]]
    fresh: list[Array] | None  # where documents begin
    norm: tuple[Array, Array] | None
    q: Array  # [B,H,blocks,K,C]
    k: Array
    v: Array
    pairs: Array  # [B,H,steps,64,C]
    vectors: Array  # [B,H,steps,8,C]

    def inputs(self) -> dict:
        named = self._asdict()
        scale, bias = named.pop("norm") or (None, None)
        return named | {"scale": scale, "bias": bias}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocks(work: Work, network: Network, streams: _Streams) -> tuple[Array, Array, dict]:
    """`(y [B,H,steps,V,C], surprise [B,H,steps,C], final states)`; of no use where a pass has no tokens."""
    return _run(work, network, streams, False)[:3]


def _run(work, network, streams, keep):
    out = gpu_forward.run(streams.inputs(), work, network, keep=keep, dtype=streams.v.dtype)
    return out["y"], out["surprise"], out["final"], out.get("kept")


def _blocks_fwd(work, network, streams):
    *results, kept = _run(work, network, streams, True)
    return tuple(results), (streams, kept)


def _blocks_bwd(work, network, saved, cotangents):
    streams, kept = saved
    dy, dsurprise, dfinal = cotangents
    vectors = streams.vectors.at[:, :, :, LOSS].set(dsurprise)
    given = streams._replace(vectors=vectors).inputs() | {"dy": dy, "kept": kept, "final": dfinal}
    return (_gathered(gpu_backward.run(given, work, network), streams, work, network),)


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _gathered(out: dict, streams: _Streams, work: Work, network: Network) -> _Streams:
    """Gradients; those of passes without tokens were not written."""

    def present(x):
        if work.passes == 1:
            return x
        here = streams.vectors[:, :, :, FLAGS, PRESENT] != 0
        return jnp.where(here.reshape(*here.shape, *[1] * (x.ndim - 3)), x, 0)

    def tokens(x, like):
        x = present(x)
        return jnp.sum(x.reshape(*x.shape[:2], work.blocks, -1, *x.shape[3:]), 3).astype(like.dtype)

    vectors, ends = jnp.sum(present(out["dvectors"]), 3), jnp.sum(present(out["dends"]), (3, -1))
    if "momentum" not in streams.initial:
        unwritten = jnp.isin(jnp.arange(vectors.shape[3]), jnp.array([IN_WEIGHTS, END_MOVE]))
        vectors = jnp.where(unwritten[:, None], 0, vectors)
    vectors = jnp.pad(vectors, ((0, 0), (0, 0), (0, 0), (0, 8 - vectors.shape[3]), (0, 0)))
    norm = None
    if streams.norm is not None:
        both = jnp.sum(present(out["dnorm"]), (0, 2))
        norm = both[:, 0], both[:, 1]
    width = streams.q.shape[3]
    dq, dk, dv = jnp.split(tokens(out["dtokens"], streams.v), [width, 2 * width], 3)
    pairs = jnp.sum(present(out["dpairs"]), 3)
    vectors = vectors.at[:, :, :, ENDS, : ends.shape[-1]].set(ends)
    initial = {name: [x[:, :, n] for x in out["dinitial"]] for n, name in enumerate(network.states)}
    return _Streams(initial, out.get("dfresh"), norm, dq, dk, dv, pairs, vectors)


def _cut(x: Array, block: int, columns: int, width: int) -> Array:
    """`[B,T,H,W] -> [B,H,n,width,C]`."""
    x = jnp.transpose(split_time(x, block), (1, 3, 0, 4, 2))
    return jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[3]), (0, columns - x.shape[4])))


def _laid(x: Array, *sizes: int) -> Array:
    """`[n,P,B,H,...] -> [B,H,n P,*sizes]`, with zeros."""
    x = jnp.moveaxis(x, (2, 3), (0, 1))
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
    pad = [(0, size - own) for size, own in zip(sizes, x.shape[3:], strict=True)]
    return jnp.pad(x, ((0, 0),) * 3 + tuple(pad))


def _coefficients(c: Linear, steps: Plan, columns: int) -> tuple[Array, Array]:
    """`pairs`, `vectors`."""
    m, none = c.moving, jnp.zeros_like(c.keep)
    moving = (none, none) if m is None else (m.in_weights, m.end_gradient)
    ends = [c.end_keep] if m is None else [c.end_keep, m.end_in_weights, m.end_stay]
    rows = [c.keep, moving[0], c.end_gradient, moving[1], jnp.concatenate(ends, -2), _flags(c, steps)]
    vectors = jnp.stack([_laid(x[..., 0], columns) for x in rows], -2)
    pairs = _laid(jnp.swapaxes(c.gradient, -1, -2), BLOCK, columns)
    return pairs, jnp.pad(vectors, ((0, 0),) * 3 + ((0, 8 - vectors.shape[3]), (0, 0)))


def _flags(c: Linear, steps: Plan) -> Array:
    """`[n,P,B,H,3,1]`."""
    groups = steps.groups
    begins = jnp.broadcast_to(groups.begins[..., None], steps.full.shape)
    flags = {PRESENT: jnp.any(groups.members, -1), BEGINS: begins, FULL: steps.full}
    rows = jnp.stack([flags[n].astype(F32) for n in sorted(flags)], -1)
    return jnp.broadcast_to(rows[:, :, :, None, :, None], (*c.keep.shape[:4], len(flags), 1))


def _turned(weights: Any) -> list[Array]:
    """`[B,H,in,out]` to `[B,H,out,in]` in multiples of 64."""

    def turn(w):
        w = jnp.swapaxes(w.astype(F32), 2, 3)
        return jnp.pad(w, ((0, 0), (0, 0), *((0, -size % BLOCK) for size in w.shape[2:])))

    return [turn(w) for w in weights]


def _network(tokens: Tokens, widths: list[int], norm: Any, rule: Rule, columns: int) -> Network:
    return Network(
        tuple(up_to(width, BLOCK) // BLOCK for width in widths),
        columns,
        part_count(tokens.v.dtype),
        tokens.log_momentum is not None,
        ACTIVATIONS[rule.activation],
        rule.residual,
        rule.clip,
        None if norm is None else rule.norm_eps,
    )


def _chosen(y: Array, steps: Plan) -> Array:
    """`[B,H,n P,C,W]` to `[B,T,H,W]`: of every token what the pass found that it belongs to."""
    members = jnp.moveaxis(steps.groups.members, 2, 0)  # [B,n,P,C]
    y = y.reshape(*y.shape[:2], *members.shape[1:3], *y.shape[3:])[:, :, :, :, : members.shape[3]]
    out = y[:, :, :, 0]
    for n in range(1, members.shape[2]):
        out = jnp.where(members[:, None, :, n, :, None], y[:, :, :, n], out)
    return jnp.moveaxis(out, (0, 1, 2, 3), (1, 3, 0, 2))


def memory_update(fresh: Memory, tokens: Tokens, norm, memory: Memory | None, segment_ids, rule: Rule):
    """Block by block; `fresh` is the memory at the start of a document, `memory` the carried one or None."""
    batch, length, heads, value = tokens.v.shape
    sizes = BLOCKS[tokens.v.dtype.name]
    columns = sizes[max(least for least in sizes if least <= rule.chunk)]
    block = min(rule.chunk, chunk_length(length, columns))
    steps, c = passes(fresh, memory, tokens, segment_ids, rule, block)
    widths = [tokens.k.shape[3], *(w.shape[3] for w in fresh.weights)]
    network = _network(tokens, widths, norm, rule, columns)
    blocks, count = steps.groups.members.shape[:2]
    work = Work(batch, heads, blocks, count)
    entering = fresh if memory is None else memory
    q, k, v = (_cut(x, block, columns, up_to(x.shape[3], BLOCK)) for x in tokens[:3])
    pairs, vectors = _coefficients(c, steps, columns)
    streams = _Streams(
        {name: _turned(getattr(entering, name)) for name in network.states},
        None if segment_ids is None else _turned(fresh.weights),
        None if norm is None else (norm[0].astype(F32), norm[1].astype(F32)),
        q, k, v, pairs, vectors,
    )  # fmt: skip
    y, surprise, final = _blocks(work, network, streams)
    y = join_time(_chosen(jnp.swapaxes(y, 3, 4), steps), length)[..., :value]
    surprise = join_time(_chosen(surprise[..., None], steps), length)[..., 0]

    def turned_back(name):
        own = zip(final.get(name, []), getattr(fresh, name), strict=True)
        return tuple(jnp.swapaxes(x, 2, 3)[:, :, : w.shape[2], : w.shape[3]] for x, w in own)

    start, weights, momentum = map(turned_back, ("start", "weights", "momentum"))
    return (y, surprise), Memory(start, weights, momentum, steps.phase)


def refusal(fresh, tokens, norm, memory, segment_ids, rule: Rule) -> str | None:
    """Why the kernel cannot take these arguments, or None."""
    key, value = tokens.k.shape[3], tokens.v.shape[3]
    if len({x.dtype for x in tokens[:3]}) > 1 or tokens.v.dtype.name not in BLOCKS:
        return "takes q, k and v of one dtype, bfloat16 or float32"
    if rule.retention is not None or rule.window > 1 or rule.loss is not square:
        return "takes linear retention, window=1 and loss='square' only"
    for name in ("read_scale", "threshold", "orthogonal"):
        if getattr(tokens, name) is not None:
            return f"takes no {name}"
    widths = [key, *(w.shape[3] for w in fresh.weights)]
    if any(w.shape[2] != width for w, width in zip(fresh.weights, widths, strict=False)):
        return "takes inner weights without biases only"
    if max(key, value) > WIDEST:
        return f"takes heads of at most {WIDEST} channels"
    if norm is not None and value % BLOCK:
        return f"takes a norm of {BLOCK} channels only"
    size = sum(up_to(w.shape[2], BLOCK) * up_to(w.shape[3], BLOCK) for w in fresh.weights)
    return None if size <= LARGEST else f"takes inner weights of at most {LARGEST} numbers a head, not {size}"
