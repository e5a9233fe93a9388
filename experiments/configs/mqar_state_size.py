"""Recall against state size: DeltaNet, Gated DeltaNet, GLA and Mamba-2 on a published curve. For a GPU.

    zoo compare mqar_state_size

The mixture of Arora et al. 2024 (arXiv 2402.18668): trained on 4 to 64 pairs in 64 to 256 tokens, tested on
up to 256 pairs in 1,024; accuracy is the mean of seven cells. Two layers without an MLP, of which the first
is a short convolution over three tokens (Mamba-2 is both itself), at widths 64 to 256; 32 epochs in batches
of 256, AdamW with weight decay 0.1, no warm-up, a cosine to zero, the best of four learning rates.

PUBLISHED is read off the figure in the README of HazyResearch/zoology (commit d88d6f5), to 0.005 in accuracy
and 2 % in size: bytes of the states of both layers in float32. Left out are points of Mamba-2 that two
settings share, and one of Gated DeltaNet at 257 KB whose size is none of its own.

Not as published: the learning rate is chosen on a validation split (there on the test split), by accuracy per
label over all cells; no dropout of embeddings (there 0.1); the convolution is this zoo's; weights and batches
are drawn anew; and no run stops early.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Claim, mean, of
from experiments.tasks.recall_mixture import RecallMixture
from layers import base_conv, mamba2
from zoo import lm, registry

DATA = RecallMixture.based()
EPOCHS, BATCH = 32, 256
EPOCH = sum(examples // BATCH for _, _, examples in DATA.train)  # steps
RATES = (1e-3, 3.2e-3, 1e-2, 3.2e-2)
DELTA = {"heads": 2, "gate": False}
LAYERS = {
    "delta_net": lambda width: DELTA,
    "gated_delta_net": lambda width: {**DELTA, "value_dim": width},  # twice the keys'
    "gla": lambda width: {"heads": 2},
}
# Layer -> width, Mamba-2's state per channel, bytes of state, accuracy.
PUBLISHED = {
    "delta_net": ((64, 0, 8_929, 0.793), (128, 0, 34_120, 0.963), (256, 0, 133_675, 0.995)),
    "gated_delta_net": ((64, 0, 17_096, 0.890), (128, 0, 66_793, 0.988)),
    "gla": ((64, 0, 4_847, 0.532), (128, 0, 17_869, 0.771), (256, 0, 68_475, 0.950)),
    "mamba2": ((64, 8, 8_150, 0.520), (128, 24, 48_874, 0.796), (256, 24, 98_084, 0.844)),
}


def model(name: str, width: int, state: int) -> lm.Config:
    if name == "mamba2":
        pattern: tuple = (registry.config(name, width, state_dim=state),)
    else:
        pattern = base_conv.Config(width, expand=1), registry.config(name, width, **LAYERS[name](width))
    return lm.Config(
        vocab_size=DATA.vocab_size, width=width, depth=2, pattern=pattern, mlp="none", remat=False
    )


def memory_bytes(cfg: lm.Config) -> int:
    """Of the states, as the figure counts them: no convolution but that of the first layer."""
    numbers = 0
    for layer in cfg.layers:
        if isinstance(layer, base_conv.Config):
            numbers += layer.conv * layer.width
        elif isinstance(layer, mamba2.Config):
            numbers += layer.channels * layer.state_dim
        else:
            numbers += layer.heads * layer.K * layer.V
    return 4 * numbers


def run(cfg: lm.Config) -> Run:
    optimizer = Optimizer(lr=1e-2, min_lr_ratio=0.0, weight_decay=0.1, beta2=0.999, clip_norm=None)
    return Run(
        model=cfg,
        data=DATA,
        optimizer=optimizer,
        steps=EPOCHS * EPOCH,
        batch_size=BATCH,
        log_every=EPOCH,
        checkpoint_every=8 * EPOCH,
        eval_batch_size=50,
    )


def label(name: str, width: int, state: int) -> str:
    return f"{name}, width {width}" + (f", {state} states" if state else "")


POINTS = tuple((name, *point) for name, points in PUBLISHED.items() for point in points)
CELLS = tuple(
    (f"{length} tokens, {pairs} pairs", DATA.cell("evaluation", number))
    for number, (length, pairs, _) in enumerate(DATA.evaluation)
)

config = Comparison(
    title="recall against state size",
    runs=tuple((label(*point[:3]), run(model(*point[:3]))) for point in POINTS),
    grid=(("optimizer.lr", RATES),),
    probes=CELLS,
)

CLAIMS = tuple(
    Claim.near(
        f"{label(name, width, state)} ({size / 1e3:.0f} KB) recalls as published",
        mean(*(of(label(name, width, state), cell) for cell, _ in CELLS)),
        accuracy,
        0.05,
    )
    for name, width, state, size, accuracy in POINTS
)
