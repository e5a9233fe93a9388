"""Our side of the benchmark of generation (`experiments.bench_generate`): one model, greedy, batch 1.

    python -m experiments.generate_worker NAME WIDTH DEPTH VOCABULARY TOKENS ROUNDS FOLDER CONTEXT...

The model is the checkpoint in FOLDER, or has random weights where that is `-`. It answers in JSON lines:
first, when everything is compiled, what it is; then to every line on standard input: for every CONTEXT, the
first has it read a prompt, the next ROUNDS have it write TOKENS more each; after these it says, unasked, what
memory it took beyond the model.
"""

import json
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.bench_generate import NONE, PIECE, Sizes, config
from experiments.measure import reaching
from experiments.peers import resident
from zoo import lm
from zoo.generation import Session, generate, prefill, stream
from zoo.pretrained import load_pretrained


def model(name: str, sizes: Sizes, context: int, folder: str) -> tuple[Any, lm.Config]:
    """Parameters and Config, full attention with room for all of the text."""
    if folder == NONE:
        cfg = config(name, sizes, context)
        return jax.block_until_ready(jax.jit(lambda: lm.init(jax.random.key(0), cfg))()), cfg
    cfg, params = load_pretrained(folder)
    return params, reaching(cfg, context + sizes.tokens)


class Work:
    """Prompts of random tokens, read in pieces, and what follows them; `contexts` in their order."""

    def __init__(self, name: str, sizes: Sizes, contexts: list[int], folder: str = NONE):
        self.params, self.cfg = model(name, sizes, max(contexts), folder)
        self.sizes = sizes
        self.before = resident.present()
        for length in sorted({min(context, 2 * PIECE) for context in contexts}):
            self.read(length)  # what compiles here is all there is to compile
        self.write()
        list(stream(self.params, self.cfg, steps=8, session=self.session, temperature=0))
        resident.forget()

    def about(self) -> dict[str, Any]:
        return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(self.params))}

    def read(self, context: int) -> dict[str, Any]:
        """A prompt; seconds."""
        prompt = np.random.default_rng(0).integers(1, self.sizes.vocabulary, context)
        start, piece = time.perf_counter(), min(PIECE, context)
        session = prefill(self.params, self.cfg, prompt, piece=piece)
        self.session: Session = jax.block_until_ready(session)
        return {"prefill": time.perf_counter() - start}

    def write(self) -> dict[str, Any]:
        """Seconds of a token, those of all cores, and the tokens."""
        start, busy, steps = time.perf_counter(), time.process_time(), self.sizes.tokens
        how = {"session": self.session, "temperature": 0, "with_session": True}
        tokens, self.session = generate(self.params, self.cfg, steps=steps, **how)
        found = {"decode": (time.perf_counter() - start) / steps, "tokens": tokens[0].tolist()}
        return found | {"busy": (time.process_time() - busy) / steps}

    def rest(self) -> dict[str, Any]:
        """Seconds of a token where text is given out every 8 tokens; bytes, counted anew after it."""
        start, steps = time.perf_counter(), self.sizes.tokens
        list(stream(self.params, self.cfg, steps=steps, session=self.session, temperature=0))
        streamed, memory = (time.perf_counter() - start) / steps, resident.peak() - self.before
        resident.forget()
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(self.session.state))
        return {"streamed": streamed, "memory": memory, "state": state}


def main(name: str, *arguments: str) -> None:
    """Answer line by line."""
    width, depth, vocabulary, tokens, rounds = map(int, arguments[:5])
    resident.limit()
    contexts = list(map(int, arguments[6:]))
    work = Work(name, Sizes(width, depth, vocabulary, tokens), contexts, arguments[5])
    print(json.dumps(work.about()), flush=True)
    for context in contexts:
        sys.stdin.readline()
        print(json.dumps(work.read(context)), flush=True)
        for _ in range(rounds):
            sys.stdin.readline()
            print(json.dumps(work.write()), flush=True)
        print(json.dumps(work.rest()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
