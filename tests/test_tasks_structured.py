"""MAD, ListOps, Pathfinder and biographies, beyond what every task promises (`tests/test_tasks.py`)."""

import dataclasses
import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solvers_structured import solve_list_ops, solve_pathfinder

from experiments.config import Optimizer, Run
from experiments.evaluate import evaluate
from experiments.sources import IGNORED, LanguageSource, Stream, random_words
from experiments.tasks import mad
from experiments.tasks.bios import BITS_PER_PERSON, BiosData, bits_per_parameter
from experiments.tasks.bios_text import ATTRIBUTES, NAMES, POOLS
from experiments.tasks.list_ops import CLOSE, PAD, TOKENS, ListOpsData
from experiments.tasks.list_ops import text as expression
from experiments.tasks.mad_fuzzy import MadFuzzyRecallData
from experiments.tasks.mad_memory import MadCompressionData, MadCopyingData, MadMemorizationData
from experiments.tasks.mad_recall import MadRecallData, first_places
from experiments.tasks.pathfinder import PathfinderData
from experiments.train import train
from layers.common import rms_norm
from zoo import autoencoder, classifier, lm, trunk

TRUNK = {"width": 8, "depth": 1, "pattern": ("linear_attention",), "mlp": "none"}


def refuses(message, make, **fields):
    with pytest.raises(ValueError, match=message):
        make(**fields)


# ---- MAD


def test_mad_protocol_is_the_published_one():
    sizes = {task: len(mad.variations(task)) for task in mad.PROTOCOL}
    assert sizes == {
        "in_context_recall": 11,
        "noisy_recall": 14,
        "fuzzy_recall": 11,
        "memorization": 6,
        "compression": 11,
        "selective_copying": 13,
    }
    for task in mad.PROTOCOL:
        configs = mad.variations(task)
        baseline = configs.pop("baseline")
        assert baseline.eval_examples == 1_280
        for name, config in configs.items():
            field, value = name.split("=")
            assert str(getattr(config, field)) == value
            assert dataclasses.replace(config, **{field: getattr(baseline, field)}) == baseline
    noisy = mad.variations("noisy_recall")
    assert {c.keys for c in (noisy["baseline"], noisy["vocab_size=144"])} == {8, 64}
    assert mad.steps(noisy["baseline"]) == 20_000 and mad.steps(noisy["train_examples=800"]) == 1_400
    refuses("unknown MAD task 'recal'", mad.variations, task="recal")


def test_mad_score_is_a_mean_of_means_over_everything():
    results = {task: dict.fromkeys(mad.variations(task), 0.5) for task in mad.PROTOCOL}
    results["memorization"] = dict.fromkeys(results["memorization"], 1.0)
    assert mad.score(results) == pytest.approx((5 * 0.5 + 1.0) / 6)
    del results["compression"]["length=128"]
    refuses("MAD score: compression .* length=128", mad.score, results=results)


@pytest.mark.parametrize("make", [MadRecallData, MadFuzzyRecallData])
def test_mad_recall_trains_on_every_token_if_asked_and_is_examined_on_answers(make):
    few, every = (make(length=64, every_token=on, train_examples=50).build() for on in (False, True))
    a, b = few.batch(0, 0, 30), every.batch(0, 0, 30)
    np.testing.assert_array_equal(a["tokens"], b["tokens"])
    known = a["targets"] != IGNORED
    np.testing.assert_array_equal(a["targets"][known], b["targets"][known])
    for tokens, targets in zip(b["tokens"], b["targets"], strict=True):
        end = len(tokens) if make is MadRecallData else (tokens != 15).sum()
        np.testing.assert_array_equal(targets[: end - 1], tokens[1:end])
        assert (targets[end - 1 :] == IGNORED).all()
    for x, y in zip(few.eval_batches("test", 8), every.eval_batches("test", 8), strict=True):
        np.testing.assert_array_equal(x["targets"], y["targets"])


def test_mad_recall_noise():
    cfg = MadRecallData(vocab_size=32, noise_vocab=16, noise=0.8, length=64, train_examples=0)
    batch = cfg.build().batch(0, 0, 2_000)
    real = batch["tokens"][:, ::2] < cfg.keys
    assert real[:, -1].all() and real[:, :-1].any(1).all()  # always a pair, and one that asks
    np.testing.assert_array_equal(batch["tokens"][:, ::2] >= 16, batch["tokens"][:, 1::2] >= 16)
    # 31 pairs before the last, one of which stays, the others with probability 1/5.
    assert real[:, :-1].mean() == pytest.approx((1 + 30 * 0.2) / 31, abs=5 * (0.16 / 2_000 / 31) ** 0.5)
    assert (batch["targets"][:, -2] == batch["tokens"][:, -1]).all()


def test_mad_fuzzy_recall_sizes_of_keys():
    source = MadFuzzyRecallData(length=64, train_examples=200, eval_examples=100).build()

    def runs(batch):
        """How many tokens keys have, and values."""
        found = {True: set(), False: set()}
        for tokens in batch["tokens"]:
            is_key = [*(tokens < 7).tolist(), None]
            size = 0
            for token, (now, after) in zip(tokens, pairwise(is_key), strict=True):
                size += 1
                if now != after:
                    if token != 15:
                        found[now].add(size)
                    size = 0
        return found[True], found[False]

    assert runs(source.batch(0, 0, 100)) == ({1, 2, 3}, {1, 2, 3})
    assert runs(next(source.eval_batches("validation", 100))) == ({3}, {1, 2, 3})


def test_mad_memorization_shows_every_key_and_keeps_its_map():
    source = mad.variations("memorization")["vocab_size=8192"].build()
    keys = np.concatenate([source.batch(0, step, 128)["tokens"][:, ::2] for step in range(2)])
    assert len(np.unique(keys)) == 4095 == source.cfg.keys
    assert len(np.unique(source.values)) == 4095 and source.values.min() == 4095
    other = dataclasses.replace(source.cfg, data_seed=1).build()
    assert (other.values != source.values).mean() > 0.99


def test_mad_copying_puts_blanks_into_every_gap():
    cfg = MadCopyingData(length=64, copied=7, train_examples=0)
    tokens = cfg.build().batch(0, 0, 4_000)["tokens"]
    assert (tokens[:, 56] == 15).all() and (tokens[:, 57:] == 14).all()
    gaps = []
    for row in tokens[:, :56]:
        places = np.flatnonzero(row < 14)
        gaps.append(np.diff(places, prepend=-1, append=56) - 1)
    # 49 blanks fall into 8 gaps, binomially.
    expected, deviation = 49 / 8, (49 * 7 / 64 / 4_000) ** 0.5
    np.testing.assert_allclose(np.mean(gaps, 0), expected, atol=5 * deviation)
    np.testing.assert_allclose(np.var(gaps, 0), 49 * 7 / 64, rtol=0.15)


def test_mad_compression_scores_words_only():
    cfg = MadCompressionData(vocab_size=12, noise_vocab=4, noise=0.3, length=40, train_examples=0)
    source = cfg.build()
    batch = source.batch(0, 0, 500)
    noisy = batch["tokens"] >= cfg.words
    assert (batch["tokens"][:, -1] == 11).all() and (batch["tokens"][:, :-1] < 11).all()
    np.testing.assert_array_equal(batch["targets"] == IGNORED, noisy)
    assert noisy[:, :-1].mean() == pytest.approx(0.3, abs=5 * (0.21 / 500 / 39) ** 0.5)
    assert isinstance(source, LanguageSource) and source.kind == "reconstruction"


def test_first_places():
    ids = np.array([[3, 1, 3, 3, 1, 0], [5, 5, 5, 5, 5, 5]])
    np.testing.assert_array_equal(first_places(ids), [[0, 1, 0, 0, 1, 5], [0] * 6])


def test_mad_configs_refuse_what_does_not_fit_together():
    refuses("noise=0.5 needs noise tokens", MadRecallData, noise=0.5)
    refuses("vocab_size=16 with noise_vocab=13", MadRecallData, noise_vocab=13)
    refuses("length=33 must be even", MadRecallData, length=33)
    refuses("motif=4 must be at most 3", MadFuzzyRecallData, motif=4)
    refuses("length=11 must be at least 12", MadFuzzyRecallData, length=11)
    refuses("train_examples=7 of length=32 cannot show 127 keys", MadMemorizationData, train_examples=7)
    refuses("noise=0.1 needs noise tokens", MadCompressionData, noise=0.1)
    refuses("length=32 must be at least 33", MadCopyingData, length=32)


# ---- the autoencoder


def test_autoencoder_is_its_definition():
    cfg = autoencoder.Config(vocab_size=5, **TRUNK)
    params = autoencoder.init(jax.random.key(0), cfg)
    params = jax.tree.map(lambda p: p + 0.1 * np.sin(np.arange(p.size)).reshape(p.shape), params)
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 5)
    blocks = jax.jit(lambda params: trunk.apply(params["blocks"], cfg, params["w_embed"][tokens])[0])
    x = blocks(params)
    code = np.asarray(rms_norm(x[:, -1], params["norm_final"]))
    places, rates = np.arange(9), 10_000.0 ** (-np.arange(4) / 4)
    waves = np.concatenate([np.sin(np.outer(places, rates)), np.cos(np.outer(places, rates))], 1)

    def norm(h, scale):
        return h / np.sqrt(np.square(h).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)

    h = code[:, None] + waves
    for layer in params["decoder"]:
        z = norm(h, layer["norm"]) @ np.asarray(layer["w_in"]) + np.asarray(layer["bias"])
        h = 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    expected = norm(h, params["norm_head"]) @ np.asarray(params["w_head"]) + np.asarray(params["bias_head"])
    found = jax.jit(lambda params: autoencoder.apply(params, cfg, tokens)[0])(params)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert autoencoder.param_count(cfg) == sum(p.size for p in jax.tree.leaves(params))
    assert autoencoder.state_bytes(cfg) == lm.state_bytes(lm.Config(vocab_size=5, **TRUNK))
    decoder = 2 * 2 * 8**2 + 2 * 8 * 5
    assert autoencoder.flops_per_token(cfg, 9) == cfg.trunk_flops_per_token(9) + decoder


def test_autoencoder_learns_by_the_common_loop(float32):
    data = MadCompressionData(vocab_size=5, length=4, train_examples=0, eval_examples=64)
    model = autoencoder.Config(vocab_size=5, width=16, depth=1, pattern=("linear_attention",), remat=False)
    run = Run(model=model, data=data, optimizer=Optimizer(lr=1e-2), steps=150, log_every=50, loss_chunk=64)
    result = train(run, progress=False)
    assert result.rows[0]["loss"] == pytest.approx(math.log(5), abs=0.5)
    assert result.summary["loss"] < 1.0 and result.summary["accuracy"] > 0.5  # chance 1.39, 0.25


def test_models_refuse_data_of_another_kind():
    reals, words = classifier.Config(features=1, classes=2, **TRUNK), lm.Config(vocab_size=16, **TRUNK)
    packer = autoencoder.Config(vocab_size=16, **TRUNK)
    images = PathfinderData(size=16, dashes=2)
    for model, data in ((words, MadCompressionData()), (packer, MadRecallData()), (packer, images)):
        with pytest.raises(ValueError, match=r"data of kind '\w+' for a model of kind '\w+'"):
            train(Run(model=model, data=data), progress=False)
    with pytest.raises(ValueError, match="vocab_size=9, but the data have vocab_size=16"):
        train(Run(model=dataclasses.replace(packer, vocab_size=9), data=MadCompressionData()), progress=False)
    with pytest.raises(ValueError, match="no Config of zoo's lm, classifier or autoencoder"):
        train(Run(model=object(), data=images), progress=False)
    assert reals.features == images.build().features


# ---- ListOps


def test_list_ops_at_the_published_size():
    cfg = ListOpsData()
    batch = cfg.build().batch(0, 0, 60)
    lengths = (batch["tokens"] != PAD).sum(1)
    assert lengths.min() > 500 and lengths.max() < 2_000 and batch["tokens"].shape == (60, 2_000)
    np.testing.assert_array_equal(batch["positions"][:, 0], lengths - 1)
    np.testing.assert_array_equal(solve_list_ops(batch, cfg), batch["targets"])
    depth = np.cumsum(
        (batch["tokens"] // 10 == 1) * np.where(batch["tokens"] < CLOSE, 1, -1) * (batch["tokens"] < PAD), 1
    )
    assert depth.max() == 9  # operators; what is nested tenth are digits
    counts = np.bincount(batch["tokens"].ravel(), minlength=16)
    assert counts[10:14].sum() == counts[CLOSE]
    for kinds in (slice(0, 10), slice(10, 14)):  # all equally frequent
        np.testing.assert_allclose(counts[kinds] / counts[kinds].mean(), 1, atol=0.1)


def test_list_ops_arguments_and_nesting():
    cfg = ListOpsData(length=200, shortest=20, depth=4, arguments=3, eval_examples=50)
    assert (
        expression(np.array([13, 1, 10, 4, 5, CLOSE, CLOSE, PAD])) == "[SM 1 [MIN 4 5 ] ]"
        and len(TOKENS) == 16
    )
    found = set()
    for tokens in cfg.build().batch(0, 0, 400)["tokens"]:
        open_lists = []
        for token in tokens[tokens != PAD]:
            if token == CLOSE:
                found.add(open_lists.pop())
                continue
            if open_lists:
                open_lists[-1] += 1
            nested = len(open_lists) + 1
            assert nested <= 4 and (nested < 4 or token < 10) and (nested > 1 or token >= 10)
            if token >= 10:
                open_lists.append(0)
    assert found == {2, 3}
    refuses("length=100 must be at least 16, and twice shortest=51", ListOpsData, length=100, shortest=51)
    with pytest.raises(ValueError, match="shortest=30: hardly any expression of depth=2"):
        ListOpsData(length=60, shortest=30, depth=2, arguments=3).build().batch(0, 0, 2)


# ---- Pathfinder


@pytest.mark.parametrize(("cfg", "count"), [(PathfinderData(), 60), (PathfinderData.for_size(48), 6)])
def test_pathfinder_images(cfg, count):
    batch = cfg.build().batch(0, 0, count)
    np.testing.assert_array_equal(solve_pathfinder(batch, cfg), batch["targets"])
    images = batch["inputs"].reshape(-1, cfg.size, cfg.size)
    border = np.ones((cfg.size, cfg.size), bool)
    border[1:-1, 1:-1] = False
    assert not images[:, border].any()
    levels = np.unique(images)
    assert levels[-1] == 1 and ((levels > 0.75) & (levels < 1)).sum() <= 4  # the rim of discs
    # Two curves of 14 dashes of about 2 x 0.83 pixels, and something to distract.
    lit = images.sum((1, 2))
    least = 2 * cfg.dashes * 2 * 0.83 * 0.75
    assert (lit > 0.7 * least).all() and (lit < 3 * least).all()


def test_pathfinder_says_little_by_where_its_discs_lie():
    """No cut of their distance tells the classes apart."""
    batch = PathfinderData(distractors=0).build().batch(0, 0, 400)
    assert abs(batch["targets"].mean() - 0.5) < 5 * 0.5 / 400**0.5
    bright = [np.argwhere(x == 1) for x in batch["inputs"].reshape(-1, 32, 32)]
    spread = np.array([np.ptp(places, axis=0).max() for places in bright])
    right = [((spread < cut) == batch["targets"]).mean() for cut in range(33)]
    assert max(right) < 0.62 and min(right) > 0.38


def test_pathfinder_configs():
    assert PathfinderData.for_size(32) == PathfinderData()
    assert PathfinderData.for_size(64, eval_examples=5).dashes == 28
    refuses("dashes=22 must be at most 21 with size=32", PathfinderData, dashes=22)
    refuses("apart=6 must lie between 7 and 12", PathfinderData, apart=6)


# ---- biographies


def test_bios_pools_have_the_published_sizes_and_no_entry_begins_another():
    assert [len(pool) for pool in NAMES.values()] == [400, 400, 1000]
    assert [len(pool) for pool in ATTRIBUTES.values()] == [2, 12, 28, 200, 200, 300, 100, 263]
    assert round(BITS_PER_PERSON, 2) == 47.59
    for pool in POOLS.values():
        texts = sorted("".join(entry) for entry in pool)
        assert not any(after.startswith(text) for text, after in pairwise(texts))


@pytest.mark.parametrize("text", ["pieces", "bytes"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_bios_label_names_and_values_and_nothing_else(text, shuffled):
    cfg = BiosData(people=60, text=text, shuffled=shuffled)
    source = cfg.build()
    people = source._writer.people
    orders = set()
    name, value, every = (next(source.eval_batches(split, 60)) for split in ("name", "value", "validation"))
    for i in range(60):
        facts = {part: "".join(pool[people[part][i]]) for part, pool in POOLS.items()}
        labels = [source.read(b["targets"][i][b["targets"][i] != IGNORED]) for b in (name, value)]
        assert labels[0] == "".join(facts[part] for part in NAMES).strip()
        date = facts["month"] + facts["day"] + facts["year"]
        told = {k: facts[k] for k in ("pronoun", "city", "university", "major", "employer")} | {"date": date}
        rest, order = " " + labels[1], []
        while rest:  # some order of all of them
            found = max(
                (k for k in told if k not in order and rest.startswith(told[k])), key=lambda k: len(told[k])
            )
            rest, order = rest[len(told[found]) :], [*order, found]
        assert len(order) == 6 and order.index("pronoun") == 1
        orders.add(tuple(order))
        whole = source.read(every["tokens"][i])
        assert (
            whole.startswith(labels[0])
            and whole.endswith(".")
            and all(x in f" {whole}" for x in told.values())
        )
        assert whole.split().count(facts["pronoun"].strip()) == 4
        tokens, targets = every["tokens"][i], every["targets"][i]
        size = (targets != IGNORED).sum()
        np.testing.assert_array_equal(targets[:size], tokens[1 : size + 1])
        assert (
            tokens[0] == tokens[size] == source._writer.end and (tokens[1:size] != source._writer.end).all()
        )
    assert (len(orders) > 20) == shuffled


def test_bios_show_everybody_once_an_epoch_in_ever_new_words():
    cfg = BiosData(people=40)
    source, names = cfg.build(), {}
    for step in range(20):
        for row in source.batch(3, step, 10)["tokens"]:
            words = source.read(row).split()
            names.setdefault(" ".join(words[:3]), []).append(" ".join(words[3:]))
    assert len(names) == 40 and {len(texts) for texts in names.values()} == {5}
    assert source.exposures(20, 10) == 5
    assert np.mean([len(set(texts)) for texts in names.values()]) > 4.9
    again = cfg.build().batch(3, 7, 10)
    np.testing.assert_array_equal(source.batch(3, 7, 10)["tokens"], again["tokens"])
    assert (source.batch(4, 7, 10)["tokens"] != again["tokens"]).any()
    one = BiosData(people=40, variants=1).build()
    a, b = (
        {source.read(row) for step in steps for row in one.batch(0, step, 10)["tokens"]}
        for steps in (range(4), range(4, 8))
    )
    assert a == b and len(a) == 40


def test_bios_capacity_counts_bits_that_are_known():
    people, params = 1_000, 20_000
    names, values = math.log(1.6e8), BITS_PER_PERSON * math.log(2)
    assert bits_per_parameter(people, names, values, params) == pytest.approx(0, abs=1e-9)
    perfect = bits_per_parameter(people, math.log(people), 0.0, params)
    assert perfect == pytest.approx(people * (math.log2(1.6e8 / people) + BITS_PER_PERSON) / params)
    # Someone who knows attributes only halfway: half of their bits, whatever the sign in print.
    half = bits_per_parameter(people, names, values / 2, params)
    assert half == pytest.approx(people * BITS_PER_PERSON / 2 / params)
    assert (
        bits_per_parameter(people, names, 0.0, params)
        > half
        > bits_per_parameter(people, names + 1, values, params)
    )


def test_bios_capacity_of_a_model(float32):
    data = BiosData(people=24)
    source = data.build()
    model = lm.Config(vocab_size=source.vocab_size, **TRUNK)
    run = Run(model=model, data=data, batch_size=16)
    params = jax.tree.map(jnp.zeros_like, lm.init(jax.random.key(0), model))  # every token equally likely
    name, value = (evaluate(run, params, source, split) for split in ("name", "value"))
    count = sum((b["targets"] != IGNORED).sum() for b in source.eval_batches("value", 24))
    nats = math.log(source.vocab_size) * (6 + count / 24)
    assert name["tokens"] == 24 * 6 and value["tokens"] == count
    expected = 24 * (math.log2(1.6e8) + BITS_PER_PERSON - nats / math.log(2)) / 1_000
    assert source.capacity(name, value, 1_000) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="split 'name' has 144 labelled tokens, not 96: evaluate it all"):
        source.capacity(name | {"tokens": 96}, value, 1_000)


def test_bios_configs_and_words():
    assert isinstance(BiosData().build(), LanguageSource)
    text = BiosData().build().describe()
    assert "47.59 bits a person" in text and "\n" not in text
    refuses("variants=5 must be at most 4", BiosData, variants=5)
    refuses("text='words'; choose from pieces, bytes", BiosData, text="words")
    refuses("people=2000000 must be at most 1,600,000", BiosData, people=2_000_000)
    source = BiosData(people=2_000, data_seed=4).build()
    drawn = source._writer.people
    assert len({tuple(drawn[part][i] for part in NAMES) for i in range(2_000)}) == 2_000
    counts = np.bincount(drawn["month"], minlength=12)
    np.testing.assert_allclose(counts / 2_000, 1 / 12, atol=5 * (1 / 12 * 11 / 12 / 2_000) ** 0.5)
    assert random_words(1, Stream.TASK, 4)[0] != random_words(1, Stream.TASK, 5)[0]
