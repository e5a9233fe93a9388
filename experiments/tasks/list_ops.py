"""ListOps: the value of a nested expression (Nangia and Bowman 2018, arXiv 1804.06028).

Lengths are those of Long Range Arena (Tay et al. 2021, arXiv 2011.04006).

    [MAX 2 9 [MIN 4 7 ] 0 ]   is 9

An expression is a digit or `[OP a_1 ... a_k ]`, where OP is one of MIN, MAX, MED (the median, of an even
number of arguments the mean of the middle two rounded down) and SM (the sum modulo 10), and the arguments are
expressions. The outermost one has an operator; below it each argument has one with probability 1/4, as long
as it is nested less than `depth` deep, and k is uniform from 2 to `arguments`. Kept are expressions of more
than `shortest` and fewer than `length` tokens. One label, at the last bracket: the value.

The published setting is the default; its training set has 96,000 examples (`train_examples=96_000`, here by
default 0, examples that never repeat), validation and test 2,000 each.

Unlike the published generator, which draws from an unseeded generator and lets the order of a hash set decide
what is trained on and what is tested, examples here belong to (config, seed) alone.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.sources import (
    Batch,
    GeneratedSource,
    Stream,
    require_at_least,
    require_types,
)
from layers.checks import require

TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]", "_")
MIN, MAX, MED, SM, CLOSE, PAD = range(10, 16)
CANDIDATES = 3  # expressions drawn at a time for one example, of which the first that fits is taken
ATTEMPTS = 500  # times that so many are drawn
PROBED = 1_000  # examples that tell how often each value is the answer


@dataclass(frozen=True, kw_only=True)
class ListOpsData:
    """ListOps expressions of `shortest < n < length` tokens, padded to `length`.

    `train_examples` is the size of a fixed training pool, or 0 for examples that never repeat.
    """

    length: int = 2000
    shortest: int = 500
    depth: int = 10
    arguments: int = 10
    train_examples: int = 0
    eval_examples: int = 2_000
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "eval_examples")
        require_at_least(self, 2, "depth", "arguments")
        require_at_least(self, 0, "train_examples", "data_seed", "shortest")
        ok = self.length >= max(16, 2 * self.shortest)  # or expressions that fit would be rare
        text = f"length={self.length} must be at least 16, and twice shortest={self.shortest}"
        require(ok, f"ListOpsData: {text}")

    def build(self) -> "ListOpsSource":
        """The source; examples are made when first asked for."""
        return ListOpsSource(self)


class ListOpsSource(GeneratedSource):
    """Batches `{"tokens" [B,T], "positions" [B,1], "targets" [B,1]}`, int32; the label is a digit."""

    kind = "language"
    tokenizer = None
    vocab_size = len(TOKENS)
    disjoint = True

    def __init__(self, cfg: ListOpsData):
        super().__init__(cfg, 1)

    @cached_property
    def chance(self) -> float:
        """Of the most frequent value: its share of examples of a stream that nothing else draws from."""
        values = self._all_examples(Stream.TASK, PROBED)["targets"]
        return float(np.bincount(values[:, 0]).max() / PROBED)

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        tokens = np.full((len(words), self.length), PAD, np.int32)
        positions = np.zeros((len(words), 1), np.int32)
        targets = np.zeros((len(words), 1), np.int32)
        missing = np.arange(len(words))
        for attempt in range(ATTEMPTS):
            if not missing.size:
                break
            candidates = attempt * CANDIDATES + np.arange(CANDIDATES)
            forest = _Forest(self.cfg, mixed(words[missing, :1], candidates).reshape(-1))
            fits = forest.fits.reshape(-1, CANDIDATES)
            found = np.flatnonzero(fits.any(1))
            rows = missing[found]
            forest.keep(found * CANDIDATES + fits[found].argmax(1))
            tokens[rows], positions[rows, 0], targets[rows, 0] = forest.expressions()
            missing = np.delete(missing, found)
        text = f"hardly any expression of depth={self.cfg.depth} has over {self.cfg.shortest} tokens"
        require(not missing.size, f"ListOpsData: shortest={self.cfg.shortest}: {text}")
        return {"tokens": tokens, "positions": positions, "targets": targets}

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        return (
            f"ListOps: expressions of {cfg.shortest + 1} to {cfg.length - 1} tokens, up to {cfg.depth} deep, "
            f"{pool}, chance {self.chance:.2%}"
        )


@dataclass
class _Level:
    """The nodes of all trees that are nested equally deep, tree by tree, siblings side by side."""

    tree: np.ndarray  # [n] the number of the tree
    parent: np.ndarray  # [n] the number of the parent in the level above
    symbol: np.ndarray  # [n] a digit or an operator
    arguments: np.ndarray  # [n] the number of children, 0 of a digit

    @property
    def firsts(self) -> np.ndarray:
        """For each operator the number of its first child in the level below."""
        counts = self.arguments[self.arguments > 0]
        return counts.cumsum() - counts


class _Forest:
    """Many expressions, level by level: a tree for every key."""

    def __init__(self, cfg: ListOpsData, keys: np.ndarray):
        self.cfg, self.levels = cfg, []
        tree, parent = np.arange(len(keys)), np.zeros(len(keys), np.int64)
        lengths = np.zeros(len(keys), np.int64)  # in tokens
        for depth in range(1, cfg.depth + 1):
            level = self._level(depth, keys, tree, parent)
            lengths += np.bincount(tree, 1.0 + (level.arguments > 0), len(keys)).astype(np.int64)
            level.arguments[lengths[tree] >= cfg.length] = 0  # too long already
            self.levels.append(level)
            parent = np.repeat(np.arange(len(tree)), level.arguments)
            tree = tree[parent]
        self.fits = (lengths > cfg.shortest) & (lengths < cfg.length)

    def _level(self, depth: int, keys: np.ndarray, tree: np.ndarray, parent: np.ndarray) -> _Level:
        place = np.arange(len(tree)) - np.searchsorted(tree, tree)
        words = mixed(keys[tree], place + (depth << 32))
        low, high = (words & np.uint64(2**32 - 1)).astype(np.int64), (words >> np.uint64(32)).astype(np.int64)
        operator = (low % 4 == 0) & (depth < self.cfg.depth) | (depth == 1)
        symbol = np.where(operator, MIN + low // 4 % 4, high % 10)
        return _Level(tree, parent, symbol, np.where(operator, 2 + high % (self.cfg.arguments - 1), 0))

    def keep(self, trees: np.ndarray) -> None:
        """Only `trees`, increasing numbers, from now on 0, 1, ..."""
        number = np.full(len(self.fits), -1)
        number[trees] = np.arange(len(trees))
        above = np.zeros(len(self.fits), np.int64)
        for i, level in enumerate(self.levels):
            kept = number[level.tree] >= 0
            self.levels[i] = _Level(
                number[level.tree[kept]],
                above[level.parent[kept]],
                level.symbol[kept],
                level.arguments[kept],
            )
            above = kept.cumsum() - 1
        self.fits = self.fits[trees]

    def expressions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(tokens [n,T], place of the last token [n], value [n])`."""
        sizes, value = self._sizes(), self._values()
        tokens = np.full((len(self.fits), self.cfg.length), PAD, np.int32)
        start = np.zeros(len(self.fits), np.int64)
        for depth, (level, size) in enumerate(zip(self.levels, sizes, strict=True)):
            if depth:
                before = size.cumsum() - size
                above = self.levels[depth - 1]
                first = np.repeat(above.firsts, above.arguments[above.arguments > 0])
                start = start[level.parent] + 1 + before - before[first]
            operator = level.arguments > 0
            tokens[level.tree, start] = level.symbol
            tokens[level.tree[operator], (start + size - 1)[operator]] = CLOSE
        return tokens, sizes[0] - 1, value

    def _sizes(self) -> list[np.ndarray]:
        """The number of tokens of every node, level by level."""
        sizes = [np.ones(len(level.tree), np.int64) for level in self.levels]
        for i in range(len(sizes) - 2, -1, -1):
            operator = self.levels[i].arguments > 0
            if operator.any():
                sizes[i][operator] = 2 + np.add.reduceat(sizes[i + 1], self.levels[i].firsts)
        return sizes

    def _values(self) -> np.ndarray:
        """The values of the outermost expressions."""
        value = self.levels[-1].symbol
        for level, below in zip(self.levels[-2::-1], self.levels[:0:-1], strict=True):
            operator, arguments = level.arguments > 0, value
            value = level.symbol.copy()
            if operator.any():
                value[operator] = _apply(level, arguments, below.parent)
        return value


def _apply(level: _Level, arguments: np.ndarray, parent: np.ndarray) -> np.ndarray:
    """The values of a level's operators, from those of the level below."""
    first = level.firsts
    symbol, count = level.symbol[level.arguments > 0], level.arguments[level.arguments > 0]
    ordered = arguments[np.lexsort((arguments, parent))]
    values = {
        MIN: ordered[first],
        MAX: ordered[first + count - 1],
        MED: (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) // 2,
        SM: np.add.reduceat(arguments, first) % 10,
    }
    return np.select([symbol == operator for operator in values], list(values.values()))


def mixed(key: np.ndarray, number: np.ndarray | int) -> np.ndarray:
    """Word `number` of the random sequence that belongs to `key` (SplitMix64, Steele et al. 2014); uint64."""
    z = key + (np.atleast_1d(number).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return z ^ (z >> np.uint64(31))


def text(tokens: np.ndarray) -> str:
    """An expression as people write it."""
    return " ".join(TOKENS[token] for token in tokens if token != PAD)
