"""States that collapse beyond the training length, and a cure: to begin with those of other text. For a GPU.

    zoo compare state_collapse

Recurrent models trained long on short sequences fail on long ones, for the states these lead to were never
met in training (Chen et al. 2024, arXiv 2410.07145; Buitrago and Gu 2025, arXiv 2507.02782, who begin
training sequences with the final states of others: state passing). Published for Mamba-2 of 130 M to 1.3 B
parameters, for which a state of S million numbers took training on 5.2 S - 4.5 thousand tokens or more to
learn to forget. Here one of 4.3 M parameters and S = 1.05, trained from the first step on 128 bytes at a time
of the running Python's own library. A probe of n tokens is the loss over the last eighth of rows of n.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Claim, Figure, difference, of
from experiments.tasks.collapse import Stretch
from experiments.text import TextData
from zoo import lm, registry

WIDTH, DEPTH, STATE, LENGTH, STEPS = 256, 8, 256, 128, 10_000
LENGTHS = tuple(4**n * LENGTH for n in range(5))  # to 32,768
DATA = TextData(length=LENGTH)


def run(initial_state: str) -> Run:
    layer = registry.config("mamba2", WIDTH, state_dim=STATE, head_dim=32)
    model = lm.Config(
        vocab_size=257, width=WIDTH, depth=DEPTH, pattern=(layer,), mlp="none", remat=False, piece=4096
    )
    return Run(
        model=model,
        data=DATA,
        optimizer=Optimizer(lr=2e-3, warmup_steps=STEPS // 20, weight_decay=0.1),
        steps=STEPS,
        batch_size=64,
        log_every=100,
        eval_batch_size=8,
        checkpoint_every=STEPS // 4,
        initial_state=initial_state,
    )


def loss(model: str, length: int) -> Figure:
    return of(model, f"{length:,} tokens", "loss")


config = Comparison(
    title="trained on 128 tokens, read on",
    runs=(("empty states", run("zero")), ("passed states", run("shuffled"))),
    seeds=(0, 1),
    select="loss",
    probes=tuple((f"{length:,} tokens", Stretch.at(DATA, length)) for length in LENGTHS),
)

NEAR, FAR = LENGTHS[0], LENGTHS[-1]
CLAIMS = (
    Claim(
        f"trained from empty states, Mamba-2 loses this much more at {FAR:,} tokens than at {NEAR}",
        difference(loss("empty states", FAR), loss("empty states", NEAR)),
        least=0.1,
    ),
    Claim(
        f"trained from passed states, it loses this much more at {FAR:,} tokens than at {NEAR}",
        difference(loss("passed states", FAR), loss("passed states", NEAR)),
        most=0.0,
    ),
    Claim(
        f"which makes this much of a difference at {FAR:,} tokens",
        difference(loss("empty states", FAR), loss("passed states", FAR)),
        least=0.2,
    ),
    Claim(
        f"and costs this much at {NEAR}",
        difference(loss("passed states", NEAR), loss("empty states", NEAR)),
        most=0.05,
    ),
)
