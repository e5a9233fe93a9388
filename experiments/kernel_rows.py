"""What `experiments.bench kernels` measures: one row per case, direction and who computes it."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax

from experiments import kernel_inputs as inputs
from experiments.kernel_cases import DIRECTIONS, Case, Variant, cases
from experiments.kernel_peers import PEERS
from experiments.kernel_targets import program


def _attention_arguments(draw: inputs.Draw, s: inputs.Sizes) -> dict[str, jax.Array]:
    return {name: draw.normal(*s.vectors) for name in "qkv"}


def _attention(q, k, v, *, implementation):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation), None


# Causal: half of the square of scores, and of their product with the values.
ATTENTION = Variant(
    "attention", "attention", _attention_arguments, _attention, lambda s: 2 * s.T * s.H * s.D,
    inputs.HEADS, inputs.SMALL_HEADS,
)  # fmt: skip


class Row(NamedTuple):
    case: Case
    direction: str
    by: str  # an implementation, or the name of a peer

    @property
    def peer(self) -> bool:
        return self.by.startswith("fla ")

    def program(self) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
        return program(self.case, self.direction, self.by)

    def reason(self, platform: str, no_fla: str | None) -> str | None:
        """Why it cannot run on a device of this platform, or None."""
        needs = {"xla": platform, "cudnn": "gpu"}.get(self.by, self.by)
        if self.peer:
            return no_fla
        return None if needs == platform else f"needs a {needs.upper()}"


def _by(case: Case, platform: str) -> list[str]:
    if case.variant is ATTENTION:
        return ["cudnn" if platform == "gpu" else "xla"]
    return ["xla", *case.variant.platforms, *(peer.name for peer in PEERS.get(case.variant.name, []))]


def rows(platform: str, ops: Collection[str] = ()) -> list[Row]:
    """First shapes of all variants first, so that a run that ends early has seen something of each.

    All ops unless some are named; on a CPU one small shape each.
    """
    reduced = platform == "cpu"
    yardsticks = [ATTENTION.small] if reduced else ATTENTION.shapes
    named = cases(reduced=reduced) + [Case(ATTENTION, sizes, "bfloat16") for sizes in yardsticks]
    named = [case for case in named if not ops or case.variant.op in ops]
    place = {case: 0 if reduced else case.variant.shapes.index(case.sizes) for case in named}
    named.sort(key=lambda case: place[case])
    return [
        Row(case, direction, by) for case in named for direction in DIRECTIONS for by in _by(case, platform)
    ]


def checks(chosen: list[Row]) -> list[int]:
    """Rows whose errors stand for all of their variant and number of channels."""
    first: dict[tuple, int] = {}
    for number, row in enumerate(chosen):
        if row.case.variant is not ATTENTION and row.direction == DIRECTIONS[1]:
            first.setdefault((row.case.variant.name, row.case.sizes.D, row.by), number)
    return list(first.values())
