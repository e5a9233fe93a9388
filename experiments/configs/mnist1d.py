"""Digits as 40 samples of a noisy curve, in their order and shuffled.

    zoo compare mnist1d

After MNIST-1D (Greydanus and Kobak 2020, arXiv 2011.14439): a model that uses the order of time gets above
0.9 and loses much of it when one fixed permutation is applied to all curves.
"""

import dataclasses

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Claim, drop, of
from experiments.tasks.mnist1d import Mnist1dData
from zoo import classifier, registry

WIDTH = 64
DATA = Mnist1dData()


def run(name: str, shuffled: bool = False, **settings) -> Run:
    layer = registry.config(name, WIDTH, **settings)
    model = classifier.Config(
        features=1, classes=10, width=WIDTH, depth=3, pattern=(layer,), mlp="swiglu", remat=False
    )
    optimizer = Optimizer(lr=2e-3, warmup_steps=100, weight_decay=0.1)
    data = dataclasses.replace(DATA, shuffled=shuffled)
    return Run(model=model, data=data, optimizer=optimizer, steps=1000, batch_size=64, log_every=20)


config = Comparison(
    title="digits as curves of 40 samples",
    runs=(
        ("s4d", run("s4d")),
        ("s4d, shuffled", run("s4d", shuffled=True)),
        ("mamba", run("mamba")),
        ("mamba, shuffled", run("mamba", shuffled=True)),
    ),
)

CLAIMS = (
    Claim("S4D reads the curves", of("s4d"), least=0.91),
    Claim("and loses this much when they are shuffled", drop("s4d", "s4d, shuffled"), least=0.2),
    Claim("Mamba reads the curves", of("mamba"), least=0.91),
    Claim("and loses this much when they are shuffled", drop("mamba", "mamba, shuffled"), least=0.2),
)
