"""Ours beside theirs: the work of a layer or an op in this project and in public code for the CPU.

Each entry of `PEERS` is a function of the same name in a script of `experiments/peers`, which an interpreter
with the packages runs (`peers/clock.py` says what it prints), and a layer here, or the op in `peers/ours.py`.
Both have the same sizes, float32 and random weights; numbers are not compared (tests/oracles does that).
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from experiments.peers import ours
from experiments.timing import compiled, decode_seconds, layer_forward, line, median_seconds
from zoo import registry

BATCH, LENGTH, WIDTH, ROUNDS = 2, 2048, 256, 3
# Peers that take longer than this for a round have one round.
LONG = 180.0
GROUP = 16  # decoded tokens timed together
FOLDER = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Peer:
    """Code of somebody else; `ours` is the op that does its work, or the layer, with `settings`."""

    script: str
    packages: tuple[str, ...]
    function: str
    ours: str
    differences: str = ""
    settings: dict = field(default_factory=dict)


def _transformers(ours: str, function: str, differences: str = "") -> Peer:
    return Peer("transformers_layers.py", ("transformers", "torch"), function, ours, differences)


def _fla(ours: str, function: str, differences: str = "") -> Peer:
    return Peer("fla_chunks.py", ("fla-core", "torch"), function, ours, differences)


def _scan(function: str) -> Peer:
    return Peer("jax_scans.py", ("recurrentgemma", "jax"), function, "diagonal_scan")


def _discretax(ours: str, function: str, differences: str, **settings) -> Peer:
    return Peer("discretax_layers.py", ("discretax", "jax"), function, ours, differences, settings)


TOKEN_BY_TOKEN = "theirs is token by token"
PEERS = {
    "mamba": _transformers("mamba", "MambaMixer", TOKEN_BY_TOKEN),
    "mamba_mambapy": Peer(
        "transformers_layers.py",
        ("transformers", "mambapy", "torch"),
        "MambaMixer, pscan of mambapy",
        "mamba",
    ),
    "mamba2": _transformers("mamba2", "Mamba2Mixer"),
    "rg_lru": _transformers("rg_lru", "RecurrentGemmaRecurrentBlock", TOKEN_BY_TOKEN),
    "gated_delta_net": _transformers("gated_delta_net", "Qwen3NextGatedDeltaNet"),
    "kda": _transformers("kda", "KimiLinearDeltaAttention", "ours has a bias at the gate"),
    "lightning_attention": _transformers("lightning_attention", "MiniMaxLightningAttention"),
    "titans": Peer(
        "titans_memory.py",
        ("titans-pytorch", "torch"),
        "NeuralMemory",
        "titans",
        "both move the weights their gradients are taken at every 16 tokens; theirs has one write and one "
        "decay per 16 tokens and reads before it, ours one per token; theirs has a norm before and a gate "
        "per head, ours a gate per channel",
        {"conv": 0, "activation": "gelu"},
    ),
    "s5": _discretax("s5", "S5SequenceMixer, GELU, GLU", "theirs has biases at the gate", gate="full"),
    "lru": _discretax("lru", "LRUSequenceMixer, GELU, GLU", "theirs has biases at the gate"),
    "s4d": _discretax("s4d", "S4DSequenceMixer, GELU, GLU", "theirs has no skip connection"),
    "delta_net": _discretax(
        "delta_net", "DeltaNetSequenceMixer", "theirs has one beta for all heads and no output norm", conv=0
    ),
    "fla_simple_gla": _fla("gated_linear_attention", "naive_chunk_simple_gla"),
    "fla_linear_attn": _fla("gated_linear_attention", "naive_chunk_linear_attn"),
    "fla_gla": _fla(
        "gated_linear_attention", "naive_recurrent_gla", f"{TOKEN_BY_TOKEN}: there is no other in PyTorch"
    ),
    "fla_rwkv6": _fla(
        "gated_linear_attention",
        "naive_chunk_rwkv6",
        "autograd cannot go back through theirs: it writes in place",
    ),
    "fla_delta_rule": _fla("gated_delta_rule", "delta_rule_chunkwise"),
    "fla_gated_delta_rule": _fla("gated_delta_rule", "naive_chunk_gated_delta_rule"),
    "fla_kda": _fla("gated_delta_rule", "naive_chunk_kda"),
    "fla_gdn2": _fla("gated_delta_rule", "naive_chunk_gdn2"),
    "fla_comba": _fla("dplr", "naive_chunk_comba"),
    "fla_dplr": _fla("dplr", "dplr_chunkwise"),
    "fla_iplr": _fla("dplr", "iplr_chunkwise"),
    "fla_momentum_delta_rule": _fla(
        "momentum_delta_rule",
        "chunk_momentum_delta_rule_ref",
        "theirs has one rate more, of reading the momentum",
    ),
    "fla_ttt": _fla("memory_update", "chunk_ttt_linear_ref", "theirs adds LN(z) to z, ours to q"),
    "fla_hgrn": _fla(
        "diagonal_scan", "naive_recurrent_hgrn", f"{TOKEN_BY_TOKEN}: their chunks are for T = 64 only"
    ),
    "recurrentgemma_scan": _scan("linear_scan"),
    "recurrentgemma_complex_scan": _scan("linear_scan, complex"),
}

VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps([importlib.metadata.version(name) for name in sys.argv[1:]]))
"""


def find(peer: Peer, pythons: Sequence[str]) -> tuple[str, str] | None:
    """The first interpreter that has the packages, and their versions."""
    for python in pythons:
        command = [python, "-c", VERSIONS, *peer.packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            pairs = zip(peer.packages, json.loads(done.stdout), strict=True)
            return python, ", ".join(" ".join(pair) for pair in pairs)
        if "PackageNotFoundError" not in done.stderr:
            raise RuntimeError(f"{python}: {done.stderr.strip()}")
    return None


def theirs(name: str, python: str, sizes: tuple[int, int, int]) -> dict:
    """What the peer's script prints; RuntimeError with its last line of complaint."""
    command = [python, FOLDER / PEERS[name].script, name, *sizes]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr.splitlines() or [f'exit {done.returncode}'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _gradient(forward: Callable, *args) -> tuple[Array, tuple]:
    def loss(*args):
        return jnp.sum(forward(*args) ** 2)

    return jax.value_and_grad(loss, tuple(range(len(args))))(*args)


def _layer(peer: Peer, width: int):
    cfg = registry.config(peer.ours, width, **peer.settings)
    layer = registry.module(cfg)
    return layer, cfg, layer.init(jax.random.key(0), cfg)


def programs(name: str, sizes: tuple[int, int, int]) -> tuple[dict[str, Callable], list]:
    """Our compiled forward, and forward with backward, and their arguments."""
    forward: Callable
    if name not in ours.OPS:
        layer, cfg, params = _layer(PEERS[name], sizes[2])
        forward = partial(layer_forward, layer, cfg, None)
        args = [params, jax.random.normal(jax.random.key(2), sizes)]
    else:
        forward = ours.OPS[name]
        args = ours.inputs(forward, *sizes)
    runs: dict[str, Callable] = {"forward": forward, "forward_backward": partial(_gradient, forward)}
    return {key: compiled(run, *args)[0] for key, run in runs.items()}, args


def step_seconds(layer, cfg, params) -> float:
    """Seconds of a token at batch 1, one call of the compiled step each: the median of groups."""
    step = jax.jit(lambda params, x, state: layer.step(params, cfg, x, state), donate_argnums=2)
    x = jax.random.normal(jax.random.key(1), (1, cfg.width))
    # Arrays of their own: two fields may be the same array of zeros, which cannot be given away twice.
    state = jax.tree.map(jnp.array, layer.init_state(cfg, 1))
    seconds = []
    for _ in range(60):
        start = time.perf_counter()
        for _ in range(GROUP):
            y, state = step(params, x, state)
            y.block_until_ready()
        seconds.append((time.perf_counter() - start) / GROUP)
    return statistics.median(seconds)


def _decode(name: str, width: int) -> dict[str, float]:
    """Of our layer: a call per token, as theirs, and a token of a compiled loop."""
    layer, cfg, params = _layer(PEERS[name], width)
    return {"decode": step_seconds(layer, cfg, params), "loop": decode_seconds(layer, cfg, params)}


def bench(name: str, pythons: Sequence[str], width: int = WIDTH, length: int = LENGTH) -> dict | None:
    """Medians over rounds of theirs and ours in turn; None, and a line, where no interpreter has it."""
    peer, sizes = PEERS[name], (BATCH, length, width)
    found = find(peer, pythons)
    if not found:
        print(f"{name}: no interpreter given has {peer.packages[0]} (with {', '.join(peer.packages[1:])})")
        return None
    functions, args = programs(name, sizes)
    rounds: list[tuple[dict, dict]] = []
    start = time.perf_counter()
    while len(rounds) < (1 if time.perf_counter() - start > LONG else ROUNDS):
        their = theirs(name, found[0], sizes)
        our = {key: median_seconds(program, *args) for key, program in functions.items()}
        rounds.append((their, our | (_decode(name, width) if their["decode"] else {})))
    parameters = sum(x.size for x in jax.tree.leaves(args[0])) if name not in ours.OPS else None
    kind = "op" if name in ours.OPS else "layer"
    row: dict = {"name": name, "ours": f"{kind} {peer.ours}", "function": peer.function, "packages": found[1]}
    row |= _times(rounds)
    row |= {"parameters_theirs": rounds[0][0]["parameters"], "parameters_ours": parameters}
    row |= {"rounds": len(rounds), "differences": peer.differences}
    print(line(row), flush=True)
    return row


def _median(rounds: list[dict], key: str) -> float | None:
    seconds = [r[key] for r in rounds if r.get(key) is not None]
    return statistics.median(seconds) if seconds else None


def _times(rounds: list[tuple[dict, dict]]) -> dict[str, float | None]:
    """Milliseconds of theirs and ours and their ratio; microseconds for a token of decoding."""
    their, our = ([r[i] for r in rounds] for i in (0, 1))
    columns: dict[str, float | None] = {}
    for label, key, ours_key, unit in (
        ("forward", "forward", "forward", "ms"),
        ("forward_backward", "forward_backward", "forward_backward", "ms"),
        ("decode", "decode", "decode", "us"),
        ("decode_loop", "decode", "loop", "us"),
    ):
        a, b = _median(their, key), _median(our, ours_key)
        scale = 1e3 if unit == "ms" else 1e6
        if label != "decode_loop":
            columns[f"{label}_theirs_{unit}"] = a and scale * a
        columns[f"{label}_ours_{unit}"] = b and scale * b
        columns[f"{label}_ratio"] = a / b if a and b else None
    return columns
