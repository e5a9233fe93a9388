"""Batches on their way: the same whoever makes them, how far ahead, and however many processes share them."""

import threading
import time

import numpy as np
import pytest
from task_rows import ROWS

from experiments import faults, feed
from experiments.feed import Feed, local_rows
from zoo import autoencoder, classifier, lm

SIZE, UNTIL = 12, 9


class Numbered:
    """Batch i holds i; odd ones take longer, and each says which thread made it."""

    def __init__(self, broken=-1):
        self.made, self.threads, self.broken = [], set(), broken

    def batch(self, seed, step, size):
        self.made.append(step)
        self.threads.add(threading.current_thread().name)
        time.sleep(0.02 * (step % 2))
        if step == self.broken:
            raise ValueError(f"no batch {step}")
        return {"targets": np.arange(size) + 1000 * step + seed}


def read(source, steps=range(UNTIL), seed=5, **how):
    with Feed(source, seed, SIZE, until=UNTIL, **how) as batches:
        return [batches(step) for step in steps]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(("ahead", "threads"), [(0, 1), (1, 1), (3, 1), (4, 3), (50, 8)])
def test_batches_do_not_depend_on_who_makes_them(ahead, threads):
    source = Numbered()
    wanted = [Numbered().batch(5, step, SIZE) for step in range(UNTIL)]
    for got, expected in zip(read(source, ahead=ahead, threads=threads), wanted, strict=True):
        assert_equal(got, expected)
    assert sorted(source.made) == list(range(UNTIL))  # each once, none beyond the end
    assert ("MainThread" in source.threads) == (ahead == 0) and len(source.threads) <= threads


def test_the_next_batches_are_made_while_one_is_used():
    source = Numbered()
    with Feed(source, 0, SIZE, until=UNTIL, ahead=3) as batches:
        batches(0)
        until = time.monotonic() + 10
        while len(source.made) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        assert source.made == [0, 1, 2, 3]
    assert not any(thread.name.startswith("feed") for thread in threading.enumerate())


def test_steps_in_any_order():
    source = Numbered()
    for step, got in zip((4, 5, 1, 8, 0), read(source, (4, 5, 1, 8, 0), ahead=2), strict=True):
        assert_equal(got, Numbered().batch(5, step, SIZE))


def test_what_a_source_raises_comes_with_its_step():
    with Feed(Numbered(broken=2), 0, SIZE, until=UNTIL, ahead=4) as batches:
        batches(0)
        batches(1)
        with pytest.raises(ValueError, match="no batch 2"):
            batches(2)


@pytest.mark.parametrize("name", ROWS)
def test_processes_share_one_batch(name):
    """Of a source each: their rows, one after the other, are the batch of a single process."""
    cfg = ROWS[name][0]
    sources = [cfg.build() for _ in range(4)]
    whole = cfg.build().batch(1, 3, SIZE)
    for hosts in (1, 2, 3, 4):
        parts = [
            read(sources[host], [3], seed=1, ahead=host, host=host, hosts=hosts)[0] for host in range(hosts)
        ]
        assert_equal({n: np.concatenate([part[n] for part in parts]) for n in whole}, whole)


def test_shares_are_whole():
    batch = {"targets": np.zeros((6, 3))}
    with pytest.raises(ValueError, match="a batch of 6 rows cannot be shared by 4 processes"):
        local_rows(batch, 0, 4)
    with pytest.raises(ValueError, match=r"host=2 must lie in \[0, 2\)"):
        feed.local_rows(batch, 2, 2)


# --- batches that cannot be trained on ------------------------------------------------------------------

LANGUAGE = lm.Config(vocab_size=7, width=8, depth=1)
PICTURES = classifier.Config(features=2, classes=3, width=8, depth=1)
TEXTS = autoencoder.Config(vocab_size=7, width=8, depth=1)


def language():
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 7, (3, 5), np.int32) for name in ("tokens", "targets")}


def positioned():
    return language() | {"positions": np.array([[0], [4], [2]], np.int32), "targets": np.array([[6]] * 3)}


def classes():
    return {"inputs": np.zeros((3, 4, 2), np.float32), "targets": np.array([0, 2, -1], np.int32)}


@pytest.mark.parametrize(
    ("model", "make", "name", "place", "value", "said"),
    [
        (LANGUAGE, language, "tokens", (1, 2), 7, "tokens[1, 2] = 7 is outside [0, 7)"),
        (LANGUAGE, language, "tokens", (2, 4), -1, "tokens[2, 4] = -1 is outside [0, 7)"),
        (LANGUAGE, language, "tokens", (0, 0), 2**31 - 1, "tokens[0, 0] = 2147483647 is outside [0, 7)"),
        (LANGUAGE, language, "targets", (0, 3), 7, "targets[0, 3] = 7 is not below 7"),
        (LANGUAGE, positioned, "positions", (1, 0), 5, "positions[1, 0] = 5 is outside [0, 5)"),
        (LANGUAGE, positioned, "targets", (1, 0), 9, "targets[1, 0] = 9 is not below 7"),
        (TEXTS, language, "tokens", (1, 2), 9, "tokens[1, 2] = 9 is outside [0, 7)"),
        (PICTURES, classes, "inputs", (2, 3, 1), np.nan, "inputs[2, 3, 1] = nan is not finite"),
        (PICTURES, classes, "inputs", (0, 0, 0), -np.inf, "inputs[0, 0, 0] = -inf is not finite"),
        (PICTURES, classes, "targets", (1,), 3, "targets[1] = 3 is not below 3"),
    ],
)
def test_faults_are_seen_on_device_and_host(model, make, name, place, value, said):
    batch = make()
    assert faults.fault(model, batch) is None and bool(faults.sound(model, batch))
    batch[name][place] = value
    assert faults.fault(model, batch) == said
    assert not faults.sound(model, batch)


def test_negative_targets_are_none_at_all():
    batch = language()
    batch["targets"][:] = -7
    assert faults.fault(LANGUAGE, batch) is None and bool(faults.sound(LANGUAGE, batch))
