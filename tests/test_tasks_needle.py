"""Needles in haystacks: where they stand, what surrounds them, what is refused."""

import re

import numpy as np
import pytest
from solvers_needle import PATTERNS

from experiments.tasks.needle import FORMS, NeedleData, stratified
from experiments.tasks.prose import NOISE, prose

SIZES = {kind: 420 if kind == "niah3" else 320 for kind in FORMS}


def text_of(batch, row):
    """The row, the answer included."""
    known = batch["targets"][row] >= 0
    return bytes([*batch["tokens"][row].tolist(), int(batch["targets"][row][known][-1])]).decode()


@pytest.mark.parametrize("kind", FORMS)
def test_a_row_is_filled_and_ends_with_its_answer(kind):
    source = NeedleData(kind=kind, length=SIZES[kind]).build()
    batch = source.batch(0, 0, 40)
    for row in range(40):
        text = text_of(batch, row)
        known = batch["targets"][row] >= 0
        answer = bytes(batch["targets"][row][known].tolist()).decode()
        assert len(text) == SIZES[kind] + 1 and text.endswith(answer) and "  " not in text
        assert (batch["positions"][row][known] == SIZES[kind] - len(answer) + np.arange(len(answer))).all()
        assert re.findall(r"\d", answer) and answer.strip(".") in text[: -len(answer)]
        haystack = prose() if FORMS[kind].prose else NOISE * 9
        start = text.index("\n") + 1
        assert text[start : start + 8] in haystack or text[start:].startswith(
            ("The secret ", "The pass key ")
        )
    assert source.tokenizer.decode(batch["tokens"][0]) == text_of(batch, 0)[:-1]


def test_depth_is_where_the_needle_stands():
    cfg = NeedleData(kind="niah2", length=4_000)
    grid, longest = stratified(cfg, 4), max(map(len, prose().split(". "))) + 2
    assert [c.depth for c in grid] == [0.125, 0.375, 0.625, 0.875]
    for each in (
        *grid,
        NeedleData(kind="niah2", length=4_000, depth=0),
        NeedleData(kind="niah2", length=4_000, depth=1),
    ):
        batch = each.build().batch(0, 0, 5)
        for row in range(5):
            text = text_of(batch, row)
            first, last = text.index("\n") + 1, text.rindex("\n")
            found = re.search(PATTERNS["niah2"].format(key=r"\w+"), text)
            room = last - first - len(found[0])
            assert abs(found.start() - first - each.depth * room) <= longest
    anywhere = cfg.build().batch(0, 0, 200)
    places = [re.search(r"The secret number of \w+ is", text_of(anywhere, row)).start() for row in range(200)]
    assert min(places) < 400 and max(places) > 3_500 and 1_700 < np.mean(places) < 2_200


def test_the_needle_stands_between_sentences():
    batch = NeedleData(kind="passkey5", length=600).build().batch(0, 0, 50)
    for row in range(50):
        before, after = re.split(
            r"The pass key is \d{5}\. Keep it in mind, \d{5} is the pass key\. ", text_of(batch, row)
        )
        assert before.endswith(("\n", ". ")) and after.startswith(
            ("The ", "On ", "Round ", "\n", "T", "O", "R")
        )


def test_no_answer_is_in_two_splits():
    source = NeedleData(kind="passkey", length=250, eval_examples=500).build()

    def answers(batches):
        return {tuple(row[row >= 0].tolist()) for batch in batches for row in batch["targets"]} - {()}

    train = answers(source.batch(0, step, 500) for step in range(6))
    validation, test = (answers(source.eval_batches(split, 500)) for split in source.splits)
    assert len(train) > 2_500 and len(validation) > 450 and len(test) > 450
    assert not train & validation and not train & test and not validation & test


def test_prose_may_come_from_a_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Sentence number one is here. And é another!\nA third one? " * 3, encoding="utf-8")
    source = NeedleData(kind="niah3", length=2_000, path=str(path)).build()
    batch = source.batch(0, 0, 20)
    for row in range(20):
        text = bytes(batch["tokens"][row].tolist()).decode(errors="replace")
        assert "Sentence number one is here. And é another!\nA third one? Sentence" in text
        before = text[: re.search(r"The secret code of \w+ is", text).start()]
        assert before.endswith((". ", "\n", "? "))
    assert source.fingerprint != NeedleData(kind="niah3", length=2_000).build().fingerprint
    path.write_text("Other words. ")
    assert source.fingerprint != NeedleData(kind="niah3", length=2_000, path=str(path)).build().fingerprint
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        NeedleData(kind="niah2", path=str(tmp_path / "none.txt")).build()


@pytest.mark.parametrize("kind", FORMS)
def test_the_shortest_row_has_no_haystack_to_speak_of(kind):
    with pytest.raises(ValueError, match=r"^NeedleData: length=10 must be at least \d+$") as error:
        NeedleData(kind=kind, length=10)
    least = int(str(error.value).split()[-1])
    batch = NeedleData(kind=kind, length=least).build().batch(0, 0, 20)
    assert batch["tokens"].shape == (20, least)
    assert NeedleData(kind=kind, length=65_536).build().batch(0, 0, 1)["tokens"].shape == (1, 65_536)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hay"}, "kind='hay'; choose from passkey, passkey5, niah1, niah2, niah3"),
        ({"depth": 1.5}, r"depth=1.5 must lie in \[0, 1\], or be None"),
        ({"depth": float("nan")}, r"depth=nan must lie in \[0, 1\], or be None"),
        ({"path": "book.txt"}, "path: passkey5 is hidden in noise"),
        ({"eval_examples": 0}, "eval_examples=0 must be at least 1"),
    ],
)
def test_needles_refuse_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=f"^NeedleData: {message}$"):
        NeedleData(**change)
