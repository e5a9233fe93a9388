"""Tasks: what is asked of a memory, each a config whose examples are a pure function of (config, seed).

Examples are made, not downloaded: bit for bit the same on any machine, training and test apart, the answer
recoverable from the input. A source's `chance` is the accuracy of the best guess that does not look.
"""

import ast
from pathlib import Path

# Config, and the file it is in.
TASKS = {
    "RecallData": "recall",
    "RecallMixture": "recall_mixture",
    "VariedRecall": "recall_variants",
    "InductionData": "induction",
    "CopyingData": "copying",
    "MadRecallData": "mad_recall",
    "MadFuzzyRecallData": "mad_fuzzy",
    "MadMemorizationData": "mad_memory",
    "MadCompressionData": "mad_memory",
    "MadCopyingData": "mad_memory",
    "NeedleData": "needle",
    "WordProblemData": "state_tracking",
    "ArithmeticData": "expressions",
    "ListOpsData": "list_ops",
    "PathfinderData": "pathfinder",
    "Mnist1dData": "mnist1d",
    "DigitsData": "digits",
    "SignalData": "signals",
    "ArrayData": "signals",
    "BiosData": "bios",
    "LexiconData": "lexicon",
    "HiddenMarkovData": "hidden_markov",
}


def summary(name: str) -> str:
    """The first line of what is written about a task; nothing is run."""
    text = (Path(__file__).parent / f"{TASKS[name]}.py").read_text()
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
