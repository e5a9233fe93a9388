"""Choosing the implementation of an op: loudly, never by silent fallback.

"reference" and "xla" run anywhere. "tpu" and "gpu" are Pallas kernels; they need their hardware, unless
`interpreted` lets Pallas' interpreters stand in for it (tests) or `assumed` says that the program will only
be exported or compiled ahead of time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunks import accumulation_dtype
from pallas_kernels.partition import sizes

PLATFORMS = ("tpu", "gpu")
# Compute capability of the first GPU whose instructions the GPU kernels use (Hopper: wgmma, TMA).
GPU_CAPABILITY = 9.0
_stand_in: ContextVar[str | None] = ContextVar("stand_in", default=None)


class Kernel(NamedTuple):
    """A Pallas kernel: what runs it, and why it cannot take some arguments (None: it can)."""

    run: Callable
    refusal: Callable[..., str | None] = lambda *arguments: None


@contextmanager
def _standing_in(what: str) -> Iterator[None]:
    token = _stand_in.set(what)
    try:
        yield
    finally:
        _stand_in.reset(token)


def interpreted(*, plain: bool = False):
    """Within this context kernels of every platform run here, in Pallas' interpreters: slowly.

    `plain`: TPU kernels in the interpreter that simulates no memory spaces but, unlike the other, knows vmap.
    """
    return _standing_in("plain interpreter" if plain else "interpreter")


def assumed():
    """Within this context kernels are traced as if their hardware were here."""
    return _standing_in("hardware")


def interpretation(platform: str) -> Any:
    """The argument `interpret` of a kernel for this platform."""
    stand_in = _stand_in.get()
    if stand_in not in ("interpreter", "plain interpreter"):
        return False
    if platform == "tpu" and stand_in == "plain interpreter":
        return True
    if platform == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        return pltpu.InterpretParams(uninitialized_memory="nan")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()


def missing_hardware(platform: str) -> str | None:
    """Why kernels of this platform cannot run here, or None."""
    if _stand_in.get() is not None:
        return None
    device = jax.local_devices()[0]
    if device.platform != platform:
        return f"needs a {platform.upper()}; the default device is a {device.platform.upper()}"
    capability = getattr(device, "compute_capability", None)
    if platform == "gpu" and (capability is None or float(capability) < GPU_CAPABILITY):
        return (
            f"needs an NVIDIA GPU of compute capability {GPU_CAPABILITY} or more; this one has {capability}"
        )
    return None


def _double(x: Any) -> bool:
    return getattr(x, "dtype", None) in (jnp.float64, jnp.complex128)


def refusal(kernel: Kernel, platform: str, arguments: tuple) -> str | None:
    """Why a kernel cannot run here on these arguments, or None."""
    reason = missing_hardware(platform)
    if reason is None and any(_double(x) for x in jax.tree.leaves(arguments)):
        reason = "takes no float64"
    return reason or kernel.refusal(*arguments)


def choose(
    op: str,
    implementation: str | None,
    available: Mapping[str, Callable | Kernel],
    arguments: tuple = (),
) -> Callable:
    """The function that runs `op` on `arguments`.

    `None` picks the kernel of the default device's platform if there is one that takes the arguments, else
    (and on a mesh that XLA partitions over) "xla"; a name picks exactly that one. Raises ValueError for a
    name that this op does not have, and for a kernel that cannot run here, with the reason.
    """
    if implementation is None:
        return _best(available, arguments)
    if implementation not in available:
        raise ValueError(
            f"{op}: no implementation {implementation!r}; this op has: {', '.join(sorted(available))}"
        )
    chosen = available[implementation]
    if not isinstance(chosen, Kernel):
        return chosen
    reason = refusal(chosen, implementation, arguments)
    if reason is not None:
        raise ValueError(f"{op}: implementation {implementation!r} {reason}")
    return chosen.run


def _best(available: Mapping[str, Callable | Kernel], arguments: tuple) -> Callable:
    # XLA cannot cut a kernel over a mesh: there, outside of a shard_map, it runs its own form.
    if _stand_in.get() is None and not sizes():
        kernel = available.get(jax.default_backend())
        if isinstance(kernel, Kernel) and refusal(kernel, jax.default_backend(), arguments) is None:
            return kernel.run
    xla = available["xla"]
    return xla.run if isinstance(xla, Kernel) else xla


def widened(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with all floating-point arguments in the accumulation dtype of all of them."""

    @wraps(run)
    def wide(*arguments):
        floats = [x for x in jax.tree.leaves(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]
        dtype = accumulation_dtype(*floats)

        def widen(x):
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return run(*jax.tree.map(widen, arguments))

    return wide
