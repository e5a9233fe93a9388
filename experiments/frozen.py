"""Parameters that stay as they are: `frozen` of a `Run`.

Patterns are those of a shell over the paths of parameters, `blocks/0/0/mixer/w_in`, where * crosses slashes;
one that matches a branch takes all of it. Blocks that share an array of stacked parameters (equal ones, see
`zoo.blocks`) are frozen together. What is frozen is no argument of the gradient, and the optimiser does not
see it: no moments, no decay, no part in the norm that is clipped.
"""

from fnmatch import fnmatchcase
from typing import Any

import jax

from layers.checks import require
from zoo.pretrained.convert import paths


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")


def check(patterns: tuple[str, ...], params: Any) -> None:
    """ValueError for a pattern that matches no parameter, or where nothing is left to train."""
    known = list(paths(params))
    for pattern in patterns:
        found = any(_matches(path, pattern) for path in known)
        require(found, f"frozen: {pattern!r} matches none of the parameters {', '.join(known)}")
    left = any(not any(_matches(path, p) for p in patterns) for path in known)
    require(left, f"frozen: {', '.join(patterns)} leave nothing to train")


def split(params: Any, patterns: tuple[str, ...]) -> tuple[Any, Any]:
    """`(trained, still)`, two trees like `params` with None in the places of the other."""
    if not patterns:
        return params, None
    leaves, tree = jax.tree.flatten(params)
    still = [any(_matches(path, p) for p in patterns) for path in paths(params)]
    trained, fixed = (
        [leaf if here is kind else None for leaf, here in zip(leaves, still, strict=True)]
        for kind in (False, True)
    )
    return jax.tree.unflatten(tree, trained), jax.tree.unflatten(tree, fixed)


def join(trained: Any, still: Any) -> Any:
    """What was `split`, in one tree again."""
    if still is None:
        return trained
    return jax.tree.map(lambda a, b: b if a is None else a, trained, still, is_leaf=lambda x: x is None)
