"""Language models on sequences cut over devices: each holds T / P tokens, forward and backward.

    mesh = jax.make_mesh((2, 4), ("data", "sequence"))
    logits, state, aux = sequence.apply(params, cfg, tokens, mesh=mesh)

Values and gradients are those of `lm.apply` on one device. `python -m zoo.sequence` says how each layer
does it (`shards.way`).
"""

from collections.abc import Callable

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec, get_abstract_mesh

from layers.checks import require
from layers.common import Params
from pallas_kernels import sequence
from zoo import lm, registry, shards

AXIS = "sequence"


def _devices(mesh: Mesh | AbstractMesh, axis: str, rows: tuple[str, ...], tokens: Array) -> sequence.Axis:
    """The axis in use. Raises ValueError where the mesh lacks one or does not divide the tokens."""
    for name in (axis, *rows):
        require(name in mesh.shape, f"no axis {name!r} in a mesh of {', '.join(mesh.shape) or 'no axes'}")
    size = mesh.shape[axis]
    require(
        tokens.shape[1] % size == 0,
        f"a sequence of {tokens.shape[1]} tokens is not divided by the {size} devices of mesh axis {axis!r}",
    )
    for name in rows:
        ok = tokens.shape[0] % mesh.shape[name] == 0
        require(ok, f"{tokens.shape[0]} rows are not divided by the {mesh.shape[name]} of mesh axis {name!r}")
    return sequence.Axis(axis, size, rows)


def hidden(
    params: Params,
    cfg: lm.Config,
    tokens: Array,
    state=None,
    *,
    mesh: Mesh | None = None,
    axis: str = AXIS,
    rows: tuple[str, ...] = (),
    then: Callable | None = None,
    given: tuple[Array, ...] = (),
    keep_state: bool = True,
    segment_ids: Array | None = None,
    implementation: str | None = None,
    dtype=None,
):
    """`lm.hidden` with time cut over the mesh axis `axis`: `tokens [B,T] -> (h [B,T,D], state, aux)`.

    With `then`, in place of h what `then(params, h, *given)` makes of each shard of h and of `given`
    (`[B,T,...]` arrays, targets say): arrays `[B,T,...]`, losses say, so that logits stay where they are.

    To be called under `jax.jit`, in a training step; `mesh` is the ambient one unless given. `h` lies on the
    devices as the tokens do, state and aux on all. Other axes of the mesh stay XLA's to partition over,
    except `rows`, which are cut by hand as well: Pallas kernels need that of every axis of more than one
    device. Without `keep_state` the state is None; that of full attention is as long as the sequence.

    Raises ValueError for an axis that the mesh does not have or that does not divide T (or B).
    """
    found = _devices(mesh or get_abstract_mesh(), axis, rows, tokens)

    def shard(params, tokens, state, segment_ids, given):
        with sequence.along(found):
            how = {"segment_ids": segment_ids, "implementation": implementation, "dtype": dtype}
            h, state, aux = lm.hidden(params, cfg, tokens, state, **how)
        out = h if then is None else then(params, h, *given)
        return out, found.of_last(state) if keep_state else None, aux

    batch = rows or None
    whole, cut, stacked = PartitionSpec(), PartitionSpec(batch, axis), PartitionSpec(None, batch)
    return jax.shard_map(
        shard,
        mesh=_automatic(mesh),
        in_specs=(whole, cut, stacked, cut, cut),
        out_specs=(cut, stacked, whole),
        axis_names={axis, *rows},
        check_vma=False,
    )(params, tokens, state, segment_ids, given)


def _automatic(mesh: Mesh | None) -> Mesh | None:
    """The same devices, for arrays whose place is XLA's to find."""
    return mesh and Mesh(mesh.devices, mesh.axis_names)


def apply(params: Params, cfg: lm.Config, tokens: Array, state=None, **how):
    """`tokens [B,T] -> (logits [B,T,vocab], state, aux)`; arguments as of `hidden`."""
    h, state, aux = hidden(params, cfg, tokens, state, **how)
    return lm.logits(params, cfg, h), state, aux


def table() -> str:
    """Markdown: every layer of the registry and how it works along a cut sequence."""
    rows = [(name, shards.way(registry.config(name, 64))) for name in registry.LAYERS]
    return "\n".join(["| layer | way |", "|---|---|", *(f"| `{name}` | {way} |" for name, way in rows)])


if __name__ == "__main__":
    print(table())
