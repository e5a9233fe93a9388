"""Residual blocks: `x + mixer(norm(x))`, then `x + mlp(norm(x))`, repeated in a pattern.

Equal blocks are stacked along a leading axis and run under `lax.scan`, so that compile time does not grow
with depth. Depth = repeats of the pattern, plus a shorter tail when the pattern does not divide it.

In every `moe_every`-th block the MLP is a mixture of E experts, as Mixtral's and Jamba's: with
p = softmax(W_router x), the `experts_per_token` largest p, scaled to sum to one, weigh the outputs of their
experts. Every expert runs on every token and the foreign ones are masked: no token is dropped and none sees
another, except through the loss balance * E * sum_e f_e p_e, f_e the fraction of tokens that chose e and
p_e its mean probability (Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, arXiv 2101.03961 eq. 4-6).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from layers.common import Params, dense, require, require_choice, require_positive, rms_norm, weight, wide
from zoo import registry

MLPS = ("swiglu", "gelu", "none")
Group = tuple[tuple[Any, ...], int]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The trunk of a model.

    `pattern` is a tuple of layer names or layer Configs, repeated to `depth`. Raises ValueError for unknown
    names, sizes that do not fit, or a layer Config of another width.
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

    def __post_init__(self):
        require_positive(self, "width", "depth", "experts", "experts_per_token")
        require_choice(self, "mlp", MLPS)
        ok = isinstance(self.pattern, tuple) and len(self.pattern) > 0
        require(ok, f"pattern={self.pattern!r} must be a tuple of layer names or layer Configs")
        require(self.expansion is None or self.expansion > 0, f"expansion={self.expansion} must be > 0")
        ok = self.moe_every == 0 or (self.moe_every > 0 and self.mlp != "none")
        require(ok, f"moe_every={self.moe_every} must be >= 0, and 0 with mlp={self.mlp!r}")
        k = self.experts_per_token
        require(k <= self.experts, f"experts_per_token={k} exceeds experts={self.experts}")
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
        registry.module(entry)
        return entry

    @property
    def groups(self) -> tuple[Group, ...]:
        """`(layer Configs, repeats)`: the repeated pattern (of mixers and MLPs), then the tail."""
        size = min(math.lcm(len(self.pattern), self.moe_every or 1), self.depth)
        repeats, rest = divmod(self.depth, size)
        groups = [(self.layers[:size], repeats)]
        return tuple(groups + [(self.layers[:rest], 1)] * (rest > 0))

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
        mixtures = self.depth // self.moe_every if self.moe_every else 0
        return mixtures * (self.experts - self.experts_per_token) * self.mlp_weights()

    def trunk_state_bytes(self) -> int:
        """Bytes of float32 state of all blocks, one sequence."""
        return sum(layer.state_bytes() for layer in self.layers)

    def trunk_flops_per_token(self, length: int) -> int:
        """Forward FLOPs of all blocks for one token of a sequence of `length`.

        Of a mixture, the router and the experts that the token goes to; here the others run and are masked.
        """
        mixers = sum(layer.flops_per_token(length) for layer in self.layers)
        mixtures = sum(self.is_moe(place) for place in range(self.depth))
        experts = (self.experts_per_token - 1) * self.mlp_weights() + self.width * self.experts
        return mixers + 2 * (self.depth * self.mlp_weights() + mixtures * experts)


def _init_block(key: Array, cfg: Config, layer, moe: bool) -> Params:
    mixer_key, in_key, out_key = jax.random.split(key, 3)
    block = {"norm_mixer": jnp.ones(cfg.width), "mixer": registry.module(layer).init(mixer_key, layer)}
    if cfg.hidden:
        inner = 2 * cfg.hidden if cfg.mlp == "swiglu" else cfg.hidden
        block["norm_mlp"] = jnp.ones(cfg.width)
        experts = (cfg.experts,) if moe else ()
        block["mlp"] = {
            "w_in": weight(in_key, cfg.width, *experts, inner),
            "w_out": weight(out_key, cfg.hidden, *experts, cfg.width),
        }
        if moe:
            block["mlp"]["w_router"] = weight(jax.random.fold_in(key, 3), cfg.width, cfg.experts)
    return block


def _scale_outputs(params: Params, depth: int) -> Params:
    """Shrink every `w_out` by 1/sqrt(2 depth): the residual stream keeps its size at any depth (GPT-2)."""

    def scale(path, leaf):
        return leaf * (2 * depth) ** -0.5 if path[-1].key == "w_out" else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


def init(key: Array, cfg: Config) -> list[list[Params]]:
    """Parameters: per group, per place in the pattern, blocks stacked along a leading `repeats` axis."""
    groups = []
    for number, (layers, repeats) in enumerate(cfg.groups):
        keys = jax.random.split(jax.random.fold_in(key, number), (len(layers), repeats))
        blocks = [
            jax.vmap(lambda k, layer=layer, at=place: _init_block(k, cfg, layer, cfg.is_moe(at)))(ks)
            for place, (layer, ks) in enumerate(zip(layers, keys, strict=True))
        ]
        groups.append([_scale_outputs(b, cfg.depth) for b in blocks])
    return groups


def init_state(cfg: Config, batch: int) -> list[list[Any]]:
    """Empty states, arranged as the parameters are."""

    def stacked(layer, repeats):
        state = registry.module(layer).init_state(layer, batch)
        return jax.tree.map(lambda s: jnp.broadcast_to(s, (repeats, *s.shape)), state)

    return [[stacked(layer, repeats) for layer in layers] for layers, repeats in cfg.groups]


def _route(cfg: Config, logits: Array) -> tuple[Array, dict[str, Array]]:
    """Weights `[..., E]`, 0 for the experts that are not chosen, and the loss and load of a batch."""
    probabilities = jax.nn.softmax(logits)
    _, best = jax.lax.top_k(probabilities, cfg.experts_per_token)
    chosen = jnp.any(best[..., None] == jnp.arange(cfg.experts), -2)
    weights = jnp.where(chosen, probabilities, 0)
    load, share = (x.reshape(-1, cfg.experts).mean(0, weights.dtype) for x in (chosen, probabilities))
    loss = cfg.balance * cfg.experts * jnp.sum(load * share)
    return weights / weights.sum(-1, keepdims=True), {"expert_balance_loss": loss, "expert_load": load}


def _mlp(params: Params, cfg: Config, x: Array) -> tuple[Array, dict[str, Array]]:
    if not cfg.hidden:
        return x, {}
    normed, mlp = rms_norm(x, params["norm_mlp"]), params["mlp"]
    inner = dense(normed, mlp["w_in"])
    if cfg.mlp == "swiglu":
        gate, value = jnp.split(inner, 2, -1)
        inner = jax.nn.silu(gate) * value
    else:
        inner = jax.nn.gelu(inner)
    if "w_router" not in mlp:
        return x + dense(inner, mlp["w_out"]), {}
    weights, aux = _route(cfg, dense(wide(normed), mlp["w_router"]))
    inner = inner * weights[..., None].astype(inner.dtype)
    return x + jnp.einsum("...ef,fed->...d", inner, mlp["w_out"].astype(x.dtype)), aux


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


def apply(params, cfg: Config, x: Array, state=None, *, segment_ids=None, implementation=None):
    """All blocks over `x [B,T,D]`: `(y [B,T,D], state, aux)`."""
    new_states, all_aux = [], []
    for g, (layers, _) in enumerate(cfg.groups):

        def body(x, blocks, layers=layers):
            states, auxes = [], []
            for layer, (block, old) in zip(layers, blocks, strict=True):
                y, new, aux = registry.module(layer).apply(
                    block["mixer"],
                    layer,
                    rms_norm(x, block["norm_mixer"]),
                    old,
                    segment_ids=segment_ids,
                    implementation=implementation,
                )
                x, experts = _mlp(block, cfg, x + y)
                states.append(new)
                auxes.append(aux | experts)
            return x, (states, auxes)

        old = state[g] if state is not None else [None] * len(layers)
        run = jax.checkpoint(body) if cfg.remat else body
        x, (states, auxes) = jax.lax.scan(run, x, list(zip(params[g], old, strict=True)))
        new_states.append(states)
        all_aux += auxes
    return x, new_states, _merge_aux(all_aux)


def step(params, cfg: Config, x_t: Array, state):
    """All blocks over one token `x_t [B,D]`: `(y_t [B,D], state)`."""
    new_states = []
    for (layers, _), group, old in zip(cfg.groups, params, state, strict=True):

        def body(x, blocks, layers=layers):
            states = []
            for layer, (block, old) in zip(layers, blocks, strict=True):
                normed = rms_norm(x, block["norm_mixer"])
                y, new = registry.module(layer).step(block["mixer"], layer, normed, old)
                x, _ = _mlp(block, cfg, x + y)
                states.append(new)
            return x, states

        x_t, states = jax.lax.scan(body, x_t, list(zip(group, old, strict=True)))
        new_states.append(states)
    return x_t, new_states


def count(init_model, cfg: Config) -> int:
    """Number of parameters that `init_model(key, cfg)` would make; nothing is allocated."""
    shapes = jax.eval_shape(lambda: init_model(jax.random.key(0), cfg))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
