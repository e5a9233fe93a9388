"""Checkpoints: exact, all or nothing, every kind of damage noticed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo import checkpoint


def tree(step: int = 0):
    """A pytree of every kind of node and leaf that training states have."""
    rng = np.random.default_rng(step)
    convolution = jnp.asarray(rng.normal(size=7), jnp.bfloat16)
    params = {
        "w_embed": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        "blocks": [[{"conv": convolution}, {"none": jnp.zeros((2, 0), jnp.float32)}], []],
    }
    return {"params": params, "opt_state": optax.adam(1e-3).init(params), "step": jnp.int32(step)}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(directory: Path, *steps: int) -> Path:
    for step in steps:
        checkpoint.save(directory, step, tree(step), {"note": [step, None]}, keep=len(steps))
    return directory


def files_of(directory: Path, step: int) -> list[Path]:
    return sorted(p for p in (directory / f"step_{step:08d}").rglob("*") if p.is_file())


def test_round_trip_is_exact(tmp_path):
    saved(tmp_path, 3)
    template = jax.eval_shape(lambda: tree(0))
    step, restored, extra = checkpoint.restore(tmp_path, template)
    assert (step, extra) == (3, {"note": [3, None]})
    assert_same(restored, tree(3))


def test_parameters_load_without_a_template(tmp_path):
    saved(tmp_path / "checkpoints", 4)
    params = checkpoint.load_params(tmp_path)
    wanted = tree(4)["params"]
    wanted["blocks"].pop()  # an empty list has no leaves, and so no path
    assert_same(params, wanted)


def test_keeps_the_newest_and_drops_what_a_run_turned_back_from(tmp_path):
    for step in (1, 2, 9, 3, 4):
        checkpoint.save(tmp_path, step, tree(step), keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_saving_a_step_again_replaces_it(tmp_path):
    saved(tmp_path, 1)
    checkpoint.save(tmp_path, 1, tree(7))
    assert_same(checkpoint.restore(tmp_path, tree())[1], tree(7))


def test_another_model_is_refused_by_the_name_of_an_array(tmp_path):
    saved(tmp_path, 1)
    other = tree()
    other["params"]["w_embed"] = jnp.zeros((6, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"params/w_embed is \(\(5, 3\), 'float32'\).*\(\(6, 3\)"):
        checkpoint.restore(tmp_path, other)


def test_every_bit_flip_is_noticed(tmp_path):
    """Any file of a checkpoint, any bit: the loader says so and takes the older one."""
    saved(tmp_path, 1, 2)
    rng = random.Random(0)
    files = [p for p in files_of(tmp_path, 2) if p.stat().st_size]
    for trial in range(120):
        path = files[trial % len(files)]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match="step_00000002 is damaged .*; trying an older one"):
            step, restored, _ = checkpoint.restore(tmp_path, tree())
        assert step == 1
        path.write_bytes(good)
    assert_same(restored, tree(1))
    assert checkpoint.restore(tmp_path, tree())[0] == 2


@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing", "extra", "swapped"])
def test_damaged_files_are_noticed(tmp_path, damage):
    saved(tmp_path, 1, 2)
    for path in files_of(tmp_path, 2):
        good = path.read_bytes()
        if damage == "truncated":
            path.write_bytes(good[:-1])
        elif damage == "emptied":
            path.write_bytes(b"")
        elif damage == "missing":
            path.unlink()
        elif damage == "extra":
            (path.parent / "more").touch()
        else:
            path.write_bytes(next(p for p in files_of(tmp_path, 1) if p.read_bytes() != good).read_bytes())
        harmless = path.name != "manifest" and not good and damage in ("truncated", "emptied")
        harmless |= damage == "extra" and path.name == "manifest"  # it lies beside the arrays, not among them
        if not harmless:
            with pytest.warns(UserWarning, match="damaged"):
                assert checkpoint.restore(tmp_path, tree())[0] == 1
        path.write_bytes(good)
        (path.parent / "more").unlink(missing_ok=True)


def test_an_array_that_orbax_reads_back_wrongly_is_noticed(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    read = checkpoint._read_arrays

    def wrong(path, described, places):
        leaves = read(path, described, places)
        leaves["params/w_embed"] = leaves["params/w_embed"] + 1
        return leaves

    monkeypatch.setattr(checkpoint, "_read_arrays", wrong)
    with (
        pytest.warns(UserWarning, match="array params/w_embed has changed"),
        pytest.raises(checkpoint.CheckpointError, match="no intact checkpoint"),
    ):
        checkpoint.restore(tmp_path, tree())


def test_a_checkpoint_under_another_number_is_noticed(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000005")
    with pytest.warns(UserWarning, match="it is the checkpoint of step 1"):
        assert checkpoint.restore(tmp_path, tree())[0] == 1


def test_nothing_intact_is_one_clear_error(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no intact checkpoint in"):
        checkpoint.restore(tmp_path, tree())
    with pytest.raises(checkpoint.CheckpointError, match="no intact checkpoint in"):
        checkpoint.load_params(tmp_path)


def test_a_save_that_fails_leaves_the_older_ones(tmp_path, monkeypatch):
    saved(tmp_path, 1)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(OSError, match=r"could not save checkpoint .*step_00000002: .*No space left"):
        checkpoint.save(tmp_path, 2, tree(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpoint.restore(tmp_path, tree())[0] == 1


SAVE_FOR_EVER = """
import itertools, sys, test_checkpoint
from zoo import checkpoint
print("ready", flush=True)
for step in itertools.count(1):
    checkpoint.save(sys.argv[1], step, test_checkpoint.tree(step), keep=2)
    print(step, flush=True)
"""


def test_kill_at_any_moment(tmp_path):
    """SIGKILL while saving: what is there is intact, and no older than the last save that returned."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    rng = random.Random(1)
    for trial in range(3):
        directory = tmp_path / str(trial)
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(directory)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline() == "1\n"
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        told = [int(line) for line in process.communicate()[0].split()] or [1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing half-written is ever visible
            step, restored, _ = checkpoint.restore(directory, tree())
        assert step in (told[-1], told[-1] + 1)
        assert_same(restored, tree(step))
        checkpoint.save(directory, step + 1, tree(step + 1))
        assert not list(directory.glob(".*"))
