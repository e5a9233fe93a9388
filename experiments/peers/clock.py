"""Timing of one peer, in an interpreter that need not have this project; what its scripts share.

    PYTHON SCRIPT.py NAME BATCH LENGTH WIDTH

NAME is a function of the script that takes batch, length and width and gives a `Work`. Prints one JSON line:
median seconds of forward, of forward with backward of a sum of squares (with respect to inputs and
parameters), of one token of decoding at batch 1 (or null), and the number of parameters (or null).
"""

import functools
import importlib
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BUDGET = 5.0  # seconds a measurement may take before it stops repeating
PATIENCE = 60.0  # a first call that took longer is not repeated at all
GROUP = 16  # tokens timed together: what a layer does once a chunk is shared by its tokens
HEADS = 4


@dataclass
class Work:
    """Calls that come back when they are done."""

    forward: Callable
    forward_backward: Callable | None
    step: Callable | None = None  # one token at batch 1
    parameters: int | None = None


@functools.cache
def folder(package):
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def load(module):
    """A module without the `__init__` of the packages it is in: they want a GPU, or more packages."""
    parts = module.split(".")
    root = folder(parts[0])
    for depth in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(root.joinpath(*parts[1:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(module)


def median_seconds(work, repeats=5):
    """After a call to warm up."""
    start = time.perf_counter()
    work()
    first = time.perf_counter() - start
    seconds = []
    while first < PATIENCE and len(seconds) < repeats and sum(seconds) < BUDGET:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds or [first])


def step_seconds(step):
    """Seconds of a token: the median of groups."""

    def group():
        for _ in range(GROUP):
            step()

    return median_seconds(group, repeats=60) / GROUP


def torch_work(run, leaves, step=None, parameters=None):
    """`run` gives a tensor, `leaves` are what it is differentiated by."""
    import torch

    leaves = [leaf.requires_grad_() for leaf in leaves]

    def forward():
        with torch.inference_mode():
            run()

    def backward():
        for leaf in leaves:
            leaf.grad = None
        (run() ** 2).sum().backward()

    def token():
        with torch.inference_mode():
            step()

    return Work(forward, backward, token if step else None, parameters)


def jax_work(run, *arguments, parameters=None):
    """`run` gives an array and is differentiated by all arguments."""
    import jax
    import jax.numpy as jnp

    def loss(*arguments):
        return jnp.sum(run(*arguments) ** 2)

    gradient = jax.value_and_grad(loss, tuple(range(len(arguments))))
    forward, backward = (jax.jit(f).lower(*arguments).compile() for f in (run, gradient))
    return Work(
        lambda: jax.block_until_ready(forward(*arguments)),
        lambda: jax.block_until_ready(backward(*arguments)),
        parameters=parameters,
    )


def main(functions):
    """`functions` are the caller's globals."""
    name, *sizes = sys.argv[1:]
    work = functions[name](*map(int, sizes))
    row = {
        "forward": median_seconds(work.forward),
        "forward_backward": work.forward_backward and median_seconds(work.forward_backward),
        "decode": work.step and step_seconds(work.step),
        "parameters": work.parameters,
    }
    print(json.dumps(row))
