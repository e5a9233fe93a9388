"""MAD, six small tasks that rank architectures (Poli et al. 2024, arXiv 2403.17844), and its protocol.

    variations("noisy_recall")      {"baseline": MadRecallData(...), "vocab_size=48": ..., "noise=0.8": ...}
    score(results)                  the mean over tasks of the mean over a task's variations

A model of width 128 and four residual blocks (mixer, SwiGLU, mixer, SwiGLU; here `depth=2`) trains on every
baseline and on every variation, which differs from it in one setting, once for each learning rate and weight
decay below; the best of these runs counts. Published are averages over classes (macro) on the test split,
which also chose that run. Here accuracy is over labelled positions (micro), and the run is to be chosen on
the validation split; compare with published scores accordingly. Definitions, with what is deliberately
different: `mad_recall.py`, `mad_fuzzy.py` and `mad_memory.py`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from experiments.tasks.mad_fuzzy import MadFuzzyRecallData
from experiments.tasks.mad_memory import MadCompressionData, MadCopyingData, MadMemorizationData
from experiments.tasks.mad_recall import MadRecallData
from zoo.registry import unknown

# The published training: AdamW, cosine to 1e-6, and the better of these.
BATCH_SIZE = 128
EPOCHS = 200
LEARNING_RATES = (1e-4, 5e-4, 1e-3)
WEIGHT_DECAYS = (0.0, 0.1)

_POOLS = (6_400, 3_200, 1_600, 800)
_RECALL = {"vocab_size": (32, 64, 128), "length": (256, 512, 1024), "train_examples": _POOLS}
PROTOCOL: dict[str, tuple[Any, dict[str, tuple]]] = {
    "in_context_recall": (MadRecallData(every_token=True), _RECALL),
    "noisy_recall": (
        MadRecallData(vocab_size=32, noise_vocab=16, noise=0.2, every_token=True),
        _RECALL | {"vocab_size": (48, 80, 144), "noise": (0.4, 0.6, 0.8)},
    ),
    "fuzzy_recall": (MadFuzzyRecallData(every_token=True), _RECALL),
    "memorization": (MadMemorizationData(), {"vocab_size": (512, 1024, 2048, 4096, 8192)}),
    "compression": (MadCompressionData(), _RECALL | {"length": (64, 128, 256)}),
    "selective_copying": (MadCopyingData(), _RECALL | {"length": (512, 1024), "copied": (32, 64, 96)}),
}


def variations(task: str) -> dict[str, Any]:
    """The configs of one task: `baseline`, and by `field=value` those that differ from it in one field."""
    if task not in PROTOCOL:
        raise unknown("MAD task", task, PROTOCOL)
    return dict(_variations(*PROTOCOL[task]))


def _variations(baseline: Any, changes: dict[str, tuple]) -> Iterator[tuple[str, Any]]:
    yield "baseline", baseline
    for field, values in changes.items():
        for value in values:
            yield f"{field}={value}", dataclasses.replace(baseline, **{field: value})


def steps(config: Any) -> int:
    """Updates of the published training on a config: 200 epochs in batches of 128."""
    return EPOCHS * -(-config.train_examples // BATCH_SIZE)


def score(results: Mapping[str, Mapping[str, float]]) -> float:
    """`{task: {variation: accuracy}}` -> the mean over tasks of the mean over each task's variations.

    Raises ValueError where one of the tasks or of their variations is missing, or is not one.
    """
    for task, (baseline, changes) in PROTOCOL.items():
        expected = {name for name, _ in _variations(baseline, changes)}
        wrong = sorted(expected ^ set(results.get(task, {})))
        if wrong:
            raise ValueError(f"MAD score: {task} needs one result for each variation; see {', '.join(wrong)}")
    return fmean(fmean(results[task].values()) for task in PROTOCOL)
