"""Public entry of the op."""

import jax
from jaxtyping import Bool, Float, Int

from pallas_kernels.chunks import number_runs
from pallas_kernels.dispatch import choose
from pallas_kernels.running_top import reference, xla
from pallas_kernels.running_top.reference import Top

IMPLEMENTATIONS = {"reference": reference.running_top, "xla": xla.running_top}


def running_top(
    score: Float[jax.Array, "B T"],
    index: Int[jax.Array, "B T"],
    there: Bool[jax.Array, "B T"],
    past: Top,
    *,
    segment_ids: Int[jax.Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Top:
    """The M best of the document's entries up to each token: scores and indices `[B, T, M]`, best first.

    Scores are >= 0, and of equal ones the lower index is better; entries that are not `there` do not count.
    `past` `[B, M]` holds the best before the call, with scores of -1 and indices of -1 in empty places. An
    index should grow with time, or what is kept depends on how time was cut. The choice has no gradient.
    Raises ValueError for an unknown implementation.
    """
    run = choose("running_top", implementation, IMPLEMENTATIONS)
    score, past = jax.lax.stop_gradient((score, past))
    return run(score.astype(past.score.dtype), index, there, past, number_runs(segment_ids))
