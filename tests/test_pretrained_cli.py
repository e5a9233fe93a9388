"""`zoo import` and `zoo export`: a checkpoint becomes a run directory, with its tokenizer, and goes back."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file
from test_pretrained import FOLDERS

from experiments import cli
from experiments.directory import read_config, read_tokenizer
from zoo import checkpoint
from zoo.pretrained import load_pretrained

MINIMAX = next(f for f in FOLDERS if f.name == "pretrained_minimax")
TEXT = "a b a c"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """`(checkpoint, run directory)` of MiniMax, whose files hold more than weights, and a tokenizer."""
    home = tmp_path_factory.mktemp("imported")
    shutil.copytree(MINIMAX, home / "theirs")
    words = {word: number for number, word in enumerate(["[UNK]", "<eos>", *"abcdefgh"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(home / "theirs" / "tokenizer.json"))
    (home / "theirs" / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert cli.main(["import", str(home / "theirs"), "--out", str(home / "run")]) == 0
    return home / "theirs", home / "run"


def test_a_run_directory_as_any_other(imported, capsys):
    theirs, run = imported
    cfg, params = load_pretrained(theirs)
    assert read_config(run)[0].model == cfg
    np.testing.assert_array_equal(checkpoint.load_params(run)["w_embed"], params["w_embed"])
    again, loaded = load_pretrained(run)
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert cli.main(["generate", str(run), "--prompt", TEXT, "--tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith(TEXT)


def test_the_tokenizer_comes_along(imported):
    theirs, run = imported
    ours = read_tokenizer(run)
    original = tokenizers.Tokenizer.from_file(str(theirs / "tokenizer.json"))
    assert ours.encode(TEXT).tolist() == original.encode(TEXT).ids == [2, 3, 2, 4]
    assert ours.separator == 1 and ours.decode([2, 3, 1]) == original.decode([2, 3])


def test_export_is_what_was_imported(imported, tmp_path, capsys):
    theirs, run = imported
    assert cli.main(["export", str(run), "--out", str(tmp_path / "back")]) == 0
    ours, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", theirs))
    assert ours.keys() == original.keys()
    assert all(ours[k].tobytes() == original[k].tobytes() for k in original)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((theirs / name).read_text())


def test_nothing_is_overwritten_and_errors_are_one_line(imported, tmp_path, capsys):
    theirs, run = imported
    assert cli.main(["import", str(theirs), "--out", str(run)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"zoo: {tmp_path} holds no config.json\n"
    assert cli.main(["export", str(theirs), "--out", str(tmp_path / "x")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
