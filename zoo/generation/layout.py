"""How a model lies in memory while it writes.

Equal blocks are stacked, and a step scans over the stack (`zoo.trunk`). On a CPU that copies every weight
out of the stack before it is used, for every token, which costs as much as the product itself at batch 1; and
a head that is the transposed embedding may be transposed anew for every token. So there a tied head becomes
an array of its own for a text, and models of up to `MOST` blocks are laid out apart: each block with its own
arrays, one after the other in the program. That takes the memory of the parameters once more, and time to
compile for every block. Models on other devices stay as they are.

A loop that writes carries states without the axis of a stack of one: with it, XLA on a CPU does not update
the keys and values of attention in place, but goes over all of them some six times a token.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from zoo import lm

MOST = 12


def apart(cfg: lm.Config) -> lm.Config:
    """The Config of the same model as it is to lie: no tied head, its blocks one group that stands once."""
    if jax.default_backend() != "cpu":
        return cfg
    cfg = dataclasses.replace(cfg, tie=False)
    return cfg if cfg.depth > MOST else dataclasses.replace(cfg, first=(), pattern=cfg.blocks, moe_every=0)


def alike(cfg: lm.Config, other: lm.Config) -> bool:
    """Whether the states of two Configs of one model lie alike."""
    return cfg.block_groups == other.block_groups


def unstacked(cfg: lm.Config, tree: Any) -> list[list[Any]]:
    """What `cfg` has for its blocks (parameters, states) as `apart(cfg)` has it."""
    blocks = [
        jax.tree.map(lambda leaf, r=r: leaf[r : r + 1], place)
        for (_, repeats), group in zip(cfg.block_groups, tree, strict=False)
        for r in range(repeats)
        for place in group
    ]
    return [blocks, *tree[len(cfg.block_groups) :]]  # and the blocks they share


def stacked(cfg: lm.Config, tree: list[list[Any]]) -> list[list[Any]]:
    """What was `unstacked`, as it was."""
    (rest,), groups = tree, []
    for blocks, repeats in cfg.block_groups:
        here, rest = rest[: len(blocks) * repeats], rest[len(blocks) * repeats :]
        places = [here[place :: len(blocks)] for place in range(len(blocks))]
        groups.append([jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *place) for place in places])
    return groups


def bare(cfg: lm.Config, state: list[Any]) -> list[Any]:
    """`state` without the stacking axis of blocks that stand once."""
    return [
        jax.tree.map(lambda leaf: leaf[0], group) if repeats == 1 else group
        for (_, repeats), group in zip(cfg.block_groups, state, strict=True)
    ]


def dressed(cfg: lm.Config, state: list[Any]) -> list[Any]:
    """What was `bare`, as it was."""
    return [
        jax.tree.map(lambda leaf: leaf[None], group) if repeats == 1 else group
        for (_, repeats), group in zip(cfg.block_groups, state, strict=True)
    ]


@partial(jax.jit, static_argnames=("cfg", "to"))
def _laid_out(params, cfg: lm.Config, to: lm.Config) -> Any:
    head = {"w_head": params["w_embed"].T} if cfg.tie and not to.tie else {}
    blocks = params["blocks"] if alike(cfg, to) else unstacked(cfg, params["blocks"])
    return params | {"blocks": blocks} | head


def model(params: Any, cfg: lm.Config) -> tuple[Any, lm.Config]:
    """Parameters and Config to write with."""
    found = apart(cfg)
    return (params if found == cfg else _laid_out(params, cfg, found)), found
