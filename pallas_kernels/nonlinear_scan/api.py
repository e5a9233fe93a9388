"""Public entry of the op: choice of implementation. The definition is `chunks.scan_tokens`."""

from collections.abc import Callable
from typing import Any

from jax import Array
from jaxtyping import Int

from pallas_kernels.chunks import number_runs, scan_tokens
from pallas_kernels.dispatch import choose
from pallas_kernels.nonlinear_scan import xla

IMPLEMENTATIONS = {"reference": scan_tokens, "xla": xla.nonlinear_scan}


def nonlinear_scan(
    cell: Callable[[Any, Any], tuple[Any, Any]],
    inputs: Any,
    state: Any,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    reset_state: Any = None,
    implementation: str | None = None,
) -> tuple[Any, Any]:
    """`state, y_t = cell(state, inputs_t)` token by token; returns `(all y, last state)`.

    `inputs` is a pytree of `[B,T,...]`, the cell sees one token of it, `[B,...]`; `state` is a pytree of
    `[B,...]` whose shapes and dtypes the cell keeps. At the start of each segment the state becomes
    `reset_state` (zeros unless given). The cell may close over parameters: it is differentiated as it
    stands. What does not depend on the state is better computed before, for all tokens at once.
    Raises ValueError for an unknown implementation.
    """
    run = choose("nonlinear_scan", implementation, IMPLEMENTATIONS)
    return run(cell, state, inputs, number_runs(segment_ids), reset_state)
