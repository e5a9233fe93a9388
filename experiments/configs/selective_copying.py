"""Selective copying: 16 tokens scattered over 256 places, in their order.

    zoo compare selective_copying

Gu and Dao 2023 (arXiv 2312.00752), Table 1, at a context of 256: what to keep depends on the content, which a
time-invariant state space cannot decide. Both learn it out of 32 places first, where an answer costs a fifth
of the tokens, then out of more and more: from 256 alone Mamba is right on 0.3 of them after 2,000 steps of 32
sequences at a rate of 3e-3.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Claim, of
from experiments.stages import Stages
from experiments.tasks.copying import CopyingData
from zoo import lm, registry

WIDTH = 64
CONTEXTS, STEPS = (32, 64, 128, 256), (2000, 500, 500, 800)
DATA = Stages(tasks=tuple(CopyingData(context=context) for context in CONTEXTS), steps=STEPS)


def run(name: str, **settings) -> Run:
    layer = registry.config(name, WIDTH, **settings)
    model = lm.Config(vocab_size=16, width=WIDTH, depth=2, pattern=(layer,), mlp="none", remat=False)
    optimizer = Optimizer(lr=1e-2, warmup_steps=100, weight_decay=0.0, schedule="wsd")
    return Run(model=model, data=DATA, optimizer=optimizer, steps=sum(STEPS), batch_size=32, log_every=20)


config = Comparison(
    title="selective copying of 16 tokens out of 256",
    runs=(("mamba", run("mamba")), ("s4d", run("s4d"))),
)

CLAIMS = (
    Claim("Mamba copies", of("mamba"), least=0.97),
    Claim("time-invariant S4D does not", of("s4d"), most=0.6),
)
