"""The data sources: purity, coverage, disjointness, answers recoverable, complaints of one line."""

import hashlib
import json
import pickle
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from experiments import corpora
from experiments.sources import (
    ClassificationSource,
    LanguageSource,
    Source,
    Stream,
    below,
    epoch_order,
    fingerprint,
    random_words,
    shuffled_indices,
    uniform,
)
from experiments.tasks.recall import RecallData, draw_distinct, draw_weighted
from experiments.tasks.signals import ArrayData, SignalData
from experiments.text import TextData
from experiments.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    from_dict,
    load_huggingface,
)

PROSE = "".join(f"Line {i}: the quick brown fox, number {i * 7919 % 1000}, jumps é ü.\n" for i in range(100))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with one corpus in every format, an .npz, and a small BPE tokenizer."""
    root = tmp_path_factory.mktemp("data")
    documents = [f"document {i} " + "xyz"[i % 3] * (3 + i * i % 17) for i in range(40)]
    (root / "prose.txt").write_text(PROSE, encoding="utf-8")
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": d, "n": 1}) + "\n" for d in documents))
    pq.write_table(pa.table({"text": documents, "n": list(range(40))}), root / "rows.parquet")
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (50, 12)), rng.integers(0, 4, 50)
    np.savez(root / "arrays.npz", x=x, y=y, x_test=x[:7], y_test=y[:7])
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.train_from_iterator([PROSE], trainer)
    bpe.save(str(root / "tokenizer.json"))
    return root


def configs(root):
    prose, rows = str(root / "prose.txt"), str(root / "rows.jsonl")
    return {
        "windows-byte": TextData(path=prose, length=16),
        "windows-char": TextData(path=prose, length=16, tokenizer="char"),
        "windows-bpe": TextData(path=rows, length=16, tokenizer=str(root / "tokenizer.json")),
        "packed-byte": TextData(path=rows, length=16, mode="packed"),
        "packed-char": TextData(path=prose, length=16, mode="packed", tokenizer="char"),
        "recall-pool": RecallData(vocab_size=66, length=32, pairs=4, train_examples=50, eval_examples=20),
        "recall-fresh": RecallData(vocab_size=66, length=32, pairs=4, train_examples=0, random_filler=True),
        "signals-pool": SignalData(length=32, features=2, classes=3, train_examples=30, eval_examples=20),
        "signals-fresh": SignalData(length=32, train_examples=0, eval_examples=20, shuffled=True),
        "arrays": ArrayData(path=str(root / "arrays.npz")),
    }


KINDS = list(configs(Path()))


@pytest.fixture(params=KINDS)
def cfg(request, data):
    return configs(data)[request.param]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


# ---- what every source promises


def test_batch_is_a_pure_function_of_seed_step_size(cfg):
    first, second = cfg.build(), cfg.build()
    for step in (0, 1, 40):
        first.batch(3, step, 4)
    assert_same(first.batch(3, 7, 4), second.batch(3, 7, 4))
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 64
    different = first.batch(3, 8, 4), first.batch(4, 7, 4)
    for other in different:
        assert any((first.batch(3, 7, 4)[name] != x).any() for name, x in other.items())


def test_shapes_and_types(cfg):
    source = cfg.build()
    assert isinstance(source, Source)
    batches = [source.batch(0, 0, 3), *source.eval_batches("validation", 3)]
    for batch in batches:
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: (x.shape, x.dtype) for name, x in batches[0].items()
        }
        assert len(batch["targets"]) == 3 and batch["targets"].dtype == np.int32
    if source.kind == "language":
        assert isinstance(source, LanguageSource)
        assert batches[0]["tokens"].shape == (3, source.length)
        for batch in batches:
            assert batch["tokens"].min() >= 0 and batch["tokens"].max() < source.vocab_size
            assert batch["targets"].min() >= -1 and batch["targets"].max() < source.vocab_size
    else:
        assert isinstance(source, ClassificationSource)
        assert batches[0]["inputs"].shape == (3, source.length, source.features)
        assert batches[0]["inputs"].dtype == np.float32
        assert max(batch["targets"].max() for batch in batches) < source.classes


def test_eval_is_repeatable_and_its_content_does_not_depend_on_the_batch_size(cfg):
    source = cfg.build()
    for split in source.splits:
        scored = [
            np.concatenate([b["targets"].reshape(size, -1) for b in source.eval_batches(split, size)])
            for size in (3, 3, 5)
        ]
        scored = [x[(x >= 0).any(1)] for x in scored]
        np.testing.assert_array_equal(scored[0], scored[1])
        np.testing.assert_array_equal(scored[0], scored[2])


def test_configs_are_hashable_describe_themselves_and_pickle(cfg):
    assert hash(cfg) == hash(pickle.loads(pickle.dumps(cfg)))
    source = cfg.build()
    assert "\n" not in source.describe() and len(source.describe()) > 20
    with pytest.raises(ValueError, match="no split 'training' here; choose from validation"):
        next(iter(source.eval_batches("training", 2)))


def test_a_pool_is_gone_through_once_per_epoch_in_a_new_order():
    source = RecallData(train_examples=30, eval_examples=1).build()
    tokens = np.concatenate([source.batch(5, step, 10)["tokens"] for step in range(6)])
    epochs = [Counter(map(bytes, part)) for part in (tokens[:30], tokens[30:])]
    assert epochs[0] == epochs[1] and set(epochs[0].values()) == {1}
    assert (tokens[:30] != tokens[30:]).any()
    assert (
        Counter(map(bytes, np.concatenate([source.batch(6, s, 10)["tokens"] for s in range(3)]))) == epochs[0]
    )


def test_epochs_run_on_across_batches_of_any_size():
    whole = shuffled_indices(9, 7, 0, 50)
    np.testing.assert_array_equal(
        whole, np.concatenate([shuffled_indices(9, 7, s, 5) for s in range(0, 50, 5)])
    )
    np.testing.assert_array_equal(np.sort(whole[:49].reshape(7, 7), axis=1), np.tile(np.arange(7), (7, 1)))
    np.testing.assert_array_equal(whole[7:14], epoch_order(9, 1, 7))


def test_random_words_are_addressable_and_streams_differ():
    words = random_words(40, Stream.TRAIN, 1)
    np.testing.assert_array_equal(random_words(8, Stream.TRAIN, 1, start=3), words[12:20])
    others = [random_words(40, s, 1) for s in Stream if s != Stream.TRAIN]
    others += [random_words(40, Stream.TRAIN, 2), random_words(40, Stream.TRAIN, 1, salt=1)]
    assert not any(np.isin(words, other).any() for other in others)
    assert 0 < uniform(np.array([0], np.uint64))[0] < uniform(np.array([2**64 - 1], np.uint64))[0] < 1
    counts = np.bincount(below(random_words(60_000, Stream.TASK, 0), 6), minlength=6)
    assert abs(counts - 10_000).max() < 400


def test_fingerprints_see_settings_dtype_shape_and_content():
    x = np.arange(6)
    variants = [
        ({"a": 1}, x),
        ({"a": 2}, x),
        ({"a": 1}, x + 1),
        ({"a": 1}, x.reshape(2, 3)),
        ({"a": 1}, x * 1.0),
    ]
    assert len({fingerprint(*v) for v in variants}) == len(variants)


# ---- associative recall


@pytest.mark.parametrize("random_filler", [False, True])
@pytest.mark.parametrize("train_examples", [0, 300])
def test_recall_is_solved_by_looking_the_key_up(random_filler, train_examples):
    cfg = RecallData(
        vocab_size=101, length=48, pairs=12, random_filler=random_filler, train_examples=train_examples
    )
    source = cfg.build()
    batches = [
        source.batch(0, 2, 100),
        *source.eval_batches("validation", 100),
        *source.eval_batches("test", 100),
    ]
    for batch in batches:
        keys, values = batch["tokens"][:, 0:24:2], batch["tokens"][:, 1:24:2]
        assert ((keys >= 1) & (keys < 50)).all() and ((values >= 50) & (values < 101)).all()
        assert all(len(set(row)) == 12 for row in (*keys, *values))
        assert all(len(set(row)) == 12 for row in batch["positions"])
        assert ((batch["positions"] >= 24) & (batch["positions"] % 2 == 0)).all()
        queries = np.take_along_axis(batch["tokens"], batch["positions"], 1)
        found = queries[:, :, None] == keys[:, None, :]
        assert (found.sum(-1) == 1).all()
        np.testing.assert_array_equal(np.einsum("bqk,bk->bq", found, values), batch["targets"])
        filler = np.delete(batch["tokens"][0], [*range(24), *batch["positions"][0]])
        assert (filler != 0).any() == random_filler
    assert source.chance == pytest.approx(1 / 51)
    assert RecallData().build().chance == 2 / 512


def test_recall_streams_share_no_example():
    source = RecallData(vocab_size=64, length=32, pairs=4, train_examples=2_000).build()
    fresh = RecallData(vocab_size=64, length=32, pairs=4, train_examples=0).build()
    held_out = [np.concatenate([b["tokens"] for b in source.eval_batches(s, 500)]) for s in source.splits]
    parts = [source.batch(0, 0, 2_000)["tokens"], fresh.batch(0, 0, 2_000)["tokens"], *held_out]
    rows = [bytes(row) for part in parts for row in part]
    assert len(rows) == 6_000 and len(set(rows)) == len(rows)


def test_recall_is_the_same_bits_everywhere():
    batch = RecallData(train_examples=0, random_filler=True).build().batch(11, 3, 64)
    digest = hashlib.sha256(b"".join(batch[k].astype("<i4").tobytes() for k in sorted(batch))).hexdigest()
    assert digest == "6b35d307bdf25465084ce47639c2c9793e96ac5c7abe5925b3ac5c0139d825d1"


def test_recall_examples_do_not_depend_on_how_they_are_cut_into_batches():
    source = RecallData(train_examples=0).build()
    whole = source.batch(1, 0, 12)
    pieces = [source.batch(1, step, 4) for step in range(3)]
    assert_same(whole, {name: np.concatenate([p[name] for p in pieces]) for name in whole})


def test_draws_have_the_distribution_of_their_definition():
    words = random_words(40_000, Stream.TASK, 0)
    pairs = Counter(map(tuple, draw_distinct(words.reshape(-1, 2), 4).tolist()))
    assert len(pairs) == 12 and abs(np.array(list(pairs.values())) - 20_000 / 12).max() < 160
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    drawn = draw_weighted(words.reshape(-1, 4), weights, 2)
    first = np.bincount(drawn[:, 0], minlength=4) / 10_000
    np.testing.assert_allclose(first, weights / 10, atol=0.015)
    after_three = drawn[drawn[:, 0] == 3, 1]  # what is left is weighed anew
    np.testing.assert_allclose(
        np.bincount(after_three, minlength=3) / len(after_three), weights[:3] / 6, atol=0.025
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 63}, "length=63 must be even"),
        ({"pairs": 17}, "pairs=17 needs length >= 68, not 64"),
        ({"vocab_size": 64}, "vocab_size=64 must exceed length=64"),
        ({"pairs": 0}, "pairs=0 must be at least 1"),
        ({"train_examples": -1}, "train_examples=-1 must be at least 0"),
        ({"power": 0.0}, r"power=0.0 must lie in \(0, 1\]"),
        ({"length": "64"}, "length='64' must be of type int"),
        ({"pairs": True}, "pairs=True must be of type int"),
    ],
)
def test_recall_refuses_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=f"^RecallData: {message}[^\n]*$"):
        RecallData(**change)


# ---- signals and arrays


def test_signals_need_the_order_of_the_values_and_are_solvable():
    source = SignalData(train_examples=3_000, eval_examples=500).build()
    train = source.batch(0, 0, 3_000)
    (test,) = source.eval_batches("validation", 500)

    def linear(batch):
        return np.concatenate([batch["inputs"][..., 0], np.ones((len(batch["targets"]), 1))], 1)

    weights = np.linalg.lstsq(linear(train), np.eye(10)[train["targets"]], rcond=None)[0]
    linear_accuracy = ((linear(test) @ weights).argmax(1) == test["targets"]).mean()
    assert matched_filter_accuracy(source, test) > 0.9 > 0.5 > linear_accuracy


def matched_filter_accuracy(source, batch):
    """Every class at every place of a grid, its best amplitude: the largest normalised correlation wins."""
    length = source.length
    best = np.full((len(batch["targets"]), source.classes), -np.inf)
    for width in length * np.linspace(0.42, 0.68, 5):
        for start in np.arange(0, length - width + 1, 1.0):
            place = np.tile((np.arange(length) - start) / width, (source.classes, 1))
            filters = source.render(np.arange(source.classes), place)[..., 0]
            filters /= np.linalg.norm(filters, axis=1, keepdims=True)
            best = np.maximum(best, batch["inputs"][..., 0] @ filters.T)
    return (best.argmax(1) == batch["targets"]).mean()


def test_signal_streams_share_no_example_and_shuffling_permutes_time():
    plain = SignalData(train_examples=200, eval_examples=200).build()
    parts = [plain.batch(0, 0, 200), *plain.eval_batches("validation", 200), *plain.eval_batches("test", 200)]
    rows = [x.tobytes() for part in parts for x in part["inputs"]]
    assert len(set(rows)) == 600
    mixed = SignalData(train_examples=200, shuffled=True).build().batch(0, 0, 200)
    np.testing.assert_array_equal(np.sort(parts[0]["inputs"], 1), np.sort(mixed["inputs"], 1))
    assert (parts[0]["inputs"] != mixed["inputs"]).any()


def test_arrays_are_split_standardised_and_complete(data):
    source = ArrayData(path=str(data / "arrays.npz"), train_fraction=0.8).build()
    train = source.batch(0, 0, 40)
    assert abs(train["inputs"].mean()) < 1e-5 and abs(train["inputs"].std() - 1) < 1e-5
    content = np.load(data / "arrays.npz")
    (validation,), (test,) = source.eval_batches("validation", 10), source.eval_batches("test", 7)
    np.testing.assert_array_equal(validation["targets"], content["y"][40:])
    np.testing.assert_array_equal(test["targets"], content["y_test"])
    mean, deviation = content["x"][:40].mean(), content["x"][:40].std()
    np.testing.assert_allclose(
        test["inputs"][..., 0], (content["x_test"] - mean) / deviation, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((4, 3))}, "needs arrays x and y; there are: x"),
        ({"x": np.ones((4, 3)), "y": np.zeros(3, int)}, "are not "),
        ({"x": np.ones((4, 3)), "y": np.zeros(4)}, "y integer"),
        ({"x": np.full((4, 3), np.nan), "y": np.zeros(4, int)}, "x is not finite"),
        ({"x": np.ones((1, 3)), "y": np.zeros(1, int)}, "1 sequences are too few to split"),
        ({"x": np.ones((4, 3)), "y": np.zeros(4, int), "x_test": np.ones((4, 3))}, "x_test and y_test"),
    ],
)
def test_arrays_that_are_malformed(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        ArrayData(path=str(tmp_path / "a.npz")).build()


def test_arrays_that_are_no_arrays(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.npz"):
        ArrayData(path=str(tmp_path / "none.npz")).build()
    (tmp_path / "bad.npz").write_text("not a zip")
    with pytest.raises(ValueError, match=r"bad\.npz: not a readable \.npz"):
        ArrayData(path=str(tmp_path / "bad.npz")).build()


# ---- tokenizers


def test_tokenizers_round_trip_and_survive_saving(data):
    for tokenizer in (
        ByteTokenizer(),
        CharTokenizer.fit([PROSE], separator=True),
        load_huggingface(str(data / "tokenizer.json")),
        load_huggingface(str(data)),
    ):
        ids = tokenizer.encode(PROSE)
        assert ids.max() < tokenizer.vocab_size and tokenizer.decode(ids) == PROSE
        assert tokenizer.decode([tokenizer.separator, *ids[:9].tolist()]) == tokenizer.decode(ids[:9])
        again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        np.testing.assert_array_equal(again.encode(PROSE), ids)
        assert (again.vocab_size, again.separator) == (tokenizer.vocab_size, tokenizer.separator)
        assert len(tokenizer.encode("")) == 0 and tokenizer.decode([]) == ""
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(
                ValueError, match=rf"token id \[{bad}\] is outside \[0, {tokenizer.vocab_size}\)"
            ):
                tokenizer.decode([bad])


def test_tokenizer_vocabularies(data):
    assert (ByteTokenizer().vocab_size, ByteTokenizer().separator) == (257, 256)
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    chars = CharTokenizer.fit(["ba", "cab"], separator=False)
    assert (chars.characters, chars.vocab_size, chars.separator) == ("abc", 3, None)
    bpe = load_huggingface(str(data / "tokenizer.json"))
    assert (bpe.vocab_size, bpe.separator) == (300, 0)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert (HuggingFaceTokenizer(words).vocab_size, HuggingFaceTokenizer(words).separator) == (3, 2)


def test_tokenizers_refuse_what_they_cannot_write(data, tmp_path):
    chars = CharTokenizer.fit(["abc"], separator=False)
    for text, complaint in (
        ("ab☃", "'☃' at character 2"),
        ("z", "'z' at character 0"),
        (" a", "' ' at character 0"),
    ):
        with pytest.raises(ValueError, match=f"{complaint} is not in the vocabulary"):
            chars.encode(text)
    for tokenizer in (ByteTokenizer(), load_huggingface(str(data))):
        with pytest.raises(ValueError, match=r"'\\ud800' at character 1 is half a surrogate pair"):
            tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="not a saved tokenizer"):
        from_dict({"kind": "word"})
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        load_huggingface(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^tokenizer [^\n]* cannot be loaded: [^\n]*$"):
        load_huggingface(str(tmp_path / "bad.json"))


# ---- text


def test_a_single_file_is_split_by_characters_and_evaluated_whole(data):
    source = TextData(path=str(data / "prose.txt"), length=50, tokenizer="char").build()
    cut = int(0.9 * len(PROSE))
    batches = list(source.eval_batches("validation", 4))
    tokens, targets = (np.concatenate([b[name] for b in batches]) for name in ("tokens", "targets"))
    scored = targets >= 0
    assert source.tokenizer.decode(targets[scored]) == PROSE[cut + 1 :]
    assert source.tokenizer.decode(tokens[scored]) == PROSE[cut:-1]
    assert source.vocab_size == len(set(PROSE)) and source.splits == ("validation",)
    capped = TextData(path=str(data / "prose.txt"), length=50, tokenizer="char", eval_limit=2).build()
    for a, b in zip(capped.eval_batches("validation", 4), batches[:2], strict=True):
        assert_same(a, b)


def test_windows_are_pieces_of_the_training_text_at_uniform_offsets(data):
    source = TextData(path=str(data / "prose.txt"), length=70).build()
    training = PROSE[: int(0.9 * len(PROSE))].encode()
    batch = source.batch(0, 5, 400)
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    rows = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], 1)
    assert all(bytes(row.tolist()) in training for row in rows)
    offsets = np.array([training.index(bytes(row.tolist())) for row in rows])
    assert abs(offsets.mean() / len(training) - 0.5) < 0.05 and len(set(offsets.tolist())) > 350


def test_windows_reach_both_ends(tmp_path):
    (tmp_path / "t.txt").write_text("abcdef")
    (tmp_path / "v.txt").write_text("ab")
    source = TextData(path=str(tmp_path / "t.txt"), validation=str(tmp_path / "v.txt"), length=4).build()
    rows = {source.tokenizer.decode(row) for row in source.batch(0, 0, 64)["targets"]}
    assert rows == {"bcde", "cdef"}


def pieces(batch, separator=256):
    """The packed pieces of documents in a batch: (begins a document, its tokens, its targets)."""
    for tokens, targets, segments in zip(
        *(batch[k] for k in ("tokens", "targets", "segment_ids")), strict=True
    ):
        for segment in range(segments.max() + 1):
            here = (segments == segment) & (targets >= 0)
            if here.any():
                yield tokens[here][0] == separator, tokens[here].tolist(), targets[here].tolist()


def test_one_packed_epoch_is_every_document_once(data):
    """Rows are long enough here to hold most documents whole."""
    source = TextData(path=str(data / "rows.jsonl"), length=128, mode="packed", train_fraction=0.8).build()
    lines = [json.loads(line)["text"] for line in (data / "rows.jsonl").read_text().splitlines()]
    total = source._parts["train"].size
    rows = -(-total // 128)
    orders = []
    for epoch in (0, 1):
        found = list(pieces(source.batch(2, epoch, rows)))
        whole = [source.tokenizer.decode(t) for starts, t, u in found if starts and u[-1] == 256]
        parts = [source.tokenizer.decode(t) for starts, t, u in found if not (starts and u[-1] == 256)]
        assert set(whole) <= set(lines) and all(any(part in line for line in lines) for part in parts)
        assert total <= sum(len(t) for _, t, _ in found) < total + 128
        orders.append(whole)
    assert orders[0] != orders[1]
    training = {line for line in lines if line in set(orders[0] + orders[1])}
    held_out = [d for batch in source.eval_batches("validation", 1) for d in pieces(batch)]
    assert not training & {source.tokenizer.decode(t) for _, t, _ in held_out}
    assert sum(len(t) for _, t, _ in held_out) == sum(len(x) + 1 for x in lines) - total


def test_packed_rows_cover_every_position_of_an_epoch(tmp_path):
    """With all bytes of the corpus distinct, each must turn up, and only one row's worth twice."""
    text = bytes(range(1, 128)).decode()
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": text[i : i + 9]}) + "\n" for i in range(0, 127, 9))
    )
    (tmp_path / "v.txt").write_text("validation")
    cfg = TextData(
        path=str(tmp_path / "t.jsonl"), validation=str(tmp_path / "v.txt"), length=10, mode="packed"
    )
    source = cfg.build()
    rows = -(-source._parts["train"].size // 10)
    for epoch in range(3):
        targets = np.concatenate(
            [source.batch(0, epoch * rows + i, 1)["targets"].ravel() for i in range(rows)]
        )
        counts = np.bincount(targets, minlength=257)
        assert (counts[1:128] >= 1).all() and counts[256] >= 15 and counts.sum() == rows * 10
        assert (counts[1:128] > 1).sum() < 10


def test_packed_pieces_are_the_documents_run_alone(data):
    """Every piece is a run of `S t1 .. tn` with targets `t1 .. tn S`, for the one document it comes from."""
    source = TextData(path=str(data / "rows.jsonl"), length=24, mode="packed").build()
    alone = [[256, *text.encode(), 256] for text in corpora.read_path(str(data / "rows.jsonl"), "text")]

    def occurs(tokens, targets):
        run = [*tokens, targets[-1]]
        return tokens[1:] == targets[:-1] and any(
            run == document[i : i + len(run)] for document in alone for i in range(len(document))
        )

    for batch in (source.batch(0, 1, 8), *source.eval_batches("validation", 4)):
        assert all(occurs(tokens, targets) for _, tokens, targets in pieces(batch))


def test_packed_rows_mark_documents_and_no_target_crosses(data):
    source = TextData(path=str(data / "rows.jsonl"), length=64, mode="packed").build()
    for batch in (source.batch(0, 3, 8), *source.eval_batches("validation", 2)):
        tokens, targets, segments = batch["tokens"], batch["targets"], batch["segment_ids"]
        scored = (targets >= 0)[:, 1:]
        starts = (tokens == 256)[:, 1:]
        np.testing.assert_array_equal((np.diff(segments, axis=1) == 1)[scored], starts[scored])
        assert np.isin(np.diff(segments, axis=1), (0, 1)).all() and (segments[:, 0] == 0).all()
        ends = targets[:, :-1] == 256
        np.testing.assert_array_equal(ends[scored], starts[scored])
        follows = ~starts & scored
        np.testing.assert_array_equal(tokens[:, 1:][follows], targets[:, :-1][follows])


def test_formats_agree_and_files_combine(data, tmp_path):
    expected = corpora.read_path(str(data / "rows.jsonl"), "text")
    assert len(expected) == 40
    assert corpora.read_path(str(data / "rows.parquet"), "text") == expected
    assert corpora.read_path(str(data / "rows.*"), "text") == 2 * expected
    assert corpora.read_path(str(data), "text") == [PROSE, *expected, *expected]
    jsonl, parquet = (TextData(path=str(data / f"rows.{e}"), length=8).build() for e in ("jsonl", "parquet"))
    assert jsonl.fingerprint == parquet.fingerprint
    odd = tmp_path / "we[ir]d *.parquet"
    odd.write_bytes((data / "rows.parquet").read_bytes())
    assert corpora.read_path(str(odd), "text") == expected


def test_documents_may_be_lines_or_joined(data):
    path = str(data / "prose.txt")
    lines = TextData(path=path, documents="lines", length=8, mode="packed").build()
    assert [len(lines._parts[name].starts) for name in ("train", "validation")] == [90, 10]
    joined = TextData(path=str(data / "rows.jsonl"), documents="joined", length=8, tokenizer="char").build()
    assert len(joined._parts["train"].starts) == 1 and joined.tokenizer.separator is None


def test_given_validation_and_test_files_are_used_whole(data):
    prose, rows = str(data / "prose.txt"), str(data / "rows.jsonl")
    source = TextData(path=prose, validation=rows, test=prose, length=32).build()
    assert source.splits == ("validation", "test")
    count = {s: sum(int((b["targets"] >= 0).sum()) for b in source.eval_batches(s, 4)) for s in source.splits}
    texts = corpora.read_path(rows, "text")
    assert count == {"validation": sum(map(len, texts)) + len(texts), "test": len(PROSE.encode()) + 1}


def test_the_fingerprint_follows_the_content_and_not_the_place(data, tmp_path):
    def fingerprint_of(text, **changes):
        (tmp_path / "t.txt").write_text(text, encoding="utf-8")
        return TextData(path=str(tmp_path / "t.txt"), **({"length": 16} | changes)).build().fingerprint

    original = TextData(path=str(data / "prose.txt"), length=16).build().fingerprint
    assert fingerprint_of(PROSE) == original
    changed = [
        fingerprint_of(PROSE.replace("fox", "cat", 1)),
        fingerprint_of(PROSE[:-1] + "!"),
        fingerprint_of(PROSE, length=17),
        fingerprint_of(PROSE, mode="packed"),
        fingerprint_of(PROSE, tokenizer="char"),
        fingerprint_of(PROSE, train_fraction=0.8),
    ]
    assert len({original, *changed}) == 7


def test_without_a_path_python_itself_is_the_corpus():
    documents = corpora.read_stdlib()
    sizes = [len(text.encode()) for text in documents]
    assert 1_000_000 < sum(sizes) <= 5_000_000 and documents == corpora.read_stdlib.__wrapped__()
    source = TextData(length=64).build()
    assert source.vocab_size == 257 and "standard library" in source.describe()
    assert source.batch(0, 0, 2)["tokens"].shape == (2, 64)


def test_a_dataset_by_name(data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "repository"
    repository.mkdir()
    for split in ("train", "validation"):
        (repository / f"{split}.jsonl").write_bytes((data / "rows.jsonl").read_bytes())
    cfg = TextData(hub=str(repository), validation="validation", length=16)
    source = cfg.build()
    local = str(data / "rows.jsonl")
    assert source.fingerprint == TextData(path=local, validation=local, length=16).build().fingerprint
    with pytest.raises(ValueError, match="row 1 has no field 'body'; fields there: n, text"):
        TextData(hub=str(repository), field="body").build()
    with pytest.raises(FileNotFoundError, match=r"^dataset [^\n]*split 'nowhere', cannot be loaded[^\n]*$"):
        TextData(hub=str(repository), hub_split="nowhere").build()


def test_reading_tables_leaves_the_datasets_library_as_it_was(data, capfd):
    datasets.enable_progress_bars()
    verbosity = datasets.utils.logging.get_verbosity()
    corpora.read_path(str(data / "rows.parquet"), "text")
    assert not datasets.are_progress_bars_disabled()
    assert datasets.utils.logging.get_verbosity() == verbosity
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty, there is no text in it"),
        ("empty.jsonl", b"", "empty, there is no text in it"),
        ("blank.jsonl", b'\n{"text": ""}\n\n', "empty, there is no text in it"),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), "not UTF-8 text, byte 0xe9 at offset 3"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', "not UTF-8 text, byte 0xe9 at offset 13"),
        ("short.txt", b"0123456789", "training text has 9 tokens, one window of length 16 takes 17"),
        ("field.jsonl", b'{"body": "x", "id": 3}', "row 1 has no field 'text'; fields there: body, id"),
        ("mixed.jsonl", b'{"text": "x"}\n{"body": "y"}', "row 2 has no field 'text'; fields there: body"),
        ("list.jsonl", b'{"text": ["x"]}', "row 1 has no text but list in 'text'; fields there: text"),
        ("broken.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON: Expecting value"),
        ("array.jsonl", b"[1, 2]", "line 1 is not a JSON object"),
        ("half.jsonl", b'{"text": "a\\ud800"}', "is half a surrogate pair"),
        ("bad.parquet", b"not parquet", "not readable as parquet"),
        ("empty.parquet", b"", "not readable as parquet"),
    ],
)
def test_text_that_cannot_be_read_is_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        TextData(path=str(tmp_path / name), length=16).build()
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_field(data):
    with pytest.raises(ValueError, match=r"rows\.parquet: row 1 has no field 'body'; fields there: n, text"):
        TextData(path=str(data / "rows.parquet"), field="body").build()


def test_missing_files_are_named(tmp_path):
    for path, message in (
        (tmp_path / "none.txt", "no such file or directory: .*none.txt"),
        (tmp_path / "*.txt", "no file matches"),
        (tmp_path, r"no \.txt, \.jsonl or \.parquet file in directory"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            TextData(path=str(path)).build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length=0 must be at least 1"),
        ({"mode": "rows"}, "mode='rows'; choose from windows, packed"),
        ({"documents": "pages"}, "documents='pages'; choose from each, lines, joined"),
        ({"train_fraction": 1.0}, "train_fraction=1.0 not in"),
        ({"path": "a", "hub": "b"}, "give path or hub, not both"),
        ({"hub_config": "c"}, "hub_config needs hub"),
        ({"validation": "v"}, "validation and test need path or hub"),
        ({"path": 3}, r"path=3 must be of type str \| None"),
        ({"eval_limit": -1}, "eval_limit=-1 must be at least 0"),
    ],
)
def test_text_configs_refuse_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        TextData(**change)
