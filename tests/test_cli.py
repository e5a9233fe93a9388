"""The command line: what a person types, and the one line they get back when it is wrong."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments import cli, overrides
from experiments.compare import Comparison
from experiments.config import Run
from experiments.sweep import Sweep

TINY = ["--steps=4", "--log-every=2", "--eval-batches=1"]


@pytest.fixture
def tiny(tmp_path):
    """A config file of one small run on text, and its directory."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    config = tmp_path / "tiny.py"
    config.write_text(
        f'''"""A tiny run."""
from experiments.config import Run
from experiments.sweep import Sweep
from experiments.text import TextData
from zoo import lm

config = Run(
    model=lm.Config(vocab_size=64, width=8, depth=1, pattern=("gla",)),
    data=TextData(path={str(text)!r}, tokenizer="char", length=16),
    steps=4, batch_size=2, log_every=2, eval_batches=1,
)
'''
    )
    return str(config), str(tmp_path / "run")


@pytest.fixture
def trained(tiny, float32):
    config, out = tiny
    assert cli.main(["train", config, "--out", out]) == 0
    return out


def refused(capsys, *arguments):
    """Run a command that must fail, and return its one line."""
    assert cli.main(list(arguments)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("zoo: ")
    return line


def test_train_eval_generate(trained, capsys):
    assert cli.main(["eval", trained]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert cli.main(["generate", trained, "--prompt", "the q", "--tokens", "5"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the q")
    assert len(text) == len("the q") + 5 + len("\n")


def test_compare_writes_report_tables_and_names(tmp_path, capsys, float32):
    out = tmp_path / "compared"
    config = tmp_path / "two.py"
    config.write_text(
        '''"""Two runs."""
from experiments.compare import Comparison
from experiments.configs.quickstart import config as quickstart

config = Comparison(title="two of them", runs=quickstart.runs[:1] + quickstart.runs[3:4])
'''
    )
    command = ["compare", str(config), "--out", str(out), "--workers=0", *TINY]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    rows = (out / "results.csv").read_text().splitlines()
    assert len(rows) == 3
    for row in rows[1:]:
        label = row.split(",")[0]
        assert label in shown
        assert (out / label / "summary.json").exists()
    assert "<svg" in (out / "report.html").read_text()
    # A second time nothing is trained or measured again: the rows, timings included, are the same.
    assert cli.main(command) == 0
    assert (out / "results.csv").read_text().splitlines() == rows


def test_list_names_every_layer_and_config(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in ("titans", "mamba", "s4d", "mixture_of_memories", "NeedleData", "quickstart", "shakespeare"):
        assert name in shown


@pytest.mark.parametrize("name", overrides.config_names())
def test_shipped_configs_load_and_say_how_they_are_run(name, capsys):
    config, doc = overrides.load(name)
    verb = {Comparison: "compare", Sweep: "sweep"}.get(type(config), "train")
    assert f"zoo {verb} {name}" in doc
    assert cli.main([verb, name, "--show"]) == 0
    assert "--optimizer.lr=" in capsys.readouterr().out


def test_overrides_reach_nested_fields_and_every_run():
    run = overrides.override(overrides.load("text")[0], {"optimizer.lr": "0.5", "model.pattern": "s4d,mamba"})
    assert run.optimizer.lr == 0.5
    assert run.model.pattern == ("s4d", "mamba")
    assert overrides.parse(["--a.b=1", "--c-d", "2"]) == {"a.b": "1", "c_d": "2"}
    comparison = overrides.load("quickstart")[0].override({"steps": "7", "optimizer.clip_norm": "none"})
    assert {(run.steps, run.optimizer.clip_norm) for _, run in comparison.runs} == {(7, None)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quikstart"], "unknown config 'quikstart' (did you mean 'quickstart'?)"),
        (["train", "nowhere.py"], "no config file 'nowhere.py'"),
        (["train", "quickstart"], "use `zoo compare quickstart`"),
        (["sweep", "quickstart"], "use `zoo compare quickstart`"),
        (["compare", "quickstart", "--workers=-1"], "workers=-1 must be >= 0"),
        (["compare", "quickstart", "--seeds=0,0"], "seeds=(0, 0) must be different"),
        (["compare", "quickstart", "--seeds=zero"], "--seeds=zero"),
        (["compare", "text"], "use `zoo train text`"),
        (["train", "text", "--stepz=3"], "unknown field 'stepz' of Run (did you mean 'steps'?)"),
        (["train", "text", "--lr=3"], "did you mean 'optimizer.lr'?"),
        (["train", "text", "--steps=many"], "--steps=many"),
        (["train", "text", "--steps"], "--steps has no value"),
        (["train", "text", "--steps=0"], "steps=0"),
        (["train", "text", "--model=3"], "set one of its fields"),
        (["train", "text", "--model.pattern=mambo"], "unknown layer 'mambo' (did you mean 'mamba'?)"),
        (["train", "text", "--model.width=130"], "does not divide width=130"),
        (["train", "text", "--model.vocab_size=100"], "vocab_size=100"),
        (["train", "text", "--data.path=missing.txt"], "missing.txt"),
        (["train", "text", "oops"], "unexpected 'oops'"),
        (["fit", "nothing.csv"], "nothing.csv: no such file or directory"),
        (["eval", "nowhere"], "nowhere is not the directory of a run"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere is not the directory of a run"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys, tmp_path, monkeypatch, float32):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_directory_of_another_run_is_left_alone(tiny, trained, capsys):
    def contents():
        return {p: p.read_bytes() for p in pathlib.Path(trained).rglob("*") if p.is_file()}

    before = contents()
    config, out = tiny
    line = refused(capsys, "train", config, "--out", out, "--optimizer.lr=0.5")
    assert "belongs to another run" in line
    assert "optimizer.lr" in line
    assert contents() == before


def test_a_prompt_outside_the_vocabulary(trained, capsys):
    assert "prompt" in refused(capsys, "generate", trained, "--prompt", "")
    assert "Q" in refused(capsys, "generate", trained, "--prompt", "Q!")


def test_exit_status_reaches_the_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", "train", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("zoo: unknown config 'nothing'")


def test_a_finished_run_says_the_same_again(tiny, trained, capsys):
    config, out = tiny
    capsys.readouterr()
    with open(f"{out}/summary.json") as stream:
        summary = json.load(stream)
    assert cli.main(["train", config, "--out", out]) == 0
    assert f"{summary['loss']:,.4f}" in capsys.readouterr().out
    assert isinstance(overrides.load(config)[0], Run)
