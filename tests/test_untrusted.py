"""Files that somebody else has made: parsed, or refused in one line; nothing is executed or followed."""

import io
import json
import os
import pickle
import shutil
import sys
import types
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_pretrained import FOLDERS

from experiments import cells, config, directory, tokenizer
from experiments.config import Run
from experiments.soak import inputs, readers
from experiments.soak.mutations import BYTES
from experiments.tasks import signals
from experiments.text import TextData
from zoo import checkpoint, lm, reading
from zoo.pretrained import keep_source, load_pretrained
from zoo.pretrained.convert import make_plan
from zoo.pretrained.formats import find
from zoo.pretrained.options import too_many

RUN = Run(model=lm.Config(vocab_size=5, width=8, depth=1), data=TextData(length=4))

# --- JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "file is refused: its JSON is nested too deeply"),
        ('{"a":' * 101 + "1" + "}" * 101, "file is refused: its JSON is nested too deeply"),
        ("[1, 2", "file is not JSON: Expecting"),
        (b"\xff\xfe\x00", "file is not JSON: "),
        ("[1]".encode("utf-32"), "file is not JSON: 'utf-8' codec"),
        ("1" * 5_000, "file is not JSON: Exceeds the limit"),
        ("", "file is not JSON: Expecting value"),
    ],
)
def test_json_that_is_none_is_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        reading.parse(text, "file")
    assert "\n" not in str(error.value)
    assert reading.parse("[" * 100 + "]" * 100, "file")


def test_json_files_are_regular_and_not_endless(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", "."):
        with pytest.raises(FileNotFoundError, match="no such file"):
            reading.read_json(tmp_path / name)
    (tmp_path / "long").write_text("[1, 2, 3]")
    with pytest.raises(ValueError, match="does not hold a JSON object"):
        reading.read_object(tmp_path / "long")
    monkeypatch.setattr(reading, "MOST_BYTES", 5)
    with pytest.raises(ValueError, match="is refused: 9 bytes of JSON"):
        reading.read_json(tmp_path / "long")


# --- configs --------------------------------------------------------------------------------------------

MODULE = """
from dataclasses import dataclass
import sys
sys.executed_by_a_config = True
@dataclass(frozen=True)
class Data:
    length: int = 3
    def build(self): ...
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module that notices when it is imported, on the path, and not yet loaded."""
    (tmp_path / "planted_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "planted_module"
    sys.modules.pop("planted_module", None)
    vars(sys).pop("executed_by_a_config", None)


def test_no_module_is_imported_because_a_config_names_it(planted, monkeypatch):
    saved = {"type": f"{planted}:Data", "length": 4}
    with pytest.raises(ValueError, match=r"no config type 'planted_module:Data'; .* in ZOO_MODULES"):
        config.from_dict(saved)
    assert planted not in sys.modules and not hasattr(sys, "executed_by_a_config")
    monkeypatch.setenv("ZOO_MODULES", f"other,{planted}")
    assert config.from_dict(saved).length == 4 and hasattr(sys, "executed_by_a_config")
    monkeypatch.delenv("ZOO_MODULES")
    assert config.from_dict(saved).length == 4  # it is loaded now, by whoever trusts it


def test_a_sweep_vouches_for_the_modules_of_its_own_config(planted, monkeypatch):
    monkeypatch.setenv("ZOO_MODULES", "mine")
    data = __import__(planted).Data()
    config.vouch(Run(model=RUN.model, data=data))
    assert os.environ["ZOO_MODULES"] == f"mine,{planted}"
    config.vouch(RUN)
    assert os.environ["ZOO_MODULES"] == f"mine,{planted}"


@dataclass
class Thawed:
    length: int = 1


@pytest.mark.parametrize(
    "name",
    [
        "os:system", "subprocess:Popen", "builtins:eval", "pathlib:Path", f"{__name__}:Thawed",
        "zoo..lm:Config",
        "experiments.text:Run", "experiments.cells:Run", "zoo.nowhere:Config", "zoo", "", ":", None, 3,
        ["a"], {}, "layers\0:Config", "zoo.lm:Config.__init__", "experiments.soak.lives:Life",
    ],
)  # fmt: skip
def test_what_is_no_config_type(name):
    with pytest.raises(ValueError, match="there is no config type") as error:
        config.from_dict({"type": name})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": "many"}, {"optimizer": {"type": "experiments.config:Optimizer", "lr": "fast"}},
        {"model": None}, {"data": {}}, {"keep": []},
        {"model": {"type": "zoo.lm:Config", "vocab_size": 5, "depth": 10**12}},
        {"model": {"type": "zoo.lm:Config", "vocab_size": 5, "pattern": [{"a": []}]}}, {"nothing": 1},
        {"model": {"type": "zoo.lm:Config", "pattern": ["gla"]}},
    ],
)  # fmt: skip
def test_configs_with_values_that_do_not_fit_are_one_line(tmp_path, changes):
    saved = {"run": config.to_dict(RUN) | changes, "data": "x"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError) as error:
        directory.read_config(tmp_path)
    assert "\n" not in str(error.value)


# --- run directories ------------------------------------------------------------------------------------


def test_damaged_rows_are_named_and_stay(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n{"st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        directory.rows_of(file, "step")
    file.write_text('{"step": 1}\n{"stop": 2}\n')
    with pytest.raises(ValueError, match="line 2 is no row of step"):
        directory.rows_of(file, "step")
    file.write_text('{"step": 1}\n{"st')
    assert directory.rows_of(file, "step") == [{"step": 1}] and file.read_text().endswith("st")


def test_links_in_a_run_directory_are_not_written_through(tmp_path):
    """Where a lock, or a file that is being written, would be, somebody has left a link to something dear."""
    home, dear = tmp_path / "run", tmp_path / "dear"
    home.mkdir()
    dear.write_text("dear")
    (home / ".config.json.unfinished").symlink_to(dear)
    directory.Directory(home, RUN, "x").close()
    (home / ".lock").unlink()
    (home / ".lock").symlink_to(dear)
    with pytest.raises(OSError):
        directory.Directory(home, RUN, "x")
    assert dear.read_text() == "dear" and directory.read_config(home)[0] == RUN


def test_a_cut_line_of_attempts_is_taken_off_before_the_next(tmp_path):
    (tmp_path / "attempts.jsonl").write_text('{"runner": "a", "began": 1}\n{"runner": "a", "er')
    cells._note(tmp_path, runner="a", error="no")
    assert cells.outcome(tmp_path).error == "no" and cells.given_up(tmp_path, "a", retries=0)


def test_tokenizers_that_are_none_are_one_line():
    for saved in (
        {"kind": "huggingface", "json": "{}"},
        {"kind": "char", "characters": "ba", "separator": True},
    ):
        with pytest.raises(ValueError) as error:
            tokenizer.from_dict(saved)
        assert "\n" not in str(error.value)


# --- checkpoints ----------------------------------------------------------------------------------------


def run_with_a_checkpoint(home):
    checkpoint.save(home / "checkpoints", 3, {"params": {"w": np.arange(6.0, dtype=np.float32)}})
    return home / "checkpoints" / "step_00000003"


@pytest.mark.parametrize("what", ["file", "folder", "manifest", "all", "pipe"])
def test_no_link_leads_out_of_a_checkpoint(tmp_path, what):
    """Even where it leads to the very bytes that belong there."""
    step = run_with_a_checkpoint(tmp_path / "run")
    path = {
        "file": step / "arrays" / "_METADATA",
        "folder": next(p for p in (step / "arrays").iterdir() if p.is_dir()),
        "manifest": step / "manifest",
        "all": step,
        "pipe": step / "arrays" / "_METADATA",
    }[what]
    path.rename(tmp_path / "elsewhere")
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with (
        pytest.warns(UserWarning, match="is a link" if what != "pipe" else "is no regular file"),
        pytest.raises(checkpoint.CheckpointError, match="no intact checkpoint"),
    ):
        checkpoint.load_params(tmp_path / "run")


def resealed(step, change):
    """The manifest changed by somebody who knows how its digests are made."""
    body = (step / "manifest").read_bytes().rpartition(b"\n")[0]
    manifest = json.loads(body) | {"files": checkpoint._file_digests(step)}
    change(manifest)
    readers.sealed(step / "manifest", manifest)


def test_no_name_leads_out_of_a_checkpoint(tmp_path):
    """Names of arrays as orbax keeps them without its own database: files, below the directory."""
    import orbax.checkpoint as ocp

    for home, name in ((tmp_path / "victim", "w"), (tmp_path / "arrays", "params")):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
            writer.save(home, {name: np.arange(6.0)})
    step = run_with_a_checkpoint(tmp_path / "run")
    shutil.rmtree(step / "arrays")
    shutil.copytree(tmp_path / "arrays", step / "arrays")
    outside = "../../../../victim/w"
    about = (step / "arrays" / "_METADATA").read_text().replace("('params',)", f"('{outside}',)")
    (step / "arrays" / "_METADATA").write_text(about.replace('"key": "params"', f'"key": "{outside}"'))
    resealed(step, lambda m: m.update(leaves={outside: m["leaves"].popitem()[1]}))
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(checkpoint.CheckpointError):
        checkpoint.load_params(tmp_path / "run")


def test_arrays_larger_than_memory_are_refused_before_they_are_made(tmp_path):
    """The library under orbax ends the process when it is asked for them."""
    import tensorstore

    step = run_with_a_checkpoint(tmp_path)
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{step}/arrays/"}).result()
    about = json.loads(store.read("params/w/.zarray").result().value)
    for shape, chunks, claimed in (([2**42], [6], [6]), ([6], [2**42], [6]), ([2**42], [2**42], [2**42])):
        changed = json.dumps(about | {"shape": shape, "chunks": chunks}).encode()
        store.write("params/w/.zarray", changed).result()
        resealed(step, lambda m, claimed=claimed: m["leaves"]["params/w"].update(shape=claimed))
        with (
            pytest.warns(UserWarning, match="array params/w is|do not fit in memory"),
            pytest.raises(checkpoint.CheckpointError),
        ):
            checkpoint.load_params(tmp_path)


# --- published weights ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(next(f for f in FOLDERS if f.name == "pretrained_mamba"), tmp_path / "folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_link_leads_out_of_a_folder(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of the folder"):
        load_pretrained(folder)


def test_a_link_to_itself_is_one_line(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "loop"}}')
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="'loop' leads out of the folder"):
        load_pretrained(folder)


def test_options_without_their_parts_are_one_line():
    config = {"model_type": "gla", "attn": {"num_heads": 2}}
    plan, problems = make_plan(config, 64, frozenset())
    assert plan is None and any("num_hidden_layers is missing" in line for line in problems)


def test_no_file_from_elsewhere_is_copied(folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer\.json leads out of the folder"):
        keep_source(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "index", [{"weight_map": {"a": 3}}, {"weight_map": []}, {}, [], {"weight_map": {"a": []}}]
)
def test_an_index_of_something_else(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has no weight_map of names|does not hold a JSON object"):
        load_pretrained(folder)


def test_counts_beyond_any_model_are_refused(folder):
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(options | {"num_hidden_layers": 10**12}))
    with pytest.raises(ValueError, match=r"num_hidden_layers=1000000000000 exceeds 10,000"):
        load_pretrained(folder)
    assert too_many({"num_hidden_layers": 5_000, "num_experts": 5_000}) and not too_many({"num_experts": 512})
    with pytest.raises(ValueError, match=r"model_type=\[\] is not supported"):
        find({"model_type": []})


def test_a_header_that_is_deep_or_lies(folder):
    """Offsets beyond the file, and brackets without end."""
    file = folder / "model.safetensors"
    header, body = readers.split_header(file.read_bytes())
    key = next(k for k in header if k != "__metadata__")
    for changed in (
        header | {key: header[key] | {"data_offsets": [0, 2**60]}},
        {"a": json.loads("[" * 90 + "]" * 90)},
    ):
        file.write_bytes(readers.join_header(changed, body))
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
            load_pretrained(folder)


def test_sixteen_bit_weights_are_still_read(folder):
    """The checks refuse nothing that is right."""
    arrays = {k: jnp.asarray(v, jnp.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
    save_file({k: np.asarray(v) for k, v in arrays.items()}, folder / "model.safetensors")
    assert load_pretrained(folder)[0].vocab_size == 61


# --- arrays ---------------------------------------------------------------------------------------------


def test_no_pickle_is_read(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (exec, ("import sys; sys.executed_by_a_pickle = True",))

    harmful = np.array([Harmful()], object)
    np.savez(tmp_path / "a.npz", x=harmful, y=np.zeros(1, int))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Harmful()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match=r"not a readable \.npz of numbers"):
            signals.ArrayData(path=str(tmp_path / name)).build()
    assert not hasattr(sys, "executed_by_a_pickle")


def test_small_files_that_unpack_to_much_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((2_000, 500)), y=np.zeros(2_000, int))
    monkeypatch.setattr(signals, "SMALL", 10**6)
    with pytest.raises(ValueError, match=r"its [\d,]+ bytes unpack to 8,016,\d\d\d"):
        signals.ArrayData(path=str(tmp_path / "a.npz")).build()


# --- the soaks themselves -------------------------------------------------------------------------------


def test_values_that_hypothesis_invents():
    assert inputs.invent(150, seed=1) < 150


def test_the_watch_sees_what_it_is_for(tmp_path):
    watch = inputs.Watch()
    watch.begin(tmp_path)
    pickle.loads(pickle.dumps(io.StringIO))
    (tmp_path / "a").write_text("x")
    (tmp_path / "a").rename(tmp_path / "outside")
    (tmp_path / "outside").read_text()
    __import__("colorsys") if "colorsys" not in sys.modules else None
    seen = watch.end()
    (tmp_path / "b").write_text("x")
    for event in ("pickle.find_class", "to write", "os.rename", "outside"):
        assert any(event in each for each in seen), event
    assert watch.seen == seen


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda home: json.loads("{"), "JSONDecodeError"),  # from deeper down: it would be a traceback
        (lambda home: (home / "a").write_text("x"), "to write"),
        (lambda home: pickle.loads(pickle.dumps(types.SimpleNamespace)), "pickle.find_class"),
        (lambda home: config.require(False, "two\nlines"), "several lines"),
        (lambda home: config.require(False, "one"), ""),
        (lambda home: 1, ""),
    ],
)
def test_a_promise_that_is_broken_is_seen(tmp_path, monkeypatch, read, said):
    def make(home):
        (home / "a").write_text("good")

    calls = []
    reader = readers.Reader(make, lambda home: read(home) if calls else calls.append(home), mutations=BYTES)
    monkeypatch.setitem(readers.READERS, "broken", reader)
    stand = inputs.Stand("broken", tmp_path, inputs.Watch())
    assert [
        said in stand.case(number)[2] and bool(stand.case(number)[2]) == bool(said) for number in range(3)
    ]
    assert said in stand.case(0)[2] and bool(stand.case(0)[2]) == bool(said)
