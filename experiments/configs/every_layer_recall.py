"""Every layer of the registry on one small recall task, 200 steps each.

    zoo compare every_layer_recall

A sequence shows 4 key-value pairs and then asks for every key again; accuracy is over the 4 answers, chance
is 1/32. Two blocks of width 32 without an MLP, every layer with its own defaults, and the same data, batches
and learning rate for all: what is shown is that each of them trains in the common loop, not which is best.
Two hundred steps end before most layers recall, and a chunk longer than 32 tokens (LaCT) never fills.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.tasks.recall import RecallData
from zoo import lm, registry

WIDTH, STEPS = 32, 200
DATA = RecallData(vocab_size=64, length=32, pairs=4, train_examples=0, eval_examples=1_000)
OPTIMIZER = Optimizer(lr=5e-3, warmup_steps=20, weight_decay=0.1)


def run(name: str) -> Run:
    layer = registry.config(name, WIDTH)
    model = lm.Config(vocab_size=64, width=WIDTH, depth=2, pattern=(layer,), mlp="none", remat=False)
    return Run(model=model, data=DATA, optimizer=OPTIMIZER, steps=STEPS, batch_size=32, log_every=1)


config = Comparison(
    title="every layer: recall, V=64, T=32, 4 pairs, 200 steps of 32",
    runs=tuple((name, run(name)) for name in registry.LAYERS),
)
