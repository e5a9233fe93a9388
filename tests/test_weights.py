"""Training on from weights: of a checkpoint or a run, whole or in part frozen, and the ways back."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from test_pretrained import FOLDERS
from test_training import assert_bits, bare, contents, quiet

from experiments import cli, frozen, overrides, step, weights
from experiments.config import Run
from experiments.directory import OtherRunError, read_config, read_tokenizer
from experiments.text import TextData
from experiments.weights import FromWeights
from zoo import checkpoint, lm, pretrained

WORDS = ["lo", "and", "behold", "the", "state", "of", "a", "zoo", "goes", "on", "as", "if", "never", "away"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A text, and a checkpoint of Mamba, random and small, with a tokenizer of its words."""
    home = tmp_path_factory.mktemp("weights")
    order = np.random.default_rng(0).integers(0, len(WORDS), 3000)
    (home / "text.txt").write_text(" ".join(WORDS[i] for i in order))
    add_tokenizer(copy("mamba", home / "theirs"))
    return home


def copy(name, to):
    shutil.copytree(next(f for f in FOLDERS if f.name == f"pretrained_{name}"), to)
    (to / "expected.safetensors").unlink()
    return to


def add_tokenizer(folder):
    known = {word: number for number, word in enumerate(["[UNK]", "<eos>", *dict.fromkeys(WORDS)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def short(name, home, **changes):
    """A shipped config, on the text and the weights, small."""
    run = overrides.load(name)[0]
    data = replace(run.data, path=str(home / "text.txt"), length=16, eval_limit=1)
    sizes = {"steps": 4, "batch_size": 2, "eval_every": 0, "checkpoint_every": 0, "log_every": 1}
    return replace(run, data=data, initial_weights=str(home / "theirs"), **(sizes | changes))


@pytest.fixture(scope="module")
def trained(home):
    """`(run, result, directory)` of the continued run with all weight matrices frozen."""
    run = short("continued", home, frozen=("*w_*",))
    with jax.enable_x64(False):
        return run, quiet(run, home / "run"), home / "run"


def test_the_run_says_what_the_weights_decided(home, trained):
    cfg, params = pretrained.load_pretrained(home / "theirs")
    saved = read_config(trained[2])[0]
    assert saved.model == cfg and saved.data.tokenizer == str(home / "theirs")
    assert len(saved.initial_fingerprint) == 16
    assert read_tokenizer(trained[2]).decode([2, 3]) == "lo and"
    resolved, initial = weights.resolved(trained[0])
    assert resolved == saved
    assert_bits(initial, params)


def test_what_is_frozen_stays_and_takes_no_memory(home, trained):
    run, result, directory = trained
    before = pretrained.load_pretrained(home / "theirs")[1]
    moved, still = frozen.split(result.params, run.frozen)
    first_moved, first_still = frozen.split(before, run.frozen)
    assert_bits(still, first_still)
    assert_bits(checkpoint.load_params(directory)["w_embed"], before["w_embed"])
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(first_moved), strict=True):
        assert (np.asarray(a) != np.asarray(b)).any()
    names = frozen.paths(moved)
    assert names.keys() == {p for p in frozen.paths(before) if "w_" not in p} and "norm_final" in names
    state = jax.eval_shape(lambda: step.init_state(read_config(directory)[0], jax.random.key(0)))
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 1)
    assert sizes == sorted(2 * [leaf.size for leaf in jax.tree.leaves(moved)])  # two moments of each


@pytest.mark.deep
def test_the_update_is_that_of_the_whole_model(home):
    """Without clipping, what is frozen makes no difference to the first step of the rest."""
    run = short("continued", home, steps=1)
    run = replace(run, optimizer=replace(run.optimizer, clip_norm=None))
    patterns = ("w_embed", "blocks/*/mixer/w_*")
    whole, part = (quiet(replace(run, frozen=patterns if few else ())).params for few in (False, True))
    expected, _ = frozen.split(whole, patterns)
    for a, b in zip(jax.tree.leaves(frozen.split(part, patterns)[0]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["continued", pytest.param("state_passing", marks=pytest.mark.deep)])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(name, home, trained, tmp_path, float32):
    run = short(name, home, frozen=trained[0].frozen)
    straight = trained[1] if name == "continued" else quiet(run)
    assert quiet(run, tmp_path / "run", until=2).stopped == "until"
    resumed = quiet(run, tmp_path / "run")
    assert bare(resumed.rows) == bare(straight.rows)
    assert_bits(resumed.params, straight.params)


def test_other_weights_are_refused_by_name(home, trained, tmp_path, float32):
    run, _, directory = trained
    folder = shutil.copytree(home / "theirs", tmp_path / "theirs")
    elsewhere = replace(run, initial_weights=str(folder))
    tensors = load_file(folder / "model.safetensors")
    key = next(iter(tensors))
    save_file(tensors | {key: np.nextafter(tensors[key], 9)}, folder / "model.safetensors")
    before = contents(directory)
    with pytest.raises(OtherRunError, match=r"initial_fingerprint: '\w{16}' -> '\w{16}'"):
        quiet(elsewhere, directory)
    with pytest.raises(OtherRunError, match="frozen"):
        quiet(replace(run, frozen=()), directory)
    assert contents(directory) == before
    pinned = replace(elsewhere, initial_fingerprint=read_config(directory)[0].initial_fingerprint)
    with pytest.raises(ValueError, match=r"has fingerprint \w{16}, not"):
        quiet(pinned)


def test_generation_and_export_from_the_run(home, trained, tmp_path, capsys, float32):
    _, result, directory = trained
    assert cli.main(["generate", str(directory), "--prompt", "lo and", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("lo and")
    assert cli.main(["eval", str(directory)]) == 0
    assert cli.main(["export", str(directory), "--out", str(tmp_path / "back")]) == 0
    cfg, params = pretrained.load_pretrained(tmp_path / "back")
    assert cfg == read_config(directory)[0].model
    assert_bits(params, result.params)
    theirs = (home / "theirs" / "tokenizer.json").read_text()
    assert json.loads((tmp_path / "back" / "tokenizer.json").read_text()) == json.loads(theirs)


def test_half_precision_becomes_float32(home, tmp_path, float32):
    """And float16 again in an export, where frozen parameters are the bits they were."""
    folder = shutil.copytree(home / "theirs", tmp_path / "half")
    half = {k: v.astype(np.float16) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    run = replace(short("continued", home, steps=1), initial_weights=str(folder), frozen=("w_embed",))
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.resolved(run)[1])} == {np.dtype(np.float32)}
    result = quiet(run, tmp_path / "run")
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {np.dtype(np.float32)}
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {v.dtype for v in back.values()} == {np.dtype(np.float16)}
    assert_bits(back["backbone.embeddings.weight"], half["backbone.embeddings.weight"])


def test_from_the_command_line_and_on_from_a_run(home, tmp_path, capsys, float32):
    """State passing from a checkpoint, with a path alone; then on from the run directory, with its source."""
    more = ["--steps=2", "--batch_size=2", "--data.length=16", "--data.eval_limit=1"]
    given = [f"--data.path={home / 'text.txt'}", *more]
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["train", "state_passing", f"--initial_weights={home / 'theirs'}", "--out", str(first)]
    assert cli.main([*command, *given]) == 0
    assert cli.main(["train", "continued", f"--initial_weights={first}", "--out", str(second), *given]) == 0
    assert_bits(weights.resolved(read_config(second)[0])[1], checkpoint.load_params(first))
    assert read_tokenizer(second).to_dict() == read_tokenizer(first).to_dict()
    assert cli.main(["export", str(second), "--out", str(tmp_path / "back")]) == 0
    assert_bits(pretrained.load_pretrained(tmp_path / "back")[1], checkpoint.load_params(second))


def test_on_from_a_run_in_characters(home, tmp_path, float32):
    """Its alphabet is that of the first text, whatever the second has; there is nothing to export."""
    model = lm.Config(vocab_size=64, width=8, depth=1, pattern=("gla",), mlp="none")
    data = TextData(path=str(home / "text.txt"), tokenizer="char", length=16, eval_limit=1)
    first = quiet(Run(model=model, data=data, steps=1, batch_size=2), tmp_path / "first")
    (tmp_path / "other.txt").write_text("a state of the zoo " * 20)
    run = replace(
        short("continued", home, steps=1),
        data=replace(data, path=str(tmp_path / "other.txt"), tokenizer="weights"),
        initial_weights=str(tmp_path / "first"),
        model=FromWeights(piece=8, remat=False),
    )
    assert_bits(weights.resolved(run)[1], first.params)
    quiet(run, tmp_path / "second")
    saved = read_config(tmp_path / "second")[0]
    assert saved.model == replace(model, piece=8, remat=False)
    assert read_tokenizer(tmp_path / "second").to_dict() == read_tokenizer(tmp_path / "first").to_dict()
    assert not (tmp_path / "second" / "source").exists()


def test_a_model_of_ones_own_takes_weights_that_fit(home, float32):
    run = short("continued", home)
    model = weights.resolved(run)[0].model
    capped = replace(model, logit_cap=3.0)
    assert weights.resolved(replace(run, model=capped))[0].model == capped
    with pytest.raises(ValueError, match=r"w_embed is \(61, 20\) in the weights and \(64, 20\) in the model"):
        weights.resolved(replace(run, model=replace(model, vocab_size=64)))


def test_patterns():
    params = {"w_embed": 1, "blocks": [[{"mixer": {"w_in": 2, "A_log": 3}, "norm_mixer": 4}]], "norm": 5}
    assert frozen.split(params, ()) == (params, None)
    trained, still = frozen.split(params, ("blocks/0/0/mixer", "norm"))
    assert trained == {
        "w_embed": 1,
        "blocks": [[{"mixer": {"w_in": None, "A_log": None}, "norm_mixer": 4}]],
        "norm": None,
    }
    assert frozen.join(trained, still) == params
    assert frozen.split(params, ("*/A_log",))[1]["blocks"][0][0]["mixer"] == {"w_in": None, "A_log": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no weights to start from: give initial_weights, a checkpoint's folder or a run's"),
        (["--initial_weights=nowhere"], "nowhere is neither a directory nor the name of a model on the hub"),
        (["--initial_weights=empty"], "empty holds no config.json"),
        (["--initial_weights=bare"], "bare has no tokenizer.json: give data.tokenizer"),
        (
            ["--initial_weights=theirs", "--frozen=w_embd"],
            "'w_embd' matches none of the parameters bl",
        ),
        (["--initial_weights=theirs", "--frozen=*"], "frozen: * leave nothing to train"),
        (["--initial_weights=theirs", "--initial_fingerprint=0"], "not 0"),
        (["--initial_weights=theirs", "--data.tokenizer=byte"], "vocab_size=61, but the data have"),
        (
            ["--initial_weights=ended", "--model.max_length=9"],
            "ended is a run directory, whose model",
        ),
    ],
)
def test_mistakes_get_one_line(options, message, home, trained, tmp_path, monkeypatch, capsys, float32):
    shutil.copytree(home / "theirs", tmp_path / "theirs")
    copy("gla", tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    (tmp_path / "ended").symlink_to(trained[2])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "continued", f"--data.path={home / 'text.txt'}", *options]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and message in line
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_tokenizer_of_weights_needs_weights(home):
    with pytest.raises(ValueError, match="needs initial_weights, and none are given"):
        TextData(path=str(home / "text.txt"), tokenizer="weights").build()
