"""Speed and memory of every layer on this machine.

    python -m experiments.bench layers
    python -m experiments.bench layers --layers mamba,s4 --lengths 1024,4096 --out somewhere
    python -m experiments.bench peers --peer-python oracle/bin/python,discretax/bin/python
    python -m experiments.bench kernels
    python -m experiments.bench generate --peer-python oracle/bin/python

`layers`: one row per layer and length: forward, and forward with backward (of a sum of squares, with respect
to inputs and parameters), each the median of a few runs; the seconds to compile both; the temporary memory
XLA plans for the backward pass; one decode step; the share of this machine's own matrix-product peak that the
analytic FLOPs (3 x forward) make of forward and backward. At T = 1,024 also the same two times for a naive
`lax.scan` over tokens. At T = 16,384 also a bound of that memory: what forward and backward of one piece of
1,024 tokens need, the output, and a state for every piece, which is what a layer must hold that computes
everything else again; how many times the bound the layer needs as it is and in such pieces (`zoo/pieces.py`);
and the time in pieces. What would take more than half of the machine's memory is left out.

`peers`: the same work in other people's code (`experiments/bench_peers.py`), ours and theirs in turn; theirs
run in interpreters of their own (tests/oracles/README.md makes them).

`kernels`: ops instead of layers, on a GPU: Pallas kernels, XLA, fla's Triton kernels and attention
(`experiments/bench_kernels.py`).

`generate`: tokens per second and memory of whole models against the length of the context, beside
transformers' (`experiments/bench_generate.py`).

Results: a CSV and a Markdown table.

The script starts itself again with glibc told to keep freed memory (`experiments.freed_memory`).
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import bench_generate, bench_kernels, bench_peers, freed_memory
from experiments.flops import peak_flops
from experiments.kernel_cases import VARIANTS
from experiments.kernel_rows import ATTENTION
from experiments.timing import (
    compiled,
    decode_seconds,
    kept,
    layer_forward,
    layer_gradient,
    line,
    machine,
    median_seconds,
    write,
)
from zoo import pieces, registry

RESULTS = Path(__file__).parent / "results"
LENGTHS = (1024, 4096, 16384, 65536)
NAIVE_LENGTH, MEMORY_LENGTH, PIECE = 1024, 16384, 1024
WIDTH, BATCH = 128, 1
PATIENCE = 10.0  # seconds: a layer that takes longer at one length is not run at the next


def _setup(cfg: Any, length: int):
    """Layer, Config, parameters and input."""
    # Full attention's state has a slot for every token, log-linear attention's for every scale.
    if hasattr(cfg, "max_length"):
        cfg = dataclasses.replace(cfg, max_length=length)
    layer = registry.module(cfg)
    params = layer.init(jax.random.key(0), cfg)
    return layer, cfg, params, jax.random.normal(jax.random.key(2), (BATCH, length, cfg.width))


def _temporary(program) -> int:
    """Bytes that a compiled program needs besides its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def _gradient_in_pieces(layer, cfg, params, x):
    """`layer_gradient` of the layer in pieces of PIECE tokens (`zoo/pieces.py`)."""

    def loss(params, x):
        def run(x, state, ids):
            return layer.apply(params, cfg, x, state, segment_ids=ids)

        return jnp.sum(pieces.apply(run, layer.init_state(cfg, BATCH), x, None, None, PIECE)[0] ** 2)

    return jax.value_and_grad(loss, (0, 1))(params, x)


def _memory(layer, cfg, params, x, plain_MB: float) -> dict[str, float]:
    """The bound that this module states, how much of it the plain form and pieces need, and their time."""
    one_piece, _ = compiled(partial(layer_gradient, layer, cfg, None), params, x[:, :PIECE])
    program, _ = compiled(partial(_gradient_in_pieces, layer, cfg), params, x)
    states = x.shape[1] // PIECE * BATCH * cfg.state_bytes()
    bound = (_temporary(one_piece) + states + x.nbytes) / 1e6
    in_pieces = _temporary(program) / 1e6
    return {
        "bound_MB": bound,
        "plain_over_bound": plain_MB / bound,
        "pieces_over_bound": in_pieces / bound,
        "pieces_ms": 1e3 * median_seconds(program, params, x),
    }


def _naive(layer, cfg, params, x) -> dict[str, float]:
    """Milliseconds of the reference, a scan over tokens that keeps every state for its backward pass."""
    columns = {}
    for column, run in {"naive_forward_ms": layer_forward, "naive_ms": layer_gradient}.items():
        program, _ = compiled(partial(run, layer, cfg, "reference"), params, x)
        if _fits(program):
            columns[column] = 1e3 * median_seconds(program, params, x)
    return columns


def _fits(program) -> bool:
    """Whether the temporary memory of a program is less than half of what this machine has."""
    return _temporary(program) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def _row(name: str, cfg: Any, length: int) -> dict | None:
    """None, and a line, where the backward pass does not fit in memory."""
    layer, cfg, params, x = _setup(cfg, length)
    forward, first = compiled(partial(layer_forward, layer, cfg, None), params, x)
    gradient, second = compiled(partial(layer_gradient, layer, cfg, None), params, x)
    memory = _temporary(gradient) / 1e6
    if not _fits(gradient):
        print(f"{name}: T = {length} needs {memory:,.0f} MB of temporary memory, too much for this machine")
        return None
    seconds = median_seconds(gradient, params, x)
    row = {
        "layer": name,
        "T": length,
        "forward_ms": 1e3 * median_seconds(forward, params, x),
        "forward_backward_ms": 1e3 * seconds,
        "tokens_per_second": BATCH * length / seconds,
        "us_per_token": 1e6 * seconds / (BATCH * length),
        "compile_s": first + second,
        "temporary_MB": memory,
        "decode_us": 1e6 * decode_seconds(layer, cfg, params, BATCH),
        "peak_share": 3 * cfg.flops_per_token(length) * BATCH * length / seconds / peak_flops("float32"),
    }
    row |= dict.fromkeys(("naive_forward_ms", "naive_ms"))
    row |= dict.fromkeys(("bound_MB", "plain_over_bound", "pieces_over_bound", "pieces_ms"))
    if length == NAIVE_LENGTH:
        row |= _naive(layer, cfg, params, x)
    if length == MEMORY_LENGTH:
        row |= _memory(layer, cfg, params, x, memory)
    print(line(row), flush=True)
    return row


def bench_layer(name: str, cfg: Any, lengths: tuple[int, ...]) -> list[dict]:
    """Rows of the layer of Config `cfg`, called `name`, shortest length first, as far as memory goes and
    PATIENCE."""
    rows: list[dict] = []
    for length in sorted(lengths):
        row = _row(name, cfg, length)
        rows += [row] if row else []
        if not row or row["forward_backward_ms"] > 1e3 * PATIENCE:
            break
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["layers", "peers", "kernels", "generate"])
    parser.add_argument(
        "--layers", help="names (of PEERS, of ops with kernels), separated by commas; default all"
    )
    lengths = ",".join(map(str, LENGTHS))
    parser.add_argument(
        "--lengths", help=f"tokens, separated by commas; default {lengths}, for peers {bench_peers.LENGTH}"
    )
    parser.add_argument("--width", type=int, help=f"default {WIDTH}, for peers {bench_peers.WIDTH}")
    parser.add_argument("--peer-python", help="interpreters with the peers' packages, separated by commas")
    parser.add_argument(
        "--seconds", type=float, default=bench_kernels.SECONDS, help="budget of kernels; default %(default)s"
    )
    parser.add_argument("--small", action="store_true", help="generate: small models, short contexts")
    parser.add_argument("--add", action="store_true", help="keep what the tables have of other names")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for the tables")
    return parser


def _names(options, known: Iterable[str]) -> list[str]:
    return options.layers.split(",") if options.layers else list(known)


def _layers(options, note: str) -> int:
    width = options.width or WIDTH
    lengths = tuple(map(int, options.lengths.split(","))) if options.lengths else LENGTHS
    names = _names(options, registry.LAYERS)
    table = options.out / ("layers" if width == WIDTH else f"layers_{width}")
    rows, notes = kept(table, names) if options.add else ([], [])
    for name in names:
        rows += bench_layer(name, registry.config(name, width), lengths)
        head = f"{note}: width {width}, batch {BATCH}, float32. {machine()}."
        if rows:
            write(rows, table, [*notes, head])
    return 0


def _peers(options, note: str) -> int:
    """Every peer that can run does; 1 if one that is installed failed."""
    width, length = options.width or bench_peers.WIDTH, int(options.lengths or bench_peers.LENGTH)
    note = f"{note}: width {width}, B = {bench_peers.BATCH}, T = {length}, decoding at B = 1, float32."
    names, failed = _names(options, bench_peers.PEERS), 0
    usual = (width, length) == (bench_peers.WIDTH, bench_peers.LENGTH)
    table = options.out / ("peers" if usual else f"peers_{width}_{length}")
    rows, notes = kept(table, names) if options.add else ([], [])
    for name in names:
        try:
            row = bench_peers.bench(name, options.peer_python.split(","), width, length)
        except (RuntimeError, OSError) as error:
            print(error, flush=True)
            row, failed = None, 1
        if row:
            rows.append(row)
            write(rows, table, [*notes, f"{note} {machine()}."])
    return failed


def _generate(options, note: str) -> int:
    contexts = tuple(map(int, options.lengths.split(","))) if options.lengths else None
    pythons = options.peer_python.split(",") if options.peer_python else []
    names = _names(options, bench_generate.MODELS)
    return bench_generate.bench(names, contexts, pythons, options.out, note, options.small)


def _kernels(parser: argparse.ArgumentParser, options) -> int:
    ops, known = _names(options, ()), {variant.op for variant in (*VARIANTS.values(), ATTENTION)}
    unknown = [name for name in ops if name not in known]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    print(bench_kernels.bench(options.seconds, options.out, ops))
    return 0


def _shown(argument: str) -> str:
    """As in the command, but only the ends of paths from the root: tables are read on other machines."""
    return ",".join(str(Path(*Path(a).parts[-3:])) if a.startswith("/") else a for a in argument.split(","))


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.what == "kernels":
        return _kernels(parser, options)
    peers = options.what == "peers"
    if peers and not options.peer_python:
        parser.error("peers needs --peer-python (tests/oracles/README.md makes one)")
    models = bench_generate.MODELS if options.what == "generate" else registry.LAYERS
    known: Iterable[str] = bench_peers.PEERS if peers else models
    unknown = [name for name in _names(options, known) if name not in known]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    note = f"`python -m experiments.bench {' '.join(map(_shown, arguments or sys.argv[1:]))}`"
    print(machine(), flush=True)
    failed = {"peers": _peers, "generate": _generate}.get(options.what, _layers)(options, note)
    print(options.out)
    return failed


if __name__ == "__main__":
    freed_memory.keep()
    sys.exit(main())
