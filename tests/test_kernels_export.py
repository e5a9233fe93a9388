"""Kernels exported for their platforms without hardware or compilers, and what is said where neither is."""

import importlib
from pathlib import Path

import jax
import pytest

import pallas_kernels
from experiments.kernel_cases import DIRECTIONS, VARIANTS, Case
from experiments.kernel_targets import KERNEL_CALLS, exported

KERNELS = [(name, platform) for name, variant in VARIANTS.items() for platform in variant.platforms]
CALLS = dict(zip(("tpu", "gpu"), KERNEL_CALLS, strict=True))
pytestmark = pytest.mark.usefixtures("float32")


def kernels_of(case, direction, platform):
    """Calls of kernels in the exported program; None where the op refuses the case with a reason."""
    try:
        program = exported(case, direction, platform)
    except ValueError as error:
        assert f"{case.variant.op}: implementation {platform!r} " in str(error)
        return None
    assert [(x.shape, x.dtype) for x in program.out_avals[:1]] == [(case.output().shape, case.output().dtype)]
    return program.mlir_module().count(f"@{CALLS[platform]}")


def dtype_of(variant):
    return "float32" if variant.op == "diagonal_scan" else "bfloat16"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "platform"), KERNELS)
def test_a_small_case(name, platform, direction):
    """With a length that no chunk divides; the pull-back has a kernel of its own."""
    variant = VARIANTS[name]
    calls = kernels_of(Case(variant, variant.small, dtype_of(variant)), direction, platform)
    assert calls >= DIRECTIONS.index(direction) + 1


@pytest.mark.parametrize(("name", "platform"), KERNELS)
def test_two_shapes_of_the_benchmark(name, platform):
    """The first, and the one with the widest heads or the most tokens."""
    variant = VARIANTS[name]
    for sizes in (variant.shapes[0], max(variant.shapes, key=lambda s: (s.D, s.T))):
        calls = kernels_of(Case(variant, sizes, dtype_of(variant)), DIRECTIONS[1], platform)
        assert calls is None or calls >= 2


@pytest.mark.deep
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "platform"), KERNELS)
def test_every_shape_in_float32(name, platform, direction):
    variant = VARIANTS[name]
    for sizes in (variant.small, *variant.shapes):
        assert kernels_of(Case(variant, sizes, "float32"), direction, platform) != 0


@pytest.mark.parametrize(("name", "platform"), KERNELS)
def test_where_the_hardware_is_missing_one_line_says_so(name, platform):
    variant = VARIANTS[name]
    case = Case(variant, variant.small, dtype_of(variant))
    missing = (
        f"{variant.op}: implementation {platform!r} needs a {platform.upper()}; the default device is a CPU"
    )
    with pytest.raises(ValueError, match=missing):
        jax.eval_shape(case.forward(platform), *case.structs())


def test_every_kernel_is_in_some_case():
    """Or no table would show it."""
    folders = [path.parent.name for path in Path(pallas_kernels.__file__).parent.glob("*/api.py")]
    modules = {op: importlib.import_module(f"pallas_kernels.{op}.api") for op in folders}
    own = {
        op for op, module in modules.items() if {"tpu", "gpu"} & set(getattr(module, "IMPLEMENTATIONS", ()))
    }
    assert own <= {variant.op for variant in VARIANTS.values()}
