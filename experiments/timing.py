"""What the benchmarks share: times of compiled functions, and tables of them."""

import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.flops import peak_flops

REPEATS = 5


def compiled(function: Callable, *args) -> tuple[Any, float]:
    """The compiled function and the seconds it took."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - start


def median_seconds(program: Callable, *args, repeats: int = REPEATS, patience: float = 5.0) -> float:
    """Median seconds of a call, after one to warm up; no more calls after `patience` seconds."""
    seconds = []
    jax.block_until_ready(program(*args))
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > patience:
            break
    return statistics.median(seconds)


def layer_forward(layer, cfg, implementation, params, x):
    return layer.apply(params, cfg, x, implementation=implementation)[0]


def layer_gradient(layer, cfg, implementation, params, x):
    def loss(params, x):
        return jnp.sum(layer_forward(layer, cfg, implementation, params, x) ** 2)

    return jax.value_and_grad(loss, (0, 1))(params, x)


def decode_seconds(layer, cfg, params, batch: int = 1, steps: int = 256) -> float:
    """Seconds of one step inside a compiled loop."""
    x = jax.random.normal(jax.random.key(1), (steps, batch, cfg.width))

    def loop(params, state, x):
        def body(state, x_t):
            y, state = layer.step(params, cfg, x_t, state)
            return state, y

        return jax.lax.scan(body, state, x)

    args = (params, layer.init_state(cfg, batch), x)
    return median_seconds(compiled(loop, *args)[0], *args) / steps


def line(row: dict) -> str:
    return "  ".join(f"{k} {cell(v)}" for k, v in row.items() if v is not None)


def cell(value) -> str:
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
    lines += ["| " + " | ".join(cell(row[k]) for k in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(rows: list[dict], table: Path, notes: list[str]) -> None:
    """`table.csv` and `table.md`, which begins with a paragraph for every note."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table.with_suffix(".md").write_text(markdown(rows, "\n\n".join(notes)))


def kept(table: Path, names: list[str]) -> tuple[list[dict], list[str]]:
    """Rows of a written table that are not of `names` (its first column), and its notes, if there is one."""
    if not table.with_suffix(".csv").exists():
        return [], []
    with table.with_suffix(".csv").open(newline="") as stream:
        rows = [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(stream)]
    head = table.with_suffix(".md").read_text().split("\n\n|")[0]
    return [row for row in rows if next(iter(row.values())) not in names], head.split("\n\n")


def _value(text: str):
    """What was written as `text`: nothing, a whole number, a number, or text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
