"""`zoo import` and `zoo export`: published checkpoints into run directories and back.

An imported model is a run directory without a history, so that `zoo generate`, `zoo eval` and `zoo state`
take it as any other: `config.json` holds a Run of the model, whose data are text in the checkpoint's own
tokenizer; `tokenizer.json` and `checkpoints/` are as in training; `source/` keeps what the weights alone do
not say: the checkpoint's config.json and tokenizer files, how it stored its tensors, and those that are no
weights.
"""

from pathlib import Path
from typing import Any


def add_parsers(verbs: Any) -> None:
    """The two verbs, to the subparsers `verbs`."""
    sub = verbs.add_parser("import", help="make a run directory of a Hugging Face checkpoint")
    sub.add_argument("name", metavar="PATH_OR_HUB_NAME", help="a directory, or owner/name on the hub")
    sub.add_argument("--out", metavar="DIR", help="run directory to make (default runs/NAME)")
    sub.add_argument("--dtype", default="float32", help="of the parameters: float32, bfloat16, or stored")
    sub.add_argument("--max-length", type=int, metavar="N", help="tokens that full attention holds")
    sub.add_argument(
        "--without", action="append", default=[], metavar="PREFIX", help="leave these tensors out"
    )
    sub.add_argument("--data", metavar="FILE", help="text that `zoo eval` reads (default Python's library)")
    sub.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")

    sub = verbs.add_parser("export", help="write an imported model as the checkpoint it came from")
    sub.add_argument("run", metavar="RUN", help="directory of an imported model, or of a run from one")
    sub.add_argument("--out", metavar="DIR", required=True, help="where to")
    sub.add_argument("--like", metavar="PATH", help="the checkpoint whose format it gets (default RUN's)")


def import_weights(options: Any) -> int:
    """`zoo import`."""
    from zoo.pretrained import load_pretrained, locate

    source = locate(options.name, options.revision)
    out = Path(options.out or Path("runs") / Path(options.name).name)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another directory with --out")
    more = {} if options.max_length is None else {"max_length": options.max_length}
    dtype = None if options.dtype == "stored" else options.dtype
    cfg, params = load_pretrained(source, dtype=dtype, without=tuple(options.without), **more)
    write_run(out, cfg, params, source, options.data)
    print(out)
    return 0


def write_run(out: Path, cfg: Any, params: Any, source: Path, text: str | None = None) -> None:
    """The run directory `out` of a model that was read from `source`; its parts in an order that a reader
    believes: config.json, without which it is no run, comes last."""
    from experiments import config
    from experiments.config import Run
    from experiments.directory import write_json
    from experiments.text import TextData
    from experiments.tokenizer import load_huggingface
    from zoo import checkpoint
    from zoo.pretrained import keep_source

    keep_source(source, out / "source")
    data = TextData(path=text)
    if (out / "source" / "tokenizer.json").is_file():
        data = TextData(path=text, tokenizer=str((out / "source" / "tokenizer.json").absolute()))
        write_json(out / "tokenizer.json", load_huggingface(data.tokenizer).to_dict())
    checkpoint.save(out / "checkpoints", 0, {"params": params}, {"imported": str(source)})
    run = Run(model=cfg, data=data)
    write_json(out / "config.json", {"run": config.to_dict(run), "data": "imported"})


def export_weights(options: Any) -> int:
    """`zoo export`."""
    from experiments.directory import read_config
    from zoo import checkpoint
    from zoo.pretrained import save_pretrained

    if not (Path(options.run) / "checkpoints").is_dir():
        raise FileNotFoundError(f"{options.run} is not the directory of a run: it has no checkpoints")
    run, _ = read_config(options.run)
    source = Path(options.like or Path(options.run) / "source")
    if not options.like and not source.is_dir():
        raise FileNotFoundError(
            f"{options.run} was not imported: give the checkpoint it is to be like, --like"
        )
    params = checkpoint.load_params(options.run)
    print(save_pretrained(options.out, run.model, params, like=source))
    return 0
