"""Recall, induction heads, copying, word problems and arithmetic, beyond what all tasks promise."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from solvers_symbolic import solve_arithmetic

from experiments.sources import GeneratedSource, content_hash
from experiments.tasks.copying import CopyingData
from experiments.tasks.expressions import ArithmeticData, _bracket_values, _flat_values
from experiments.tasks.groups import elements_moving, group_table
from experiments.tasks.induction import InductionData
from experiments.tasks.recall import RecallData
from experiments.tasks.recall_mixture import RecallMixture
from experiments.tasks.recall_variants import VariedRecall
from experiments.tasks.state_tracking import WordProblemData, scaled_accuracy

# ---- splits by content


def test_the_content_hash_sees_every_value_and_its_place_but_not_padding():
    rows = np.array(list(product(range(3), repeat=6)), np.int32)
    hashes = content_hash(rows)
    assert len(set(hashes.tolist())) == len(rows)
    np.testing.assert_array_equal(content_hash(np.pad(rows, ((0, 0), (0, 5)))), hashes)
    np.testing.assert_array_equal(content_hash(rows.astype(np.int64)), hashes)
    floats = rows.astype(np.float32).reshape(-1, 3, 2)
    assert len(set(content_hash(floats).tolist())) == len(rows)
    shares = np.bincount((hashes >> np.uint64(61)).astype(int), minlength=8) / len(rows)
    assert abs(shares - 1 / 8).max() < 0.05


class Few(GeneratedSource):
    """Examples of one of `kinds` contents."""

    disjoint = True

    def __init__(self, kinds, cfg):
        self.kinds = kinds
        super().__init__(cfg, 1)

    def make(self, words):
        tokens = (1 + words[:, :1] % np.uint64(self.kinds)).astype(np.int32)
        return {"tokens": tokens, "targets": tokens.copy()}

    def describe(self):
        return "few"


def test_few_contents_are_shared_out_completely_and_evenly_drawn_within_a_split():
    source = Few(64, RecallData(train_examples=2_000, eval_examples=2_000))
    pool = source.batch(0, 0, 2_000)["tokens"][:, 0]
    parts = [pool, *(next(source.eval_batches(s, 2_000))["tokens"][:, 0] for s in source.splits)]
    kinds = [set(part.tolist()) for part in parts]
    assert set.union(*kinds) == set(range(1, 65)) and sum(map(len, kinds)) == 64
    for part, found in zip(parts, kinds, strict=True):
        expected = 2_000 / len(found)
        assert max(abs(n - expected) for n in Counter(part.tolist()).values()) < 5 * expected**0.5
    fresh = Few(64, RecallData(train_examples=0)).batch(3, 0, 500)["tokens"][:, 0]
    assert set(fresh.tolist()) == kinds[0]


def test_a_split_that_would_stay_empty_is_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"^RecallData: too few different examples to give \w+ some of its own$"
    ):
        for stream in ("validation", "test"):
            list(Few(1, RecallData(eval_examples=1)).eval_batches(stream, 10))
    with pytest.raises(ValueError, match=r"^WordProblemData: too few different examples"):
        list(
            WordProblemData(group="Z2", min_length=1, length=1, eval_examples=1)
            .build()
            .eval_batches("test", 1)
        )


def test_redrawn_examples_do_not_depend_on_how_they_are_cut_into_batches():
    source = WordProblemData(group="Z3", length=6).build()
    whole = source.batch(1, 0, 60)
    for name, x in whole.items():
        np.testing.assert_array_equal(x, np.concatenate([source.batch(1, s, 20)[name] for s in range(3)]))


# ---- recall


def test_published_recall_cells():
    sizes = [
        (c.length, c.pairs, c.vocab_size, c.train_examples)
        for c in map(RecallData.zoology, (64, 128, 256, 512))
    ]
    assert sizes == [(n, k, 8192, 100_000) for n, k in ((64, 4), (128, 8), (256, 16), (512, 64))]
    with pytest.raises(ValueError, match="no published cell has length=100; there are 64, 128, 256, 512"):
        RecallData.zoology(100)
    based = RecallMixture.based()
    assert sum(cell[2] for cell in based.train) == 180_000 and len(based.evaluation) == 7
    source = based.build()
    assert source.length == 1024 and source.vocab_size == 8192 and source.chance == 1 / 4096
    batch = next(source.eval_batches("test-1024x256", 3))
    assert batch["tokens"].shape == (3, 1024) and batch["targets"].shape == (3, 256)


MIXTURE = RecallMixture(
    vocab_size=300, train=((16, 2, 50), (16, 4, 26), (32, 4, 9)), evaluation=((16, 2, 5), (64, 16, 8))
)


def epoch(source, number):
    """The 8 batches of an epoch of MIXTURE."""
    return [source.batch(4, 8 * number + i, 10) for i in range(8)]


def shape(batch):
    return batch["tokens"].shape[1], batch["targets"].shape[1]


@pytest.mark.parametrize("fresh", [False, True])
def test_an_epoch_of_a_mixture_has_as_many_batches_of_a_cell_as_its_examples_fill(fresh):
    source = replace(MIXTURE, fresh=fresh).build()
    epochs = [epoch(source, number) for number in range(4)]
    for batches in epochs:
        assert Counter(map(shape, batches)) == {(16, 2): 5, (16, 4): 2, (32, 4): 1}
    assert len({tuple(map(shape, batches)) for batches in epochs}) > 1
    seen = [Counter(bytes(row) for b in e if shape(b) == (16, 2) for row in b["tokens"]) for e in epochs]
    assert all(len(rows) == 50 for rows in seen)
    assert (seen[0] == seen[1]) is not fresh and bool(seen[0] & seen[1]) is not fresh


def test_cells_of_a_mixture_have_random_words_of_their_own():
    source = RecallMixture(vocab_size=300, train=((32, 4, 50), (32, 8, 50))).build()
    few, many = (
        next(b for b in (source.batch(0, s, 50) for s in range(9)) if shape(b)[1] == k) for k in (4, 8)
    )
    first = {bytes(row[:8:2]) for row in few["tokens"]}
    assert len(first) == 50 and not first & {bytes(row[:8:2]) for row in many["tokens"]}
    plain = RecallData(vocab_size=300, length=32, pairs=4, train_examples=50).build().batch(0, 0, 50)
    assert not first & {bytes(row[:8:2]) for row in plain["tokens"]}


def test_a_mixture_is_evaluated_cell_by_cell():
    source = MIXTURE.build()
    whole = list(source.eval_batches("test", 5))
    parts = [b for name in ("16x2", "64x16") for b in source.eval_batches(f"test-{name}", 5)]
    assert [shape(b) for b in whole] == [(16, 2), (64, 16), (64, 16)]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    assert (whole[-1]["targets"][3:] == -1).all() and (whole[-1]["targets"][:3] >= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "train has no cell"),
        ({"train": ((64, 4),)}, r"train has \(64, 4\), which is not \(length, pairs, examples\)"),
        (
            {"evaluation": ((64, 20, 9),)},
            r"evaluation has \(64, 20, 9\): RecallData: pairs=20 needs length >= 80",
        ),
        ({"evaluation": ((64, 4, 0),)}, r"evaluation has \(64, 4, 0\), which is not"),
        ({"train": ((64, 4, 9), (64, 4, 8))}, "train has two cells of one length and pairs"),
        ({"data_seed": 2**32}, "data_seed=4294967296 must be below 2\\^32"),
    ],
)
def test_mixtures_refuse_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=f"^RecallMixture: {message}[^\n]*$"):
        RecallMixture(**change)


def test_a_rewritten_key_has_another_value_and_the_first_one_is_wrong():
    cfg = VariedRecall(pairs=8, rewritten=3, train_examples=0)
    batch = cfg.build().batch(0, 0, 200)
    context = batch["tokens"][:, : cfg.context].reshape(200, 11, 2)
    queried = np.take_along_axis(batch["tokens"], batch["positions"], 1)
    first = context[:, :8]  # every key once, before any comes again
    assert all(len(set(row)) == 8 for row in first[..., 0])
    assert all(len(set(row)) == 11 for row in context[..., 1])
    of_query = (queried[:, :, None] == first[:, None, :, 0]).argmax(-1)
    guess = np.take_along_axis(first[..., 1], of_query, 1)
    np.testing.assert_array_equal((guess != batch["targets"]).sum(1), 3)
    rewritten = {tuple(sorted(row)) for row in (context[:, 8:, None, 0] == first[:, None, :, 0]).argmax(-1)}
    assert len(rewritten) > 40  # of 56


def test_neither_token_of_a_compound_key_tells_the_value():
    cfg = VariedRecall(length=60, pairs=9, compound=True, train_examples=0)
    batch = cfg.build().batch(0, 0, 100)
    orders = set()
    for entries in batch["tokens"][:, :27].reshape(100, 9, 3):
        first, second, value = (sorted(set(column)) for column in entries.T)
        assert len(first) == len(second) == 3 and len(value) == 9
        assert {(a, b) for a, b, _ in entries} == set(product(first, second))
        orders.add(tuple(3 * first.index(a) + second.index(b) for a, b, _ in entries))
    assert len(orders) == 100
    assert (batch["tokens"][:, :27:3] < 170).all() and (batch["tokens"][:, 2:27:3] >= 341).all()


def test_repeated_context_is_the_same_twice_and_plain_recall_is_a_special_case():
    cfg = VariedRecall(length=80, pairs=8, rewritten=2, passes=3, train_examples=0)
    passes = cfg.build().batch(0, 0, 50)["tokens"][:, : cfg.context].reshape(50, 3, -1)
    assert passes.shape[2] == 20 and (passes == passes[:, :1]).all()
    plain = RecallData(length=80, train_examples=0).build().batch(0, 0, 50)
    varied = VariedRecall(length=80, train_examples=0).build().batch(0, 0, 50)
    assert {n: x.shape for n, x in plain.items()} == {n: x.shape for n, x in varied.items()}
    np.testing.assert_array_equal(plain["tokens"][:, 0:16:2], varied["tokens"][:, 0:16:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewritten": 9}, "rewritten=9 is more than pairs=8"),
        ({"compound": True}, "compound keys need a square number of pairs, not pairs=8"),
        ({"passes": 6}, "length=96 must be at least 112"),
        ({"vocab_size": 30, "rewritten": 8}, "vocab_size=30 is too small for pairs=8, rewritten=8"),
        ({"vocab_size": 17}, "vocab_size=17 is too small for pairs=8"),
        ({"power": 1.5}, "power=1.5 must lie in"),
    ],
)
def test_varied_recall_refuses_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=f"^VariedRecall: {message}[^\n]*$"):
        VariedRecall(**change)


# ---- induction heads and copying


def test_the_special_token_stands_twice_and_first_anywhere():
    batch = InductionData(length=14).build().batch(0, 0, 12_000)
    special = batch["tokens"] == 15
    assert (special.sum(1) == 2).all() and special[:, -1].all()
    places = np.bincount(special.argmax(1), minlength=14)
    assert (places[12:] == 0).all() and abs(places[:12] - 1_000).max() < 150
    ordinary = np.bincount(batch["tokens"][~special], minlength=16)
    assert ordinary[15] == 0 and abs(ordinary[:15] / ordinary.sum() - 1 / 15).max() < 0.003
    assert np.unique(batch["targets"]).tolist() == list(range(15))


def test_induction_heads_at_a_length_far_beyond_training():
    source = InductionData(length=2**17, eval_examples=2).build()
    (batch,) = source.eval_batches("test", 2)
    assert batch["tokens"].shape == (2, 2**17) and not source.disjoint
    for tokens, target in zip(batch["tokens"], batch["targets"][:, 0], strict=True):
        first, last = np.flatnonzero(tokens == 15)
        assert last == 2**17 - 1 and tokens[first + 1] == target


def test_copied_tokens_stand_anywhere_in_the_context_or_in_front():
    batch = CopyingData(context=20, copied=4).build().batch(0, 0, 5_000)
    data = batch["tokens"][:, :20] != 0
    assert (data.sum(1) == 4).all() and abs(data.mean(0) - 0.2).max() < 0.03
    assert (batch["tokens"][:, 20:] == 15).all() and (batch["positions"] == np.arange(20, 24)).all()
    assert batch["targets"].min() == 1 and batch["targets"].max() == 14
    plain = CopyingData(context=20, copied=4, selective=False).build().batch(0, 0, 50)
    np.testing.assert_array_equal(plain["tokens"][:, :4], plain["targets"])
    assert (plain["tokens"][:, 4:20] == 0).all()
    published = CopyingData.mamba()
    assert (published.length, published.context, published.copied, published.vocab_size) == (
        4112,
        4096,
        16,
        16,
    )
    with pytest.raises(ValueError, match=r"^CopyingData: copied=9 does not fit context=8$"):
        CopyingData(context=8, copied=9)


# ---- groups and word problems


@pytest.mark.parametrize(
    ("name", "order", "abelian"),
    [
        ("Z7", 7, True),
        ("S3", 6, False),
        ("A4", 12, False),
        ("A5", 60, False),
        ("S5", 120, False),
        ("Z2xS3", 12, False),
    ],
)
def test_tables_are_those_of_groups(name, order, abelian):
    table = group_table(name)
    assert table.shape == (order, order)
    np.testing.assert_array_equal(table[0], np.arange(order))
    np.testing.assert_array_equal(table[:, 0], np.arange(order))
    np.testing.assert_array_equal(table[table], table[:, table])  # associative
    assert ((table == 0).sum(0) == 1).all() and ((table == 0).sum(1) == 1).all()  # inverses
    assert (table == table.T).all() == abelian


def test_a5_is_simple_and_a_product_is_not():
    """Its conjugates: no union of classes with the identity has a size that divides 60."""

    def classes(name):
        table = group_table(name)
        inverse = (table == 0).argmax(1)
        a = np.arange(len(table))
        return sorted(len(set(table[table[inverse, x], a].tolist())) for x in a)

    assert Counter(classes("A5")) == {1: 1, 12: 24, 15: 15, 20: 20}
    assert Counter(classes("A4xZ5")) == {1: 5, 3: 15, 4: 40}


def test_swaps_are_the_elements_of_order_two_that_move_two_things():
    swaps = elements_moving("S5", 2)
    assert swaps[0] == 0 and len(swaps) == 11 and len(elements_moving("S5", 3)) == 31
    assert (group_table("S5")[swaps, swaps] == 0).all()
    inputs = WordProblemData(moved=2).build().batch(0, 0, 50)["tokens"][:, 1:]
    assert set(inputs[inputs > 0] - 2) == set(swaps.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": "Q8"}, "unknown group 'Q8'; there are Z2 to Z1000"),
        ({"group": "S7"}, "unknown group 'S7'"),
        ({"group": "A4x"}, "unknown group ''"),
        ({"group": "S6xZ5"}, "group 'S6xZ5' has 3,600 elements, more than 1,000"),
        ({"group": "Z5", "moved": 2}, "'Z5' is not a group of permutations"),
        ({"moved": 1}, "moved=1 must be at least 2"),
        ({"min_length": 41}, "min_length=41 is above length=40"),
        ({"labels": "first"}, "labels='first'; choose from every, last"),
    ],
)
def test_word_problems_refuse_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=f"^WordProblemData: [^\n]*{message}[^\n]*$"):
        WordProblemData(**change)


def test_words_have_every_length_and_labels_where_they_are():
    cfg = WordProblemData(group="Z3", min_length=2, length=9)
    batch = cfg.build().batch(0, 0, 8_000)
    lengths = (batch["tokens"][:, 1:] > 0).sum(1)
    assert (batch["tokens"][:, 0] == 1).all() and (batch["targets"][:, 0] == -1).all()
    np.testing.assert_array_equal(batch["targets"][:, 1:] >= 0, np.arange(9) < lengths[:, None])
    np.testing.assert_array_equal(batch["tokens"][:, 1:] > 0, np.arange(9) < lengths[:, None])
    counts = np.bincount(lengths, minlength=10)[2:]
    assert abs(counts - 1_000).max() < 400  # some short words belong to other splits
    last = replace(cfg, labels="last").build().batch(0, 0, 8_000)
    np.testing.assert_array_equal(last["tokens"], batch["tokens"])
    np.testing.assert_array_equal(last["targets"], np.take_along_axis(batch["targets"], last["positions"], 1))
    np.testing.assert_array_equal(last["positions"][:, 0], lengths)


def test_a_word_is_in_one_split_whatever_the_lengths_of_the_config():
    short = WordProblemData.parity(3, 12)
    long = replace(short, length=30, data_seed=7, train_examples=5_000)
    seen = {row[row > 0].tobytes() for row in long.build().batch(0, 0, 5_000)["tokens"]}
    held = {row[row > 0].tobytes() for b in short.build().eval_batches("test", 500) for row in b["tokens"]}
    common = {row[row > 0].tobytes() for row in short.build().batch(0, 0, 1_000)["tokens"]}
    assert seen & common and not seen & held


def test_the_chance_of_swaps_is_that_of_a_random_walk():
    """Two steps with the identity among 11 elements: back at the start in 11 of 121 ways."""
    source = WordProblemData(moved=2, min_length=2, length=2, labels="last").build()
    assert source.chance == pytest.approx(11 / 121)
    every = WordProblemData(moved=2, min_length=1, length=2).build()  # of 3 labels 2 are first ones
    assert every.chance == pytest.approx((2 * 1 / 11 + 11 / 121) / 3)
    assert WordProblemData.parity().build().chance == 0.5


def test_scaled_accuracy():
    assert scaled_accuracy(0.2, 0.2) == 0 and scaled_accuracy(1.0, 0.2) == 1
    assert scaled_accuracy(0.75, 0.5) == 0.5


# ---- arithmetic


def texts(batch, modulus):
    symbols = [""] + [str(d) for d in range(modulus)] + list("+-*()=")
    return ["".join(symbols[t] for t in row) for row in batch["tokens"].tolist()]


def is_bracketed(text):
    """Whether a text, without "=", is an E(n)."""
    if len(text) <= 2:
        return text[-1:].isdigit() and text[:-1] in ("", "-")
    if text[0] != "(" or text[-1] != ")":
        return False
    inside = text[1:-1]
    if is_bracketed(inside) and len(inside) <= 2:
        return True
    cuts = [i for i in range(1, len(inside) - 1) if inside[i] in "+-*" and inside[i - 1] in "0123456789)"]
    return any(is_bracketed(inside[:i]) and is_bracketed(inside[i + 1 :]) for i in cuts)


def test_expressions_follow_their_grammar_at_every_length():
    cfg = ArithmeticData(brackets=True, length=14)
    found = [text.partition("=") for text in texts(cfg.build().batch(0, 0, 1_500), 5)]
    assert all(equals == "=" and rest == "" and is_bracketed(text) for text, equals, rest in found)
    assert {len(text) for text, _, _ in found} == set(range(3, 15))
    assert not is_bracketed("1+2") and not is_bracketed("((1+2)") and not is_bracketed("((1))")
    flat = [text.partition("=")[0] for text in texts(ArithmeticData(length=14).build().batch(0, 0, 500), 5)]
    assert {len(text) for text in flat} == {3, 5, 7, 9, 11, 13}
    assert all(text[::2].isdigit() and set(text[1::2]) <= set("+-*") for text in flat)


def test_every_expression_of_a_length_can_come():
    found = set(
        texts(
            ArithmeticData(modulus=2, operators="+-", brackets=True, min_length=5, length=6)
            .build()
            .batch(0, 0, 4_000),
            2,
        )
    )
    held = ArithmeticData(
        modulus=2, operators="+-", brackets=True, min_length=5, length=6, eval_examples=2_000
    ).build()
    for split in held.splits:
        found |= {t for b in held.eval_batches(split, 500) for t in texts(b, 2)}
    digits, negative = "01", ("-0", "-1")
    five = {f"({a}{o}{b})=" for a, o, b in product(digits, "+-", digits)}
    six = {f"({a}{o}{b})=" for a, o, b in product(negative, "+-", digits)}
    six |= {f"({a}{o}{b})=" for a, o, b in product(digits, "+-", negative)}
    assert found == five | six


@pytest.mark.parametrize("brackets", [False, True])
def test_the_likeliest_value_is_computed_from_the_distribution_of_values(brackets):
    cfg = ArithmeticData(modulus=3, operators="*+", brackets=brackets, min_length=9, length=9)
    source = cfg.build()
    targets = source.batch(0, 0, 8_000)["targets"][:, 0] - 1
    spread = (_bracket_values if brackets else _flat_values)(cfg)[9]
    assert spread.sum() == pytest.approx(1) and source.chance == spread.max()
    np.testing.assert_allclose(np.bincount(targets, minlength=3) / 8_000, spread, atol=0.02)


def test_small_expressions_by_hand():
    source = ArithmeticData().build()
    sign = {text: i for i, text in enumerate(["", *"01234+-*()="])}
    for text, value in {"1+2*3=": 2, "1-1-1=": 4, "0*1+4*3-2=": 0, "2-3*4*2-1=": 2}.items():
        tokens = np.array([[sign[c] for c in text] + [0] * (41 - len(text))])
        assert source._flat_result(tokens)[0] == value
        assert solve_arithmetic({"tokens": tokens}, source.cfg)[0, 0] == 1 + value
    for text, value in {"(-1)=": 4, "((2-3)*-4)=": 4, "(2--3)=": 0, "-2=": 3, "(1-(2-(3-4)))=": 3}.items():
        tokens = np.array([[sign[c] for c in text] + [0] * (41 - len(text))])
        assert source._values(tokens)[0] == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operators": "+/"}, "operators='\\+/' must be some of"),
        ({"operators": "++"}, "operators='\\+\\+' must be some of"),
        ({"operators": ""}, "operators='' must be some of"),
        ({"min_length": 4, "length": 4}, "no expression from min_length=4 to length=4"),
        ({"modulus": 1}, "modulus=1 must be at least 2"),
    ],
)
def test_arithmetic_refuses_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=f"^ArithmeticData: {message}[^\n]*$"):
        ArithmeticData(**change)
