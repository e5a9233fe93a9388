"""Corpora of known entropy: the formulas against models written out in full, and against what is drawn."""

import hashlib
import itertools
import math

import numpy as np
import pytest

from experiments.sources import LanguageSource, Stream, random_words
from experiments.tasks import hidden_markov
from experiments.tasks.entropy import entropy, whole_counts
from experiments.tasks.hidden_markov import HiddenMarkovData
from experiments.tasks.lexicon import LexiconData

SMALL = LexiconData(
    length=9, words=7, topics=2, letters=3, shortest=1, longest=3, head=2.0, sentence=3.0, eval_examples=40
)
HIDDEN = HiddenMarkovData(length=7, vocab_size=3, states=4, branches=3, symbols=2, eval_examples=40)
CONFIGS = {
    "lexicon": SMALL,
    "lexicon-pool": LexiconData(length=40, words=500, train_examples=60, eval_examples=20),
    "hidden": HIDDEN,
    "hidden-pool": HiddenMarkovData(length=40, train_examples=60, eval_examples=20),
}
GOLDEN = {
    "lexicon-pool": "070f4a6eb0e236f969b22c39ad262efbe8e0fb82bf3c703109270b535ed5e133",
    "hidden-pool": "4a484b4db394b4caca58895fe13960ad657ea4b5013e48a401e1999b2bd872d2",
}


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture
def source(name):
    return CONFIGS[name].build()


# ---- the lexicon as a hidden Markov model, written out


def automaton(source):
    """Transitions `{state: {token: (probability, next state)}}` of the lexicon's process, states by name.

    A state is None (before a topic), or (topic, letters so far, whether a sentence may begin instead).
    """
    lexicon, rho = source.words, source.rho
    moves = {None: {2 + z: (p, (z, (), False)) for z, p in enumerate(lexicon.tau)}}
    for z, topic in enumerate(lexicon.spelled):
        words = [tuple(row[:size].tolist()) for row, size in zip(topic, lexicon.sizes, strict=True)]
        assert len(set(words)) == len(words)
        for begun in {word[:i] for word in words for i in range(len(word))}:
            chosen = [
                (word[len(begun)], p)
                for word, p in zip(words, lexicon.p, strict=True)
                if word[: len(begun)] == begun
            ]
            mass = sum(p for _, p in chosen)
            share = {token: sum(p for t, p in chosen if t == token) / mass for token, _ in chosen}
            after = {token: (z, (), True) if token == 1 else (z, (*begun, token), False) for token in share}
            moves[z, begun, False] = {token: (p, after[token]) for token, p in share.items()}
        moves[z, (), True] = {token: ((1 - rho) * p, to) for token, (p, to) in moves[z, (), False].items()}
        moves[z, (), True][0] = (rho, None)
    return moves


def paths(moves, state, length):
    """Every string of `length` tokens from `state` with its probability."""
    if length == 0:
        yield (), 1.0
        return
    for token, (p, after) in moves[state].items():
        for rest, q in paths(moves, after, length - 1):
            yield (token, *rest), p * q


def test_the_entropy_rate_is_that_of_the_stationary_distribution():
    source = SMALL.build()
    moves = automaton(source)
    place = {state: i for i, state in enumerate(moves)}
    transition, local = np.zeros((len(place), len(place))), np.zeros(len(place))
    for state, options in moves.items():
        for p, after in options.values():
            transition[place[state], place[after]] += p
        local[place[state]] = entropy(np.array([p for p, _ in options.values()]))
    np.testing.assert_allclose(transition.sum(1), 1, rtol=1e-12)
    pi = hidden_markov.stationary(transition)
    np.testing.assert_allclose(source.entropy_rate, pi @ local, rtol=1e-12)
    assert source.loss_knowing(7) == source.entropy_rate < source.loss_knowing(6) < source.loss_knowing(0)


def test_every_row_of_the_lexicon_is_enumerated():
    """Probabilities, expected loss per position and chance, from all rows of a short lexicon."""
    source = SMALL.build()
    for length in (1, 2, 6):
        rows = list(paths(automaton(source), None, length))
        p = np.array([q for _, q in rows])
        tokens = np.array([(0, *row) for row, _ in rows])
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
        found = source.log_likelihoods(tokens)
        np.testing.assert_allclose(found.sum(1), np.log(p), rtol=1e-11)
        np.testing.assert_allclose(-p @ found, source.conditional_entropy[:length], rtol=1e-11)
    guesses = [max(np.bincount(column, p)) for column in tokens.T[1:]]
    short = LexiconData(**{**vars(SMALL), "length": 6}).build()
    assert short.chance == pytest.approx(np.mean(guesses), rel=1e-12)
    assert short.window_entropy == pytest.approx(np.mean(source.conditional_entropy[:6]), rel=1e-12)


def test_impossible_rows_have_no_probability():
    source = SMALL.build()
    (row,) = source.batch(0, 0, 1)["tokens"][:, :6].astype(int)
    assert np.isfinite(source.log_likelihoods(row[None])).all()
    for at, token in ((1, 0), (1, 5), (2, 0), (2, 2), (2, 1)):
        wrong = row.copy()
        wrong[at] = token
        assert source.log_likelihoods(wrong[None])[0, at - 1] == -np.inf


def test_what_is_drawn_has_these_probabilities():
    """Mean surprisal of many rows, over all and at each place, within five standard errors."""
    for cfg in (LexiconData(length=60, words=3_000), HiddenMarkovData(length=60)):
        source = cfg.build()
        loss = source.surprisal(source.batch(0, 0, 2_000))
        assert np.isfinite(loss).all()
        error = loss.std(0, ddof=1) / 2_000**0.5
        sampled = source.entropy_bounds.error if cfg == HiddenMarkovData(length=60) else 0.0
        margin = 5 * (error + 2 * sampled) + 1e-9
        assert (np.abs(loss.mean(0) - source.conditional_entropy) < margin).all()
        spread = loss.mean(1).std(ddof=1) / 2_000**0.5 + sampled
        assert abs(loss.mean() - source.window_entropy) < 5 * spread


def test_words_are_drawn_with_their_probabilities_and_letters_are_theirs():
    source = LexiconData(length=400, words=4, topics=3, letters=5, head=1.0, sentence=2.0).build()
    tokens = source.batch(0, 0, 500)["tokens"]
    counts, topics, slots = {}, np.zeros(3), 0
    for row in tokens:
        topic, word = None, []
        for token in row[: np.flatnonzero(row == 1)[-1] + 1].tolist():
            if 2 <= token < 5:
                topic = token - 2
                topics[topic] += 1
            elif token == 1:
                counts[topic, tuple(word)] = counts.get((topic, tuple(word)), 0) + 1
                word, slots = [], slots + 1
            elif token > 0:
                word.append(token)
    spelled = source.words.spelled
    assert set(counts) <= {(z, tuple(w[w > 1].tolist())) for z in range(3) for w in spelled[z]}
    for z in range(3):
        for w, p in zip(spelled[z], source.words.p, strict=True):
            total = sum(n for (topic, _), n in counts.items() if topic == z)
            assert abs(counts[z, tuple(w[w > 1].tolist())] / total - p) < 5 * (p / total) ** 0.5
    np.testing.assert_allclose(topics / topics.sum(), source.words.tau, atol=0.02)
    np.testing.assert_allclose(source.words.tau, np.array([6, 3, 2]) / 11, atol=1e-4)
    assert abs((topics.sum() - 500) / (slots - 500) - 0.5) < 0.01


def test_a_power_law_by_design():
    """Beyond its first words a lexicon is forgotten like n^-tail: slopes from n = 200 to 2,000 of 65,536."""
    source = LexiconData().build()
    excess = [source.loss_knowing(n) - source.entropy_rate for n in (200, 2_000, 65_536)]
    slope = math.log10(excess[1] / excess[0])
    assert -0.6 < slope < -0.45 and excess[2] == 0.0
    assert source.entropy_rate == pytest.approx(1.14884842, abs=1e-8)


def counting_learner(source, rows):
    """Loss above the ideal of letter frequencies given (topic, letters so far), counted in `rows` rows."""
    size, unit = source.vocab_size, 2**61

    def pairs(batch):
        """A code for what a target depends on, and the target."""
        tokens, codes = batch["tokens"].astype(np.int64), []
        topic = code = np.zeros(len(tokens), np.int64)
        for now in tokens.T:
            topic = np.where((now > 1) & (now < 2 + source.cfg.topics), now, topic)
            code = np.where((now == 1) | (now == topic), topic, code * size + now)
            codes.append(np.where(now == 0, 0, code + unit * (now == 1)))
        return np.stack(codes, 1).reshape(-1), batch["targets"].reshape(-1)

    context, target = pairs(source.batch(0, 0, rows))
    test = source.batch(1, 0, 200)
    asked, answer = pairs(test)
    known, number = np.unique(np.append(context, asked), return_inverse=True)
    seen = np.bincount(number[: len(context)], minlength=len(known))[number[len(context) :]]
    codes, counts = np.unique(number[: len(context)] * size + target, return_counts=True)
    place = np.searchsorted(codes, number[len(context) :] * size + answer).clip(max=len(codes) - 1)
    hits = np.where(codes[place] == number[len(context) :] * size + answer, counts[place], 0)
    overall = np.bincount(target, minlength=size) / len(target)
    return -np.log((hits + overall[answer]) / (seen + 1)).mean() - source.surprisal(test).mean()


def test_counting_learns_at_the_predicted_rate():
    """D^(-tail / (1 + tail)), here a third: measured from 32 thousand tokens to 512 thousand."""
    source = LexiconData().build()
    few, many = (counting_learner(source, rows) for rows in (128, 2_048))
    assert 0.31 < math.log(few / many) / math.log(16) < 0.36


# ---- the hidden Markov model


def test_likelihoods_of_the_hidden_model_by_enumeration_of_states():
    source = HIDDEN.build()
    tokens = source.batch(0, 0, 5)["tokens"][:, :4].astype(int)
    for row, found in zip(tokens, source.log_likelihoods(tokens), strict=True):
        total = []
        for length in range(1, 5):
            each = [
                source.initial[path[0]]
                * math.prod(source.transition[a, b] for a, b in itertools.pairwise(path))
                * math.prod(source.emission[s, x] for s, x in zip(path, row, strict=False))
                for path in itertools.product(range(4), repeat=length)
            ]
            total.append(sum(each))
        np.testing.assert_allclose(found, np.diff(np.log(total)), rtol=1e-10)


def test_bounds_of_the_entropy_rate_close_up_and_hold_the_sampled_ones():
    source = HIDDEN.build()
    model = (source.initial, source.transition, source.emission)
    bounds = np.array([hidden_markov.exact_bounds(*model, n) for n in (1, 2, 3, 5, 7, 9)])
    lower, upper = bounds.T
    assert (np.diff(lower) > -1e-9).all() and (np.diff(upper) < 1e-9).all() and (lower <= upper + 1e-12).all()
    assert upper[-1] - lower[-1] < 0.1 * (upper[0] - lower[0])
    sampled = source.entropy_bounds
    assert lower[-1] - 2 * sampled.error < source.entropy_rate < upper[-1] + 2 * sampled.error
    assert sampled.lower <= sampled.upper + 1e-6 and 0 < sampled.error < 0.02
    exact = [hidden_markov.exact_bounds(*model, n)[1] for n in range(2, 9)]
    np.testing.assert_allclose(source.conditional_entropy, exact, atol=0.03)


def test_a_chain_whose_tokens_are_its_states_has_the_entropy_of_its_transitions():
    source = HIDDEN.build()
    pi = hidden_markov.stationary(source.transition)
    np.testing.assert_allclose(pi @ source.transition, pi, atol=1e-12)
    rate = pi @ entropy(source.transition)
    lower, upper = hidden_markov.exact_bounds(pi, source.transition, np.eye(4), 3)
    np.testing.assert_allclose((lower, upper), rate, rtol=1e-9)


def test_states_and_tokens_follow_the_model():
    cfg = HiddenMarkovData(length=30, states=5, vocab_size=6, branches=3, symbols=4)
    source = cfg.build()
    assert (source.transition > 0).sum() == 15 and (source.emission > 0).sum() == 20
    np.testing.assert_allclose(source.transition.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(source.emission.sum(1), 1, rtol=1e-12)
    assert all(source.transition[s].argmax() == (s + 1) % 5 for s in range(5))
    tokens = source.batch(3, 0, 4_000)["tokens"]
    pairs = np.bincount(tokens[:, 10] * 6 + tokens[:, 11], minlength=36).reshape(6, 6) / 4_000
    joint = np.einsum("s,sv,st,tw->vw", source.initial, source.emission, source.transition, source.emission)
    assert np.abs(pairs - joint).max() < 5 * 0.5 / 4_000**0.5
    assert source.chance == pytest.approx(joint.sum(0).max(), rel=1e-6)


# ---- what both promise


def test_batches_are_pure_and_the_same_bits_everywhere(name, source):
    again = CONFIGS[name].build()
    again.batch(1, 5, 8)
    batch = source.batch(3, 2, 8)
    for key, x in again.batch(3, 2, 8).items():
        np.testing.assert_array_equal(x, batch[key])
        assert x.dtype == np.int32 and x.shape == (8, source.length)
        assert all((x != again.batch(seed, step, 8)[key]).any() for seed, step in ((4, 2), (3, 1)))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert isinstance(source, LanguageSource) and batch["tokens"].max() < source.vocab_size
    assert source.fingerprint == again.fingerprint and len(source.fingerprint) == 64
    if name in GOLDEN:
        both = (batch, next(source.eval_batches("test", 8)))
        digest = hashlib.sha256(b"".join(b[k].astype("<i4").tobytes() for b in both for k in sorted(b)))
        assert digest.hexdigest() == GOLDEN[name]


def test_streams_share_no_row(name):
    if not name.endswith("pool"):
        pytest.skip("rows so short repeat")
    source = CONFIGS[name].build()
    parts = [source.batch(0, 0, 60), *source.eval_batches("validation", 20), *source.eval_batches("test", 20)]
    assert len({bytes(row) for part in parts for row in part["tokens"]}) == 100


def test_surprisal_of_a_split_is_its_ideal_loss(source):
    batches = list(source.eval_batches("validation", 7))
    loss = [source.surprisal(batch) for batch in batches]
    padded = batches[-1]["targets"][:, 0] < 0
    assert (loss[-1][padded] == 0).all()
    rows = np.concatenate(loss)[: source.cfg.eval_examples]
    assert source.ideal_loss("validation") == pytest.approx(rows.mean(), rel=1e-12)
    assert "\n" not in source.describe() and f"chance {source.chance:.2%}" in source.describe()
    with pytest.raises(ValueError, match="no split 'train' here"):
        source.ideal_loss("train")


def test_probabilities_as_whole_numbers():
    weights = random_words(1_000, Stream.TASK, 0).astype(float)
    counts = whole_counts(weights, 20)
    assert counts.sum() == 2**20 and np.abs(counts / 2**20 - weights / weights.sum()).max() < 2.0**-20
    assert entropy(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])).tolist() == [math.log(2), 0.0]


@pytest.mark.parametrize(
    ("cfg", "change", "message"),
    [
        (SMALL, {"shortest": 4}, "shortest=4 exceeds longest=3"),
        (SMALL, {"words": 100}, "words=100 takes 4 of the 3 of 1 letters"),
        (SMALL, {"tail": 0.0}, r"tail=0.0 must lie in \(0, 4\]"),
        (SMALL, {"sentence": float("nan")}, r"sentence=nan must lie in \(1, 10000\]"),
        (SMALL, {"head": -1.0}, r"head=-1.0 must lie in \(0, 1e\+06\]"),
        (SMALL, {"longest": 30, "letters": 20, "words": 40}, "longest=30 letters do not fit into 63 bits"),
        (SMALL, {"topics": 2_000}, "topics=2000 must be at most 1000"),
        (LexiconData(), {"tail": 4.0, "head": 1.0}, "words=65536: the rarest would never be drawn"),
        (HIDDEN, {"branches": 5}, "branches=5 exceeds states=4 and 16"),
        (HIDDEN, {"symbols": 4}, "symbols=4 exceeds vocab_size=3 and 16"),
        (HIDDEN, {"branch_power": float("nan")}, r"branch_power=nan must lie in \[0, 4\]"),
        (HIDDEN, {"states": 1}, "states=1 must be at least 2"),
        (HIDDEN, {"length": "7"}, "length='7' must be of type int"),
    ],
)
def test_configs_refuse_what_cannot_be(cfg, change, message):
    with pytest.raises(ValueError, match=f"^{type(cfg).__name__}: {message}[^\n]*$"):
        type(cfg)(**{**vars(cfg), **change})
