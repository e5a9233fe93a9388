"""The `zoo` command: list, train, compare, sweep, fit, reproduce, eval, generate, state, import, export.

Every error of the user's making is one line on standard error and exit status 2; nothing is overwritten.
"""

import argparse
import importlib.metadata
import os
import sys
import traceback
from pathlib import Path

from experiments import cli_generate, cli_weights, distributed


def _prepare_environment() -> None:
    """What must be set before jax is imported."""
    # jax 0.11 can deadlock on few cores when one program runs several FFTs; more pool threads avoid it.
    if importlib.metadata.version("jax") < "0.12" and (os.cpu_count() or 1) < 8:
        os.environ.setdefault("NPROC", "8")


def _list(_) -> int:
    from rich.console import Console
    from rich.table import Table

    from experiments import overrides
    from experiments.tasks import TASKS
    from experiments.tasks import summary as task_summary
    from zoo import registry

    console = Console()
    # What a layer is needs room: 80 columns hold names and numbers, a pipe or a file holds all.
    if not console.is_terminal:
        console = Console(width=160)
    layers = Table(title="layers at width 128 and 1,024 tokens; each has apply, in this form, and step")
    layers.add_column("layer", no_wrap=True)
    layers.add_column("form")
    for column in ("state KB", "KFLOP/token"):
        layers.add_column(column, justify="right")
    layers.add_column("arXiv", no_wrap=True)
    if console.width >= 120:
        layers.add_column("what it is")
    for name, entry in registry.LAYERS.items():
        cfg = registry.config(name, 128)
        numbers = (f"{cfg.state_bytes() / 1e3:,.1f}", f"{cfg.flops_per_token(1024) / 1e3:,.0f}")
        what = [registry.summary(name)] * (console.width >= 120)
        layers.add_row(name, entry.form, *numbers, registry.paper(name), *what)
    asked = Table("data", "what is asked", title="tasks, beside experiments.text")
    for name in TASKS:
        asked.add_row(name, task_summary(name))
    configs = Table("config", "what it does", title="configs")
    for name in overrides.config_names():
        configs.add_row(name, overrides.description(name))
    console.print(layers, asked, configs)
    return 0


def _config(options, rest: list[str]):
    """The config that was named, with its overrides, and where its results go."""
    from experiments import overrides
    from experiments.compare import Comparison
    from experiments.sweep import Sweep

    config, _ = overrides.load(options.config)
    changes = overrides.parse(rest)
    own = isinstance(config, Comparison | Sweep)
    config = config.override(changes) if own else overrides.override(config, changes)
    name = Path(options.config).stem
    return config, Path(options.out or Path("runs") / name)


def _train(options, rest: list[str]) -> int:
    distributed.start(options)
    from experiments.config import Run
    from experiments.train import train
    from layers.checks import require
    from zoo import processes

    run, directory = _config(options, rest)
    require(isinstance(run, Run), _other_verb(options.config, run))
    samples = cli_generate.samples(options)
    result = train(run, directory, tensorboard=options.tensorboard, samples=samples)
    if not processes.first():
        return 130 if result.stopped else 0
    if result.stopped:
        step = result.summary["step"]
        print(f"stopped by {result.stopped} at step {step}; the same command goes on from here")
        return 130
    _print_summary(result.summary)
    print(directory)
    return 0


def _print_summary(values: dict) -> None:
    for name, value in values.items():
        print(f"{name:>18}  {value:,.4f}" if isinstance(value, float) else f"{name:>18}  {value}")


def _compare(options, rest: list[str]) -> int:
    from experiments.compare import Comparison, compare
    from layers.checks import require

    comparison, directory = _config(options, rest)
    require(isinstance(comparison, Comparison), _other_verb(options.config, comparison))
    arms = compare(comparison, directory, workers=options.workers)
    return 1 if any(arm.failed for arm in arms.values()) else 0


def _sweep(options, rest: list[str]) -> int:
    from experiments.sweep import Sweep, sweep
    from layers.checks import require

    config, directory = _config(options, rest)
    require(isinstance(config, Sweep), _other_verb(options.config, config))
    outcomes = sweep(
        config,
        directory,
        workers=options.workers,
        engine="local" if options.ray is None else "ray",
        address=None if options.ray in (None, "here") else options.ray,
        retries=options.retries,
    )
    failed = [f"{address}: {found.error}" for address, found in outcomes.items() if not found.summary]
    for line in failed:
        print(f"failed: {line}")
    print(directory / "results.csv")
    return 1 if failed else 0


def _other_verb(name: str, config) -> str:
    """That a config is for another verb, and which."""
    from experiments.compare import Comparison
    from experiments.sweep import Sweep

    kinds = {Comparison: ("a comparison", "compare"), Sweep: ("a sweep", "sweep")}
    what, verb = kinds.get(type(config), ("one run", "train"))
    return f"{name!r} is {what}: use `zoo {verb} {name}`"


def _fit(options) -> int:
    from experiments.scaling import cli

    return cli.main(options)


def _reproduce(options) -> int:
    from experiments.reproduce import reproduce

    home = Path(options.out or "runs/reproduce")
    reproduce(options.tier, home, only=options.only, workers=options.workers)
    print(home / f"reproduce_{options.tier}.md")
    return 0


def _eval(options) -> int:
    from experiments.evaluate import evaluate_directory

    _print_summary(evaluate_directory(options.run, options.split))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo", description="Recurrent and state-space sequence models in JAX."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verbs.add_parser("list", help="layers, tasks and configs")
    verbs_of_configs = {
        "train": "train one run",
        "compare": "train several architectures and put them side by side",
        "sweep": "train many runs and put them in one table",
    }
    for verb, text in verbs_of_configs.items():
        sub = verbs.add_parser(
            verb,
            help=text,
            epilog="Any field of the config can follow as --field=value, nested ones as --optimizer.lr=3e-4. "
            f"`zoo {verb} CONFIG --show` prints them all.",
        )
        sub.add_argument("config", metavar="CONFIG", help="a name from `zoo list`, or a Python file")
        sub.add_argument("--out", metavar="DIR", help="directory of the results (default runs/CONFIG)")
        sub.add_argument(
            "--show", action="store_true", help="print the config and its documentation, and stop"
        )
        if verb == "train":
            sub.add_argument("--tensorboard", action="store_true", help="write TensorBoard files too")
            cli_generate.add_samples(sub)
            distributed.add_arguments(sub)
        else:
            sub.add_argument(
                "--workers", type=int, metavar="N", help="processes (default one a core or GPU; 0: only this)"
            )
        if verb == "sweep":
            sub.add_argument("--retries", type=int, default=1, help="of a cell that fails (default 1)")
            sub.add_argument(
                "--ray",
                nargs="?",
                const="here",
                metavar="ADDRESS",
                help="spread over the Ray cluster at ADDRESS, or over one started here",
            )

    from experiments.scaling import cli as scaling

    sub = verbs.add_parser("fit", help="fit scaling laws to a sweep, or to any CSV with params, tokens, loss")
    scaling.add_arguments(sub)

    sub = verbs.add_parser("reproduce", help="train published findings again and hold them against claims")
    sub.add_argument("tier", metavar="TIER", help="cpu (for two cores) or gpu")
    sub.add_argument("--only", metavar="FINDING", help="one of them")
    sub.add_argument("--out", metavar="DIR", help="directory of the results (default runs/reproduce)")
    sub.add_argument("--workers", type=int, metavar="N", help="as of compare")

    sub = verbs.add_parser("eval", help="evaluate a run's newest checkpoint")
    sub.add_argument("run", metavar="RUN", help="directory of a run")
    sub.add_argument("--split", default="validation", help="split of its data (default validation)")

    cli_generate.add_parsers(verbs)
    cli_weights.add_parsers(verbs)
    return parser


def _show(options, rest: list[str]) -> int:
    from experiments import overrides
    from experiments.compare import Comparison
    from experiments.sweep import Sweep

    config, directory = _config(options, rest)
    print(overrides.load(options.config)[1].strip(), "\n")
    runs: tuple = (("", config),)
    if isinstance(config, Comparison):
        runs = config.runs
    elif isinstance(config, Sweep):
        runs = tuple((str(cell.point), cell.run) for cell in config.cells)
    for label, run in runs:
        print(f"{label}:" if label else f"results in {directory}")
        for path in overrides.field_paths(run):
            value = run
            for name in path.split("."):
                value = getattr(value, name)
            print(f"  --{path}={value}")
    return 0


def _run(arguments: list[str] | None) -> int:
    options, rest = _parser().parse_known_args(arguments)
    of_configs = {"train": _train, "compare": _compare, "sweep": _sweep}
    if options.verb in of_configs:
        return (_show if options.show else of_configs[options.verb])(options, rest)
    if rest:
        raise ValueError(f"unexpected {rest[0]!r}; see `zoo {options.verb} --help`")
    verbs = {"list": _list, "fit": _fit, "reproduce": _reproduce, "eval": _eval}
    verbs |= {"generate": cli_generate.generate, "state": cli_generate.state}
    verbs |= {"import": cli_weights.import_weights, "export": cli_weights.export_weights}
    return verbs[options.verb](options)


def _users(error: Exception) -> bool:
    """Whether the user can mend it: the project's own checks raised it, or the operating system did.

    Anything from deeper down is a defect and keeps its traceback.
    """
    frames = traceback.extract_tb(error.__traceback__)
    home = Path(__file__).parent.parent
    ours = [home / name for name in ("experiments", "zoo", "layers", "pallas_kernels")]
    raised = Path(frames[-1].filename)
    return isinstance(error, OSError) or any(raised.is_relative_to(folder) for folder in ours)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    _prepare_environment()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if not _users(error):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror.lower()}"
        print(f"zoo: {' '.join(text.split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
