"""Feature maps phi of linear attention, of a key itself or of what learned weights make of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class FeatureMap(NamedTuple):
    """`function` maps x `[..., K]`, or with weights what they make of it, to the features."""

    function: Callable[[Array], Array]
    features: int = 1  # their number over K
    columns: int = 0  # of the weights over K; 0 for none
    non_negative: bool = False


def _dpfp(x: Array) -> Array:
    x = jax.nn.relu(jnp.concatenate([x, -x], -1))
    return x * jnp.roll(x, 1, -1)


def _hadamard(x: Array) -> Array:
    a, b = jnp.split(x, 2, -1)
    return a * b


def _hedgehog(x: Array) -> Array:
    return jax.nn.softmax(jnp.concatenate([x, -x], -1))


FEATURE_MAPS = {
    "identity": FeatureMap(lambda x: x),
    "elu+1": FeatureMap(lambda x: jax.nn.elu(x) + 1, non_negative=True),
    "relu": FeatureMap(jax.nn.relu, non_negative=True),
    "relu^2": FeatureMap(lambda x: jnp.square(jax.nn.relu(x)), non_negative=True),
    "silu": FeatureMap(jax.nn.silu),
    "t2r": FeatureMap(jax.nn.relu, columns=1, non_negative=True),
    "hedgehog": FeatureMap(_hedgehog, features=2, columns=1, non_negative=True),
    "dpfp": FeatureMap(_dpfp, features=2, non_negative=True),
    "hadamard": FeatureMap(_hadamard, columns=2),
}
