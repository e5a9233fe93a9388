"""Known entropy, general: a hidden Markov model with many states and fewer tokens, filtered exactly.

From state s the chain goes to one of `branches` states, the r-th of them with probability q_r proportional to
(r + 1)^-branch_power, and says one of `symbols` tokens, by the same law with symbol_power. The first branches
make one cycle of all states, so that each can be reached; other branches are drawn evenly, tokens by a Zipf
law, so that states share the frequent ones and the past tells the state only slowly. High powers make the
process nearly deterministic, 0 makes it even. Probabilities are whole numbers of 2^-16: they hold for what is
drawn.

A row begins in the stationary distribution; its reader does not know where. What it can expect follows from
the forward algorithm, with b the belief about the state (P transitions, O emissions):

    P(x_t | x_<t) = sum_s b_t(s) O(s, x_t),      b_{t+1} proportional to (b_t * O(., x_t)) P.

The entropy rate has no closed form. It lies between two numbers that close up on it as t grows (Cover and
Thomas, Elements of Information Theory, section 4.5),

    H(X_t | X_1..X_{t-1}, S_1)  <=  h  <=  H(X_t | X_1..X_{t-1}),

and both are means, over rows, of the entropy of a predictive distribution: `entropy_bounds`, with standard
errors. (`exact_bounds` goes through all rows, where those are few.)

    HiddenMarkovData(length=256, states=64, vocab_size=32).build()
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from experiments.sources import Batch, Stream, random_words, require_at_least, require_types
from experiments.tasks.entropy import KnownEntropySource, entropy, whole_counts
from experiments.tasks.recall import draw_weighted
from layers.checks import require

BITS = 16
SAMPLED_ROWS = 256  # rows that expectations are taken over
SAMPLED_LENGTH = 512  # tokens of those that bound the entropy rate


@dataclass(frozen=True, kw_only=True)
class HiddenMarkovData:
    """A hidden Markov model; `train_examples` is the size of a fixed pool, 0 for rows that never repeat."""

    length: int = 256
    vocab_size: int = 32
    states: int = 64
    branches: int = 4
    symbols: int = 8
    branch_power: float = 2.0
    symbol_power: float = 1.5
    train_examples: int = 0
    eval_examples: int = 1_000
    data_seed: int = 0

    def __post_init__(self):
        require_types(self)
        require_at_least(self, 1, "length", "branches", "symbols", "eval_examples")
        require_at_least(self, 2, "vocab_size", "states")
        require_at_least(self, 0, "train_examples", "data_seed")
        for name in ("branch_power", "symbol_power"):
            value = getattr(self, name)
            require(0 <= value <= 4, f"HiddenMarkovData: {name}={value} must lie in [0, 4]")
        for name, bound, most in (
            ("states", "4096", 4096),
            ("branches", f"states={self.states} and 16", min(16, self.states)),
            ("symbols", f"vocab_size={self.vocab_size} and 16", min(16, self.vocab_size)),
        ):
            value = getattr(self, name)
            require(value <= most, f"HiddenMarkovData: {name}={value} exceeds {bound}")

    def build(self) -> "HiddenMarkovSource":
        """The source; the model is drawn at once."""
        return HiddenMarkovSource(self)


class EntropyBounds(NamedTuple):
    """`lower - error` to `upper + error` holds the entropy rate; nats per token."""

    lower: float
    upper: float
    error: float  # two standard errors of the worse of the two means


class HiddenMarkovSource(KnownEntropySource):
    """Batches `{"tokens" [B,T], "targets" [B,T]}`, int32: every token but the first is a target."""

    def __init__(self, cfg: HiddenMarkovData):
        super().__init__(cfg, 1 + -(-(cfg.length + 1) // 2))
        self.vocab_size = cfg.vocab_size
        q_branch = _zipf_counts(cfg.branches, cfg.branch_power)
        q_symbol = _zipf_counts(cfg.symbols, cfg.symbol_power)
        self._branch_of, self._symbol_of = (np.repeat(np.arange(len(q)), q) for q in (q_branch, q_symbol))
        self._next, self._said = _branches(cfg), _symbols(cfg)
        self.transition = _scatter(self._next, q_branch, cfg.states)  # P [S,S]
        self.emission = _scatter(self._said, q_symbol, cfg.vocab_size)  # O [S,V]
        counts = whole_counts(stationary(self.transition), 32)
        self._initial_edges = np.cumsum(counts).astype(np.uint64)
        self.initial = counts * 2.0**-32  # [S]: of the first state; stationary to 2^-32
        self.chance = float((self.initial @ self.emission).max())

    def _draw(self, words: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of words as `tokens [B,length]` and the first states `[B]`; each word serves two tokens."""
        first = np.searchsorted(self._initial_edges, words[:, 0] >> np.uint64(32), side="right")
        bits = np.stack(
            [words[:, 1:] >> np.uint64(shift) & np.uint64(2**BITS - 1) for shift in (0, 16, 32, 48)], -1
        )
        bits = bits.astype(np.int64).reshape(len(words), -1, 2)[:, :length]
        branch = np.ascontiguousarray(self._branch_of[bits[..., 0]].T)
        states, table, width = np.empty_like(branch), self._next.reshape(-1), self._next.shape[1]
        states[0] = first
        for t in range(1, length):
            states[t] = table[states[t - 1] * width + branch[t - 1]]
        return self._said[states.T, self._symbol_of[bits[..., 1]]], first

    def make(self, words: np.ndarray) -> Batch:
        """The rows that rows of random words stand for."""
        tokens = self._draw(words, self.length + 1)[0].astype(np.int32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    # ---- what is known

    def log_likelihoods(self, tokens: np.ndarray) -> np.ndarray:
        """`tokens [B,T+1] -> [B,T]`: log P(token t + 1 | tokens 0..t), by the forward algorithm."""
        belief = np.broadcast_to(self.initial, (len(tokens), len(self.initial)))
        predictions = predict(belief, self.transition, self.emission, tokens)
        with np.errstate(divide="ignore"):
            found = [np.log(p[np.arange(len(p)), x]) for p, x in zip(predictions, tokens.T, strict=True)]
        return np.stack(found[1:], 1)

    def _expectations(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`H(X_t | x_<t)` and `H(X_t | x_<t, s_1)` for sampled rows: two arrays `[rows, length]`."""
        count = 4 * -(-(1 + -(-length // 2)) // 4)
        words = random_words(SAMPLED_ROWS * count, Stream.TASK, self.cfg.data_seed, salt=2)
        tokens, first = self._draw(words.reshape(SAMPLED_ROWS, count), length)
        blind = np.broadcast_to(self.initial, (SAMPLED_ROWS, len(self.initial)))
        told = np.eye(len(self.initial))[first]
        model = (self.transition, self.emission, tokens)
        upper, lower = ([entropy(p) for p in predict(belief, *model)] for belief in (blind, told))
        return np.stack(upper, 1), np.stack(lower, 1)

    @cached_property
    def conditional_entropy(self) -> np.ndarray:
        """`[T]`: the best predictor's expected loss at every target of a row, estimated from sampled rows."""
        return self._expectations(self.length + 1)[0].mean(0)[1:]

    @cached_property
    def entropy_bounds(self) -> EntropyBounds:
        """Around the entropy rate: means over the second half of long rows."""
        late = [x[:, SAMPLED_LENGTH // 2 :].mean(1) for x in self._expectations(SAMPLED_LENGTH)]
        error = max(2 * x.std(ddof=1) / SAMPLED_ROWS**0.5 for x in late)
        return EntropyBounds(float(late[1].mean()), float(late[0].mean()), float(error))

    @property
    def entropy_rate(self) -> float:
        """h in nats per token: the middle of `entropy_bounds`."""
        return (self.entropy_bounds.lower + self.entropy_bounds.upper) / 2

    def describe(self) -> str:
        """One line for people."""
        cfg, bounds = self.cfg, self.entropy_bounds
        pool = f"{cfg.train_examples:,} training rows" if cfg.train_examples else "fresh rows"
        return (
            f"hidden Markov model: {cfg.states} states, rows of {cfg.length}, vocabulary {cfg.vocab_size}, "
            f"entropy rate {bounds.lower:.4f} to {bounds.upper:.4f} (+- {bounds.error:.4f}) nats, {pool}, "
            f"chance {self.chance:.2%}"
        )


def predict(belief: np.ndarray, transition: np.ndarray, emission: np.ndarray, tokens: np.ndarray):
    """Yield P(x_t | x_<t), `[B,V]`, for each place of `tokens [B,T]`; `belief [B,S]` is about state 1."""
    for x in tokens.T:
        yield belief @ emission
        belief = belief * emission[:, x].T
        belief = belief / np.maximum(belief.sum(1, keepdims=True), np.finfo(float).tiny) @ transition


def exact_bounds(
    initial: np.ndarray, transition: np.ndarray, emission: np.ndarray, length: int
) -> tuple[float, float]:
    """`H(X_n | X_<n, S_1)` and `H(X_n | X_<n)` for n = `length`, over all V^(n-1) beginnings."""
    joint = np.diag(initial)[None]  # P(x_<t, s_1, s_t), [beginnings, S, S]
    for _ in range(length - 1):
        joint = np.einsum("nab,bv,bc->nvac", joint, emission, transition).reshape(-1, *joint.shape[1:])
    told = joint @ emission  # P(x_<n, s_1, x_n)
    blind = told.sum(1)

    def conditional(p: np.ndarray) -> float:
        return float(entropy(p.reshape(-1)) - entropy(p.sum(-1).reshape(-1)))

    return conditional(told), conditional(blind)


def stationary(transition: np.ndarray) -> np.ndarray:
    """pi with `pi P = pi`, `sum pi = 1`, of an irreducible chain."""
    size = len(transition)
    equations = np.vstack([transition.T - np.eye(size), np.ones(size)])
    return np.linalg.lstsq(equations, np.append(np.zeros(size), 1.0), rcond=None)[0].clip(0)


def _zipf_counts(n: int, power: float) -> np.ndarray:
    return whole_counts(np.arange(1, n + 1) ** -power, BITS)


def _branches(cfg: HiddenMarkovData) -> np.ndarray:
    """`[S, branches]`: the next states, all different: on along a cycle, then to states drawn evenly."""
    words = random_words(cfg.states * cfg.states, Stream.TASK, cfg.data_seed).reshape(cfg.states, -1)
    onward = np.roll(np.arange(cfg.states), -1)
    ahead = np.argsort(words, axis=1, kind="stable")
    others = ahead[ahead != onward[:, None]].reshape(cfg.states, -1)
    return np.concatenate([onward[:, None], others], 1)[:, : cfg.branches]


def _symbols(cfg: HiddenMarkovData) -> np.ndarray:
    """`[S, symbols]`: different tokens, the frequent ones often and early."""
    words = random_words(cfg.states * cfg.vocab_size, Stream.TASK, cfg.data_seed, salt=1)
    weights = 1.0 / np.arange(1, cfg.vocab_size + 1)
    return draw_weighted(words.reshape(cfg.states, -1), weights, cfg.symbols)


def _scatter(places: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """`[S, size]` probabilities `counts / 2^16` at `places [S, n]`."""
    dense = np.zeros((len(places), size))
    np.put_along_axis(dense, places, np.broadcast_to(counts * 2.0**-BITS, places.shape), 1)
    return dense
