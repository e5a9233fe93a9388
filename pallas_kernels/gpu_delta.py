"""The delta rule's part beyond linear attention, as Hopper kernels.

In every chunk X = (I + A)^{-1}, by blocks, each chunk by itself; then from left to right the corrections

    D = X (v - (p e^G) S),    S' = e^{G_C} S + W^T D,

after which the output is linear attention of (q, k, D); and from right to left their gradients

    dU = X^T (A_qk^T do + W dS'),    dS = e^{G_C} dS' + R^T do - (p e^G)^T dU,

which are v's. X comes in two or three bfloat16 parts, and so do A and what X multiplies: entries of the
inverse grow with the correlation of the keys, and cancel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_chunk_kernel import Plan, run
from pallas_kernels.gpu_chunk_work import Form, correct_back_chunk, correct_chunk, pair_decay
from pallas_kernels.gpu_chunks import Operands, Results
from pallas_kernels.gpu_math import (
    BF16,
    BLOCK,
    F32,
    as_left,
    column_numbers,
    down,
    get,
    left_scratch,
    multiply,
    number,
    product,
    put,
    row_numbers,
    settled,
    shared_tile,
    turned,
)
from pallas_kernels.gpu_steps import LEVELS, Run, now, send, square
from pallas_kernels.gpu_stream import Source, call, loop, stages_for, stream


def inverse_parts(dtype) -> int:
    """bfloat16 parts of an inverse for tokens of `dtype`."""
    return 2 if dtype == BF16 else 3


def _times(look: Any, left: Array, right: Array) -> Array:
    """The product of two tiles in registers."""
    _, scratch = look()
    plgpu.commit_smem()  # all are done with what was there
    put(scratch["right"], right)
    operand = as_left(left, len(scratch["right"]), scratch.get("left"))
    plgpu.commit_smem()
    return settled(multiply(product(operand, scratch["right"]))[0])


def _inverted(look: Any, a: Array) -> Array:
    """`(I + a)^{-1}` of a strictly lower triangular tile, by blocks as in `pallas_kernels.triangular`: with X
    of the diagonal blocks and A' the squares below the diagonal of the next larger ones, X - X A' X."""
    numbered = look()[1]["numbers"]
    one = (down(row_numbers()) == column_numbers(numbered)).astype(F32)
    x = settled(one - jnp.where(square(numbered, jnp.int32(0)), a, 0))

    def double(n, x):
        below = jnp.where(square(look()[1]["numbers"], n + 1), a, 0)
        return settled(x - _times(look, x, _times(look, below, x)))

    return loop(LEVELS - 1, double, x)


def _inverse_kernel(refs: dict, outputs: list, scratch: dict, run: Run) -> None:
    number(scratch["numbers"])
    tokens = ("recall", "key") if "recall" in refs else ()
    sources = {
        name: jax.tree.map(lambda ref: run.source(ref, 0, ref.shape[3]), refs[name]) for name in tokens
    }
    if "total" in refs:
        sources["total"] = Source(lambda i: refs["total"].at[(*run.place(), run.step(i)[0])], (2, BLOCK), F32)
    if "marks" in refs:
        sources["marks"] = run.marks(refs["marks"])
    if "pairs" in refs:
        sources["pairs"] = [run.pairs(x) for x in refs["pairs"]]

    def step(i, tiles, carry):
        def look():
            return tiles(), now(scratch)

        at, own = look()
        if "pairs" in at:
            a = get(at["pairs"])
        else:
            (scores,) = multiply(product(at["recall"], turned(at["key"])))
            a = settled(scores * pair_decay(at, own, Form(strict=True)))
        inverse, chunk = _inverted(look, a), run.step(i)[0]
        plgpu.commit_smem()
        send(look()[1]["right"], [run.per_head(x, chunk) for x in outputs], inverse)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return carry

    stream(run.steps, stages_for(scratch, sources, run.blocks), sources, step, ())
    plgpu.wait_smem_to_gmem(0)


def inverses(shape: tuple, dtype: Any, **operands: Any) -> tuple[Array, ...]:
    """`(I + A)^{-1}` of every chunk, `[B,H,T,64]` in parts, for `shape` (B,H,T) and tokens of `dtype`.

    `operands` are either `pairs`, A, or what it is made of: `recall` (p), `key`, `total`; and `marks`.
    """
    batch, heads, length = shape
    work, parts = Run.of(batch, heads, length), inverse_parts(dtype)
    scratch: dict = {
        "numbers": plgpu.SMEM((1, BLOCK), jnp.int32),
        "right": [shared_tile(BLOCK, BLOCK)] * parts,
    }
    if left_scratch(parts):
        scratch["left"] = left_scratch(parts)
    outputs = [jax.ShapeDtypeStruct((*shape, BLOCK), BF16)] * parts

    def kernel(ins, outs, scratch):
        _inverse_kernel(ins, outs, scratch, work)

    return tuple(call(kernel, "chunk_inverses", work.grid, operands, outputs, scratch))


def _sequential(operands: dict, initial: Array, form: Form, chunk: Any, name: str) -> Results:
    batch, heads, keys, values = initial.shape
    plan = Plan(batch, heads, operands["value"][0].shape[1] // BLOCK, keys, values, 1)
    operands = operands | {"initial": initial.astype(F32)[:, :, None]}
    results = run(operands, plan, form, name, chunk)
    return Results(results["out"], results["final"][:, :, 0], None, None)


def corrections(operands: Operands, inverse: tuple, initial: Array, dtype: Any) -> Results:
    """`out` is D, of queries p (with their decay, where it is per channel), keys k and values v; or with
    another key that writes v (see `correct_chunk`)."""
    inputs = operands._asdict() | {"inverse": inverse}
    return _sequential(inputs, initial, Form(dtype=dtype), correct_chunk, "delta_corrections")


def correction_gradients(
    operands: Operands, inverse: tuple, recall: tuple, final: Array, dtype: Any
) -> Results:
    """`out` is dU, of queries k, keys q, values do and what recalls, p; from the final state's cotangent."""
    inputs = operands._asdict() | {"inverse": inverse, "recall": recall}
    form = Form(reverse=True, dtype=dtype)
    return _sequential(inputs, final, form, correct_back_chunk, "delta_corrections")
