"""Generation against the length of the context: ours, and transformers' with the same weights.

    python -m experiments.bench generate --peer-python oracle/bin/python
    python -m experiments.bench generate --small            # in a minute or two: does it run?

A row is a model of random weights in float32 and a context: a prompt of so many random tokens, then tokens
after it, greedy, batch 1. Where transformers has the model, it makes the weights and saves them, and both
sides read that folder; `same_tokens` says how many of the tokens they write are the same before one is not.
Each side has a process for every model, which warms up (ours compiles, theirs finds its best number of
threads); then they take turns: each reads the prompt, and ROUNDS times theirs writes some tokens, then ours.
Times are medians over rounds, `ratio` is the median of theirs over ours of the same round, `least` and `most`
its range; `busy_ratio` is the same of the seconds that all cores worked, on which other programs tell less.
Memory is the highest of the process beyond the model, compiled programs included. Ours reads in
pieces of PIECE tokens; `streamed` is with text every 8 tokens.

CASES has two sizes: one for the speed of writing, and a small one for the length. A side has no longer
contexts where one would take longer than PATIENCE, going by the last, or more memory than
`peers/resident.py` allows. What a peer needs to run is said in tests/oracles/README.md.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import bench_peers
from experiments.bench_peers import Peer
from experiments.timing import line, machine, write
from zoo import registry

PIECE, PATIENCE = 1024, 100.0
ROUNDS = 7
NONE = "-"  # in the place of a folder
SCRIPT = bench_peers.FOLDER / "transformers_models.py"


class Sizes(NamedTuple):
    width: int = 256
    depth: int = 3
    vocabulary: int = 4096
    tokens: int = 64  # written in a round


USUAL, LONG, SMALL = Sizes(), Sizes(64, 3, 1024), Sizes(64, 3, 97, 8)
CONTEXTS = tuple(1024 * n for n in (1, 16, 128, 1024))  # 1k to 1M
CASES: tuple[tuple[Sizes, tuple[int, ...]], ...] = ((USUAL, (1024,)), (LONG, CONTEXTS))
SMALL_CASES = ((SMALL, (32, 64)),)

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


class Side:
    """Ours or theirs for one model: a process that answers in JSON lines, until it fails or is ended."""

    def __init__(self, command: Sequence[Any] | None):
        self._process: subprocess.Popen[str] | None = None
        self._about: dict[str, Any] = {}
        self._answers: list[dict[str, Any]] = []
        if command is None:
            return
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={"OMP_WAIT_POLICY": "passive", **os.environ},  # threads that wait leave the cores to others
        )
        self._about = self.hear() or {}

    def begin(self) -> None:
        """A row of its own."""
        self._answers = []

    def hear(self) -> dict[str, Any] | None:
        """The next answer; None, and the last complaint, where it fails or takes too long."""
        process = self._process
        if process is None:
            return None
        assert process.stdout is not None
        timer = threading.Timer(3 * PATIENCE, process.kill)
        timer.start()
        text = process.stdout.readline()
        timer.cancel()
        if text:
            self._answers.append(json.loads(text))
            return self._answers[-1]
        self._complaints.seek(0)
        lines = self._complaints.read().strip().splitlines()
        print((lines or [f"ended by {process.wait()}"])[-1][:200], flush=True)
        self.end()
        return None

    def ask(self) -> None:
        """For the answer to one line."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # which `hear` says
                self._process.stdin.write("on\n")
                self._process.stdin.flush()
        self.hear()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._complaints.close()
        self._process = None

    def said(self, key: str) -> list[Any]:
        """Every answer to `key` in this row; none of a side that did not come to its end."""
        whole = any("memory" in answer for answer in self._answers)
        found = [answer[key] for answer in [self._about, *self._answers] if key in answer]
        return found if whole else []


def _in_turns(*sides: Side) -> None:
    """One row."""
    for side in sides:
        side.begin()
    for _ in range(1 + ROUNDS):
        for side in sides:
            side.ask()
    for side in sides:
        side.hear()


def _same(theirs: Side, ours: Side) -> str | None:
    """How many tokens are the same before the first that is not."""
    first, second = (
        [t for some in [*side.said("first"), *side.said("tokens")] for t in some] for side in (theirs, ours)
    )
    pairs = list(zip(first, second, strict=False))
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return f"{same} of {len(pairs)}" if pairs else None


def _row(
    name: str, sizes: Sizes, context: int, theirs: Side, ours: Side, packages: str | None
) -> dict[str, Any]:
    def only(side: Side, key: str, scale: float = 1.0) -> float | None:
        return next((value / scale for value in side.said(key)), None)

    def per_second(side: Side, key: str) -> float | None:
        return 1 / statistics.median(side.said(key)) if side.said(key) else None

    def ratios(key: str) -> list[float]:
        return [a / b for a, b in zip(theirs.said(key), ours.said(key), strict=False)]

    wall, busy = ratios("decode"), ratios("busy")
    return {
        "model": name,
        "width": sizes.width,
        "depth": sizes.depth,
        "context": context,
        "tokens_per_second": per_second(ours, "decode"),
        "streamed_per_second": per_second(ours, "streamed"),
        "theirs_per_second": per_second(theirs, "decode"),
        "ratio": statistics.median(wall) if wall else None,
        "least": min(wall, default=None),
        "most": max(wall, default=None),
        "busy_ratio": statistics.median(busy) if busy else None,
        "same_tokens": _same(theirs, ours),
        "prefill_s": only(ours, "prefill"),
        "theirs_prefill_s": only(theirs, "prefill"),
        "memory_MB": only(ours, "memory", 1e6),
        "theirs_memory_MB": only(theirs, "memory", 1e6),
        "state_MB": only(ours, "state", 1e6),
        "parameters": only(ours, "parameters"),
        "theirs_parameters": only(theirs, "parameters"),
        "theirs_threads": only(theirs, "threads"),
        "theirs": packages,
    }


def _weights(name: str, sizes: Sizes, python: str, folder: str) -> None:
    """Have the peer make the model and save it in `folder`."""
    command = [python, SCRIPT, "save", name, sizes.width, sizes.depth, sizes.vocabulary, folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr.splitlines() or ['no weights'])[-1]}")


def _rows(name: str, sizes: Sizes, contexts: Sequence[int], found: tuple[str, str] | None, folder: str):
    """Of contexts that share their processes."""
    common = [name, sizes.width, sizes.depth, sizes.vocabulary, sizes.tokens, ROUNDS, folder, *contexts]
    theirs = Side([found[0], SCRIPT, *common] if found else None)
    ours = Side([sys.executable, "-m", "experiments.generate_worker", *common])
    for context, following in itertools.pairwise([*contexts, 0]):
        _in_turns(theirs, ours)
        if theirs.said("decode") or ours.said("decode"):
            row = _row(name, sizes, context, theirs, ours, found and found[1])
            print(line(row), flush=True)
            yield row
        for side in (theirs, ours):
            seconds = side.said("prefill")
            if not seconds or seconds[0] * following / context > PATIENCE:
                side.end()
    theirs.end()
    ours.end()


def rows(name: str, sizes: Sizes, contexts: Sequence[int], pythons: Sequence[str]) -> list[dict]:
    """Of one model, shortest context first; theirs where one of the interpreters `pythons` has it."""
    found = bench_peers.find(PEERS[name], pythons) if name in PEERS else None
    contexts = sorted(contexts)
    # Full attention is another program for another length.
    shared = [[context] for context in contexts] if name == "attention" else [contexts]
    with tempfile.TemporaryDirectory() as folder:
        if found:
            _weights(name, sizes, found[0], folder)
        place = folder if found else NONE
        return [row for some in shared for row in _rows(name, sizes, some, found, place)]


def bench(
    names: Sequence[str],
    contexts: Sequence[int] | None,
    pythons: Sequence[str],
    out: Path,
    note: str,
    small: bool = False,
) -> int:
    """The table `generate` in `out`; 1 if some model has no row at all."""
    cases = SMALL_CASES if small else CASES
    if contexts:
        cases = ((cases[0][0], tuple(contexts)),)
    load = f"load {os.getloadavg()[0]:.1f} of other work when it began"
    what = f"float32, greedy, batch 1, {cases[0][0].tokens} tokens in each of {ROUNDS} rounds"
    head = f"{note}: {what}; {load}. {machine()}."
    table: list[dict] = []
    missing = 0
    for sizes, lengths in cases:
        for name in names:
            new = rows(name, sizes, lengths, pythons)
            missing |= not new
            table += new
            if table:
                write(table, out / ("generate_small" if small else "generate"), [head])
    return int(missing)
