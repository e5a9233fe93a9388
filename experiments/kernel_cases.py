"""The named cases that kernels are exported, compiled and measured on.

A case is one op in one of its forms (`VARIANTS`), at one shape and dtype: its arguments, drawn from ranges
that layers live in, how to call the op on them, and the work that this is. Benchmarks and tables take their
rows from here, and learn from an op's `IMPLEMENTATIONS` which kernels there are.

Work is counted from the maths, the same for every implementation. FLOPs are the op's own `flops_per_token`
(`flops` below says what of backward). Bytes are the fewest: every argument and result once, and for forward
with backward arguments twice, output, its cotangent and the gradients once. What a kernel keeps or reads
again comes on top of that.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import Array

from experiments import kernel_inputs as inputs
from experiments.kernel_inputs import Sizes
from layers import titans
from pallas_kernels import diagonal_scan as diagonal
from pallas_kernels import dispatch, dplr, gated_delta_rule, gated_linear_attention, memory_update
from pallas_kernels import selective_scan as selective
from pallas_kernels import short_conv as conv

DIRECTIONS = ("forward", "forward+backward")


def _delta_rule(q, k, v, log_decay, beta, *, implementation):
    """With the rate folded in as layers do it: part of the work."""
    beta = beta[..., None].astype(v.dtype)
    return gated_delta_rule.gated_delta_rule(
        q, k, beta * v, beta * k, log_decay, implementation=implementation
    )


def _dplr(q, k, v, log_decay, a, b, *, implementation):
    return dplr.dplr(q, k, v, a, b, log_decay, implementation=implementation)


def _memory_update(memory_0, memory_1, *tokens, implementation):
    rule = titans.Config(width=4).rule
    (y, _), memory = memory_update.memory_update(
        (memory_0, memory_1), *tokens, implementation=implementation, **rule
    )
    return y, memory


def _memory_flops(s: Sizes) -> int:
    cfg = inputs.memory_layer(s)
    return memory_update.flops_per_token(s.T, cfg.shapes, cfg.chunk, momentum=cfg.momentum)


@dataclass(frozen=True)
class Variant:
    """One form of an op. `run(*arguments, implementation=)` gives `(output, state)`."""

    name: str
    op: str  # folder of pallas_kernels
    draw: Callable[[inputs.Draw, Sizes], dict[str, Array]]
    run: Callable[..., tuple[Array, Any]]
    flops: Callable[[Sizes], int]  # forward, of one token of one sample
    shapes: tuple[Sizes, ...]
    small: Sizes
    matrix: bool = True  # products of matrices, not entry by entry

    @property
    def implementations(self) -> dict[str, Any]:
        return importlib.import_module(f"pallas_kernels.{self.op}.api").IMPLEMENTATIONS

    @property
    def platforms(self) -> list[str]:
        """Those that the op has kernels for."""
        return [platform for platform in dispatch.PLATFORMS if platform in self.implementations]


def _decayed(op: str, draw: Callable, run: Callable, flops: Callable, channels: bool) -> Variant:
    return Variant(
        f"{op}, {'channel' if channels else 'scalar'} decay",
        op,
        lambda d, s: draw(d, s, channels),
        run,
        lambda s: flops(s.T, s.H, s.D, s.D, channels=channels),
        inputs.HEADS,
        inputs.SMALL_HEADS,
    )


def _diagonal(kind: str, draw: Callable) -> Variant:
    return Variant(
        f"diagonal_scan, {kind}",
        "diagonal_scan",
        draw,
        diagonal.diagonal_scan,
        lambda s: diagonal.flops_per_token(s.D, complex_numbers=kind == "complex"),
        inputs.CHANNELS,
        inputs.SMALL_CHANNELS,
        matrix=False,
    )


def _variants() -> Iterable[Variant]:
    gla = gated_linear_attention
    for channels in (False, True):
        run = gla.gated_linear_attention
        yield _decayed("gated_linear_attention", inputs.gla, run, gla.flops_per_token, channels)
    for channels in (False, True):
        flops = gated_delta_rule.flops_per_token
        yield _decayed("gated_delta_rule", inputs.delta, _delta_rule, flops, channels)
    yield Variant(
        "dplr, RWKV-7", "dplr", inputs.dplr, _dplr,
        lambda s: dplr.flops_per_token(s.T, s.H, s.D, s.D, channels=True), inputs.HEADS, inputs.SMALL_HEADS,
    )  # fmt: skip
    yield Variant(
        "selective_scan, Mamba", "selective_scan", inputs.selective, selective.selective_scan,
        lambda s: selective.flops_per_token(s.D, s.N), inputs.MAMBA, inputs.SMALL_MAMBA, matrix=False,
    )  # fmt: skip
    yield _diagonal("real", inputs.diagonal)
    yield _diagonal("complex", inputs.complex_diagonal)
    yield Variant(
        "memory_update, Titans", "memory_update", inputs.memory, _memory_update,
        _memory_flops, inputs.MEMORY, inputs.SMALL_HEADS,
    )  # fmt: skip
    yield Variant(
        "short_conv, 4 taps", "short_conv", inputs.conv, conv.short_conv,
        lambda s: 2 * inputs.TAPS * s.D, inputs.CHANNELS, inputs.SMALL_CHANNELS, matrix=False,
    )  # fmt: skip


VARIANTS = {variant.name: variant for variant in _variants()}


@dataclass(frozen=True)
class Case:
    variant: Variant
    sizes: Sizes
    dtype: str  # of the streams; gates and parameters of memories are float32

    @property
    def name(self) -> str:
        return f"{self.variant.name}, {self.sizes}, {self.dtype}"

    def _draw(self, key: Array) -> tuple[Array, ...]:
        return tuple(self.variant.draw(inputs.Draw(key, self.dtype), self.sizes).values())

    def structs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return jax.eval_shape(self._draw, jax.random.key(0))

    def arguments(self, seed: int = 0) -> tuple[Array, ...]:
        return jax.jit(self._draw)(jax.random.key(seed))

    def names(self) -> list[str]:
        """Of the arguments."""
        drawn: dict[str, Array] = {}
        jax.eval_shape(
            lambda key: drawn.update(self.variant.draw(inputs.Draw(key, self.dtype), self.sizes)),
            jax.random.key(0),
        )
        return list(drawn)

    def small(self, length: int = 256) -> "Case":
        """One sample of at most `length` tokens, at most 2 heads, the same channels."""
        s = self.sizes
        return replace(self, sizes=s._replace(B=1, T=min(s.T, length), H=min(s.H, 2)))

    def forward(self, implementation: str | None) -> Callable:
        """`(*arguments) -> (output, state)`."""
        return lambda *arguments: self.variant.run(*arguments, implementation=implementation)

    def gradient(self, implementation: str | None) -> Callable:
        """`(cotangent of the output, *arguments) -> (output, gradients of all arguments)`."""

        def run(cotangent, *arguments):
            out, pull = jax.vjp(lambda *args: self.forward(implementation)(*args)[0], *arguments)
            return out, pull(cotangent)

        return run

    def output(self) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(self.forward("xla"), *self.structs())[0]

    def flops(self, direction: str) -> int:
        """Backward counts as twice forward."""
        tokens = self.sizes.B * self.sizes.T
        return (1 if direction == "forward" else 3) * tokens * self.variant.flops(self.sizes)

    def bytes(self, direction: str) -> int:
        """As the head of this module says; the final state is left out."""
        given, made = (sum(x.size * x.dtype.itemsize for x in xs) for xs in (self.structs(), [self.output()]))
        return given + made if direction == "forward" else 3 * given + 2 * made


def cases(dtype: str = "bfloat16", *, reduced: bool = False) -> list[Case]:
    """All variants at their named shapes, or at one small shape each; diagonal scans are of float32."""
    return [
        Case(variant, sizes, "float32" if variant.op == "diagonal_scan" else dtype)
        for variant in VARIANTS.values()
        for sizes in ((variant.small,) if reduced else variant.shapes)
    ]
