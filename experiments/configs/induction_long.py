"""Induction heads from 256 to a million tokens, at the published size. For a GPU.

    zoo compare induction_long

Gu and Dao 2023 (arXiv 2312.00752), Table 2: two blocks of Mamba of width 64 without an MLP, 204,800 steps of
8 sequences of 256 tokens, a constant learning rate, the better of 2e-4 and 1e-3; 100 % at every length from
2^6 to 2^20.
"""

import dataclasses

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Claim, of
from experiments.tasks.induction import InductionData
from zoo import lm, registry

WIDTH = 64
DATA = InductionData(length=256)
POWERS = (6, 8, 10, 12, 14, 16, 18, 20)
PIECE = 2**14  # longer sequences go through the blocks so many tokens at a time

layer = registry.config("mamba", WIDTH)
model = lm.Config(vocab_size=16, width=WIDTH, depth=2, pattern=(layer,), mlp="none", remat=False, piece=PIECE)
optimizer = Optimizer(schedule="constant", weight_decay=0.0)
run = Run(
    model=model,
    data=DATA,
    optimizer=optimizer,
    steps=204_800,
    batch_size=8,
    log_every=1024,
    eval_every=20_480,
    checkpoint_every=20_480,
)

config = Comparison(
    title="induction heads, trained at 256 tokens, to 2^20",
    runs=(("mamba", run),),
    grid=(("optimizer.lr", (2e-4, 1e-3)),),
    probes=tuple(
        (f"2^{n} tokens", dataclasses.replace(DATA, length=2**n, eval_examples=max(16, 2**17 >> n)))
        for n in POWERS
    ),
)

CLAIMS = tuple(Claim(f"Mamba at 2^{n} tokens", of("mamba", f"2^{n} tokens"), least=0.999) for n in POWERS)
