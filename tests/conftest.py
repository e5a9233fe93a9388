"""Float64 everywhere unless a test asks for `float32`; warnings from our code are errors (pyproject.toml)."""

import os
import pathlib

# Two fake devices for shard_map; more pool threads than cores, or jax 0.11 can deadlock on 2 cores.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Nearly all the time of these tests is compilation: no expensive optimisations of small programs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

# Shape and dtype annotations of the ops are checked at every call of the test run.
OPS = (pathlib.Path(__file__).parent.parent / "pallas_kernels").glob("*/api.py")
install_import_hook([f"pallas_kernels.{api.parent.name}.api" for api in OPS], "beartype.beartype")

jax.config.update("jax_enable_x64", True)


@pytest.fixture
def float32():
    """Run the test as users do, without 64-bit types."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)
