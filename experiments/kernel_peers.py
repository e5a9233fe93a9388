"""The same work in flash-linear-attention's Triton kernels (fla-core): same process, same arrays.

    python -m experiments.kernel_peers NUMBER     # choose the tiles of one function at one head size, ahead

torch, triton and fla-core are imported only here, and only where they are installed and see a GPU. Arrays are
handed over by dlpack, without a copy. fla's kernels choose among tiles by trying them, once for each head
size, which takes minutes of compilation; `tuners` starts that in processes of their own, and fla keeps the
choice on the disk.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.kernel_cases import VARIANTS, Case, Sizes

PACKAGES = ("fla-core", "torch", "triton")
TUNING_LENGTH = 512


@dataclass(frozen=True)
class Peer:
    """A function, what it calls our arguments (others are made of them), and what else it is told."""

    module: str
    function: str
    arguments: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Callable] = field(default_factory=dict)

    @property
    def name(self) -> str:
        told = ", ".join(k if v is True else f"{k}={v}" for k, v in self.settings.items() if k != "scale")
        return f"fla {self.function}" + (f" ({told})" if told else "")


PLAIN = {"q": "q", "k": "k", "v": "v", "g": "log_decay"}
DELTA = PLAIN | {"beta": "beta"}
# Queries arrive scaled. RWKV-7's own decays are above e^{-0.6065}, which lets its kernel take longer chunks.
UNSCALED: dict[str, Any] = {"scale": 1.0}
RWKV7 = {"r": "q", "w": "log_decay", "k": "k", "v": "v", "a": "a", "b": "b"}
PEERS = {
    "gated_linear_attention, scalar decay": [
        Peer("fla.ops.simple_gla", "chunk_simple_gla", PLAIN, UNSCALED),
    ],
    "gated_linear_attention, channel decay": [Peer("fla.ops.gla", "chunk_gla", PLAIN, UNSCALED)],
    "gated_delta_rule, scalar decay": [
        Peer("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", DELTA, UNSCALED),
    ],
    "gated_delta_rule, channel decay": [
        Peer("fla.ops.kda", "chunk_kda", DELTA, UNSCALED),
        Peer("fla.ops.kda", "chunk_kda", DELTA, UNSCALED | {"safe_gate": True}),
    ],
    "dplr, RWKV-7": [Peer("fla.ops.rwkv7", "chunk_rwkv7", RWKV7, UNSCALED | {"lower_bound": -0.6065})],
    "diagonal_scan, real": [
        Peer("fla.ops.hgrn", "chunk_hgrn", {"x": "b"}, made={"g": lambda given: given["a"].log()}),
    ],
    "short_conv, 4 taps": [
        Peer(
            "fla.modules.causal_conv1d",
            "causal_conv1d",
            {"x": "x"},
            made={"weight": lambda given: given["weight"].t().contiguous()},
        ),
    ],
}


def missing() -> str | None:
    """Why fla cannot run here, or None."""
    for name in ("torch", "triton", "fla"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


def find(case: Case, name: str) -> Peer:
    return next(peer for peer in PEERS[case.variant.name] if peer.name == name)


class Call:
    """A peer's function on the arguments of a case; gradients in the order of the case's arguments."""

    def __init__(self, peer: Peer, names: Sequence[str], arguments: Sequence[Any], cotangent: Any):
        import torch

        self._torch, self._peer = torch, peer
        given = dict(zip(names, map(torch.from_dlpack, arguments), strict=True))
        tensors = {name: given[ours] for name, ours in peer.arguments.items()}
        tensors |= {name: make(given) for name, make in peer.made.items()}
        self._tensors = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        self._cotangent = torch.from_dlpack(cotangent)
        self._run = getattr(importlib.import_module(peer.module), peer.function)
        self._order = [name for ours in names for name, given in peer.arguments.items() if given == ours]

    def forward(self) -> Any:
        with self._torch.no_grad():
            return self._run(**self._tensors, **self._peer.settings)[0]

    def gradient(self) -> tuple[Any, tuple[Any, ...]]:
        """Output, and gradients of the arguments that are ours."""
        out = self._run(**self._tensors, **self._peer.settings)[0]
        leaves = list(self._tensors.values())
        found = dict(zip(self._tensors, self._torch.autograd.grad(out, leaves, self._cotangent), strict=True))
        return out, tuple(found[name] for name in self._order)

    def shared(self, names: Sequence[str]) -> list[int]:
        """Which of the case's arguments `gradient` has gradients of."""
        return [i for i, name in enumerate(names) if name in self._peer.arguments.values()]


def seconds(run: Callable, budget: float, repeats: int) -> tuple[float, str]:
    """Median seconds of a call on the device, and whether replayed as a CUDA graph or launched one by one."""
    import torch

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return _timed(graph.replay, budget, repeats), "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        return _timed(run, budget, repeats), "launched"


def _timed(run: Callable, budget: float, repeats: int) -> float:
    """Between events around as many calls as fit in the budget of one repeat."""
    import torch

    def once(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    once(1)
    calls = max(1, min(200, int(budget / max(once(2), 1e-6))))
    return sorted(once(calls) for _ in range(repeats))[repeats // 2]


def to_tune() -> list[tuple[str, Sizes]]:
    """Every variant with a peer, at every number of channels: a short piece of its shape."""
    chosen: dict[tuple[str, int], Sizes] = {}
    for name in PEERS:
        for sizes in VARIANTS[name].shapes:
            chosen.setdefault((name, sizes.D), sizes._replace(B=1, T=min(sizes.T, TUNING_LENGTH)))
    return [(name, sizes) for (name, _), sizes in chosen.items()]


def tuners(environment: dict[str, str]) -> list[subprocess.Popen]:
    """Processes that tune, one per entry of `to_tune`: all at once, one per core of a server with a GPU."""
    quiet, known = subprocess.DEVNULL, os.environ | environment
    command = [sys.executable, "-m", "experiments.kernel_peers"]
    return [
        subprocess.Popen([*command, str(number)], env=known, stdout=quiet, stderr=quiet)
        for number in range(len(to_tune()))
    ]


def tune(number: int) -> None:
    """One forward and backward of every peer of a variant at one head size, on arrays of torch's own."""
    import jax.numpy as jnp

    name, sizes = to_tune()[number]
    case = Case(VARIANTS[name], sizes, "float32" if name.startswith("diagonal") else "bfloat16")
    arguments = case.arguments()
    cotangent = jnp.ones(case.output().shape, case.output().dtype)
    for peer in PEERS[name]:
        Call(peer, case.names(), arguments, cotangent).gradient()


if __name__ == "__main__":
    tune(int(sys.argv[1]))
