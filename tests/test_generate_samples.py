"""Samples of a run in training: seen, kept, and without a trace in what is trained."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import cli, config
from experiments.config import Run
from experiments.directory import read_tokenizer
from experiments.samples import Samples
from experiments.tasks.induction import InductionData
from experiments.text import TextData
from experiments.train import train
from zoo import checkpoint, lm
from zoo.generation import generate


@pytest.fixture
def run(tmp_path, float32):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return Run(
        model=lm.Config(vocab_size=64, width=8, depth=1, pattern=("gla",)),
        data=TextData(path=str(text), tokenizer="char", length=16),
        steps=4,
        batch_size=2,
        log_every=1,
        eval_every=2,
        eval_batches=1,
    )


SAMPLES = Samples(("the ", "q"), tokens=5)


def rows(directory):
    """Of the metrics, without what depends on the machine."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


def kept(directory):
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def test_a_run_with_samples_is_the_run_without_bit_for_bit(run, tmp_path, capsys):
    plain, seen = tmp_path / "plain", tmp_path / "seen"
    a = train(run, plain, progress=False)
    b = train(run, seen, samples=SAMPLES)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert rows(plain) == rows(seen)
    assert (plain / "config.json").read_bytes() == (seen / "config.json").read_bytes()
    assert not (plain / "samples.jsonl").exists()
    # At both evaluations, both prompts; the last ones are what the trained model says.
    found = kept(seen)
    assert [(row["step"], row["prompt"]) for row in found] == [(2, "the "), (2, "q"), (4, "the "), (4, "q")]
    expected = generate(
        checkpoint.load_params(seen), run.model, list(SAMPLES.prompts), 5,
        tokenizer=read_tokenizer(seen), key=jax.random.key(0), temperature=0.8,
    )  # fmt: skip
    assert [row["text"] for row in found[2:]] == expected
    assert repr(found[3]["text"]) in capsys.readouterr().out


def test_a_run_that_goes_on_has_every_sample_once(run, tmp_path):
    train(run, tmp_path / "run", progress=False, samples=SAMPLES, until=3)
    (tmp_path / "run" / "samples.jsonl").open("a").write('{"step": 4, "prompt": "x", "text": "y"}\n{"ste')
    train(run, tmp_path / "run", progress=False, samples=SAMPLES)
    assert [row["step"] for row in kept(tmp_path / "run")] == [2, 2, 4, 4]


def test_they_are_no_part_of_a_run():
    assert not {"samples", "sample"} & {field.name for field in dataclasses.fields(Run)}


def test_on_the_command_line(run, tmp_path, capsys):
    file = tmp_path / "tiny.py"
    file.write_text(
        f'"""Tiny."""\nfrom experiments import config\nconfig = config.from_dict({config.to_dict(run)!r})\n'
    )
    out = tmp_path / "run"
    assert cli.main(["train", str(file), "--out", str(out), "--sample", "the ", "--sample-tokens=3"]) == 0
    assert "'the ' -> " in capsys.readouterr().out
    assert [len(row["text"]) for row in kept(out)] == [3, 3]
    assert cli.main(["train", str(file), "--out", str(tmp_path / "no"), "--sample", "Q"]) == 2
    assert "'Q' at character 0 is not in the vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ()}, "no prompt is given"),
        ({"prompts": ("a",), "tokens": 0}, "tokens=0"),
        ({"prompts": ("a",), "temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_what_means_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"samples: {message}"):
        Samples(**settings)


def test_only_models_of_text_write(run, tmp_path):
    task = dataclasses.replace(run, data=InductionData(), model=lm.Config(vocab_size=10_000, width=8))
    with pytest.raises(ValueError, match="only a language model that is trained on text"):
        train(task, tmp_path / "run", samples=SAMPLES)
    with pytest.raises(ValueError, match="a prompt is empty"):
        train(run, tmp_path / "run", samples=Samples(("",)))
    assert not list(tmp_path.rglob("*.jsonl"))
