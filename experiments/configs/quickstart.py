"""Six memories on one recall task, in five minutes on two CPU cores.

    zoo compare quickstart

A sequence shows 8 key-value pairs and then asks for every key again; accuracy is over the 8 answers.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.recall import RecallData
from zoo import lm, registry

WIDTH = 32
DATA = RecallData(vocab_size=512, length=64, pairs=8, train_examples=20_000, eval_examples=1_000)


def run(name: str, lr: float = 5e-3, **settings) -> Run:
    layer = registry.config(name, WIDTH, **settings)
    model = lm.Config(vocab_size=512, width=WIDTH, depth=2, pattern=(layer,), mlp="none", remat=False)
    optimizer = Optimizer(lr=lr, warmup_steps=100, weight_decay=0.1)
    return Run(model=model, data=DATA, optimizer=optimizer, steps=1200, batch_size=32, log_every=50)


config = Comparison(
    title="multi-query associative recall, V=512, T=64, 8 pairs",
    runs=(
        ("attention", run("attention", heads=1, max_length=64)),
        ("gla", run("gla", heads=1, conv=4)),
    ),
)
