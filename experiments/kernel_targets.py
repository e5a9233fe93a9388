"""Kernels exported and compiled for accelerators that are not here.

`exported` needs jax alone and finds what no kernel of a platform may do. `compiled` needs the compilers of
constraints-compile.txt (libtpu for TPUs, jax's CUDA plugin for GPUs), runs them on the CPU, and also finds
what does not fit on a chip.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
from jax import export
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from experiments.kernel_cases import Case
from pallas_kernels import dispatch

XLA_NAMES = {"tpu": "tpu", "gpu": "cuda"}
KERNEL_CALLS = ("tpu_custom_call", "mosaic_gpu_v2")
# What XLA has to know of an NVIDIA H200 (SXM): its data sheet, and Hopper's limits in NVIDIA's CUDA
# programming guide.
H200 = """
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 device_memory_size: 151397597184 l2_cache_size: 52428800
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0" device_address_bits: 64
}
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
"""


@dataclass(frozen=True)
class Target:
    """A device; peaks are the published ones, of bf16 products and of main memory."""

    platform: str
    topology: str
    flops: float  # per second
    bandwidth: float  # bytes per second
    source: str

    def describe(self) -> topologies.TopologyDescription:
        return _description(self)


# A device of JAX is one of the two TensorCores of a v7x chip: half of what is published for the chip.
TARGETS = {
    "TPU v5e": Target("tpu", "v5e:2x2", 197e12, 819e9, "Google Cloud documentation, TPU v5e"),
    "TPU v6e": Target("tpu", "v6e:2x2", 918e12, 1640e9, "Google Cloud documentation, TPU v6e"),
    "TPU v7x": Target(
        "tpu", "tpu7x:2x2x1", 2307e12 / 2, 7380e9 / 2, "Google Cloud documentation, TPU7x, one of two cores"
    ),
    "H200": Target("gpu", "1x1x1", 989e12, 4800e9, "NVIDIA H200 data sheet, dense"),
}
# Products of bf16 that one product of float32 is made of: Precision.HIGHEST on a TPU, bf16x3 on a GPU.
PASSES = {"tpu": 6, "gpu": 3}


@cache
def _description(target: Target) -> topologies.TopologyDescription:
    if target.platform == "gpu":
        return topologies.get_topology_desc(platform="cuda", target_config=H200, topology=target.topology)
    return topologies.get_topology_desc(target.topology, "tpu")


@contextmanager
def hardware(platform: str, kind: str = "TPU v5 lite") -> Iterator[None]:
    """Tracing as if the device were here; a TPU kernel asks which one, a GPU kernel must not be told."""
    with ExitStack() as stack:
        stack.enter_context(dispatch.assumed())
        if platform == "tpu":
            mesh = AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, "tpu"))
            stack.enter_context(use_abstract_mesh(mesh))
        yield


def program(case: Case, direction: str, implementation: str) -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """The function of a direction and its arguments."""
    if direction == "forward":
        return case.forward(implementation), list(case.structs())
    return case.gradient(implementation), [case.output(), *case.structs()]


def exported(case: Case, direction: str, platform: str) -> export.Exported:
    """With the kernel in it. Raises ValueError where the kernel does not take the case."""
    run, structs = program(case, direction, platform)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in KERNEL_CALLS]
    with hardware(platform):
        jitted = jax.jit(run)
        return export.export(jitted, platforms=[XLA_NAMES[platform]], disabled_checks=checks)(*structs)


def compiled(case: Case, direction: str, target: Target) -> Any:
    """By the compiler of the target, the one that would run there."""
    run, structs = program(case, direction, target.platform)
    device: Any = target.describe().devices[0]
    with hardware(target.platform, device.device_kind):
        here = SingleDeviceSharding(device)
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in structs]
        lowered = jax.jit(run).lower(*placed)
    return lowered.compile()


def vmem_bytes(program: Any) -> int | None:
    """The most memory on the chip that a Mosaic kernel of a compiled TPU program takes."""
    calls = [line for line in program.as_text().splitlines() if f'"{KERNEL_CALLS[0]}"' in line]
    pattern = r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"'
    return max((int(size) for line in calls for size in re.findall(pattern, line)), default=None)


# What Mosaic GPU and ptxas print with MOSAIC_GPU_DUMP_PTXAS and MOSAIC_GPU_DUMP_RESOURCES, for every kernel.
GPU_FIGURES = {
    "registers": r"Used (\d+) registers",
    "spilled": r"(\d+) bytes spill stores",
    "on_chip": r"smem_scratch_bytes=(\d+)",
}


def gpu_figures_complete(printed: str) -> bool:
    """False where a kernel had been compiled before in this process: ptxas did not look at it again."""
    return printed.count("Resources(") <= len(re.findall(GPU_FIGURES["registers"], printed))


def gpu_figures(printed: str) -> dict[str, int | None]:
    """The largest of every figure over the kernels of a program."""
    return {
        name: max(map(int, re.findall(pattern, printed)), default=None)
        for name, pattern in GPU_FIGURES.items()
    }
