"""Swaps of five things: one layer of DeltaNet follows them, to twice the training length, if it may reflect.

    zoo compare swaps

Words over the swaps of S_5 and the identity (Grazzi et al. 2024, arXiv 2411.12537, Section 5.2): a swap is a
reflection, which is what one step of the delta rule with beta = 2 is. Trained on words of up to 32, tested on
the products at all places of words of 64.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Claim, of
from experiments.tasks.state_tracking import WordProblemData
from zoo import lm, registry

WIDTH = 64
DATA = WordProblemData(group="S5", moved=2, min_length=3, length=32)
LONGER = WordProblemData(group="S5", moved=2, min_length=64, length=64)


def run(**settings) -> Run:
    layer = registry.config("delta_net", WIDTH, heads=2, **settings)
    model = lm.Config(vocab_size=DATA.build().vocab_size, width=WIDTH, depth=1, pattern=(layer,), remat=False)
    optimizer = Optimizer(lr=3e-3, warmup_steps=50, weight_decay=0.01)
    return Run(model=model, data=DATA, optimizer=optimizer, steps=2000, batch_size=64, log_every=20)


config = Comparison(
    title="products of swaps in S_5, one layer",
    runs=(("delta_net [0, 1]", run()), ("delta_net [-1, 1]", run(negative_eigenvalues=True))),
    grid=(("optimizer.lr", (3e-3, 1e-2)),),
    probes=(("64 swaps", LONGER),),
)

CLAIMS = (
    Claim(
        "with eigenvalues in [-1, 1] one layer follows 64 swaps", of("delta_net [-1, 1]", "64 swaps"), 0.99
    ),
    Claim("with eigenvalues in [0, 1] it does not", of("delta_net [0, 1]", "64 swaps"), most=0.9),
)
