"""Does every layer train on a mesh as it does on one device?

    python -m experiments.scale_check                          # all layers, on eight simulated devices
    python -m experiments.scale_check --layers gla,mamba2 --meshes "tensor=2,sequence=2"
    python -m experiments.scale_check --write                  # and the table of results, row by row

Each layer is trained for 50 steps on one device and on every mesh below, from the same parameters and
batches, in float32. The learning rate is low enough that rounding does not grow from step to step; what is
compared is the loss of the last one. All of it is an hour of compilation on two free cores.
"""

import argparse
import datetime
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from experiments import timing
from experiments.config import Optimizer, Run
from experiments.mesh import ONE_DEVICE, Mesh
from experiments.step import Programs, init_state
from experiments.tasks.recall import RecallData
from zoo import lm, registry

TABLE = Path(__file__).parent / "results" / "scale"
DEVICES, STEPS, RATE, EPS, ALLOWED = 8, 50, 3e-3, 1e-3, 1e-5
MESHES = {
    "data=2": Mesh(data=2),
    "fsdp=2": Mesh(fsdp=2),
    "tensor=2": Mesh(tensor=2),
    "sequence=2": Mesh(sequence=2),
    "data=2 fsdp=2 tensor=2": Mesh(data=2, fsdp=2, tensor=2),
}
FLAGS = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
NOTE = """\
Relative difference of the training loss after {steps} steps to that on one device, for every layer and
mesh: {devices} simulated devices on a CPU, float32, one block of width 32 without an MLP, recall over 32
tokens, 8 sequences a step, AdamW with eps {eps:g} at a learning rate of {rate:g}: so low, and so much, that
rounding does not grow from step to step. `first` and `last` are the losses on one device. More than
{allowed:g} is a fault; an empty cell was not run."""


def run_of(layer: str, mesh: Mesh = ONE_DEVICE) -> Run:
    """The small run of a layer: one block, a few key-value pairs to recall."""
    pattern = (registry.config(layer, 32),)
    model = lm.Config(vocab_size=64, width=32, depth=1, pattern=pattern, mlp="none", remat=False)
    data = RecallData(vocab_size=64, length=32, pairs=4)
    rates = Optimizer(lr=RATE, eps=EPS)
    return Run(model=model, data=data, steps=STEPS, batch_size=8, optimizer=rates, mesh=mesh)


def losses_on(run: Run, state: Any) -> list[float]:
    """The losses of all steps of `run`, which begins with the host's `state`."""
    devices = jax.devices()[: run.mesh.devices]
    programs = Programs(run, devices if len(devices) > 1 else None)
    placed = programs.placement
    places = placed.of_state(state) if placed.mesh else devices[0]
    source, state, losses = run.data.build(), jax.device_put(state, places), []
    for number in range(run.steps):
        batch = placed.batch(source.batch(run.seed, number, run.batch_size))
        state, metrics = programs.step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def difference(run: Run, state: Any, wanted: float) -> float:
    """Relative, of the last loss of `run` to the one `wanted`."""
    return abs(losses_on(run, state)[-1] / wanted - 1)


def row(layer: str, meshes: dict[str, Mesh]) -> dict[str, Any]:
    """What one layer does on one device, and relative differences on the meshes."""
    alone = run_of(layer)
    state = jax.device_get(jax.jit(partial(init_state, alone))(jax.random.key(alone.seed)))
    losses = losses_on(alone, state)
    found = {name: difference(run_of(layer, mesh), state, losses[-1]) for name, mesh in meshes.items()}
    jax.clear_caches()
    return {"layer": layer, "first": losses[0], "last": losses[-1], **found}


def _write(rows: list[dict[str, Any]]) -> None:
    """Rewrite the table with these rows; figures of theirs that it has for other meshes stay."""
    names = {made["layer"]: made for made in rows}
    before = {old["layer"]: old for old in timing.kept(TABLE, [])[0]}
    columns = ("layer", "first", "last", *MESHES)
    known = [before.get(name, {}) | names.get(name, {}) for name in registry.LAYERS if name in before | names]
    head = f"`python -m experiments.scale_check --write`, jax {jax.__version__}, {datetime.date.today()}."
    note = NOTE.format(steps=STEPS, devices=DEVICES, rate=RATE, eps=EPS, allowed=ALLOWED).replace("\n", " ")
    timing.write([{key: made.get(key) for key in columns} for made in known], TABLE, [head, note])


def _chosen(text: str, known: Iterable[str], what: str) -> list[str]:
    """The names in `text`, separated by commas; all without one."""
    names = text.split(",") if text else list(known)
    for name in names:
        if name not in known:
            raise registry.unknown(what, name, known)
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.scale_check")
    parser.add_argument("--layers", default="", help="names from the registry, separated by commas")
    parser.add_argument("--meshes", default="", help=f"some of: {', '.join(MESHES)}")
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}.csv and .md")
    options = parser.parse_args(arguments)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    jax.config.update("jax_platforms", "cpu")
    meshes = {name: MESHES[name] for name in _chosen(options.meshes, MESHES, "mesh")}
    rows = []
    for layer in _chosen(options.layers, registry.LAYERS, "layer"):
        rows.append(row(layer, meshes))
        print(timing.line(rows[-1]), flush=True)
        if options.write:
            _write(rows)
    faults = [made["layer"] for made in rows if not max(made[name] for name in meshes) <= ALLOWED]
    print(f"{len(rows)} layers, {len(faults)} beyond {ALLOWED:g}: {', '.join(faults) or 'none'}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
