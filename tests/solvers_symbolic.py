"""Solvers of the symbolic tasks: from the tokens alone, example by example."""

from itertools import permutations

import numpy as np


def solve_recall(batch, cfg):
    """Look the queried key up among the pairs; pairs before a key that came again are forgotten."""
    answers = []
    for tokens, positions in zip(batch["tokens"], batch["positions"], strict=True):
        memory = {int(tokens[i]): int(tokens[i + 1]) for i in range(0, 2 * cfg.pairs, 2)}
        answers.append([memory[int(tokens[p])] for p in positions])
    return np.array(answers)


def solve_varied_recall(batch, cfg):
    """The same with keys of one token or two, and a context that later entries overwrite."""
    width = 3 if cfg.compound else 2
    context = cfg.passes * width * (cfg.pairs + cfg.rewritten)
    answers = []
    for tokens, positions in zip(batch["tokens"].tolist(), batch["positions"], strict=True):
        memory = {}
        for i in range(0, context, width):
            memory[tuple(tokens[i : i + width - 1])] = tokens[i + width - 1]
        answers.append([memory[tuple(tokens[p + 2 - width : p + 1])] for p in positions])
    return np.array(answers)


def solve_recall_mixture(batch, cfg):
    """What the tokens before the first query say; how many pairs there are, the number of queries tells."""
    pairs = batch["positions"].shape[1]
    entries = batch["tokens"][:, : 2 * pairs].reshape(-1, pairs, 2)
    memories = [dict(rows.tolist()) for rows in entries]
    queries = np.take_along_axis(batch["tokens"], batch["positions"], 1)
    return np.array([[m[q] for q in row] for m, row in zip(memories, queries.tolist(), strict=True)])


def solve_induction(batch, cfg):
    """The token behind the first occurrence of the last token."""
    return np.array([[row[row.index(row[-1]) + 1]] for row in batch["tokens"].tolist()])


def solve_copying(batch, cfg):
    """Everything that is neither blank nor the last token, in order."""
    return np.array([[x for x in row if x not in (0, row[-1])] for row in batch["tokens"].tolist()])


def solve_word_problem(batch, cfg):
    """Compose numbers or permutations themselves, one after the other; look up where the result is."""
    kind, degree = cfg.group[0], int(cfg.group[1:])
    if kind == "Z":
        elements, start = list(range(degree)), 0
    else:
        elements, start = list(permutations(range(degree))), tuple(range(degree))
        if kind == "A":
            elements = [p for p in elements if _is_even(p)]
    answers = np.full(batch["tokens"].shape, -1)
    for row, tokens in zip(answers, batch["tokens"].tolist(), strict=True):
        state = start
        for t, token in enumerate(tokens[1:], 1):
            if token:
                g = elements[token - 2]
                state = (state + g) % degree if kind == "Z" else tuple(g[i] for i in state)
                row[t] = 2 + elements.index(state)
    return answers if cfg.labels == "every" else np.take_along_axis(answers, batch["positions"], 1)


def _is_even(permutation):
    """A permutation is even when its length less its number of cycles is."""
    seen, cycles = set(), 0
    for i in permutation:
        cycles += i not in seen
        while i not in seen:
            seen.add(i)
            i = permutation[i]
    return (len(permutation) - cycles) % 2 == 0


def solve_arithmetic(batch, cfg):
    """Python reads the expression; what stands behind "=" does not count."""
    symbols = {1 + d: str(d) for d in range(cfg.modulus)}
    symbols |= {1 + cfg.modulus + i: sign for i, sign in enumerate("+-*()=")} | {0: ""}
    texts = ["".join(symbols[t] for t in row) for row in batch["tokens"].tolist()]
    return np.array([[1 + eval(text.partition("=")[0]) % cfg.modulus] for text in texts])
