"""Gradients of scores of pairs of tokens, as a Hopper kernel: what `gpu_channel_gradients` begins with."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_math import BLOCK, F32, multiply, number, product, shared_tile, turned
from pallas_kernels.gpu_steps import Run, now, of_document, send
from pallas_kernels.gpu_stream import call, stages_for, stream


def _pair_kernel(refs: dict, outputs: list, scratch: dict, run: Run) -> None:
    number(scratch["numbers"])
    sources = {
        name: jax.tree.map(lambda ref: run.source(ref, 0, ref.shape[3]), refs[name])
        for name in ("left", "right")
    }
    if "marks" in refs:
        sources["marks"] = run.marks(refs["marks"])

    def step(i, tiles, carry):
        chunk, _ = run.step(i)
        for target, names in zip(outputs, (("left", "right"), ("right", "left")), strict=True):
            at, own = tiles(), now(scratch)
            (pairs,) = multiply(product(at[names[0]], turned(at[names[1]])))
            pairs = of_document(at, own["numbers"], pairs, turn=names[0] == "right")
            send([own["wide"]], [run.per_head(target, chunk)], pairs)
        plgpu.commit_smem()
        return carry

    stream(run.steps, stages_for(scratch, sources, run.blocks), sources, step, ())
    plgpu.wait_smem_to_gmem(0)


def pair_gradients(left: tuple, right: tuple, marks: Array | None) -> tuple[Array, Array]:
    """Of scores, from the cotangent `left [B,T,H,V]` of what is read and `right`, what was written: the
    products of tokens of one chunk and document, `[B,H,T,64]` float32, and the same transposed."""
    batch, length, heads, _ = left[0].shape
    run = Run.of(batch, heads, length)
    scratch = {"numbers": plgpu.SMEM((1, BLOCK), jnp.int32), "wide": shared_tile(BLOCK, BLOCK, F32)}
    outputs = [jax.ShapeDtypeStruct((batch, heads, length, BLOCK), F32)] * 2

    def kernel(ins, outs, scratch):
        _pair_kernel(ins, outs, scratch, run)

    inputs = {"left": left, "right": right, "marks": marks}
    pairs, transposed = call(kernel, "pair_gradients", run.grid, inputs, outputs, scratch)
    return pairs, transposed
