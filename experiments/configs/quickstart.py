"""Six memories on one recall task, in five minutes on two CPU cores.

    zoo compare quickstart

A sequence shows 8 key-value pairs and then asks for every key again; accuracy is over the 8 answers.
Two blocks without an MLP, width 32; every model but S4, which has none, sees tokens through a short
convolution. The learning rate is the better of 5e-3 and 1e-2 after 600 steps for GLA, Mamba and Titans
(one seed), 1e-2 for the others. Six hundred steps are short: recall appears in a sudden transition that GLA
and Titans reach later (`--steps=2000`).
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.tasks.recall import RecallData
from zoo import lm, registry

WIDTH, STEPS = 32, 600
DATA = RecallData(vocab_size=512, length=64, pairs=8, train_examples=20_000, eval_examples=1_000)


def run(name: str, lr: float = 1e-2, **settings) -> Run:
    layer = registry.config(name, WIDTH, **settings)
    model = lm.Config(vocab_size=512, width=WIDTH, depth=2, pattern=(layer,), mlp="none", remat=False)
    optimizer = Optimizer(lr=lr, warmup_steps=50, weight_decay=0.1)
    return Run(model=model, data=DATA, optimizer=optimizer, steps=STEPS, batch_size=32, log_every=20)


config = Comparison(
    title="multi-query associative recall, V=512, T=64, 8 pairs",
    runs=(
        ("attention", run("attention", heads=1, max_length=64, conv=4)),
        ("s4", run("s4", state_dim=32)),
        ("mamba", run("mamba")),
        ("gla", run("gla", heads=1, conv=4)),
        ("mixture_of_memories", run("mixture_of_memories", heads=1)),
        ("titans", run("titans", lr=5e-3, heads=1)),
    ),
)
