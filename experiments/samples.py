"""What a model writes while it is trained: a few texts at every evaluation.

    result = train(run, "runs/text", samples=Samples(("def ", "class ")))

They are shown, and with a run directory kept in its `samples.jsonl`. Nothing of the run depends on them: they
are no part of its config, draw with keys of their own, and its metrics and checkpoints are the same bits.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.config import Run
from layers.checks import require
from zoo import lm
from zoo.generation import generate


@dataclass(frozen=True)
class Samples:
    """What is asked for. Raises ValueError for no prompt, or fewer tokens than 1."""

    prompts: tuple[str, ...]
    tokens: int = 64
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self):
        require(len(self.prompts) > 0, "samples: no prompt is given")
        require(self.tokens >= 1, f"samples: tokens={self.tokens} must be at least 1")
        require(self.temperature >= 0, f"samples: temperature={self.temperature} must be at least 0")


class Writer:
    """Takes the samples of one run.

    Raises ValueError, before anything is trained, where the model is no language model of text or a prompt
    cannot be written in its vocabulary.
    """

    def __init__(self, samples: Samples, run: Run, source: Any):
        tokenizer: Any = getattr(source, "tokenizer", None)
        ok = isinstance(run.model, lm.Config) and tokenizer is not None
        require(ok, "samples: only a language model that is trained on text can write some")
        start = [] if tokenizer.separator is None else [tokenizer.separator]
        for prompt in samples.prompts:
            empty = len([*start, *tokenizer.encode(prompt)]) == 0
            require(not empty, "samples: a prompt is empty, and these texts have no separator to begin with")
        self._samples, self._run, self._tokenizer = samples, run, tokenizer
        self._path: Path | None = None

    def begin(self, path: Path, step: int) -> None:
        """Keep samples in `path`, and of those that are there the ones up to `step`."""
        self._path = path
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= step]
            path.write_text("".join(f"{line}\n" for line in kept))

    def take(self, step: int, params: Any, say: Callable[[str], None]) -> None:
        """Write, show with `say`, and keep what the model of these parameters continues the prompts with."""
        try:
            texts = self._texts(params)
        except RuntimeError as error:  # its logits are no numbers: training decides what becomes of it
            say(f"step {step}  no samples: {error}")
            return
        prompts = self._samples.prompts
        for prompt, text in zip(prompts, texts, strict=True):
            say(f"step {step}  {prompt!r} -> {text!r}")
            if self._path is not None:
                with self._path.open("a") as stream:
                    stream.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")

    def _texts(self, params: Any) -> list[str]:
        asked = self._samples
        return generate(
            params,
            self._run.model,
            list(asked.prompts),
            asked.tokens,
            tokenizer=self._tokenizer,
            key=jax.random.key(asked.seed),
            temperature=asked.temperature,
            dtype=self._run.compute_dtype,
        )


def _step(line: str) -> float:
    """The step of a line; one that was cut short is of no step that counts."""
    try:
        return json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return float("inf")
