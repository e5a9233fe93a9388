"""Training at 1.3B parameters on machines that are not here: compiled for them, and what that tells.

    python -m experiments.plan                                   # all cases: many minutes of compilation each
    python -m experiments.plan --models gla-1.3b --machines "256 TPU v5e" --write

Needs the packages of constraints-compile.txt on PYTHONPATH (`make compile-kernels` puts them in
.venv/compilers). Memory per device is the compiler's; so are the collectives, read from its HLO. The rest is
arithmetic, which stands in the table's head.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import hlo, timing
from experiments.compile_kernels import ENVIRONMENT
from experiments.config import Run
from experiments.kernel_targets import TARGETS, Target
from experiments.mesh import Mesh
from experiments.step import NoData, Programs
from zoo import lm, presets

TABLE = Path(__file__).parent / "results" / "plan"
LENGTH = 2048
MODELS = ("transformer-1.3b", "mamba2-1.3b", "gla-1.3b", "gated_delta_net-1.3b")
NOTE = """\
One training step: bf16 activations, float32 parameters and AdamW, sequences of {length} tokens, one on each
device, blocks recomputed in the backward pass, the XLA form of every op (kernels are not cut over a mesh).
Nothing ran on these machines. `state_GB` and `temporary_GB` are the compiler's memory per device (parameters,
optimiser and batch; everything else). `collective_GB` is what a device sends in a step by the ring
algorithms, over all collectives of the compiled program, each as often as its loop runs. `compute_ms` = 4/3 x
3 x forward FLOPs / peak, the third being the recomputation. `memory_ms` = (2 x state + 2 x temporaries + 3 x
weights in bf16) / bandwidth. `link_ms` = collective bytes / link bandwidth. `best_ms` is the largest of the
three (all overlapped), `worst_ms` their sum (nothing overlapped)."""


class Machine(NamedTuple):
    """Devices of `target`, wired as `topology`; bytes a second that one sends to the others."""

    target: Target
    topology: str
    mesh: Mesh
    link: float
    source: str

    def devices(self) -> Any:
        return replace(self.target, topology=self.topology).describe().devices


MACHINES = {
    "256 TPU v5e": Machine(
        TARGETS["TPU v5e"], "v5e:16x16", Mesh(fsdp=256), 200e9, "1,600 Gbit/s between chips, Google Cloud"
    ),
    "64 H200": Machine(
        TARGETS["H200"], "8x8x1", Mesh(fsdp=64), 50e9, "400 Gbit/s a GPU between nodes of eight, NVIDIA"
    ),
}


def structs(programs: Programs, rows: int) -> tuple[Any, dict[str, Any]]:
    """The state and a batch of language, as structs where they would lie."""
    batch = {name: jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32) for name in ("tokens", "targets")}
    places = programs.placement.of_batch(batch)
    return programs.template(), {name: x.update(sharding=places[name]) for name, x in batch.items()}


def row(name: str, where: str) -> dict[str, Any]:
    """Compile a preset for a machine, and say what that tells."""
    machine, model = MACHINES[where], presets.model(name)
    rows = machine.mesh.devices
    run = Run(model=model, data=NoData(), batch_size=rows, compute_dtype="bfloat16", mesh=machine.mesh)
    programs = Programs(run, machine.devices())
    start = time.perf_counter()
    program = programs.step.lower(*structs(programs, rows)).compile()
    seconds = time.perf_counter() - start
    memory: Any = program.memory_analysis()
    sent = hlo.collectives(str(program.as_text()), rows)
    return figures(
        name, where, model, memory.argument_size_in_bytes, memory.temp_size_in_bytes, sent, seconds
    )


def figures(
    name: str, where: str, model: lm.Config, state: float, temporary: float, sent: list, seconds: float
) -> dict[str, Any]:
    """The row of a case from its memory in bytes, its collectives and the seconds to compile it."""
    machine = MACHINES[where]
    compute = 4 * lm.flops_per_token(model, LENGTH) * LENGTH / machine.target.flops
    traffic = 2 * state + 2 * temporary + 3 * 2 * lm.param_count(model)
    link = sum(collective.sent for collective in sent)
    times = {
        "compute_ms": 1e3 * compute,
        "memory_ms": 1e3 * traffic / machine.target.bandwidth,
        "link_ms": 1e3 * link / machine.link,
    }
    by_kind = {kind: sum(c.sent for c in sent if c.kind == kind) / 1e9 for kind in hlo.KINDS}
    return {
        "model": name,
        "machine": where,
        "mesh": str(machine.mesh),
        "parameters": lm.param_count(model),
        "state_GB": state / 1e9,
        "temporary_GB": temporary / 1e9,
        "collective_GB": link / 1e9,
        **by_kind,
        **times,
        "best_ms": max(times.values()),
        "worst_ms": sum(times.values()),
        "compile_s": seconds,
    }


def _case(name: str, where: str) -> dict[str, Any] | None:
    """`row` in a process of its own, which has the compilers' settings and may die of a compiler."""
    command = [sys.executable, "-m", "experiments.plan", "--worker", "--models", name, "--machines", where]
    environment = {**os.environ, **ENVIRONMENT, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}, {where}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _write(rows: list[dict[str, Any]]) -> None:
    """The table with these rows, and those of other cases that it has."""
    names = [(made["model"], made["machine"]) for made in rows]
    old = [made for made in timing.kept(TABLE, [])[0] if (made["model"], made["machine"]) not in names]
    jax_version, libtpu = (importlib.metadata.version(package) for package in ("jax", "libtpu"))
    head = (
        f"`python -m experiments.plan --write`, jax {jax_version}, libtpu {libtpu}, {datetime.date.today()}."
    )
    peaks = "; ".join(
        f"{name}: {m.target.flops / 1e12:,.0f} TFLOP/s, {m.target.bandwidth / 1e9:,.0f} GB/s of memory "
        f"({m.target.source}), {m.link / 1e9:,.0f} GB/s of link ({m.source})"
        for name, m in MACHINES.items()
    )
    timing.write(
        sorted(old + rows, key=lambda made: (made["machine"], made["model"])),
        TABLE,
        [head, NOTE.format(length=f"{LENGTH:,}").replace("\n", " "), f"Peaks: {peaks}."],
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.plan")
    parser.add_argument("--models", default=",".join(MODELS), help="presets, separated by commas")
    parser.add_argument("--machines", default=",".join(MACHINES), help=f"some of: {', '.join(MACHINES)}")
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}.csv and .md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.machines.split(",")) - MACHINES.keys())
    if unknown:
        parser.error(f"no machine {', '.join(unknown)}; choose from {', '.join(MACHINES)}")
    if options.worker:
        print(json.dumps(row(options.models, options.machines)))
        return 0
    cases = [(name, where) for where in options.machines.split(",") for name in options.models.split(",")]
    rows = []
    for name, where in cases:
        made = _case(name, where)
        if made:
            print(timing.line(made), flush=True)
            rows.append(made)
            if options.write:
                _write(rows)
    return int(len(rows) < len(cases))


if __name__ == "__main__":
    sys.exit(main())
