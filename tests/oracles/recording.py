"""What the generators of op fixtures share: float64, inputs by name, gradients of a random functional."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import sys
import types
import zlib
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.overrides import TorchFunctionMode

FIXTURES = Path(__file__).parent / "fixtures"
# More than one chunk and a multiple of nothing.
B, T, H, K, V = 2, 37, 2, 4, 3


class Double(TorchFunctionMode):
    """Reference code casts to float32; under this mode every such cast is one to float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


@functools.cache
def root(package: str) -> Path:
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def load(name: str):
    """A module of an installed package, without the `__init__` of the packages it is in: they want a GPU."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(root(parts[0]).joinpath(*parts[1:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


def absent(*names: str):
    """Stand-ins for modules that the reference code imports and never calls."""
    return mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names})


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def log_decay(*shape):
    return -torch.nn.functional.softplus(torch.randn(*shape) - 1)


# One line for every name a reference function below may ask for.
DRAW = {
    "q": lambda: torch.randn(B, T, H, K),
    "k": lambda: unit(B, T, H, K),
    "v": lambda: torch.randn(B, T, H, V),
    "p": lambda: unit(B, T, H, K),
    "beta": lambda: torch.rand(B, T, H),
    "log_decay": lambda: log_decay(B, T, H),
    "log_decays": lambda: log_decay(B, T, H, K),
    "log_momentum": lambda: log_decay(B, T, H),
    "state": lambda: torch.randn(B, H, K, V),
}


def record(name: str, run, source: str, licence: str, draw=None, *, double=True, silent=(), **settings):
    """Run `run(**inputs)`, which gives a dict, and write inputs, outputs, cotangents and gradients.

    `inputs` are drawn by the names of the parameters of `run`. They and the cotangents are float32 numbers;
    everything else is computed and kept in float64. The cotangents of `silent` outputs are 0.
    """
    torch.manual_seed(zlib.crc32(name.encode()))
    draw = DRAW | (draw or {})
    inputs = {key: draw[key]().float() for key in inspect.signature(run).parameters}
    leaves = {key: x.double().requires_grad_() for key, x in inputs.items()}
    torch.set_default_dtype(torch.float64)
    with Double() if double else contextlib.nullcontext():
        # Clones: some references write into their arguments.
        outputs = run(**{key: x.clone() for key, x in leaves.items()})
    cotangents = {key: torch.randn_like(y).float() * (key not in silent) for key, y in outputs.items()}
    total = sum((y * cotangents[key].double()).sum() for key, y in outputs.items())
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    torch.set_default_dtype(torch.float32)
    assert all(y.dtype == torch.float64 for y in outputs.values()), "a cast to float32 was missed"
    groups = {"input": inputs, "output": outputs, "cotangent": cotangents, "gradient": gradients}
    arrays = {f"{group}/{key}": x for group, named in groups.items() for key, x in named.items()}
    write(name, {key: x.detach().numpy() for key, x in arrays.items()}, source, licence, settings)


def write(name: str, arrays: dict, source: str, licence: str, settings: dict):
    package, function = source.split("::")
    metadata = {
        "source": f"{package} {version(package)} {function}",
        "licence": licence,
        **{key: str(value) for key, value in settings.items()},
    }
    FIXTURES.mkdir(exist_ok=True)
    path = FIXTURES / f"{name}.safetensors"
    save_file({key: np.ascontiguousarray(x) for key, x in arrays.items()}, path, metadata)
    size = max(np.abs(x).max() for key, x in arrays.items() if not key.startswith("input"))
    print(f"{name}: {path.stat().st_size} bytes, up to {size:.1f}")
