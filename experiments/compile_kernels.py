"""Every kernel through the real compilers of its targets, on a CPU.

    python -m experiments.compile_kernels               # as CI does: `usual` below says which programs
    python -m experiments.compile_kernels --all         # every shape of the benchmark: half an hour
    python -m experiments.compile_kernels --all --write # and the tables of results, which hold timings
    python -m experiments.compile_kernels --ops dplr --targets H200    # some ops, some targets

Needs the packages of constraints-compile.txt. Fails, with a line per fault, where a compiler does not take a
kernel (an operation that the target does not have, more memory on the chip than there is) and where a kernel
of bf16 spills registers. Where an op refuses a case with a reason ("takes heads of at most 128 channels"),
XLA runs in practice: that is told, and no fault.
"""

import argparse
import datetime
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from experiments import kernel_targets
from experiments.kernel_cases import DIRECTIONS, Case, cases
from experiments.kernel_targets import PASSES, TARGETS
from experiments.kernel_workers import Worker, one_line, shared, work
from experiments.timing import kept, write

TABLE = Path(__file__).parent / "results" / "kernels_static"
PROCESSES = 2
MAIN_TARGETS = ("TPU v5e", "H200")
PACKAGES = ("jax", "libtpu", "jax-cuda13-plugin")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_RESOURCES": "1",
    # libtpu looks for the machine it is on unless told, and for others that use it.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
NOTE = """\
Static figures of the kernels, from compiling them ahead of time: no kernel ran on its hardware for this
table. FLOPs and bytes are those of the work (`experiments/kernel_cases.py`), not of the kernel. `on_chip_kB`
is the largest kernel's VMEM on a TPU, shared memory on a GPU; `registers` (of a thread) and `spilled_B` are
ptxas's, the largest of a program, and TPU compilers tell none; `temporary_MB` is the main memory that the
program takes besides arguments and results; `compile_s` counts from tracing, on two CPU cores that do other
work too. `bound_us` is the roofline that published peaks imply: the longer of FLOPs over peak (a product of
float32 counts as {tpu} of bf16 on a TPU, {gpu} on a GPU; what is done entry by entry has no published peak
and counts nothing) and bytes over bandwidth. Empty cells are unknown."""


class Job(NamedTuple):
    case: Case
    direction: str
    target: str

    def __str__(self) -> str:
        return f"{self.case.name}, {self.direction}, {self.target}"


def first_of_its_size(case: Case) -> bool:
    """Batch, heads and length only change a kernel's grid: one shape per head size has them all."""
    return case.sizes == next(sizes for sizes in case.variant.shapes if sizes.D == case.sizes.D)


def jobs() -> list[Job]:
    """What there are kernels for: shapes of the benchmark, and beside bf16 a float32 of every head size."""
    named = cases()
    beside = [case for case in cases("float32") if case not in named and first_of_its_size(case)]
    return [
        Job(case, direction, name)
        for case in named + beside
        for name, target in TARGETS.items()
        if target.platform in case.variant.platforms
        for direction in DIRECTIONS
    ]


def usual(job: Job) -> bool:
    """Whether CI compiles it: one shape per head size.

    Forward with backward has all kernels but one, and the widest heads take the most of a chip: these go to
    all targets. One TPU and the GPU also get the forward kernel that keeps nothing, other heads, and float32
    beside bf16.
    """
    case = job.case
    if not first_of_its_size(case):
        return False
    widest = max(sizes.D for sizes in case.variant.shapes) == case.sizes.D
    both, main = job.direction == DIRECTIONS[1], job.target in MAIN_TARGETS
    if case not in cases():  # float32 beside bf16
        return widest and both and main
    return (both and (main or widest)) or (main and widest)


def compile_one(job: Job) -> dict:
    """Figures of one job, or why there are none."""
    start = time.perf_counter()
    try:
        program = kernel_targets.compiled(job.case, job.direction, TARGETS[job.target])
    except Exception as error:  # compilers raise anything, and every fault is a line of the report
        refusal = f"{job.case.variant.op}: implementation "
        kind = "refused" if str(error).startswith(refusal) else "error"
        return {kind: str(error).removeprefix(refusal) if kind == "refused" else one_line(error)}
    memory = program.memory_analysis()
    return {
        "compile_s": time.perf_counter() - start,
        "on_chip": kernel_targets.vmem_bytes(program),
        "temporary": memory.temp_size_in_bytes if memory else None,
    }


def _finish(answer: dict, printed: str) -> dict:
    """With what a GPU's compiler printed."""
    if "compile_s" in answer and not kernel_targets.gpu_figures_complete(printed):
        answer = answer | {"again": True}
    return answer | {k: v for k, v in kernel_targets.gpu_figures(printed).items() if v is not None}


def fault(job: Job, answer: dict) -> str | None:
    if "error" in answer:
        return answer["error"]
    spilled = answer.get("spilled") or 0
    if job.case.dtype == "bfloat16" and spilled:
        return f"spills {spilled} bytes of registers"
    return None


def bound(job: Job) -> tuple[float, str]:
    """Seconds of the roofline, and what bounds."""
    case, target = job.case, TARGETS[job.target]
    passes = PASSES[target.platform] if case.dtype == "float32" else 1
    products = case.flops(job.direction) * passes / target.flops if case.variant.matrix else 0.0
    return max((products, "compute"), (case.bytes(job.direction) / target.bandwidth, "memory"))


def row(job: Job, answer: dict) -> dict:
    case = job.case
    seconds, by = bound(job)
    on_chip, temporary = answer.get("on_chip"), answer.get("temporary")
    return {
        "op": case.variant.name,
        "shape": str(case.sizes),
        "dtype": case.dtype,
        "direction": job.direction,
        "target": job.target,
        "GFLOP": case.flops(job.direction) / 1e9,
        "MB": case.bytes(job.direction) / 1e6,
        "on_chip_kB": None if on_chip is None else on_chip / 1e3,
        "registers": answer.get("registers"),
        "spilled_B": answer.get("spilled"),
        "temporary_MB": None if temporary is None else temporary / 1e6,
        "compile_s": answer.get("compile_s"),
        "bound_us": 1e6 * seconds,
        "bound_by": by,
        "outcome": answer.get("refused") or fault(job, answer) or "compiled",  # spills have their column
    }


def run(chosen: Sequence[Job]) -> list[dict]:
    """Answers of all jobs, in their order, with a line for what did not compile on the way."""
    answers: dict[int, dict] = {}

    def tell(number: int, answer: dict) -> None:
        answers[number] = answer
        wrong, refused = fault(everything[number], answer), answer.get("refused")
        if wrong or refused:
            print(f"{everything[number]}: {f'FAULT: {wrong}' if wrong else refused}", flush=True)
        if len(answers) % 20 == 0:
            print(f"{len(answers)} of {len(chosen)} programs", flush=True)

    everything = jobs()
    numbers = [everything.index(job) for job in chosen]
    command = [sys.executable, "-m", "experiments.compile_kernels", "--worker"]
    shared(numbers, [Worker(command, ENVIRONMENT) for _ in range(PROCESSES)], tell)
    return [answers[number] for number in numbers]


def _merged(rows: list[dict], partly: bool) -> list[dict]:
    """With those of other ops and targets that the table has, in the order of all jobs."""
    redone = {(made["op"], made["target"]) for made in rows}
    others = kept(TABLE, [])[0] if partly else []
    found = rows + [old for old in others if (old["op"], old["target"]) not in redone]
    keys = ("op", "shape", "dtype", "direction", "target")
    order = {tuple(row(job, {})[key] for key in keys): n for n, job in enumerate(jobs())}
    return sorted(found, key=lambda found: order.get(tuple(found[key] for key in keys), len(order)))


def _notes() -> list[str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    sources = "; ".join(
        f"{name} {t.flops / 1e12:,.0f} TFLOP/s and {t.bandwidth / 1e9:,.0f} GB/s ({t.source})"
        for name, t in TARGETS.items()
    )
    head = f"`python -m experiments.compile_kernels --all --write`, {versions}, {datetime.date.today()}."
    return [head, NOTE.format(**PASSES).replace("\n", " "), f"Peaks, bf16: {sources}."]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.compile_kernels")
    parser.add_argument("--all", action="store_true", help="every program, not what CI compiles")
    parser.add_argument("--ops", default="", help="folders of pallas_kernels, separated by commas")
    parser.add_argument("--targets", default="", help=f"some of {', '.join(TARGETS)}, separated by commas")
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}.csv and .md (with --all)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    if options.worker:
        everything = jobs()
        work(lambda number: compile_one(everything[int(number)]), _finish)
        return 0
    if options.write and not options.all:
        parser.error("--write goes with --all: a table has every shape")
    ops, targets = (tuple(filter(None, text.split(","))) for text in (options.ops, options.targets))
    unknown = sorted(set(targets) - TARGETS.keys())
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; choose from {', '.join(TARGETS)}")
    chosen = [
        job
        for job in jobs()
        if (options.all or usual(job))
        and (not ops or job.case.variant.op in ops)
        and (not targets or job.target in targets)
    ]
    start = time.perf_counter()
    answers = run(chosen)
    if options.write:
        write(_merged(list(map(row, chosen, answers)), bool(ops or targets)), TABLE, _notes())
    faults = sum(fault(job, answer) is not None for job, answer in zip(chosen, answers, strict=True))
    print(f"{len(chosen)} programs, {faults} faults, {time.perf_counter() - start:.0f} s")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
