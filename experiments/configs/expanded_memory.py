"""A mixture of memories against one larger memory, as many parameters active for a token. For a GPU.

    zoo compare expanded_memory

Du et al. 2025 (arXiv 2502.13685) compare a mixture of memories with its inner layer, Gated DeltaNet, made
larger until a token meets as many parameters of either (400 M): on recall-heavy tasks 26.51 against 24.78 on
average. Here small, on multi-query recall over a mixture of lengths (arXiv 2402.18668): four memories of
which a token meets two, and one more that all share, against one memory whose heads are wider. The first of
the two layers is a short convolution over three tokens. Three seeds, 16 epochs, the best of three learning
rates.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Claim, drop
from experiments.tasks.recall_mixture import RecallMixture
from layers import base_conv, gated_delta_net, mixture_of_memories
from layers.checks import require
from zoo import lm

WIDTH, HEADS = 64, 2
CHANNELS, WIDER = 16, 30  # of a head: in each memory of the mixture, in the single one
DATA = RecallMixture.based()
EPOCHS, BATCH = 16, 256
EPOCH = sum(examples // BATCH for _, _, examples in DATA.train)  # steps


def model(layer) -> lm.Config:
    pattern = (base_conv.Config(layer.width, expand=1), layer)
    return lm.Config(
        vocab_size=DATA.vocab_size, width=layer.width, depth=2, pattern=pattern, mlp="none", remat=False
    )


def active_params(cfg: lm.Config) -> int:
    """Parameters that a token meets: not the keys, values and gates of memories it is not routed to."""
    idle = 0
    for layer in cfg.layers:
        if isinstance(layer, mixture_of_memories.Config):
            columns = layer.heads * (layer.K + layer.V + 2)  # two gates a head
            idle += (layer.memories - layer.top_k) * layer.width * columns
    return lm.param_count(cfg) - idle


MIXTURE = model(mixture_of_memories.Config(WIDTH, heads=HEADS, key_dim=CHANNELS, value_dim=CHANNELS))
SINGLE = model(gated_delta_net.Config(WIDTH, heads=HEADS, key_dim=WIDER, value_dim=WIDER))
_ACTIVE = [active_params(cfg) - WIDTH * DATA.vocab_size for cfg in (MIXTURE, SINGLE)]
require(abs(_ACTIVE[0] / _ACTIVE[1] - 1) < 0.02, f"expanded_memory: active parameters differ: {_ACTIVE}")


def run(cfg: lm.Config) -> Run:
    return Run(
        model=cfg,
        data=DATA,
        optimizer=Optimizer(min_lr_ratio=0.0, warmup_steps=EPOCH // 2, weight_decay=0.1),
        steps=EPOCHS * EPOCH,
        batch_size=BATCH,
        log_every=EPOCH,
        checkpoint_every=4 * EPOCH,
        eval_batch_size=50,
    )


config = Comparison(
    title="a mixture of memories and one larger memory",
    runs=(("mixture of memories", run(MIXTURE)), ("one expanded memory", run(SINGLE))),
    seeds=(0, 1, 2),
    grid=(("optimizer.lr", (1e-3, 3.2e-3, 1e-2)),),
)

CLAIMS = (
    Claim(
        "a mixture of memories recalls more than one memory of as many active parameters, by",
        drop("mixture of memories", "one expanded memory"),
        least=0.01,
    ),
)
