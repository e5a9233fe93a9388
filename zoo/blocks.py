"""Residual blocks: `x + mixer(norm(x))`, then `x + mlp(norm(x))`, repeated in a pattern.

A pattern names mixers, and the model's fields say the rest; an entry that is a `Block` says all of it itself.

Equal blocks are stacked along a leading axis and run under `lax.scan`, so that compile time does not grow
with depth. Depth = repeats of the pattern, plus a shorter tail when the pattern does not divide it.
"""

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from layers.checks import require, require_choice, require_positive
from layers.common import Params, rms_norm
from zoo import mlp, pieces, registry

Group = tuple[tuple[Any, ...], int]
MLP = mlp.Config
RESIDUALS = ("stream", "normed")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block in full, as an entry of a pattern. Raises ValueError for anything but a layer's Config.

    With `residual="normed"` it is the norm's output that a mixer's or an MLP's is added to, not the norm's
    input; the two are multiplied by the numbers of `mixer_scales` or `mlp_scales` first (MiniMax 2025, arXiv
    2501.08313).
    """

    mixer: Any  # a layer's Config
    mlp: MLP | None = None
    eps: float = 1e-5  # of the norms
    unit_offset: bool = False  # scales of the norms are 1 + the parameter
    residual: str = "stream"
    mixer_scales: tuple[float, float] = (1.0, 1.0)
    mlp_scales: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self):
        registry.module(self.mixer)
        require_choice(self, "residual", RESIDUALS)

    def norm(self, x: Array, scale: Array) -> Array:
        """RMSNorm with this block's eps and scale."""
        return rms_norm(x, 1 + scale if self.unit_offset else scale, self.eps)

    def enter(self, x: Array, scale: Array) -> tuple[Array, Array]:
        """What a mixer or MLP works on, and what its output is added to."""
        normed = self.norm(x, scale)
        return normed, x if self.residual == "stream" else normed


@dataclass(frozen=True, kw_only=True)
class Config:
    """The trunk of a model.

    `pattern` is a tuple of layer names, layer Configs or `Block`s, repeated to `depth`; `mlp`, `expansion`
    and `moe_every` are about the first two. Raises ValueError for unknown names, sizes that do not fit, or a
    layer Config of another width.
    """

    width: int = 128  # D
    depth: int = 2  # number of blocks
    pattern: tuple[Any, ...] = ("attention",)
    mlp: str = "swiglu"
    expansion: float | None = None  # hidden width of the MLP over D; default 8/3 (swiglu) or 4 (gelu)
    moe_every: int = 0  # the MLPs of blocks n - 1, 2 n - 1, ... are mixtures of experts; 0: none
    experts: int = 8  # E
    experts_per_token: int = 2
    balance: float = 0.01  # coefficient of the experts' load-balancing loss
    remat: bool = True  # recompute each block in the backward pass instead of storing it
    piece: int = 0  # if > 0, blocks work on so many tokens at a time and recompute them (zoo/pieces.py)

    def __post_init__(self):
        require_positive(self, "width", "depth", "experts", "experts_per_token")
        require_choice(self, "mlp", mlp.KINDS)
        ok = isinstance(self.pattern, tuple) and len(self.pattern) > 0
        require(ok, f"pattern={self.pattern!r} must be a tuple of layer names, layer Configs or Blocks")
        require(self.expansion is None or self.expansion > 0, f"expansion={self.expansion} must be > 0")
        ok = self.moe_every == 0 or (self.moe_every > 0 and self.mlp != "none")
        require(ok, f"moe_every={self.moe_every} must be >= 0, and 0 with mlp={self.mlp!r}")
        k = self.experts_per_token
        require(k <= self.experts, f"experts_per_token={k} exceeds experts={self.experts}")
        ok = isinstance(self.piece, int) and self.piece >= 0
        require(ok, f"piece={self.piece!r} must be an integer >= 0")
        require(self.balance >= 0, f"balance={self.balance} must be >= 0")
        for layer in self.layers:
            require(
                layer.width == self.width,
                f"{type(layer).__module__}: width={layer.width} in a model of width={self.width}",
            )

    @cached_property
    def layers(self) -> tuple[Any, ...]:
        """The layer Config of every block, bottom to top."""
        made = tuple(self._layer(p) for p in self.pattern)
        return tuple(made[i % len(made)] for i in range(self.depth))

    def _layer(self, entry):
        if isinstance(entry, str):
            return registry.config(entry, self.width)
        if isinstance(entry, Block):
            return entry.mixer
        registry.module(entry)
        return entry

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every block, bottom to top."""
        return tuple(self._block(place) for place in range(self.depth))

    def _block(self, place: int) -> Block:
        entry = self.pattern[place % len(self.pattern)]
        if isinstance(entry, Block):
            return entry
        return Block(mixer=self.layers[place], mlp=self._mlp(self.is_moe(place)))

    def _mlp(self, moe: bool) -> MLP | None:
        if not self.hidden:
            return None
        mixture: dict[str, Any] = {"experts": self.experts, "balance": self.balance}
        mixture["experts_per_token"] = self.experts_per_token
        return MLP(hidden=self.hidden, kind=self.mlp, **(mixture if moe else {}))

    @property
    def groups(self) -> tuple[Group, ...]:
        """`(layer Configs, repeats)`: the repeated pattern (of mixers and MLPs), then the tail."""
        return tuple((tuple(b.mixer for b in blocks), repeats) for blocks, repeats in self.block_groups)

    @property
    def block_groups(self) -> tuple[tuple[tuple[Block, ...], int], ...]:
        """`groups` with all that their blocks are."""
        size = min(math.lcm(len(self.pattern), self.moe_every or 1), self.depth)
        repeats, rest = divmod(self.depth, size)
        groups = [(self.blocks[:size], repeats)]
        return tuple(groups + [(self.blocks[:rest], 1)] * (rest > 0))

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP, 0 without one; a multiple of 8."""
        if self.mlp == "none":
            return 0
        ratio = self.expansion or (8 / 3 if self.mlp == "swiglu" else 4.0)
        return 8 * math.ceil(ratio * self.width / 8)

    def is_moe(self, place: int) -> bool:
        """Whether the MLP at this place of the model, or of a group, is a mixture of experts."""
        return self.moe_every > 0 and (place + 1) % self.moe_every == 0

    def mlp_weights(self) -> int:
        """Of one MLP, or of one expert."""
        return (3 if self.mlp == "swiglu" else 2) * self.width * self.hidden

    def idle_weights(self) -> int:
        """Weights of all the experts that a token does not go to."""
        return sum(block.mlp.idle(self.width) for block in self.blocks if block.mlp)

    def trunk_state_bytes(self) -> int:
        """Bytes of float32 state of all blocks, one sequence."""
        return sum(layer.state_bytes() for layer in self.layers)

    def trunk_flops_per_token(self, length: int) -> int:
        """Forward FLOPs of all blocks for one token of a sequence of `length`.

        Of a mixture, the router and the experts that the token goes to; here the others run and are masked.
        """
        mixers = sum(layer.flops_per_token(length) for layer in self.layers)
        return mixers + 2 * sum(block.mlp.active(self.width) for block in self.blocks if block.mlp)


def init_norm(cfg: Config, block: Block) -> Array:
    """The scale of a norm as `block` has them, doing nothing: `[D]`."""
    return jnp.zeros(cfg.width) if block.unit_offset else jnp.ones(cfg.width)


def _init_block(key: Array, cfg: Config, block: Block) -> Params:
    mixer_key, in_key, out_key = jax.random.split(key, 3)
    mixer = registry.module(block.mixer).init(mixer_key, block.mixer)
    params = {"norm_mixer": init_norm(cfg, block), "mixer": mixer}
    if block.mlp:
        params["norm_mlp"] = init_norm(cfg, block)
        params["mlp"] = mlp.init(in_key, out_key, jax.random.fold_in(key, 3), block.mlp, cfg.width)
    return params


def _scale_outputs(params: Params, depth: int) -> Params:
    """Shrink every `w_out` by 1/sqrt(2 depth): the residual stream keeps its size at any depth (GPT-2)."""

    def scale(path, leaf):
        return leaf * (2 * depth) ** -0.5 if path[-1].key == "w_out" else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


def init(key: Array, cfg: Config) -> list[list[Params]]:
    """Parameters: per group, per place in the pattern, blocks stacked along a leading `repeats` axis."""
    groups = []
    for number, (blocks, repeats) in enumerate(cfg.block_groups):
        keys = jax.random.split(jax.random.fold_in(key, number), (len(blocks), repeats))
        made = [
            jax.vmap(lambda k, block=block: _init_block(k, cfg, block))(ks)
            for block, ks in zip(blocks, keys, strict=True)
        ]
        groups.append([_scale_outputs(b, cfg.depth) for b in made])
    return groups


def init_state(cfg: Config, batch: int) -> list[list[Any]]:
    """Empty states, arranged as the parameters are."""

    def stacked(layer, repeats):
        state = registry.module(layer).init_state(layer, batch)
        return jax.tree.map(lambda s: jnp.broadcast_to(s, (repeats, *s.shape)), state)

    return [[stacked(layer, repeats) for layer in layers] for layers, repeats in cfg.groups]


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


def _group(group: tuple[Block, ...], implementation, blocks, x: Array, states, segment_ids):
    """One repeat of a group over `x [B,T,D]`: `(x, states, one aux a block)`."""
    new_states, auxes = [], []
    for block, params, state in zip(group, blocks, states, strict=True):
        normed, residual = block.enter(x, params["norm_mixer"])
        y, state, aux = registry.module(block.mixer).apply(
            params["mixer"],
            block.mixer,
            normed,
            state,
            segment_ids=segment_ids,
            implementation=implementation,
        )
        x, experts = _channels(block, params, _sum(residual, y, block.mixer_scales))
        new_states.append(state)
        auxes.append(aux | experts)
    return x, new_states, auxes


def apply(params, cfg: Config, x: Array, state=None, *, segment_ids=None, implementation=None):
    """All blocks over `x [B,T,D]`: `(y [B,T,D], state, aux)`."""
    in_pieces = 0 < cfg.piece < x.shape[1]
    new_states, all_aux = [], []
    for g, (group, _) in enumerate(cfg.block_groups):

        def body(x, inputs, group=group):
            blocks, old = inputs
            run = partial(_group, group, implementation, blocks)
            if in_pieces:
                empty = [registry.module(b.mixer).init_state(b.mixer, x.shape[0]) for b in group]
                x, *out = pieces.apply(run, empty, x, old, segment_ids, cfg.piece)
            else:
                x, *out = run(x, old or [None] * len(group), segment_ids)
            return x, out

        # Pieces keep less than a block does: to recompute the block as well would cost and save nothing.
        body = jax.checkpoint(body) if cfg.remat and not in_pieces else body
        x, (states, auxes) = jax.lax.scan(body, x, (params[g], None if state is None else state[g]))
        new_states.append(states)
        all_aux += auxes
    return x, new_states, _merge_aux(all_aux)


def step(params, cfg: Config, x_t: Array, state):
    """All blocks over one token `x_t [B,D]`: `(y_t [B,D], state)`."""
    new_states = []
    for (group, _), blocks, old in zip(cfg.block_groups, params, state, strict=True):

        def body(x, blocks, group=group):
            states = []
            for block, (params, old) in zip(group, blocks, strict=True):
                normed, residual = block.enter(x, params["norm_mixer"])
                y, new = registry.module(block.mixer).step(params["mixer"], block.mixer, normed, old)
                x, _ = _channels(block, params, _sum(residual, y, block.mixer_scales))
                states.append(new)
            return x, states

        x_t, states = jax.lax.scan(body, x_t, list(zip(blocks, old, strict=True)))
        new_states.append(states)
    return x_t, new_states


def count(init_model, cfg: Config) -> int:
    """Number of parameters that `init_model(key, cfg)` would make; nothing is allocated."""
    shapes = jax.eval_shape(lambda: init_model(jax.random.key(0), cfg))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
