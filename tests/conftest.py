"""Float64 everywhere unless a test asks for `float32`; warnings from our code are errors (pyproject.toml)."""

import gc
import os
import pathlib
import re
import zlib

# Four fake devices for shard_map. Nearly all the time of these tests is compilation of small programs: no
# optimisation of their code (JAX_DISABLE_MOST_OPTIMIZATIONS is without effect here).
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
# More pool threads than cores, or jax 0.11 can deadlock on 2 cores.
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
import jax
import pytest
from jaxtyping import install_import_hook

# Shape and dtype annotations of the ops are checked at every call of the test run.
OPS = (pathlib.Path(__file__).parent.parent / "pallas_kernels").glob("*/api.py")
install_import_hook([f"pallas_kernels.{api.parent.name}.api" for api in OPS], "beartype.beartype")

jax.config.update("jax_enable_x64", True)
# Tracing makes many objects and little garbage: look for it rarely.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def float32():
    """Run the test as users do, without 64-bit types."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


def pytest_addoption(parser):
    parser.addoption(
        "--layer", metavar="FILE", help="a layer of your own, for the conformance suite in place of the rows"
    )
    parser.addoption("--part", metavar="K/N", help="one of N parts of the tests, the same at every run")
    parser.addoption(
        "--record-kernels",
        action="store_true",
        help="write down which kernels the tests of this run confirm, if all pass (not with -n)",
    )


def pytest_configure(config):
    if config.getoption("layer"):
        import rows

        rows.only(config.getoption("layer"))


def pytest_sessionstart(session):
    if not session.config.getoption("record_kernels"):
        return
    if session.config.getoption("numprocesses", None):
        raise pytest.UsageError("--record-kernels goes without -n")
    import kernels

    kernels.watch()


def pytest_sessionfinish(session, exitstatus):
    if session.config.getoption("record_kernels") and exitstatus == pytest.ExitCode.OK:
        import kernels

        from experiments import kernel_matrix

        kernel_matrix.record(kernels.confirmed, kernels.ran)


def row_of(nodeid):
    """The row that a test of the conformance suite belongs to, else the test itself."""
    found = re.search(r"test_conformance\.py::.*\[(?:[\d.]+-)?(.*)\]", nodeid)
    return found[1] if found else nodeid


def part_of(text):
    """`K/N` as numbers, K from 1 to N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise pytest.UsageError(f"--part {text}: K/N is wanted, K from 1 to N")
    return int(found[1]), int(found[2])


def over_devices(item):
    """Whether a test is one of those that compile for many devices, or start many processes."""
    return item.path.name in ("test_scale.py", "test_sequence.py") or "over_devices" in item.name


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config, items):
    """Row by row, so that the tests of a row share what is compiled for it; whole rows make a part."""
    for item in items:
        if item.get_closest_marker("deep") and over_devices(item):
            item.add_marker("devices")
    if config.getoption("part"):
        number, parts = part_of(config.getoption("part"))
        apart = {item: zlib.crc32(row_of(item.nodeid).encode()) % parts + 1 == number for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not apart[item]])
        items[:] = [item for item in items if apart[item]]
    order = {row_of(item.nodeid): place for place, item in reversed(list(enumerate(items)))}
    items.sort(key=lambda item: order[row_of(item.nodeid)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Every row in one process (pytest-xdist's own groups are without effect under pytest 9.2)."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = row_of
    return scheduler
