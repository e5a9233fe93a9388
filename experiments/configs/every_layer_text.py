"""Every layer of the registry on text, 200 steps each: the running Python's own library sources.

    zoo compare every_layer_text

Bytes, in packed documents with the state reset at each boundary; nothing to download. A step is one sequence
of 512, in which even the longest chunk among the defaults (LaCT's 256) fills. Two blocks of width 32 without
an MLP, every layer with its own defaults, and the same data, batches and learning rate for all: what is shown
is that each of them trains in the common loop, not which is best. Other text: `--data.path=FILE`.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.text import TextData
from zoo import lm, registry

WIDTH, STEPS = 32, 200
DATA = TextData(length=512, mode="packed", eval_limit=40)
OPTIMIZER = Optimizer(lr=5e-3, warmup_steps=20, weight_decay=0.1)


def run(name: str) -> Run:
    layer = registry.config(name, WIDTH)
    model = lm.Config(vocab_size=257, width=WIDTH, depth=2, pattern=(layer,), mlp="none", remat=False)
    return Run(model=model, data=DATA, optimizer=OPTIMIZER, steps=STEPS, batch_size=1, log_every=1)


config = Comparison(
    title="every layer: bytes of Python's library, 200 steps of 512 tokens",
    runs=tuple((name, run(name)) for name in registry.LAYERS),
)
