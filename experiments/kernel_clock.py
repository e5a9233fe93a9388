"""What one process does for `experiments.bench kernels`: correctness and times, asked for line by line.

    device            what there is, and the versions of what runs
    ceilings          this device's own rates: a large bf16 product of matrices, a large copy
    check N           errors of what computes row N against the definition in float64, on a short piece
    prepare SECONDS   compile all rows in threads, as far as they get
    time N            the median time of row N

Times of JAX are of a compiled loop of calls, each of which formally depends on the one before, so that no
call is left out, moved or overlapped; the host waits for the whole loop. The sum of the first entries of all
results is part of a call. Times of fla are between CUDA events (`kernel_peers.seconds`).
"""

import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import kernel_peers
from experiments.kernel_cases import Case
from experiments.kernel_rows import Row, rows
from experiments.kernel_workers import one_line, work

REPEATS = 7
LOOP = {"cpu": 1}  # calls of a loop; elsewhere as many as a small multiple of a fast call fills
USUAL_SECONDS, LEAST_CALLS, MOST_CALLS = 0.02, 4, 64
RATES = {"cpu": (1e10, 1e9)}  # a guess of FLOP/s and bytes/s that loops are sized by
USUAL_RATES = (2e14, 1e12)
THREADS = 8
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "fla-core", "torch", "triton", "numpy")


def platform() -> str:
    return jax.devices()[0].platform


def device() -> dict:
    found = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {
        "platform": platform(),
        "device": jax.devices()[0].device_kind,
        "versions": found,
        "no_fla": kernel_peers.missing(),
    }


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def repeated(run: Callable, calls: int) -> Callable:
    """A function of the same arguments that makes `calls` calls, in a row."""

    def loop(*arguments):
        def body(_, before):
            here, before = lax.optimization_barrier((arguments, before))
            results = jax.tree.leaves(lax.optimization_barrier(run(*here)))
            return sum(jnp.real(x[(0,) * x.ndim]).astype(jnp.float32) for x in results)

        return lax.fori_loop(0, calls, body, jnp.float32(0))

    return loop


def loop_seconds(program: Callable, arguments: tuple, calls: int) -> float:
    """Median over repeats, of one call."""
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)


def ceilings() -> dict:
    """FLOP/s of a product of two square bf16 matrices, bytes/s read and written by a copy."""
    size, words, calls = (512, 1 << 22, 2) if platform() == "cpu" else (8192, 1 << 30, 16)
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(repeated(lambda a: a @ a, calls))
    x = jnp.zeros(words, jnp.float32)
    copy = jax.jit(repeated(lambda x: x + 1, calls))
    return {
        "matmul": 2 * size**3 / loop_seconds(product, (a,), calls),
        "copy": 8 * words / loop_seconds(copy, (x,), calls),
    }


def relative_rms(actual: Any, exact: Any) -> float:
    actual, exact = (np.asarray(x).astype(np.complex128) for x in (actual, exact))
    return float(np.linalg.norm(actual - exact) / max(np.linalg.norm(exact), 1e-30))


def _directions(case: Case) -> tuple:
    """Cotangent of the output, and arguments."""
    out = case.output()
    cotangent = jax.random.normal(jax.random.key(1), out.shape, jnp.float32).astype(out.dtype)
    return cotangent, *case.arguments()


def exactly(case: Case) -> tuple:
    """Output and gradients of a case, in float64 by the definition."""
    given = jax.tree.map(
        np.asarray, _directions(case)
    )  # drawn before 64-bit types are on: they draw otherwise
    with jax.enable_x64(True):
        wide = [jnp.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in given]
        out, gradients = jax.jit(case.gradient("reference"))(*wide)
        return tuple(np.asarray(x) for x in (out, *gradients))


class Desk:
    """Keeps what is compiled, and the exact results of a piece, from one question to the next."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self._programs: dict[int, tuple[Any, int, float]] = {}
        self._exact: dict[Case, tuple] = {}

    def _compile(self, number: int) -> tuple[Any, int, float]:
        """The loop of a row, its calls and the seconds to compile it."""
        if number not in self._programs:
            row = self.rows[number]
            run, structs = row.program()
            calls = _calls(row)
            start = time.perf_counter()
            program = jax.jit(repeated(run, calls)).lower(*structs).compile()
            self._programs[number] = program, calls, time.perf_counter() - start
        return self._programs[number]

    def prepare(self, budget: float) -> dict:
        """Failures are told when the row is timed."""
        deadline = time.perf_counter() + budget

        def compile_in_time(number: int) -> None:
            if time.perf_counter() < deadline:
                try:
                    self._compile(number)
                except Exception:  # raised again, and told, by the row itself
                    return

        ours = [n for n, row in enumerate(self.rows) if not row.peer and not row.reason(platform(), None)]
        with ThreadPoolExecutor(1 if platform() == "cpu" else THREADS) as pool:
            list(pool.map(compile_in_time, ours))
        return {"compiled": len(self._programs)}

    def time(self, number: int) -> dict:
        row = self.rows[number]
        if row.peer:
            return _peer_time(row)
        program, calls, compile_s = self._compile(number)
        cotangent, *arguments = _directions(row.case)
        given = arguments if row.direction == "forward" else [cotangent, *arguments]
        return {
            "seconds": loop_seconds(program, tuple(given), calls),
            "how": f"loop of {calls}",
            "compile_s": compile_s,
        }

    def check(self, number: int) -> dict:
        """The largest relative RMS error over output and gradients, on a piece of the row's case."""
        row, piece = self.rows[number], self.rows[number].case.small()
        if piece not in self._exact:
            self._exact[piece] = exactly(piece)
        exact = self._exact[piece]
        if row.peer:
            results, shared = _peer_results(row, piece)
            exact = tuple(exact[i] for i in (0, *(1 + place for place in shared)))
        else:
            results = jax.tree.leaves(jax.jit(piece.gradient(row.by))(*_directions(piece)))
        errors = [relative_rms(a, e) for a, e in zip(results, exact, strict=True)]
        return {"output": errors[0], "gradients": max(errors[1:], default=None)}


def _peer_time(row: Row) -> dict:
    import torch

    call = _peer_call(row, row.case)
    try:
        run = call.forward if row.direction == "forward" else call.gradient
        seconds, how = kernel_peers.seconds(run, USUAL_SECONDS, REPEATS)
        return {"seconds": seconds, "how": how}
    finally:
        torch.cuda.empty_cache()


def _peer_results(row: Row, case: Case) -> tuple[list, list[int]]:
    """Output and gradients, and the places of the arguments that these are of."""
    import torch

    call = _peer_call(row, case)
    out, gradients = call.gradient()
    results = [x.float().cpu().numpy() for x in (out, *gradients)]
    torch.cuda.empty_cache()
    return results, call.shared(case.names())


def _peer_call(row: Row, case: Case) -> kernel_peers.Call:
    cotangent, *arguments = _directions(case)
    return kernel_peers.Call(kernel_peers.find(case, row.by), case.names(), arguments, cotangent)


def _calls(row: Row) -> int:
    if platform() in LOOP:
        return LOOP[platform()]
    flops, moved = USUAL_RATES
    guess = max(row.case.flops(row.direction) / flops, row.case.bytes(row.direction) / moved)
    return max(LEAST_CALLS, min(MOST_CALLS, int(USUAL_SECONDS / guess)))


def _alive() -> bool:
    """Whether the device still answers: a kernel's fault can end it for the whole process."""
    try:
        return bool(jax.block_until_ready(jnp.ones(1) + 1)[0] == 2)
    except Exception:  # of any kind
        return False


def reply(desk: Desk, question: str) -> dict:
    """Faults are answers too."""
    verbs: dict[str, Callable[..., dict]] = {"device": device, "ceilings": ceilings}
    verbs |= {"check": desk.check, "prepare": desk.prepare, "time": desk.time}
    verb, *numbers = question.split()
    try:
        return verbs[verb](*map(int, numbers))
    except Exception as error:  # a row that fails is a row that says so
        return {"error": one_line(error), "fatal": not _alive()}


def main(ops: Sequence[str]) -> None:
    """Answer questions about rows of some ops, or all, until there are no more."""
    desk = Desk(rows(platform(), ops))
    work(lambda question: reply(desk, question), lambda answer, printed: answer)


if __name__ == "__main__":
    main(sys.argv[1:])
