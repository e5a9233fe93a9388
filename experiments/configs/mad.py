"""MAD: six small tasks, and the averages over them that are published for four architectures. For a GPU.

    zoo compare mad                         the six baselines
    zoo reproduce gpu --only mad            these and their 60 variations: what the averages are over

Poli et al. 2024 (arXiv 2403.17844) and, for DeltaNet, Yang et al. 2024 (arXiv 2406.06484, Figure 3, which has
the averages of all four): width 128, two blocks of a mixer and a SwiGLU, 200 epochs in batches of 128, AdamW
with a cosine to 1e-6. Of the published six settings two are tried: learning rates 5e-4 and 1e-3 with weight
decay 0.1. Layers have the sizes of the published configs (athms/mad-lab), where DeltaNet is not among them.

Two of the published accuracies are of other questions than here (`experiments/tasks/mad_memory.py`), and each
claim takes that into account, a being the accuracy here:

    compression     (n a + 1) / (n + 1)         n words; the last token, always right, is a class more there
    memorization    a [1 - (1 - 1/n)^4096]      n keys; those that 4,096 draws do not show are asked for there

Published are means over classes (macro). All classes are equally likely in each of the six tasks, so that
accuracy over labels (micro) has about the same expectation. The setting is chosen on validation, where the
published one was chosen on test.
"""

from experiments.compare import Comparison
from experiments.config import Optimizer, Run
from experiments.reproduce import Arms, Claim, Figure, mean, of
from experiments.tasks import mad
from experiments.tasks.mad_memory import MadCompressionData, MadMemorizationData
from zoo import autoencoder, lm, registry

WIDTH = 128
LAYERS = {
    "attention": {"heads": 16},
    "mamba": {"state_dim": 4},
    "gla": {"heads": 1, "key_dim": 128},
    "delta_net": {"heads": 4},
}
PUBLISHED = {"attention": 0.745, "mamba": 0.693, "gla": 0.600, "delta_net": 0.718}
RATES = mad.LEARNING_RATES[1:]
VARIATIONS = {(task, name): data for task in mad.PROTOCOL for name, data in mad.variations(task).items()}


def run(name: str, data) -> Run:
    room = {"max_length": data.length} if name == "attention" else {}
    layer = registry.config(name, WIDTH, **LAYERS[name], **room)
    module = autoencoder if isinstance(data, MadCompressionData) else lm
    model = module.Config(vocab_size=data.vocab_size, width=WIDTH, depth=2, pattern=(layer,), remat=False)
    return Run(
        model=model,
        data=data,
        optimizer=Optimizer(min_lr_ratio=1e-3, weight_decay=0.1, beta2=0.999, clip_norm=None),
        steps=mad.steps(data),
        batch_size=mad.BATCH_SIZE,
        log_every=100,
    )


def label(name: str, task: str, variation: str) -> str:
    return f"{name}, {task}, {variation}"


def comparison(title: str, settings: list[tuple[str, str]]) -> Comparison:
    """Every layer on these variations of tasks."""
    return Comparison(
        title=title,
        runs=tuple(
            (label(name, *setting), run(name, VARIATIONS[setting])) for setting in settings for name in LAYERS
        ),
        grid=(("optimizer.lr", RATES),),
    )


def as_published(data, figure: Figure) -> Figure:
    """An accuracy on `data` as the published one on its counterpart counts; see above."""

    def converted(arms: Arms) -> float:
        accuracy = figure(arms)
        if isinstance(data, MadCompressionData):
            return (data.words * accuracy + 1) / (data.words + 1)
        if isinstance(data, MadMemorizationData):
            return accuracy * (1 - (1 - 1 / data.keys) ** (data.train_examples * data.length // 2))
        return accuracy

    return converted


def average(name: str) -> Figure:
    """Over the tasks, of the average over each task's variations."""
    tasks: dict[str, list[Figure]] = {}
    for (task, variation), data in VARIATIONS.items():
        tasks.setdefault(task, []).append(as_published(data, of(label(name, task, variation))))
    return mean(*(mean(*figures) for figures in tasks.values()))


config = comparison("MAD, baselines", [(task, "baseline") for task in mad.PROTOCOL])
MORE = {
    f"mad_{task}": comparison(
        f"MAD, {task.replace('_', ' ')}", [s for s in VARIATIONS if s[0] == task and s[1] != "baseline"]
    )
    for task in mad.PROTOCOL
}

CLAIMS = tuple(
    Claim.near(
        f"{name}: the average over the six tasks of MAD is the published one", average(name), seen, 0.03
    )
    for name, seen in PUBLISHED.items()
)
