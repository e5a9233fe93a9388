"""Solvers of MAD's tasks, ListOps and Pathfinder: from tokens or pixels alone, example by example."""

from statistics import median

import numpy as np

from experiments.tasks.list_ops import TOKENS


def solve_mad_recall(batch, cfg):
    """Remember every pair; what follows a key is the value it had before."""
    answers = np.zeros(batch["tokens"].shape, int)
    for row, tokens in enumerate(batch["tokens"].tolist()):
        memory = {}
        for place in range(0, len(tokens), 2):
            key, value = tokens[place : place + 2]
            if key < cfg.keys:
                answers[row, place] = memory.get(key, 0)
                memory[key] = value
    return answers


def solve_mad_fuzzy_recall(batch, cfg):
    """The same, for runs of key tokens and the runs of value tokens behind them."""
    answers = np.zeros(batch["tokens"].shape, int)
    for row, tokens in enumerate(batch["tokens"].tolist()):
        memory, key, place = {}, (), 0
        while place < len(tokens) and tokens[place] < cfg.vocab_size - 1:
            end, is_key = place, tokens[place] < cfg.keys
            while (
                end < len(tokens) and tokens[end] < cfg.vocab_size - 1 and (tokens[end] < cfg.keys) == is_key
            ):
                end += 1
            if is_key:
                key = tuple(tokens[place:end])
                known = memory.get(key, ())
                answers[row, end - 1 : end - 1 + len(known)] = known
            else:
                memory.setdefault(key, tuple(tokens[place:end]))
            place = end
    return answers


def solve_mad_memorization(batch, cfg):
    """Learn the value of every key from the first epoch of training, where it stands as the answer."""
    source, memory = cfg.build(), {}
    for step in range(max(1, cfg.train_examples // 20)):
        seen = source.batch(0, step, 20)
        keys = np.take_along_axis(seen["tokens"], seen["positions"] - 1, 1)
        memory |= dict(zip(keys.ravel().tolist(), seen["targets"].ravel().tolist(), strict=True))
    asked = np.take_along_axis(batch["tokens"], batch["positions"] - 1, 1)
    return np.vectorize(memory.__getitem__)(asked)


def solve_mad_compression(batch, cfg):
    """To reproduce is to copy."""
    return batch["tokens"]


def solve_mad_copying(batch, cfg):
    """What is no blank, up to the marker, in order."""
    blank, marker = cfg.vocab_size - 2, cfg.vocab_size - 1
    rows = [tokens[: tokens.index(marker)] for tokens in batch["tokens"].tolist()]
    return np.array([[token for token in row if token != blank] for row in rows])


def solve_list_ops(batch, cfg):
    """Read the expression recursively."""
    return np.array([[_value(iter(TOKENS[token] for token in tokens))] for tokens in batch["tokens"]])


def _value(words):
    """The value of the expression that begins here, or None where a list ends."""
    word = next(words)
    if word == "]":
        return None
    if word.isdigit():
        return int(word)
    arguments = list(iter(lambda: _value(words), None))
    operators = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(median(x)), "[SM": lambda x: sum(x) % 10}
    return operators[word](arguments)


def solve_pathfinder(batch, cfg):
    """Walk over lit pixels from one disc, in steps of at most 2; discs alone are as bright as can be."""
    return np.array([_connected(x.reshape(cfg.size, cfg.size)) for x in batch["inputs"]])


def _connected(image):
    bright = {tuple(place) for place in np.argwhere(image == 1)}
    lit = {tuple(place) for place in np.argwhere(image > 0)}
    disc = _reached(bright, min(bright), 1)
    assert disc != bright  # two discs
    return int(bright <= _reached(lit, min(bright), 2))


def _reached(places, start, step):
    reached, edge = {start}, [start]
    while edge:
        y, x = edge.pop()
        near = {(y + i, x + j) for i in range(-step, step + 1) for j in range(-step, step + 1)}
        new = (near & places) - reached
        reached |= new
        edge += new
    return reached
