"""`zoo generate` and `zoo state`: texts from a trained model, and what it remembers of them on the disk."""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

# jax comes with everything else of the project; `cli.main` prepares for it first.


class Model(NamedTuple):
    """A trained language model."""

    params: Any
    cfg: Any
    tokenizer: Any


def add_parsers(verbs: Any) -> None:
    """The two verbs, to the subparsers `verbs`."""
    sub = verbs.add_parser("generate", help="continue a text with a trained language model")
    sub.add_argument("run", metavar="RUN", help="directory of a run")
    sub.add_argument("--state", metavar="FILE", help="go on from this state (see `zoo state`)")
    _add_writing(sub)

    actions = verbs.add_parser(
        "state", help="keep what a model remembers of a text, and go on from it"
    ).add_subparsers(dest="action", required=True, metavar="ACTION")
    sub = actions.add_parser("save", help="read a text and keep the state after it")
    sub.add_argument("run", metavar="RUN", help="directory of a run")
    sub.add_argument("-o", "--save-state", metavar="FILE", required=True, help="where to")
    sub.add_argument("--state", metavar="FILE", help="go on from this state")
    _add_reading(sub)
    sub = actions.add_parser("load", help="go on from a state: `zoo generate RUN --state FILE`")
    sub.add_argument("run", metavar="RUN", help="directory of a run")
    sub.add_argument("state", metavar="FILE", help="the state")
    _add_writing(sub)
    sub = actions.add_parser("show", help="check a state, and say what it is")
    sub.add_argument("state", metavar="FILE", help="the state")
    sub.add_argument("run", metavar="RUN", nargs="?", help="directory of a run: does the state belong to it?")


def add_samples(sub: argparse.ArgumentParser) -> None:
    """What `zoo train` is told of samples, to its parser."""
    sub.add_argument(
        "--sample", action="append", metavar="TEXT", help="continue TEXT at every evaluation; repeatable"
    )
    sub.add_argument("--sample-tokens", type=int, default=64, metavar="N", help="of each (default 64)")


def samples(options: Any) -> Any:
    """The samples that were asked for, or None."""
    from experiments.samples import Samples

    return Samples(tuple(options.sample), options.sample_tokens) if options.sample else None


def _add_reading(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; several: a batch")
    sub.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue")
    sub.add_argument(
        "--piece", type=int, metavar="N", help="tokens of a prompt worked on at once (bounds memory)"
    )
    sub.add_argument("--note", default="", help="kept in the state that is saved")
    sub.add_argument("--overwrite", action="store_true", help="a state that is there already")


def _add_writing(sub: argparse.ArgumentParser) -> None:
    _add_reading(sub)
    sub.add_argument("--save-state", metavar="FILE", help="keep the state after the text")
    sub.add_argument("--tokens", type=int, default=200, help="how many tokens to add (default 200)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    sub.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    sub.add_argument(
        "--top-p", type=float, metavar="P", help="among the most likely that together have probability P"
    )
    sub.add_argument(
        "--min-p", type=float, metavar="P", help="among those at least P times as likely as the best"
    )
    sub.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1: less of what is in the text already"
    )
    sub.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    sub.add_argument(
        "--stop-token",
        action="append",
        default=[],
        type=int,
        metavar="ID",
        help="end at this token; repeatable",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")


def read_model(run: str) -> Model:
    """The model in a run's newest checkpoint, and its tokenizer. Raises FileNotFoundError for other paths."""
    from experiments.directory import read_config, read_tokenizer
    from zoo import checkpoint

    config, _ = read_config(run)
    tokenizer = read_tokenizer(run)
    return Model(checkpoint.load_params(run), config.model, tokenizer)


def _prompts(options: Any) -> list[str] | None:
    """What was asked to be continued; None for the text of the state as it is."""
    if options.prompt and options.prompt_file:
        raise ValueError("--prompt and --prompt-file exclude each other; give one")
    if options.prompt_file:
        return [Path(options.prompt_file).read_text(encoding="utf-8")]
    if not (options.prompt or options.state):
        raise ValueError("no prompt: give --prompt, --prompt-file or --state")
    return options.prompt


def _free(options: Any) -> None:
    """Raise before the work is done where its result could not be kept."""
    path = options.save_state
    if path and not options.overwrite and Path(path).exists():
        raise FileExistsError(f"{path} exists already; choose another name, or give --overwrite")


def _session(options: Any, model: Model) -> Any:
    import zoo

    if not options.state:
        return None
    found = zoo.load_state(options.state, model.params, model.cfg)
    if not hasattr(found, "logits"):
        raise ValueError(f"{options.state} is a bare state: it does not say what comes next")
    return found


def _reading(options: Any) -> dict[str, Any]:
    return {} if options.piece is None else {"piece": options.piece}


def generate(options: Any) -> int:
    """Write as tokens come; several texts one after the other, when all are done."""
    import jax

    from zoo.generation import stream

    prompts = _prompts(options)
    _free(options)
    model = read_model(options.run)
    parts = stream(
        model.params,
        model.cfg,
        prompts,
        options.tokens,
        session=_session(options, model),
        tokenizer=model.tokenizer,
        key=jax.random.key(options.seed),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=(*options.stop, *options.stop_token),
        **_reading(options),
    )
    _print(parts, options.prompt or [""])
    _keep(options, parts.session, model)
    return 0


def _print(parts: Any, prompts: list[str]) -> None:
    """Every prompt and what follows it; one text at once, several with a line between them."""
    several = len(parts.session) > 1
    texts = prompts * len(parts.session) if len(prompts) == 1 else list(prompts)
    for text in () if several else texts:
        sys.stdout.write(text)
    for part in parts:
        new = [part] if isinstance(part, str) else part
        texts = [text + more for text, more in zip(texts, new, strict=True)]
        for more in () if several else new:
            sys.stdout.write(more)
            sys.stdout.flush()
    print("\n---\n".join(texts) if several else "")


def _keep(options: Any, session: Any, model: Model) -> None:
    import zoo

    if options.save_state:
        zoo.save_state(
            options.save_state,
            session,
            model.params,
            model.cfg,
            note=options.note,
            overwrite=options.overwrite,
        )


def state(options: Any) -> int:
    """`zoo state ACTION`."""
    return {"save": _save, "load": generate, "show": _show}[options.action](options)


def _save(options: Any) -> int:
    from zoo.generation import encoded, prefill

    prompts = _prompts(options)
    if prompts is None:
        raise ValueError("no prompt: give --prompt or --prompt-file")
    _free(options)
    model = read_model(options.run)
    session = _session(options, model)
    rows = encoded(model.tokenizer, prompts, session)
    session = prefill(model.params, model.cfg, rows, session, **_reading(options))
    _keep(options, session, model)
    print(f"{options.save_state}: {_counted(session.length.tolist())}")
    return 0


def _counted(tokens: list[int]) -> str:
    texts = "1 text" if len(tokens) == 1 else f"{len(tokens)} texts"
    return f"{texts}, {', '.join(f'{n:,}' for n in tokens)} tokens"


def _show(options: Any) -> int:
    from zoo import states

    about = states.read_about(options.state)
    if options.run:
        model = read_model(options.run)
        states.load_state(options.state, model.params, model.cfg)
    size = Path(options.state).stat().st_size
    layers = [value for field, value in about.model.items() if field.endswith(".layer")]
    lines = {
        "file": f"{options.state}, {size:,} bytes, intact",
        "holds": f"{about.rows} rows of state" if about.tokens is None else _counted(about.tokens),
        "model": f"{', '.join(layers)}; width {about.model['width']}, {about.model['vocab_size']} tokens",
        "parameters": f"SHA-256 {about.params}",
        "written": about.written,
        "note": about.note,
        "run": options.run and f"{options.run}: this state is of its model",
    }
    for name, text in lines.items():
        if text:
            print(f"{name:>10}  {text}")
    return 0
