"""State-passing post-training: a trained model learns to go on from the final states of other texts.

    zoo train state_passing --initial_weights=FOLDER --data.path=text.txt

Recurrent models that only ever began with the empty state can fail on texts much longer than those they were
trained on. A few hundred steps from the final states of other rows, dealt out anew for every batch, mend that
(Buitrago and Gu 2025, arXiv 2507.02782; see `experiments.state_passing`). Weights and `--frozen` are as in
`zoo train continued`. Rows are windows of one long stream, so that each has a past to go on from;
`--initial_state=carried` hands the states on in their order, `--initial_state=gaussian` draws them.
"""

from experiments.config import Optimizer, Run
from experiments.text import TextData
from experiments.weights import FromWeights

config = Run(
    model=FromWeights(),
    data=TextData(length=512, tokenizer="weights", eval_limit=20),
    optimizer=Optimizer(lr=1e-4, ssm_lr=1e-4, warmup_steps=20, schedule="wsd"),
    steps=200,
    batch_size=8,
    initial_state="shuffled",
    eval_every=100,
    checkpoint_every=100,
)
