"""Many processes, on one machine or many, in one run.

    zoo train text --mesh.data=8 --coordinator=HOST:PORT --processes=2 --process=0     1 elsewhere
    srun zoo train text --mesh.data=64 --distributed

JAX finds the others by itself (`--distributed`) under SLURM, Open MPI, Kubernetes and on Cloud TPUs.
Processes on CPUs talk through gloo. All run the same command and see the same directory; each takes its rows
of every batch, and process 0 writes and speaks.
"""

import argparse

from layers.checks import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed", action="store_true", help="one of many processes, as SLURM, MPI, K8s or a TPU has it"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 of many is found")
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")


def start(options: argparse.Namespace) -> None:
    """Join the other processes, if there are any. Before anything asks JAX for a device.

    Raises ValueError for flags that do not go together, and where no cluster is found.
    """
    given = {name: getattr(options, name) for name in ("coordinator", "processes", "process")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given) and not options.distributed:
        return
    if not options.distributed:
        require(
            not missing, f"--coordinator, --processes and --process go together: no {' and '.join(missing)}"
        )
        n, i = options.processes, options.process
        require(0 <= i < n, f"--process={i} must be from 0 to {n - 1}, for --processes={n}")
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    except (ValueError, RuntimeError) as error:
        hint = " (no SLURM, MPI, K8s or TPU found: give --coordinator, --processes and --process)"
        raise ValueError(
            f"could not start: {error}{hint if options.distributed and missing else ''}"
        ) from None
