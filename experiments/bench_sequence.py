"""Memory of a training step on sequences cut over devices, from XLA's own account: nothing runs.

    python -m experiments.bench_sequence            # all of it: results/sequence.md and .csv
    python -m experiments.bench_sequence gla gru    # these layers, to the screen

A step is loss and gradient of a small model in float32 on one sequence, compiled for 1 to 8 simulated CPU
devices. "temporary" is what one device needs beside parameters, gradients and tokens.
"""

import csv
import os
import pathlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.losses import cross_entropy
from zoo import lm, registry, sequence, shards

DEVICES = (1, 2, 4, 8)
# Read by XLA when it is first used. Code is not optimised: which buffers a program has is settled before.
FLAGS = f"--xla_force_host_platform_device_count={DEVICES[-1]} --xla_backend_optimization_level=0"
WIDTH, DEPTH, VOCABULARY = 128, 4, 256
CASES = [(1 << 16, devices) for devices in DEVICES] + [(1 << 20, devices) for devices in (1, 8)]
LAYERS: dict[str, dict[str, Any]] = {
    "gla": {},
    "gated_delta_net": {},
    "mamba": {},
    "s4": {},
    "attention, window 1,024": {"window": 1024},
    "attention": {"max_length": 1 << 20},
    "gru": {},
}
RESULTS = pathlib.Path(__file__).parent / "results" / "sequence"


class Row(NamedTuple):
    layer: str
    way: str
    tokens: int
    devices: int
    temporary_bytes: int


def step_bytes(cfg: lm.Config, tokens: int, devices: int) -> int:
    """Temporary bytes per device of loss and gradient on `tokens` tokens over so many devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (sequence.AXIS,))

    def read(params, h, targets):
        return cross_entropy(partial(lm.logits, params, cfg), h, targets, 4096)[0]

    def loss(params, tokens, targets):
        how = {"then": read, "given": (targets,), "mesh": mesh, "keep_state": False}
        return jnp.mean(sequence.hidden(params, cfg, tokens, **how)[0])

    params = jax.eval_shape(lambda: lm.init(jax.random.key(0), cfg))
    batch = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    found = jax.jit(jax.value_and_grad(loss)).lower(params, batch, batch).compile().memory_analysis()
    assert found is not None, "XLA for CPUs says what it needs"
    return found.temp_size_in_bytes


def measure(names: list[str]) -> Iterator[Row]:
    for name in names:
        layer = registry.config(name.split(",")[0], WIDTH, **LAYERS.get(name, {}))
        cfg = lm.Config(vocab_size=VOCABULARY, width=WIDTH, depth=DEPTH, pattern=(layer,))
        for tokens, devices in CASES:
            found = step_bytes(cfg, tokens, devices)
            jax.clear_caches()
            yield Row(name, shards.way(layer), tokens, devices, found)


def table(rows: list[Row]) -> str:
    """Markdown, MiB per device."""
    found = {(row.layer, row.tokens, row.devices): row.temporary_bytes / 2**20 for row in rows}
    ways = {row.layer: row.way for row in rows}
    heads = [f"{tokens:,} on {devices}" for tokens, devices in CASES]
    lines = ["| layer | way | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(heads)]
    for layer, way in ways.items():
        cells = (found.get((layer, *case)) for case in CASES)
        lines.append(f"| {layer} | {way} | " + " | ".join(f"{c:,.0f}" if c else "" for c in cells) + " |")
    return "\n".join(lines)


def write(rows: list[Row]) -> None:
    with RESULTS.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Row._fields, *rows])
    about = (
        f"MiB of temporary memory per device: loss and gradient of {DEPTH} blocks of width {WIDTH} in float32"
        f" on one sequence of so many tokens, on so many devices (jax {jax.__version__}, by compilation for"
        " simulated CPU devices; `python -m experiments.bench_sequence`)."
    )
    RESULTS.with_suffix(".md").write_text(f"# Sequences cut over devices\n\n{about}\n\n{table(rows)}\n")


def main(names: list[str]) -> None:
    os.environ["XLA_FLAGS"] = FLAGS
    jax.config.update("jax_platforms", "cpu")
    rows: list[Row] = []
    for row in measure(names or list(LAYERS)):
        rows.append(row)
        print(*row, flush=True)
        if not names:
            write(rows)
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
