"""Induction heads from 256 to 4,096 tokens: a selective state space goes on, absolute positions do not.

    zoo compare induction

Gu and Dao 2023 (arXiv 2312.00752), Table 2: trained at 256 tokens of a vocabulary of 16, tested at others.
Here the first part of training is at 32 tokens, where an answer costs an eighth.
"""

import dataclasses

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Claim, of
from experiments.stages import Stages
from experiments.tasks.induction import InductionData
from zoo import lm, registry

WIDTH = 64
SHORT, TASK = InductionData(length=32), InductionData(length=256, eval_examples=500)
STEPS = (600, 200)
DATA = Stages(tasks=(SHORT, TASK), steps=STEPS)
LENGTHS = (64, 512, 1024, 2048, 4096)


def run(name: str, **settings) -> Run:
    layer = registry.config(name, WIDTH, **settings)
    model = lm.Config(vocab_size=16, width=WIDTH, depth=2, pattern=(layer,), mlp="none", remat=False)
    optimizer = Optimizer(lr=5e-3, warmup_steps=100, weight_decay=0.0, schedule="wsd")
    return Run(
        model=model,
        data=DATA,
        optimizer=optimizer,
        steps=sum(STEPS),
        batch_size=64,
        log_every=20,
        eval_batch_size=50,
    )


config = Comparison(
    title="induction heads, trained at 32 and 256 tokens",
    runs=(
        ("mamba", run("mamba")),
        ("attention, absolute positions", run("attention", heads=8, rope_base=None, sinusoidal=True)),
    ),
    probes=tuple(
        (f"{length} tokens", dataclasses.replace(TASK, length=length, eval_examples=100))
        for length in LENGTHS
    ),
)

CLAIMS = (
    Claim("Mamba at 4,096 tokens", of("mamba", "4096 tokens"), least=0.99),
    Claim(
        "attention with absolute positions at 4,096",
        of("attention, absolute positions", "4096 tokens"),
        most=0.2,
    ),
)
