"""Finding the needle: with a pattern for what is asked, in the text before the question."""

import re

import numpy as np

PATTERNS = {
    "passkey": r"The pass key is (\d+)\. Keep",
    "passkey5": r"The pass key is (\d{5})\. Keep",
    "niah1": r"The secret number of {key} is (\d{{7}})\.",
    "niah2": r"The secret number of {key} is (\d{{7}})\.",
    "niah3": r"The secret code of {key} is ([0-9a-f-]{{36}})\.",
}


def solve_needle(batch, cfg):
    """The bytes of the answer, placed by `positions` (0 where there is none)."""
    answers = np.full(batch["positions"].shape, -1)
    for row, (tokens, positions) in enumerate(zip(batch["tokens"], batch["positions"], strict=True)):
        first = int(positions[0]) + 1
        prompt = bytes(tokens[:first].tolist()).decode()
        text, question = prompt.rsplit("\n", 1)
        key = re.search(r" of (\w+)\? ", question)
        pattern = PATTERNS[cfg.kind].format(key=key[1]) if key else PATTERNS[cfg.kind]
        (value,) = re.findall(pattern, text)
        answer = value + "." if cfg.kind == "passkey" else value
        answers[row, : len(answer)] = list(answer.encode())
    return answers
