"""Continued pre-training: a language model goes on from published weights, or from those of a run.

    zoo train continued --initial_weights=FOLDER --data.path=text.txt
    zoo train continued --initial_weights=owner/name --data.path=text.txt --frozen=w_embed,blocks/*/mixer
    zoo export runs/continued --out=FOLDER2

The model, its tokenizer and all parameters are those of the weights: the folder of a Hugging Face checkpoint,
a name on the hub, or a run directory (see `experiments.weights`). Documents are packed, the state is reset at
their beginnings. `--frozen` names parameters that stay as they are, bit for bit, and take no memory of the
optimiser (see `experiments.frozen`). The learning rate is low and rises slowly: Adam's moments begin at zero.
"""

from experiments.config import Optimizer, Run
from experiments.text import TextData
from experiments.weights import FromWeights

config = Run(
    model=FromWeights(),
    data=TextData(length=512, mode="packed", tokenizer="weights", eval_limit=20),
    optimizer=Optimizer(lr=1e-4, ssm_lr=1e-4, warmup_steps=50),
    steps=500,
    batch_size=8,
    eval_every=250,
    checkpoint_every=100,
)
