"""Speed and memory of every layer on this machine.

    python -m experiments.bench layers
    python -m experiments.bench layers --layers mamba,s4 --lengths 1024,4096 --out somewhere
    python -m experiments.bench peers --peer-python oracle/bin/python

`layers`: one row per layer and length: forward, and forward with backward (of a sum of squares, with respect
to inputs and parameters), each the median of a few runs; the seconds to compile both; the temporary memory
XLA plans for the backward pass; one decode step; the share of this machine's own matrix-product peak that the
analytic FLOPs (3 x forward) make of forward and backward; and, at the shortest length, the same two times for
a naive `lax.scan` over tokens.

`peers`: forward and backward of the layers that Hugging Face transformers has too, ours and theirs in turn,
with the same sizes; theirs run in an interpreter of their own (tests/oracles/README.md makes one).

Results: a CSV and a Markdown table.

XLA asks for its temporary memory anew at every call. Beyond 32 MiB the C library maps it and gives it back,
page by page, which costs long sequences a fifth of their time on a CPU; so the script starts itself again
with glibc told to keep what it has (`TUNABLES`). The same variable serves long training runs on a CPU.
"""

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
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
PEERS = Path(__file__).parent / "peers" / "transformers_layers.py"
PEER_LAYERS = ("mamba", "mamba2", "rg_lru", "gated_delta_net", "kda", "lightning_attention")
PEER_BATCH, PEER_LENGTH, PEER_WIDTH = 2, 2048, 256


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


def bench_peer(name: str, python: str, width: int, rounds: int = 3) -> dict:
    """Medians over `rounds` of theirs and ours in turn, at B = 2 and T = 2,048."""
    cfg = registry.config(name, width)
    layer = registry.module(cfg)
    params = layer.init(jax.random.key(0), cfg)
    x = jax.random.normal(jax.random.key(2), (PEER_BATCH, PEER_LENGTH, width))
    runs = {"forward": _forward, "forward_backward": _gradient}
    programs = {key: compiled(partial(run, layer, cfg, None), params, x)[0] for key, run in runs.items()}
    command = [python, PEERS, name, PEER_BATCH, PEER_LENGTH, width]
    theirs, ours = [], []
    for _ in range(rounds):
        done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        theirs.append(json.loads(done.stdout.splitlines()[-1]))
        ours.append({key: median_seconds(program, params, x) for key, program in programs.items()})
    row = {"layer": name, "peer": theirs[0]["versions"]}
    for key in runs:
        a, b = (statistics.median(r[key] for r in rows) for rows in (theirs, ours))
        row |= {f"{key}_theirs_ms": 1e3 * a, f"{key}_ours_ms": 1e3 * b, f"{key}_ratio": a / b}
    print(_line(row), flush=True)
    return row


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


def write(rows: list[dict], directory: Path, name: str, note: str) -> None:
    """`name.csv` and `name.md`."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (directory / f"{name}.md").write_text(markdown(rows, note))


def keep_freed_memory() -> None:
    """Start this process again under `TUNABLES`, unless it is or somebody chose others."""
    if "GLIBC_TUNABLES" not in os.environ and platform.libc_ver()[0] == "glibc":
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": TUNABLES})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["layers", "peers"])
    parser.add_argument("--layers", help="names, separated by commas; default all that there are")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, separated by commas")
    parser.add_argument("--width", type=int, help=f"model width; default {WIDTH}, for peers {PEER_WIDTH}")
    parser.add_argument("--peer-python", help="an interpreter with torch and transformers")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the tables")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    command = " ".join(["python -m experiments.bench", *(arguments or sys.argv[1:])])
    peers = options.what == "peers"
    if peers and not options.peer_python:
        parser.error("peers needs --peer-python (tests/oracles/README.md makes one)")
    names = options.layers.split(",") if options.layers else PEER_LAYERS if peers else list(registry.LAYERS)
    width = options.width or (PEER_WIDTH if peers else WIDTH)
    lengths = tuple(int(t) for t in options.lengths.split(","))
    batch, table = (PEER_BATCH, "peers") if peers else (BATCH, "layers")
    note = f"`{command}`: width {width}, batch {batch}, float32. {machine()}."
    print(machine(), flush=True)
    rows: list[dict] = []
    for name in names:
        rows += [bench_peer(name, options.peer_python, width)] if peers else bench_layer(name, lengths, width)
        default = width == (PEER_WIDTH if peers else WIDTH)
        write(rows, options.out, table if default else f"{table}_{width}", note)
    print(options.out)
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
