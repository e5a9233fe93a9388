"""Chains of a layer's verbs, with gradients, at the price of one program per verb and shape.

Nearly all the time of these tests is compilation. So a verb is compiled once together with its pull-back, and
what chains them (cutting, resetting, summing) is NumPy.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = 1e-9


def smooth(array):
    return jnp.issubdtype(array.dtype, jnp.inexact)


def pulled(run, args, cotangents):
    """`run(*args)`, and `cotangents(outputs)` pulled back through it.

    Integers have zeros for gradients, and what is given as their cotangent counts for nothing.
    """
    out, pull = jax.vjp(run, *args)
    cotangents = jax.tree.map(
        lambda o, c: c if smooth(o) else np.zeros(o.shape, jax.dtypes.float0), out, cotangents(out)
    )
    gradients = pull(cotangents)
    return out, jax.tree.map(lambda a, g: g if smooth(a) else jnp.zeros_like(a), args, gradients)


def values_and_gradients(run, *args):
    """`run(*args)` and gradients in every argument, from a generic direction; one program."""
    directions = functools.partial(jax.tree.map, lambda o: jnp.asarray(weights(o)))
    return jax.jit(lambda *args: pulled(run, args, directions))(*args)


def with_gradients(run):
    """`run(params, x, state, ids)` as a program `(args, ids, cotangents) -> (outputs, gradients)`."""
    return jax.jit(
        lambda args, ids, cotangents: pulled(lambda *args: run(*args, ids), args, lambda _: cotangents)
    )


class Link(NamedTuple):
    verb: Callable  # with_gradients(apply or step)
    x: Any  # [B, T, D], or [B, D] for one step
    ids: Any = None  # segment ids of the tokens
    fresh: Any = None  # [B] bool: a new document begins in these rows, from an empty state


class Result(NamedTuple):
    outputs: tuple  # y [B, T, D] of all links together, the last state
    gradients: tuple  # in the parameters, in x [B, T, D], in the first state


def weights(like, seed=0):
    """A direction without symmetries, of the shape and dtype of `like`."""
    values = np.cos(0.7 * np.arange(like.size) + seed).reshape(like.shape)
    return values.astype(like.dtype) * (1 + 0.5j if jnp.iscomplexobj(like) else 1)


def restart(fresh, state, empty):
    """Rows of `state` that are `fresh` are those of `empty`."""
    if fresh is None:
        return state

    def one(s, e):
        return np.where(np.reshape(fresh, (-1, *[1] * (s.ndim - 1))), e, s)

    return jax.tree.map(one, state, empty)


def along_time(y):
    y = np.asarray(y)
    return y if y.ndim == 3 else y[:, None]


def through(links, params, state, dy=None, dstate=None, empty=None):
    """Run `links` one after the other and pull `(dy, dstate)`, if None generic directions, back through."""
    nothing = functools.partial(jax.tree.map, np.zeros_like)
    states, ys = [], []
    for link in links:
        states.append(restart(link.fresh, state, empty))
        args = (params, link.x, states[-1])
        (y, state), _ = link.verb(args, link.ids, nothing((link.x, states[-1])))
        ys.append(along_time(y))
    outputs = np.concatenate(ys, 1), state
    dy = weights(outputs[0]) if dy is None else dy
    dstate = jax.tree.map(weights, state) if dstate is None else dstate
    dparams, dxs = nothing(params), []
    cuts = np.cumsum([y.shape[1] for y in ys])[:-1]
    for link, state, cotangent in zip(links[::-1], states[::-1], np.split(dy, cuts, 1)[::-1], strict=True):
        cotangents = cotangent.reshape(link.x.shape).astype(link.x.dtype), dstate
        _, (own, dx, dstate) = link.verb((params, link.x, state), link.ids, cotangents)
        dparams = jax.tree.map(np.add, dparams, own)
        dxs.append(along_time(dx))
        dstate = restart(link.fresh, dstate, nothing(dstate))
    return Result(outputs, (dparams, np.concatenate(dxs[::-1], 1), dstate))


def assert_close(actual, desired, tolerance=TOLERANCE):
    """Every leaf, absolutely and relatively."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
