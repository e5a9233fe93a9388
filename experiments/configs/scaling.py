"""Six memories, five sizes, four budgets, on text whose entropy is known and on real text.

    zoo sweep scaling
    zoo fit runs/scaling --by layer --where corpus=lexicon --report runs/scaling/lexicon
    zoo fit runs/scaling --by layer --where corpus=python --report runs/scaling/python

Two blocks of width 16 to 64 with SwiGLU, 7,000 to 110,000 parameters, see 0.13 to 1 million tokens once, in
batches of 8 rows of 128. The learning rate falls with the square root of the width; the schedule of every run
ends with its own tokens. "lexicon" is made of words of known entropy (`experiments.tasks.lexicon`), so that a
fitted E can be held against the truth; "python" is the standard library of the running Python, in bytes.
"""

from experiments.config import Optimizer, Run
from experiments.grid import axis, product
from experiments.sweep import Sweep
from experiments.tasks.lexicon import LexiconData
from experiments.text import TextData
from experiments.tokenizer import ByteTokenizer
from zoo import lm, registry

LENGTH, ROWS = 128, 8
CORPORA = {  # data, and their vocabulary
    "lexicon": (LexiconData(length=LENGTH, eval_examples=1_000), 32),
    "python": (TextData(length=LENGTH, eval_limit=20), ByteTokenizer().vocab_size),
}
LAYERS = {
    "attention": {"heads": 2, "max_length": LENGTH},
    "mamba": {},
    "gla": {"heads": 2},
    "gated_delta_net": {"heads": 2},
    "s4d": {"state_dim": 32},
    "min_gru": {},
}
WIDTHS = (16, 24, 32, 48, 64)
BUDGETS = (2**17, 2**18, 2**19, 2**20)  # tokens


def run(corpus: str, layer: str, width: int, token_budget: int) -> Run:
    data, vocabulary = CORPORA[corpus]
    mixer = registry.config(layer, width, **LAYERS[layer])
    model = lm.Config(vocab_size=vocabulary, width=width, depth=2, pattern=(mixer,), remat=False)
    steps = token_budget // (LENGTH * ROWS)
    rate = Optimizer(lr=6e-3 * (32 / width) ** 0.5, warmup_steps=steps // 20, weight_decay=0.1)
    return Run(
        model=model,
        data=data,
        optimizer=rate,
        steps=steps,
        batch_size=ROWS,
        log_every=steps // 32,
        eval_batch_size=50,
    )


POINTS = product(
    axis("corpus", *CORPORA),
    axis("layer", *LAYERS),
    axis("width", *WIDTHS),
    axis("token_budget", *BUDGETS),  # next to each other: they share a compiled program
)
config = Sweep.of("scaling of six memories", POINTS, run)
