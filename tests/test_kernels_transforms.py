"""Kernels under JAX's transformations, in the interpreters: the numbers they give without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import pulled
from jax import export
from jax.sharding import Mesh, PartitionSpec
from kernels import directions, relative_rms

from experiments.kernel_cases import VARIANTS, Case
from experiments.kernel_targets import KERNEL_CALLS, hardware
from pallas_kernels import dispatch

# One form of every op; those that share a kernel's harness with another one are looked at in depth only.
FORMS = {
    "gated_linear_attention, scalar decay": False,
    "gated_delta_rule, channel decay": True,
    "dplr, RWKV-7": True,
    "selective_scan, Mamba": False,
    "diagonal_scan, real": True,
    "memory_update, Titans": True,
    "short_conv, 4 taps": True,
}
KERNELS = [
    pytest.param(form, platform, marks=[pytest.mark.deep] if deep or platform == "gpu" else [])
    for form, deep in FORMS.items()
    for platform in VARIANTS[form].platforms
]
BOUND = 1e-5


@functools.cache
def case(form):
    """Two samples of 20 tokens, in float32."""
    variant = VARIANTS[form]
    return Case(variant, variant.small._replace(B=2, T=20), "float32")


def results(run, *arguments):
    """Values and gradients of `run`, in the interpreter that knows transformations."""
    with dispatch.interpreted(plain=True):
        return jax.jit(lambda *args: pulled(run, args, directions))(*arguments)


def assert_near(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.shape == b.shape
        assert relative_rms(a, b) <= BOUND


# Arguments without a batch axis.
SHARED = {
    "selective_scan, Mamba": {"a", "d"},
    "memory_update, Titans": {"memory_0", "memory_1"},
    "short_conv, 4 taps": {"weight"},
}


def parts(form):
    """`(streams, the rest)` of the arguments as dictionaries: streams have a batch axis."""
    both = dict(zip(case(form).names(), case(form).arguments(), strict=True))
    shared = SHARED.get(form, set())
    return {n: x for n, x in both.items() if n not in shared}, {n: both[n] for n in shared}


def call(form, platform, streams, shared):
    """Output and state, the arguments in their order."""
    both = streams | shared
    return case(form).forward(platform)(*(both[name] for name in case(form).names()))


@pytest.mark.parametrize(("form", "platform"), KERNELS)
def test_vmap(form, platform):
    """Samples one by one under vmap are the batch."""
    streams, shared = parts(form)

    def mapped(streams, shared):
        out, _ = jax.vmap(lambda s: call(form, platform, jax.tree.map(lambda x: x[None], s), shared))(streams)
        return out[:, 0]

    def batch(streams, shared):
        return call(form, platform, streams, shared)[0]

    assert_near(results(mapped, streams, shared), results(batch, streams, shared))


@pytest.mark.parametrize(("form", "platform"), KERNELS)
def test_scan_over_layers_with_remat_and_donation(form, platform):
    """Two layers, each computed again in the backward pass, their input given away."""
    streams, shared = parts(form)
    first = next(n for n in ("v", "x", "b") if n in streams)

    def layer(x, scale):
        out, _ = call(form, platform, streams | {first: x}, shared)
        return x + scale * out.reshape(x.shape), None

    scales = jnp.array([0.5, 0.25], jnp.float32)

    # Interpreters of GPU kernels have effects, which remat does not know; that it lowers is looked at below.
    again = jax.checkpoint(layer) if platform == "tpu" else layer

    def scanned(x, scales):
        return jax.lax.scan(again, x, scales)[0]

    def unrolled(x, scales):
        return layer(layer(x, scales[0])[0], scales[1])[0]

    desired = results(unrolled, streams[first], scales)
    with dispatch.interpreted(plain=True):
        donating = jax.jit(lambda x, s: pulled(scanned, (x, s), directions), donate_argnums=0)
        assert_near(donating(streams[first].copy(), scales), desired)


def sharded(local, streams, shared):
    """`local` on a sample per device. Kernels know nothing of axes that vary over a mesh."""
    mesh = Mesh(np.array(jax.devices()[:2]), "b")
    row, whole = PartitionSpec("b"), PartitionSpec()
    specs = jax.tree.map(lambda _: row, streams), jax.tree.map(lambda _: whole, shared)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=row, check_vma=False)


@pytest.mark.parametrize(("form", "platform"), [p for p in KERNELS if p.values[1] == "tpu"])
def test_shard_map_over_the_batch(form, platform):
    streams, shared = parts(form)

    def local(streams, shared):
        return call(form, platform, streams, shared)[0]

    assert_near(results(sharded(local, streams, shared), streams, shared), results(local, streams, shared))


@pytest.mark.parametrize("form", [p.values[0] for p in KERNELS if p.values[1] == "gpu"])
def test_gpu_kernels_lower_under_remat_and_shard_map(form):
    """What their interpreter cannot run: it has effects, and on two devices waits for neither."""
    streams, shared = parts(form)

    def local(streams, shared):
        return jax.checkpoint(lambda *args: call(form, "gpu", *args)[0])(streams, shared)

    run = sharded(local, streams, shared)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in KERNEL_CALLS]
    with hardware("gpu"):
        gradient = jax.jit(lambda *args: pulled(run, args, directions))
        program = export.export(gradient, platforms=["cuda"], disabled_checks=checks)(streams, shared)
    assert program.nr_devices == 2
    assert any(name in program.mlir_module() for name in KERNEL_CALLS)
