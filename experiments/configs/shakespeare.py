"""Five families and attention on tiny Shakespeare, characters, at nanoGPT's CPU setting.

    zoo compare shakespeare --data.path=input.txt

`input.txt` is Karpathy's tinyshakespeare (1,115,394 characters, 65 of them different), cut 90/10. Every model
has four blocks of width 128 and about the parameters of the attention model (its MLP is made wider or
narrower), and sees the same 2,000 batches of 12 windows of 64 characters. The validation loss is over the
whole validation part, not a sample of it. nanoGPT reports 1.88 for its own model at this setting.
"""

import dataclasses

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.text import TextData
from zoo import lm, registry

WIDTH, DEPTH, LENGTH = 128, 4, 64
DATA = TextData(path="input.txt", tokenizer="char", length=LENGTH)
OPTIMIZER = Optimizer(lr=1e-3, min_lr_ratio=0.1, warmup_steps=100, beta2=0.99, weight_decay=0.1)


def model(name: str, **settings) -> lm.Config:
    layer = registry.config(name, WIDTH, **settings)
    return lm.Config(vocab_size=65, width=WIDTH, depth=DEPTH, pattern=(layer,), mlp="gelu", remat=False)


def matched(cfg: lm.Config, parameters: int) -> lm.Config:
    """`cfg` with the MLP width that brings it closest to `parameters`."""
    rest = lm.param_count(cfg) - DEPTH * cfg.mlp_weights()
    hidden = min(range(8, 1025, 8), key=lambda n: abs(rest + 2 * DEPTH * WIDTH * n - parameters))
    return dataclasses.replace(cfg, expansion=hidden / WIDTH)


def run(cfg: lm.Config) -> Run:
    return Run(model=cfg, data=DATA, optimizer=OPTIMIZER, steps=2000, batch_size=12, log_every=20)


ATTENTION = model("attention", heads=4, max_length=LENGTH)
FAMILIES = {
    "s4": model("s4", state_dim=32),
    "mamba": model("mamba"),
    "gla": model("gla", heads=4),
    "mixture_of_memories": model("mixture_of_memories", heads=4, key_dim=16),
    "titans": model("titans", heads=4),
}

config = Comparison(
    title="tiny Shakespeare, characters: 4 blocks of width 128, T=64, 2,000 steps of 12",
    runs=(
        ("attention", run(ATTENTION)),
        *((name, run(matched(cfg, lm.param_count(ATTENTION)))) for name, cfg in FAMILIES.items()),
    ),
)
