"""A language model on the running Python's own library sources: nothing to download.

    zoo train text
    zoo generate runs/text --prompt "def "

Bytes, in packed documents with the state reset at each boundary. Other text: `--data.path=FILE` (or a
directory, a glob, .jsonl, .parquet), or `--data.hub=NAME`.
"""

from experiments.config import Optimizer, Run
from experiments.text import TextData
from zoo import lm

config = Run(
    model=lm.Config(vocab_size=257, width=128, depth=4, pattern=("gla", "gla", "gla", "attention")),
    data=TextData(length=256, mode="packed", eval_limit=20),
    optimizer=Optimizer(lr=2e-3, warmup_steps=50),
    steps=500,
    batch_size=8,
    eval_every=250,
    checkpoint_every=100,
)
