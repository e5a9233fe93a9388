"""Speed and memory of every layer on this machine.

    python -m experiments.bench layers
    python -m experiments.bench layers --layers mamba,s4 --lengths 1024,4096 --out somewhere

One row per layer and length: forward, and forward with backward (of a sum of squares, with respect to inputs
and parameters), each the median of a few runs; the seconds to compile both; the temporary memory XLA plans
for the backward pass; one decode step; the share of this machine's own matrix-product peak that the
analytic FLOPs (3 x forward) make of forward and backward; and, at the shortest length, the same two
times for a naive `lax.scan` over tokens. Results: a CSV and a Markdown table.

XLA asks for its temporary memory anew at every call. Beyond 32 MiB the C library maps it and gives it back,
page by page, which costs long sequences a fifth of their time on a CPU; so the script starts itself again
with glibc told to keep what it has (`TUNABLES`). The same variable serves long training runs on a CPU.
"""

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.train import peak_flops
from zoo import registry

RESULTS = Path(__file__).parent / "results"
TUNABLES = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"
    ":glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1"
)
LENGTHS = (1024, 4096, 16384, 32768)
WIDTH, BATCH, REPEATS = 128, 1, 5


def compiled(function: Callable, *args) -> tuple[Any, float]:
    """The compiled function and the seconds it took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - start


def median_seconds(program: Callable, *args, repeats: int = REPEATS) -> float:
    """Median seconds of a call, after one to warm up; long calls are repeated less."""
    seconds = []
    jax.block_until_ready(program(*args))
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 20:
            break
    return statistics.median(seconds)


def _forward(layer, cfg, implementation, params, x):
    return layer.apply(params, cfg, x, implementation=implementation)[0]


def _gradient(layer, cfg, implementation, params, x):
    def loss(params, x):
        return jnp.sum(_forward(layer, cfg, implementation, params, x) ** 2)

    return jax.value_and_grad(loss, (0, 1))(params, x)


def decode_seconds(layer, cfg, params, batch: int = BATCH, steps: int = 256) -> float:
    """Seconds of one step inside a compiled loop."""
    x = jax.random.normal(jax.random.key(1), (steps, batch, cfg.width))

    def loop(params, state, x):
        def body(state, x_t):
            y, state = layer.step(params, cfg, x_t, state)
            return state, y

        return jax.lax.scan(body, state, x)

    args = (params, layer.init_state(cfg, batch), x)
    return median_seconds(compiled(loop, *args)[0], *args) / steps


def bench_layer(name: str, lengths: tuple[int, ...], width: int = WIDTH) -> list[dict]:
    """Rows of one layer, shortest length first."""
    rows = []
    for length in lengths:
        # Full attention holds as many tokens as there are; no other state knows of the length.
        cfg = registry.config(name, width, **({"max_length": length} if name == "attention" else {}))
        layer = registry.module(cfg)
        params = layer.init(jax.random.key(0), cfg)
        x = jax.random.normal(jax.random.key(2), (BATCH, length, width))
        forward, first = compiled(partial(_forward, layer, cfg, None), params, x)
        gradient, second = compiled(partial(_gradient, layer, cfg, None), params, x)
        seconds = median_seconds(gradient, params, x)
        row = {
            "layer": name,
            "T": length,
            "forward_ms": 1e3 * median_seconds(forward, params, x),
            "forward_backward_ms": 1e3 * seconds,
            "tokens_per_second": BATCH * length / seconds,
            "us_per_token": 1e6 * seconds / (BATCH * length),
            "compile_s": first + second,
            "temporary_MB": gradient.memory_analysis().temp_size_in_bytes / 1e6,
            "decode_us": 1e6 * decode_seconds(layer, cfg, params),
            "peak_share": 3 * cfg.flops_per_token(length) * BATCH * length / seconds / peak_flops("float32"),
            "naive_forward_ms": None,
            "naive_ms": None,
        }
        if length == lengths[0]:
            for column, run in (("naive_forward_ms", _forward), ("naive_ms", _gradient)):
                program, _ = compiled(partial(run, layer, cfg, "reference"), params, x)
                row[column] = 1e3 * median_seconds(program, params, x)
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: dict) -> str:
    return "  ".join(f"{k} {_cell(v)}" for k, v in row.items() if v is not None)


def _cell(value) -> str:
    if value is None:
        return ""
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:,.0f}" if isinstance(value, float) else str(value))
    )


def machine() -> str:
    """Device, versions and date, for the head of a table."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    device = jax.devices()[0]
    where = f"{cpu}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return (
        f"{where}; jax {importlib.metadata.version('jax')}, Python {platform.python_version()}; "
        f"matmul peak {peak_flops('float32') / 1e9:.0f} GFLOP/s (float32); {datetime.date.today()}"
    )


def markdown(rows: list[dict], note: str) -> str:
    """The rows as a table."""
    keys = list(rows[0])
    lines = [note, "", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(_cell(row[k]) for k in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(rows: list[dict], directory: Path, command: str, width: int) -> None:
    """`layers.csv` and `layers.md`, or `layers_WIDTH.*` for a width of one's own."""
    directory.mkdir(parents=True, exist_ok=True)
    name = "layers" if width == WIDTH else f"layers_{width}"
    with (directory / f"{name}.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    note = f"`{command}`: width {width}, batch {BATCH}, float32. {machine()}."
    (directory / f"{name}.md").write_text(markdown(rows, note))


def keep_freed_memory() -> None:
    """Start this process again under `TUNABLES`, unless it is or somebody chose others."""
    if "GLIBC_TUNABLES" not in os.environ and platform.libc_ver()[0] == "glibc":
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": TUNABLES})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["layers"])
    parser.add_argument("--layers", default=",".join(registry.LAYERS), help="names, separated by commas")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, separated by commas")
    parser.add_argument("--width", type=int, default=WIDTH, help="model width")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for layers.csv and layers.md")
    options = parser.parse_args(arguments)
    command = " ".join(["python -m experiments.bench", *(arguments or sys.argv[1:])])
    lengths = tuple(int(t) for t in options.lengths.split(","))
    print(machine(), flush=True)
    rows: list[dict] = []
    for name in options.layers.split(","):
        rows += bench_layer(name, lengths, options.width)
        write(rows, options.out, command, options.width)
    print(options.out)
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
