"""Six memories on one recall task, in five minutes on two CPU cores.

    zoo compare quickstart

A sequence shows 8 key-value pairs and then asks for every key again; accuracy is over the 8 answers.
Two blocks without an MLP, width 32; every model but S4, which has none, sees tokens through a short
convolution.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.recall import RecallData
from zoo import lm, registry

WIDTH, STEPS = 32, 600
DATA = RecallData(vocab_size=512, length=64, pairs=8, train_examples=20_000, eval_examples=1_000)


def run(name: str, **settings) -> Run:
    layer = registry.config(name, WIDTH, **settings)
    model = lm.Config(vocab_size=512, width=WIDTH, depth=2, pattern=(layer,), mlp="none", remat=False)
    optimizer = Optimizer(lr=1e-2, warmup_steps=50, weight_decay=0.1)
    return Run(model=model, data=DATA, optimizer=optimizer, steps=STEPS, batch_size=32, log_every=20)


config = Comparison(
    title="multi-query associative recall, V=512, T=64, 8 pairs",
    runs=(
        ("attention", run("attention", heads=1, max_length=64, conv=4)),
        ("s4", run("s4", state_dim=32)),
        ("mamba", run("mamba")),
        ("gla", run("gla", heads=1, conv=4)),
        ("mixture_of_memories", run("mixture_of_memories", heads=1)),
        ("titans", run("titans", heads=1)),
    ),
)
