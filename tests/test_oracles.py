"""Layers against numbers that other people's code computed (tests/oracles)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from zoo import registry

FOLDER = pathlib.Path(__file__).parent / "oracles" / "fixtures"
PACKAGES = ("transformers", "rwkv", "mingru")  # whose layers they are; the ops' are test_oracles_ops.py's
FIXTURES = sorted(path for package in PACKAGES for path in FOLDER.glob(f"{package}_*.safetensors"))


def load(path):
    """`(Config, parameters, x, y, bound)`; without a bound of their own, theirs ran in float32."""
    with safe_open(path, "numpy") as file:
        names, metadata = file.keys(), file.metadata()
        arrays = {name: jnp.array(file.get_tensor(name), jnp.float64) for name in names}
    x, y = arrays.pop("x"), arrays.pop("y")
    bound = float(metadata.get("bound", 5e-6))
    cfg = registry.config(metadata["layer"], x.shape[-1], **json.loads(metadata["settings"]))
    return cfg, {key.removeprefix("params/"): value for key, value in arrays.items()}, x, y, bound


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_layer_equals_published_code(path):
    """Relative RMS error; in float32 1e-7 to 3e-6 seen."""
    cfg, params, x, y, bound = load(path)
    layer = registry.module(cfg)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), cfg))
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in shapes.items()}
    ours, _, _ = jax.jit(lambda params, x: layer.apply(params, cfg, x))(params, x)
    assert np.linalg.norm(ours - y) <= bound * np.linalg.norm(y)


def test_there_are_fixtures():
    assert len(FIXTURES) >= 10
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2_000_000
