"""A trunk in motion: the verbs of a layer for all blocks of a `blocks.Config`.

Equal blocks are stacked along a leading axis and run under `lax.scan`, so that compile time does not grow
with depth. From block to block goes a stream: x, and beside it what some layers hand upwards.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from layers.common import Params
from zoo import depth, mlp, pieces, registry, sharding, shards, shared
from zoo.blocks import Block, Config
from zoo.shared import Calling, Side


def init_norm(cfg: Config, block: Block) -> Any:
    """The scale of a norm as `block` has them, or its scale and bias, doing nothing: `[D]`."""
    if block.norm_bias:
        return {"scale": jnp.ones(cfg.width), "bias": jnp.zeros(cfg.width)}
    return jnp.zeros(cfg.width) if block.unit_offset else jnp.ones(cfg.width)


def _init_block(key: Array, cfg: Config, block: Block) -> Params:
    mixer_key, in_key, out_key = jax.random.split(key, 3)
    mixer = registry.module(block.mixer).init(mixer_key, block.mixer)
    params = {"norm_mixer": init_norm(cfg, block), "mixer": mixer}
    if block.mlp:
        params["norm_mlp"] = init_norm(cfg, block)
        params["mlp"] = mlp.init(in_key, out_key, jax.random.fold_in(key, 3), block.mlp, cfg.width)
    if block.calls is not None:
        params["call"] = shared.init_call(jax.random.fold_in(key, 4), cfg.shared[block.calls])
    return params


def _scale_outputs(params: Params, depth: int) -> Params:
    """Shrink every `w_out` by 1/sqrt(2 depth): the residual stream keeps its size at any depth (GPT-2)."""

    def scale(path, leaf):
        return leaf * (2 * depth) ** -0.5 if path[-1].key == "w_out" else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


def init(key: Array, cfg: Config) -> list[list[Params]]:
    """Parameters: per group, per place in the pattern, blocks stacked along a leading `repeats` axis; then,
    where there are any, the list of shared blocks."""
    groups = []
    for number, (blocks, repeats) in enumerate(cfg.block_groups):
        keys = jax.random.split(jax.random.fold_in(key, number), (len(blocks), repeats))
        made = [
            jax.vmap(lambda k, block=block: _init_block(k, cfg, block))(ks)
            for block, ks in zip(blocks, keys, strict=True)
        ]
        groups.append([_scale_outputs(b, cfg.depth) for b in made])
    key = jax.random.fold_in(key, len(groups))
    common = [shared.init(jax.random.fold_in(key, n), block) for n, block in enumerate(cfg.shared)]
    return [*groups, common] if common else groups


def _init_state(cfg: Config, block: Block, batch: int) -> Any:
    state = registry.module(block.mixer).init_state(block.mixer, batch)
    if block.calls is None:
        return state
    attention = cfg.shared[block.calls].attention
    return Calling(state, registry.module(attention).init_state(attention, batch))


def init_state(cfg: Config, batch: int) -> list[list[Any]]:
    """Empty states, arranged as the parameters are."""

    def stacked(block, repeats):
        state = _init_state(cfg, block, batch)
        return jax.tree.map(lambda s: jnp.broadcast_to(s, (repeats, *s.shape)), state)

    return [[stacked(block, repeats) for block in group] for group, repeats in cfg.block_groups]


def _merge_aux(stacked: list[dict[str, Array]]) -> dict[str, Array]:
    """Losses are summed over blocks, diagnostics averaged. Input: one dict of `[repeats, ...]` per place."""
    values: dict[str, list[Array]] = {}
    for aux in stacked:
        for name, value in aux.items():
            values.setdefault(name, []).append(value)
    return {
        name: jnp.concatenate(v).sum() if name.endswith("_loss") else jnp.concatenate(v).mean(0)
        for name, v in values.items()
    }


def _sum(residual: Array, y: Array, scales: tuple[float, float]) -> Array:
    if scales == (1.0, 1.0):
        return residual + y
    return residual * scales[0] + y * scales[1]


def _channels(block: Block, params: Params, x: Array) -> tuple[Array, dict[str, Array]]:
    """The block's MLP on `x [..., D]`, and aux."""
    if block.mlp is None:
        return x, {}
    normed, residual = block.enter(x, params["norm_mlp"])
    y, aux = mlp.apply(params["mlp"], block.mlp, normed)
    return _sum(residual, y, block.mlp_scales), aux


def _beside(cfg: Config, params, first: Array) -> Side:
    """What blocks may look at beside the stream, from the parameters of the trunk and its input."""
    return Side(cfg.shared, params[-1], first) if cfg.shared else Side((), [], None)


def _stream(cfg: Config, x: Array) -> tuple[Array, Array | None]:
    """x, and what layers hand upwards beside it: nothing yet."""
    return x, jnp.zeros((*x.shape[:-1], cfg.side), x.dtype) if cfg.side else None


def _layer(verb: str, block: Block, params: Params, stream, *state, **how):
    """A layer's `verb`, "apply" or "step", on a stream in place of x; in the place of y it gives a stream."""
    run, (x, handed) = getattr(registry.module(block.mixer), verb), stream
    if not getattr(block.mixer, "side", 0):
        y, *rest = run(params, block.mixer, x, *state, **how)
        return (y, handed), *rest
    y, *rest, handed = run(params, block.mixer, x, *state, side=handed, **how)
    return (y, handed), *rest


def _mixed(block: Block, implementation, beside: Side, params: Params, stream, state, segment_ids):
    """The block's mixer, and what it calls, over a stream `[B,T,D]`: `(stream, state, aux)`."""
    x, handed = stream
    how = {"segment_ids": segment_ids, "implementation": implementation}
    heard, state, keep = shared.call(beside, block.calls, params.get("call"), x, state, **how)
    normed, residual = block.enter(x, params["norm_mixer"], heard)
    run = partial(_layer, "apply", block, params["mixer"])
    (y, handed), state, aux = shards.apply(run, block.mixer, (normed, handed), state, **how)
    return (_sum(residual, y, block.mixer_scales), handed), keep(state), aux


def _mixed_step(block: Block, beside: Side, params: Params, stream, state):
    """One token of `_mixed`: `(stream, state)`."""
    x, handed = stream
    heard, state, keep = shared.call_step(beside, block.calls, params.get("call"), x, state)
    normed, residual = block.enter(x, params["norm_mixer"], heard)
    (y, handed), state = _layer("step", block, params["mixer"], (normed, handed), state)
    return (_sum(residual, y, block.mixer_scales), handed), keep(state)


def _group(group: tuple[Block, ...], implementation, beside: Side, blocks, inputs, states, segment_ids):
    """One repeat of a group over a stream and the trunk's input: `(stream, states, one aux a block)`."""
    stream, first = inputs
    beside, new_states, auxes = beside._replace(first=first), [], []
    for block, params, state in zip(group, blocks, states, strict=True):
        (x, handed), state, aux = _mixed(block, implementation, beside, params, stream, state, segment_ids)
        x, experts = _channels(block, params, x)
        stream = x, handed
        new_states.append(state)
        auxes.append(aux | experts)
    return stream, new_states, auxes


def _in_pieces(cfg: Config, group: tuple[Block, ...], run: pieces.Run, inputs, states, segment_ids):
    """`run` of a group, piece by piece, on devices in turn where the sequence is cut over them."""
    empty = [_init_state(cfg, block, inputs[0][0].shape[0]) for block in group]
    piecewise = partial(pieces.apply, run, empty, piece=cfg.piece)
    return shards.in_turn(piecewise, empty, inputs, states, segment_ids)


def apply(params, cfg: Config, x: Array, state=None, *, segment_ids=None, implementation=None):
    """All blocks over `x [B,T,D]`: `(y [B,T,D], state, aux)`."""
    in_pieces = 0 < cfg.piece < x.shape[1]
    x = sharding.activations(x)
    params = depth.shared(params, cfg.block_groups)
    beside, stream, new_states, all_aux = _beside(cfg, params, x), _stream(cfg, x), [], []
    for g, (group, _) in enumerate(cfg.block_groups):

        def body(stream, inputs, group=group):
            blocks, old = inputs
            run, xs = partial(_group, group, implementation, beside, blocks), (stream, beside.first)
            if in_pieces:
                (x, handed), *out = _in_pieces(cfg, group, run, xs, old, segment_ids)
            else:
                (x, handed), *out = run(xs, old or [None] * len(group), segment_ids)
            return (sharding.activations(x), handed), out

        # Pieces keep less than a block does: to recompute the block as well would cost and save nothing.
        body = jax.checkpoint(body) if cfg.remat and not in_pieces else body
        inputs = params[g], None if state is None else state[g]
        stream, (states, auxes) = jax.lax.scan(body, stream, inputs)
        new_states.append(states)
        all_aux += auxes
    return sharding.activations(stream[0]), new_states, _merge_aux(all_aux)


def step(params, cfg: Config, x_t: Array, state):
    """All blocks over one token `x_t [B,D]`: `(y_t [B,D], state)`."""
    params = depth.shared(params, cfg.block_groups)
    beside, stream, new_states = _beside(cfg, params, x_t), _stream(cfg, x_t), []
    for (group, _), blocks, old in zip(cfg.block_groups, params[: len(state)], state, strict=True):

        def body(stream, blocks, group=group):
            states = []
            for block, (params, old) in zip(group, blocks, strict=True):
                (x, handed), new = _mixed_step(block, beside, params, stream, old)
                x, _ = _channels(block, params, x)
                stream = x, handed
                states.append(new)
            return stream, states

        stream, states = jax.lax.scan(body, stream, list(zip(blocks, old, strict=True)))
        new_states.append(states)
    return stream[0], new_states


def count(init_model, cfg: Config) -> int:
    """Number of parameters that `init_model(key, cfg)` would make; nothing is allocated."""
    shapes = jax.eval_shape(lambda: init_model(jax.random.key(0), cfg))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
