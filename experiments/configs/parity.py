"""Parity: trained on up to 40 bits, right on 256 only where an eigenvalue can be -1.

    zoo compare parity

Grazzi et al. 2024 (arXiv 2411.12537), Section 5: a linear recurrence whose transition has eigenvalues in
[0, 1] cannot count modulo 2 at every length, one with [-1, 1] can. Accuracy beyond the training lengths is of
the last bit of words of 40 to 256 bits; guessing gives 1/2.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Claim, of
from experiments.tasks.state_tracking import WordProblemData
from zoo import lm, registry

WIDTH = 32
DATA = WordProblemData.parity(labels="every")
LONGER = WordProblemData.parity(min_length=40, length=256)


def run(name: str, **settings) -> Run:
    layer = registry.config(name, WIDTH, **settings)
    source = DATA.build()
    model = lm.Config(vocab_size=source.vocab_size, width=WIDTH, depth=2, pattern=(layer,), remat=False)
    optimizer = Optimizer(lr=1e-2, warmup_steps=50, weight_decay=0.0)
    return Run(model=model, data=DATA, optimizer=optimizer, steps=2000, batch_size=64, log_every=20)


config = Comparison(
    title="parity of 3 to 40 bits, tested on 40 to 256",
    runs=(
        ("delta_net [0, 1]", run("delta_net", heads=2)),
        ("delta_net [-1, 1]", run("delta_net", heads=2, negative_eigenvalues=True)),
        ("mamba [0, 1]", run("mamba")),
    ),
    probes=(("40 to 256 bits", LONGER),),
)

CLAIMS = (
    Claim("DeltaNet, eigenvalues in [0, 1], guesses", of("delta_net [0, 1]", "40 to 256 bits"), most=0.6),
    Claim("DeltaNet, eigenvalues in [-1, 1], counts", of("delta_net [-1, 1]", "40 to 256 bits"), least=0.99),
    Claim("Mamba, eigenvalues in [0, 1], guesses", of("mamba [0, 1]", "40 to 256 bits"), most=0.6),
)
