"""Generation against the length of the context: ours, and transformers' for the same architecture and sizes.

    python -m experiments.bench generate --peer-python oracle/bin/python
    python -m experiments.bench generate --small            # in a minute: does it run?

A row is a model and a context: a prompt of so many random tokens, then TOKENS more, greedy, batch 1, random
parameters in float32. Each side has a process of its own for every row, which first warms up (ours compiles)
and then tells the seconds of the prompt, those of a token after it, and the memory that both took at their
highest beyond the model. Ours reads the prompt in pieces of PIECE tokens; `streamed` is with text every 8
tokens. Who takes longer than PATIENCE for a row has no longer contexts. What a peer needs to run is said in
tests/oracles/README.md.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import bench_peers
from experiments.bench_peers import Peer
from experiments.timing import line, machine, write
from zoo import registry

PIECE, PATIENCE = 1024, 300.0
REPEATS = 3


class Sizes(NamedTuple):
    width: int = 512
    depth: int = 6
    vocabulary: int = 4096
    tokens: int = 128  # written after the prompt


USUAL, SMALL = Sizes(), Sizes(64, 3, 97, 8)
CONTEXTS = tuple(1024 * 4**power for power in range(6))  # 1k to 1M
SMALL_CONTEXTS = (32, 64)

Layers = Callable[[int], tuple[Any, ...]]


def _layers(*names: str, **settings: dict[str, Any]) -> Layers:
    return lambda width: tuple(registry.config(name, width, **settings.get(name, {})) for name in names)


MODELS: dict[str, tuple[Layers, dict[str, Any]]] = {
    "mamba": (_layers("mamba"), {"mlp": "none"}),
    "mamba2": (_layers("mamba2"), {"mlp": "none"}),
    "recurrent_gemma": (
        _layers("rg_lru", "rg_lru", "attention", attention={"kv_heads": 1, "window": 2048}),
        {"expansion": 3.0},
    ),
    "gated_delta_net": (_layers("gated_delta_net"), {}),
    "attention": (_layers("attention"), {}),
}
PEERS = {
    name: Peer("transformers_models.py", ("transformers", "torch"), "generate", name)
    for name in ("mamba", "mamba2", "recurrent_gemma")
}


def config(name: str, sizes: Sizes, context: int):
    """Our model; full attention has room for all of the text."""
    from experiments.measure import reaching
    from zoo import lm

    layers, fields = MODELS[name]
    cfg = lm.Config(
        vocab_size=sizes.vocabulary,
        width=sizes.width,
        depth=sizes.depth,
        pattern=layers(sizes.width),
        **fields,
    )
    return reaching(cfg, context + sizes.tokens)


def measure(name: str, sizes: Sizes, context: int) -> dict[str, float]:
    """Ours, in this process."""
    import jax
    import numpy as np

    from experiments.peers import resident
    from zoo import lm
    from zoo.generation import generate, prefill, stream

    cfg = config(name, sizes, context)
    params = jax.block_until_ready(jax.jit(lambda: lm.init(jax.random.key(0), cfg))())
    prompt = np.random.default_rng(0).integers(1, sizes.vocabulary, context)
    piece = min(PIECE, context)
    before = resident.present()

    def read(length: int):
        return jax.block_until_ready(prefill(params, cfg, prompt[:length], piece=piece))

    session = read(min(context, 2 * piece))  # what compiles here is all there is to compile
    generate(params, cfg, steps=sizes.tokens, session=session, temperature=0)
    list(stream(params, cfg, steps=8, session=session, temperature=0))
    resident.forget()
    start = time.perf_counter()
    session = read(context)
    prefilled = time.perf_counter() - start

    def seconds(run: Callable) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / sizes.tokens

    settings = {"steps": sizes.tokens, "session": session, "temperature": 0}
    whole = [seconds(lambda: generate(params, cfg, **settings)) for _ in range(REPEATS)]
    streamed = [seconds(lambda: list(stream(params, cfg, **settings))) for _ in range(REPEATS)]
    return {
        "prefill": prefilled,
        "decode": statistics.median(whole),
        "streamed": statistics.median(streamed),
        "memory": resident.peak() - before,
        "state": sum(leaf.nbytes for leaf in jax.tree.leaves(session.state)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }


def _asked(command: Sequence[Any]) -> dict[str, float] | None:
    """The JSON line that a process prints; None, and its last complaint, if it fails or takes too long."""
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=3 * PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"stopped after {3 * PATIENCE:.0f} s: {' '.join(map(str, command[-7:]))}", flush=True)
        return None
    if done.returncode:
        print((done.stderr.splitlines() or [f"exit {done.returncode}"])[-1], flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


class _Side:
    """Ours or theirs for one model: asked for longer contexts as long as it has patience."""

    def __init__(self, command: Sequence[Any] | None):
        self._command = command

    def __call__(self, context: int, tokens: int) -> dict[str, float]:
        if self._command is None:
            return {}
        start = time.perf_counter()
        found = _asked([*self._command, context, tokens])
        if found is None or time.perf_counter() - start > PATIENCE:
            self._command = None
        return found or {}


def _row(name: str, context: int, ours: dict, theirs: dict, packages: str | None) -> dict[str, Any]:
    def per_second(side: dict, key: str) -> float | None:
        return 1 / side[key] if key in side else None

    def megabytes(side: dict, key: str) -> float | None:
        return side[key] / 1e6 if key in side else None

    both = "decode" in ours and "decode" in theirs
    return {
        "model": name,
        "context": context,
        "tokens_per_second": per_second(ours, "decode"),
        "streamed_per_second": per_second(ours, "streamed"),
        "theirs_per_second": per_second(theirs, "decode"),
        "ratio": theirs["decode"] / ours["decode"] if both else None,
        "prefill_s": ours.get("prefill"),
        "theirs_prefill_s": theirs.get("prefill"),
        "memory_MB": megabytes(ours, "memory"),
        "theirs_memory_MB": megabytes(theirs, "memory"),
        "state_MB": megabytes(ours, "state"),
        "parameters": ours.get("parameters"),
        "theirs_parameters": theirs.get("parameters"),
        "theirs": packages,
    }


def rows(name: str, contexts: Sequence[int], pythons: Sequence[str], sizes: Sizes) -> list[dict]:
    """Of one model, shortest context first; theirs where one of the interpreters `pythons` has it."""
    common = [name, sizes.width, sizes.depth, sizes.vocabulary]
    found = bench_peers.find(PEERS[name], pythons) if name in PEERS else None
    script = bench_peers.FOLDER / "transformers_models.py"
    ours = _Side([sys.executable, "-m", "experiments.bench_generate", *common])
    theirs = _Side([found[0], script, *common] if found else None)
    table = []
    for context in sorted(contexts):
        sides = theirs(context, sizes.tokens), ours(context, sizes.tokens)
        if any(sides):
            table.append(_row(name, context, sides[1], sides[0], found and found[1]))
            print(line(table[-1]), flush=True)
    return table


def bench(
    names: Sequence[str],
    contexts: Sequence[int] | None,
    pythons: Sequence[str],
    out: Path,
    note: str,
    small: bool = False,
) -> int:
    """The table `generate` in `out`; 1 if some model has no row at all."""
    sizes = SMALL if small else USUAL
    contexts = contexts or (SMALL_CONTEXTS if small else CONTEXTS)
    head = f"{note}: {sizes}, {os.cpu_count()} cores, float32, greedy, batch 1. {machine()}."
    table: list[dict] = []
    missing = 0
    for name in names:
        new = rows(name, contexts, pythons, sizes)
        missing |= not new
        table += new
        if table:
            write(table, out / ("generate_small" if small else "generate"), [head])
    return int(missing)


if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    width, depth, vocabulary, context, tokens = map(int, numbers)
    print(json.dumps(measure(name, Sizes(width, depth, vocabulary, tokens), context)))
