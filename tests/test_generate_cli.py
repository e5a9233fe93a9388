"""`zoo generate` and `zoo state`, as a person types them."""

import pathlib

import pytest
from test_cli import refused, tiny, trained  # noqa: F401 (fixtures)

from experiments import cli
from zoo import states

PROMPT = "the quick"


def said(capsys, *arguments):
    """What a command that works prints."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.fixture
def text(trained, capsys):  # noqa: F811
    """`zoo generate` with a prompt and options, without the new line at the end."""

    def run(*options, tokens=12):
        found = said(capsys, "generate", trained, f"--tokens={tokens}", *options)
        assert found.endswith("\n")
        return found[:-1]

    return run


@pytest.mark.timeout(900)  # a program for every kind of sampling
def test_texts_settings_and_stops(text, trained, tmp_path, capsys):  # noqa: F811
    """One after another, since training is what takes the time."""
    whole = text("--prompt", PROMPT)
    assert whole.startswith(PROMPT) and len(whole) == len(PROMPT) + 12
    assert text("--prompt", PROMPT) == whole != text("--prompt", PROMPT, "--seed=1")
    assert text("--prompt", PROMPT, "--piece=4") == whole
    # Two prompts: each as it is alone, but for the second row's own draws.
    both = text("--prompt", PROMPT, "--prompt", "a").split("\n---\n")
    assert both[0] == whole and both[1].startswith("a") and len(both[1]) == 13
    # Settings reach the sampler: the likeliest token alone is what greedy takes.
    greedy = text("--prompt", PROMPT, "--temperature=0")
    for only in ("--top-k=1", "--top-p=1e-9", "--min-p=1"):
        assert text("--prompt", PROMPT, only) == greedy
    assert text("--prompt", PROMPT, "--temperature=0", "--repetition-penalty=50") != greedy
    stop = whole[len(PROMPT) + 4 : len(PROMPT) + 6]
    assert text("--prompt", PROMPT, "--stop", stop) == PROMPT + whole[len(PROMPT) :].split(stop)[0]
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert text("--prompt-file", str(tmp_path / "prompt.txt")) == whole[len(PROMPT) :]
    _states(text, trained, tmp_path, capsys, whole)
    _mistakes(trained, tmp_path, capsys)


def _states(text, trained, tmp_path, capsys, whole):  # noqa: F811
    """Saved after the prompt, after five tokens, forked, shown; and going on is not stopping."""
    read, five = str(tmp_path / "read.state"), str(tmp_path / "five.state")
    shown = said(capsys, "state", "save", trained, "--prompt", PROMPT, "-o", read, "--note", "a fox")
    assert shown == f"{read}: 1 text, 9 tokens\n"
    assert text("--state", read) == whole[len(PROMPT) :]
    first = text("--prompt", PROMPT, "--save-state", five, tokens=5)
    assert first + text("--state", five, tokens=7) == whole
    assert said(capsys, "state", "load", trained, five, "--tokens=7") == whole[len(first) :] + "\n"
    assert text("--state", read, "--prompt", " brown") == text("--prompt", PROMPT + " brown")[len(PROMPT) :]
    forks = text("--state", read, "--prompt", " brown", "--prompt", " red").split("\n---\n")
    assert forks[0] == text("--state", read, "--prompt", " brown") and forks[1].startswith(" red")
    about = said(capsys, "state", "show", read, trained)
    for part in (
        "intact",
        "1 text, 9 tokens",
        "gated_linear_attention",
        "a fox",
        "this state is of its model",
    ):
        assert part in about
    before = pathlib.Path(read).read_bytes()
    line = refused(capsys, "state", "save", trained, "--prompt", "a", "-o", read)
    assert "exists already" in line and pathlib.Path(read).read_bytes() == before
    more = ["--state", read, "--prompt", " brown", "-o", read, "--overwrite"]
    assert "15 tokens" in said(capsys, "state", "save", trained, *more)


def _mistakes(trained, tmp_path, capsys):  # noqa: F811
    read, damaged = tmp_path / "read.state", tmp_path / "damaged.state"
    damaged.write_bytes(read.read_bytes()[:-1] + b"\xff")
    (tmp_path / "other").write_text("no state")
    prompt = ["generate", trained, "--prompt", "a"]
    for arguments, message in (
        (["generate", trained], "no prompt: give --prompt"),
        ([*prompt, "--prompt-file", "b"], "exclude each other"),
        (["generate", trained, "--prompt-file", "nowhere.txt"], "nowhere.txt: no such file"),
        ([*prompt, "--tokens=0"], "steps=0"),
        ([*prompt, "--top-p=2"], "top_p=2.0 must be in (0, 1]"),
        ([*prompt, "--min-p=-1"], "min_p=-1.0"),
        ([*prompt, "--temperature=-1"], "temperature=-1.0"),
        ([*prompt, "--temperature=nan"], "temperature=nan"),
        ([*prompt, "--repetition-penalty=0"], "repetition_penalty=0.0"),
        ([*prompt, "--top-k=0"], "top_k=0"),
        ([*prompt, "--stop="], "a stop string must be text"),
        ([*prompt, "--stop-token=9999"], "stop token [9999] is outside"),
        ([*prompt, "--piece=0"], "piece=0"),
        ([*prompt, "--state", "nowhere"], "no state at nowhere"),
        ([*prompt, "--state", str(damaged)], "is damaged"),
        ([*prompt, "--save-state", str(read)], "exists already"),
        (["state", "show", str(tmp_path / "other")], "is damaged or is no state"),
        (["state", "save", trained, "--state", str(read), "-o", "new"], "no prompt"),
    ):
        assert message in refused(capsys, *arguments), arguments


def test_a_state_of_another_run_is_refused(tiny, trained, tmp_path, capsys):  # noqa: F811
    config, _ = tiny
    other, kept = str(tmp_path / "other"), str(tmp_path / "a.state")
    assert cli.main(["train", config, "--out", other, "--seed=1"]) == 0
    said(capsys, "state", "save", other, "--prompt", PROMPT, "-o", kept)
    line = refused(capsys, "generate", trained, "--state", kept)
    assert "another model: the config is the same, the parameters are not" in line
    assert states.read_about(kept).tokens == [9]
