"""Modular arithmetic without and with brackets (Delétang et al., arXiv 2207.02098).

An expression of n tokens over the digits 0 ... m - 1 is followed by "=", whose label is the value modulo m.

    without brackets    digits and operators in turn, both uniform, n odd; products come before sums
    with brackets       E(1) = d,  E(2) = -d,  E(3) = (d),  E(4) = (-d),  and for n >= 5
                        E(n) = (E(l) o E(n - 3 - l)),  l uniform in [1, n - 4];  digits d, operators o uniform

n is uniform among the possible lengths in [min_length, length]; shorter expressions are padded at the end.
The first is a regular language (accumulated sum and current product are enough to remember), the second
context-free: it takes a stack. Published comparisons train on lengths 3 to 40 and test on 40 to 256 (Beck et
al., arXiv 2405.04517; Grazzi et al., arXiv 2411.12537) and report the scaled accuracy of
`state_tracking.scaled_accuracy`. The "=" is ours: without it a model would have to know that a digit is the
last. With `operators="+-"` brackets have no products, as in Delétang's published code by default.

    ArithmeticData().build()
    ArithmeticData(brackets=True, min_length=40, length=256).build()

Short expressions are few, so an expression belongs to one split by its content. Token ids: 0 pads, 1 + d is
digit d, in the labels too, then come `+ - * ( ) =`.
"""

from dataclasses import dataclass

import numpy as np

from experiments.sources import Batch, GeneratedSource, below, require_at_least, require_types
from layers.checks import require

DIGIT = 1  # token id of digit 0; the signs follow the digits
SIGNS = "+-*()="


@dataclass(frozen=True, kw_only=True)
class ArithmeticData:
    """Expressions modulo `modulus` with the given `operators`, some of "+-*"."""

    modulus: int = 5
    operators: str = "+-*"
    brackets: bool = False
    min_length: int = 3
    length: int = 40
    train_examples: int = 0
    eval_examples: int = 1_000
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 2, "modulus")
        require_at_least(self, 1, "min_length", "length", "eval_examples")
        require_at_least(self, 0, "train_examples", "data_seed")
        require(self.modulus < 1000, f"ArithmeticData: modulus={self.modulus} must be below 1000")
        chosen = self.operators
        known = 0 < len(chosen) == len(set(chosen)) and set(chosen) <= set("+-*")
        require(known, f"ArithmeticData: operators={chosen!r} must be some of '+-*', each once")
        some = bool(self.lengths)
        require(
            some, f"ArithmeticData: no expression from min_length={self.min_length} to length={self.length}"
        )

    @property
    def lengths(self) -> range:
        """The lengths that expressions may have; without brackets they are odd."""
        if self.brackets:
            return range(self.min_length, self.length + 1)
        return range(self.min_length | 1, self.length + 1, 2)

    def build(self) -> "ArithmeticSource":
        """The source; examples are made when first asked for."""
        return ArithmeticSource(self)


class ArithmeticSource(GeneratedSource):
    """Batches `{"tokens" [B,n+1], "positions" [B,1], "targets" [B,1]}`, all int32."""

    kind = "language"
    tokenizer = None
    disjoint = True

    def __init__(self, cfg: ArithmeticData):
        super().__init__(cfg, 1 + 2 * cfg.length)
        self.length = cfg.length + 1
        self.sign = {sign: DIGIT + cfg.modulus + i for i, sign in enumerate(SIGNS)}
        self.vocab_size = DIGIT + cfg.modulus + len(SIGNS)
        self._operators = np.array([self.sign[o] for o in cfg.operators])
        # Accuracy of the likeliest value over all lengths.
        spread = _bracket_values(cfg) if cfg.brackets else _flat_values(cfg)
        self.chance = float(spread[list(cfg.lengths)].mean(0).max())

    def make(self, words: np.ndarray) -> Batch:
        """The examples that rows of random words stand for."""
        cfg = self.cfg
        lengths = cfg.lengths[0] + cfg.lengths.step * below(words[:, 0], len(cfg.lengths))
        draw = words[:, 1 : 1 + 2 * cfg.length].reshape(len(words), cfg.length, 2)
        made = self._with_brackets(draw, lengths) if cfg.brackets else self._flat(draw, lengths)
        tokens = np.zeros((len(words), self.length), np.int32)
        tokens[:, :-1] = made
        positions = lengths[:, None].astype(np.int32)
        np.put_along_axis(tokens, positions, self.sign["="], axis=1)
        values = self._values(tokens) if cfg.brackets else self._flat_result(tokens)
        return {
            "tokens": tokens,
            "positions": positions,
            "targets": (DIGIT + values)[:, None].astype(np.int32),
        }

    def _flat(self, draw: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Digits and operators in turn `[count, n]`, zero beyond `lengths`."""
        made = DIGIT + below(draw[:, :, 0], self.cfg.modulus)
        made[:, 1::2] = self._operators[below(draw[:, 1::2, 1], len(self._operators))]
        return np.where(np.arange(made.shape[1]) < lengths[:, None], made, 0)

    def _flat_result(self, tokens: np.ndarray) -> np.ndarray:
        """Values `[count]` of expressions without brackets: a sum, and the product that is being made."""
        total, product = np.zeros(len(tokens), np.int64), tokens[:, 0] - DIGIT
        for t in range(2, tokens.shape[1], 2):
            operator, digit = tokens[:, t - 1], tokens[:, t] - DIGIT
            times, ended = operator == self.sign["*"], (operator == self.sign["="]) | (operator == 0)
            fresh = np.where(operator == self.sign["-"], -digit, digit)
            total = np.where(times | ended, total, total + product)
            product = np.where(ended, product, np.where(times, product * digit, fresh) % self.cfg.modulus)
        return (total + product) % self.cfg.modulus

    def _with_brackets(self, draw: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Expressions `[count, n]` by the rules above, zero beyond `lengths`; all rows at once.

        Each row has a stack of what is still to be written: n > 0 is E(n), -i is token i. What is on top
        writes one token and leaves the rest of itself on the stack. Under all of it lies a 0.
        """
        rows = np.arange(len(draw))
        stack = np.zeros((len(draw), draw.shape[1] + 3), np.int64)
        stack[:, 1], height = lengths, np.ones(len(draw), np.int64)
        made = np.zeros(draw.shape[:2], np.int64)
        for t in range(draw.shape[1]):
            top = stack[rows, height]
            height = np.maximum(height - 1, 0)
            pair = top >= 5
            left = 1 + below(draw[:, t, 0], np.maximum(top - 4, 1))
            operator = self._operators[below(draw[:, t, 1], len(self._operators))]
            digit = DIGIT + below(draw[:, t, 0], self.cfg.modulus)
            opening = np.where(top == 2, self.sign["-"], self.sign["("])
            made[:, t] = np.where(top <= 0, -top, np.where(top == 1, digit, opening))
            rest = np.where(pair, top - 3 - left, np.where(top >= 2, 1 + (top == 4), 0))
            closing = np.where(top >= 3, -self.sign[")"], 0)
            for left_over in (closing, rest, np.where(pair, -operator, 0), np.where(pair, left, 0)):
                height += left_over != 0
                stack[rows, height] = np.where(left_over != 0, left_over, stack[rows, height])
        return made

    def _values(self, tokens: np.ndarray) -> np.ndarray:
        """Values `[count]` of expressions with brackets.

        Each row has a stack with a frame for every open bracket: what stands in it so far amounts to, and the
        operator that waits for an operand.
        """
        sign, rows, depth = self.sign, np.arange(len(tokens)), np.zeros(len(tokens), np.int64)
        values = np.zeros((len(tokens), tokens.shape[1] + 1), np.int64)
        waiting = np.full_like(values, sign["+"])
        after_operand = after_minus = np.zeros(len(tokens), bool)
        for token in tokens.T:
            opening, closing = token == sign["("], token == sign[")"]
            digit = (token >= DIGIT) & (token < DIGIT + self.cfg.modulus)
            operator = (token >= sign["+"]) & (token <= sign["*"]) & after_operand
            depth += opening
            values[rows, depth] = np.where(opening, 0, values[rows, depth])
            held = np.where(operator, token, waiting[rows, depth])
            waiting[rows, depth] = np.where(opening, sign["+"], held)
            operand = np.where(after_minus, DIGIT - token, token - DIGIT)
            operand = np.where(closing, values[rows, depth], operand)
            depth -= closing
            result = self._applied(waiting[rows, depth], values[rows, depth], operand)
            # A minus where an operand is due belongs to the digit behind it.
            after_minus = (token == sign["-"]) & ~after_operand
            after_operand = digit | closing
            values[rows, depth] = np.where(after_operand, result, values[rows, depth])
        return values[:, 0]

    def _applied(self, operator: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """`a operator b`, for token ids of operators."""
        sums = np.where(operator == self.sign["-"], a - b, a + b)
        return np.where(operator == self.sign["*"], a * b, sums) % self.cfg.modulus

    def describe(self) -> str:
        """One line for people."""
        cfg = self.cfg
        pool = f"{cfg.train_examples:,} training examples" if cfg.train_examples else "fresh examples"
        return (
            f"arithmetic modulo {cfg.modulus} {'with' if cfg.brackets else 'without'} brackets, operators "
            f"{cfg.operators}: {cfg.min_length} to {cfg.length} tokens, {pool}, chance {self.chance:.2%}"
        )


def _flat_values(cfg: ArithmeticData) -> np.ndarray:
    """`[length + 1, modulus]`: how likely each value is after n tokens without brackets, n odd."""
    m, share = cfg.modulus, 1 / len(cfg.operators)
    times, plus = _value_table(m, "*"), _value_table(m, "+")
    joint = np.zeros((m, m))  # of the sum before, and the product that is being made
    joint[0] = 1 / m
    spread = np.zeros((cfg.length + 1, m))
    for n in range(1, cfg.length + 1, 2):
        whole = np.bincount(plus.ravel(), joint.ravel(), m)
        spread[n] = whole
        # Plus or minus a uniform digit: the product joins the sum, and a new one begins.
        following = np.outer(whole, np.full(m, 1 / m)) * share * len(set(cfg.operators) - {"*"})
        if "*" in cfg.operators:
            following += (
                share / m * np.stack([np.bincount(times.ravel(), np.repeat(row, m), m) for row in joint])
            )
        joint = following
    return spread


def _bracket_values(cfg: ArithmeticData) -> np.ndarray:
    """`[length + 1, modulus]`: how likely each value of E(n) is."""
    m = cfg.modulus
    spread = np.full((cfg.length + 1, m), 1 / m)
    for n in range(5, cfg.length + 1):
        joint = spread[1 : n - 3].T @ spread[n - 4 : 0 : -1] / (n - 4)  # of left and right values
        tables = [_value_table(m, operator) for operator in cfg.operators]
        spread[n] = np.mean([np.bincount(table.ravel(), joint.ravel(), m) for table in tables], axis=0)
    return spread


def _value_table(modulus: int, operator: str) -> np.ndarray:
    """`[m, m]`: the value of every a and b."""
    a, b = np.ogrid[:modulus, :modulus]
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % modulus
