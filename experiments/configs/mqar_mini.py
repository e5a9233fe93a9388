"""Recall of 8 pairs: attention and the delta rule solve it, plain linear attention in part, S4D not at all.

    zoo compare mqar_mini

Multi-query associative recall as in Zoology (Arora et al. 2023, arXiv 2312.04927), small: two blocks of width
32 without an MLP, a short convolution before every mixer but S4D, which is one itself.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Claim, of
from experiments.tasks.recall import RecallData
from zoo import lm, registry

WIDTH = 32
DATA = RecallData(vocab_size=512, length=64, pairs=8, train_examples=20_000, eval_examples=1_000)


def run(name: str, **settings) -> Run:
    layer = registry.config(name, WIDTH, **settings)
    model = lm.Config(vocab_size=512, width=WIDTH, depth=2, pattern=(layer,), mlp="none", remat=False)
    optimizer = Optimizer(lr=5e-3, warmup_steps=50, weight_decay=0.1)
    return Run(model=model, data=DATA, optimizer=optimizer, steps=1500, batch_size=32, log_every=20)


config = Comparison(
    title="recall of 8 pairs, V=512, T=64",
    runs=(
        ("attention", run("attention", heads=1, max_length=64, conv=4)),
        ("delta_net", run("delta_net", heads=1)),
        ("gated_delta_net", run("gated_delta_net", heads=1)),
        ("linear_attention", run("linear_attention", heads=1, conv=4)),
        ("s4d", run("s4d", state_dim=32)),
    ),
    grid=(("optimizer.lr", (5e-3, 1e-2)),),
)

CLAIMS = (
    Claim("attention recalls", of("attention"), least=0.99),
    Claim("DeltaNet recalls", of("delta_net"), least=0.99),
    Claim("Gated DeltaNet recalls", of("gated_delta_net"), least=0.99),
    Claim("additive linear attention recalls in part", of("linear_attention"), least=0.1, most=0.99),
    Claim("time-invariant S4D does not recall", of("s4d"), most=0.1),
)
