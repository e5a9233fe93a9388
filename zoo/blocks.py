"""What a trunk is: blocks `x + mixer(norm(x))`, then `x + mlp(norm(x))`, repeated in a pattern.

A pattern names mixers, and the model's fields say the rest; an entry that is a `Block` says all of it itself.
Depth = repeats of the pattern, plus a shorter tail when the pattern does not divide it. `zoo.trunk` runs it.

A block may call one that several places of the model share (zoo/shared.py) before its mixer.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax import Array

from layers.checks import require, require_choice, require_positive
from layers.common import layer_norm, rms_norm
from layers.fields import later
from zoo import mlp, registry, shared

Group = tuple[tuple[Any, ...], int]
MLP = mlp.Config
Shared = shared.Config
RESIDUALS = ("stream", "normed")
DEEPEST = 10_000  # blocks; every one is listed, and a config of billions must not take the memory


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
    layer_norm: bool = later(False)  # norms subtract the mean
    norm_bias: bool = later(False)  # and add a bias
    calls: int | None = later(None)  # number of the shared block whose output the mixer sees as well

    def __post_init__(self):
        registry.module(self.mixer)
        require_choice(self, "residual", RESIDUALS)
        require(not (self.layer_norm and self.unit_offset), "block: layer_norm has no unit_offset")
        require(self.layer_norm or not self.norm_bias, "block: norm_bias needs layer_norm")

    def norm(self, x: Array, scale: Any) -> Array:
        """RMSNorm or LayerNorm with this block's eps and what `init_norm` gives."""
        if self.norm_bias:
            return layer_norm(x, scale["scale"], scale["bias"], self.eps)
        if self.layer_norm:
            return layer_norm(x, scale, None, self.eps)
        return rms_norm(x, 1 + scale if self.unit_offset else scale, self.eps)

    def enter(self, x: Array, scale: Any, heard: Array | None = None) -> tuple[Array, Array]:
        """What a mixer or MLP works on, and what its output is added to; `heard` is of the former alone."""
        normed = self.norm(x if heard is None else x + heard, scale)
        return normed, x if self.residual == "stream" else normed


@dataclass(frozen=True, kw_only=True)
class Config:
    """The trunk of a model.

    `pattern` is a tuple of layer names, layer Configs or `Block`s, repeated to `depth` above the entries of
    `first`; `mlp`, `expansion` and `moe_every` are about names and Configs. Raises ValueError for unknown
    names, sizes that do not fit, or a layer Config of another width.
    """

    width: int = 128  # D
    depth: int = 2  # number of blocks
    pattern: tuple[Any, ...] = ("attention",)
    first: tuple[Any, ...] = later(())  # entries as of a pattern, once each, counted in depth
    mlp: str = "swiglu"
    expansion: float | None = None  # hidden width of the MLP over D; default 8/3 (swiglu) or 4 (gelu)
    moe_every: int = 0  # the MLPs of blocks n - 1, 2 n - 1, ... are mixtures of experts; 0: none
    experts: int = 8  # E
    experts_per_token: int = 2
    balance: float = 0.01  # coefficient of the experts' load-balancing loss
    remat: bool = True  # recompute each block in the backward pass instead of storing it
    piece: int = 0  # if > 0, blocks work on so many tokens at a time and recompute them (zoo/pieces.py)
    shared: tuple[Shared, ...] = later(())  # blocks that those of the pattern call

    def __post_init__(self):
        require_positive(self, "width", "depth", "experts", "experts_per_token")
        require(self.depth <= DEEPEST, f"depth={self.depth} exceeds {DEEPEST:,}")
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
        ok = isinstance(self.first, tuple) and len(self.first) <= self.depth
        require(ok, f"first={self.first!r} must be a tuple of at most depth={self.depth} entries")
        require(not (self.first and self.moe_every), "first: blocks below a pattern need moe_every=0")
        for layer in self.layers:
            require(
                layer.width == self.width,
                f"{type(layer).__module__}: width={layer.width} in a model of width={self.width}",
            )
        for block in self.shared:
            message = f"shared block: width={block.width} in a model of width={self.width}"
            require(block.width == self.width, message)
        for block in self.blocks:
            ok = block.calls is None or 0 <= block.calls < len(self.shared)
            require(ok, f"a block calls number {block.calls} of {len(self.shared)} shared blocks")

    @cached_property
    def layers(self) -> tuple[Any, ...]:
        """The layer Config of every block, bottom to top."""
        first, made = (tuple(self._layer(p) for p in entries) for entries in (self.first, self.pattern))
        return first + tuple(made[i % len(made)] for i in range(self.depth - len(first)))

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
        above = place - len(self.first)
        entry = self.first[place] if above < 0 else self.pattern[above % len(self.pattern)]
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
        first, blocks = self.blocks[: len(self.first)], self.blocks[len(self.first) :]
        size = math.lcm(len(self.pattern), self.moe_every or 1)
        repeats, rest = divmod(len(blocks), size)
        groups = [(first, 1), (blocks[:size], repeats), (blocks[:rest], 1)]
        return tuple(group for group in groups if group[0] and group[1])

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

    @property
    def side(self) -> int:
        """Channels that layers hand upwards beside the stream (layers/__init__.py)."""
        return max(getattr(layer, "side", 0) for layer in self.layers)

    @property
    def called(self) -> tuple[Shared, ...]:
        """The shared block of every call, bottom to top."""
        return tuple(self.shared[block.calls] for block in self.blocks if block.calls is not None)

    def trunk_state_bytes(self) -> int:
        """Bytes of float32 state of all blocks, one sequence."""
        calls = sum(block.attention.state_bytes() for block in self.called)
        return calls + sum(layer.state_bytes() for layer in self.layers)

    def trunk_flops_per_token(self, length: int) -> int:
        """Forward FLOPs of all blocks for one token of a sequence of `length`.

        Of a mixture, the router and the experts that the token goes to; here the others run and are masked.
        """
        mixers = sum(layer.flops_per_token(length) for layer in (*self.layers, *self.called))
        return mixers + 2 * sum(block.mlp.active(self.width) for block in self.blocks if block.mlp)
