"""Full and read-only disks, signals that end the process, batches that cannot be trained on."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import jax
import pytest
from test_training import (
    RUN,
    Echo,
    assert_bits,
    assert_same_run,
    bare,
    quiet,
    read_rows,
    straight,  # noqa: F401 (a fixture)
)

from experiments import interrupts, step, train
from experiments.evaluate import evaluate
from zoo import checkpoint

# --- disks ----------------------------------------------------------------------------------------------


def mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 kB; its checkpoints are of 60."""
    place = tmp_path / "disk"
    place.mkdir()
    if not shutil.which("mount") or not mount("-t", "tmpfs", "-o", "size=400k", "tmpfs", place):
        pytest.skip("only root may mount a disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place, spare):
    with contextlib.suppress(OSError), (place / "ballast").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    os.truncate(place / "ballast", (place / "ballast").stat().st_size - spare)


@pytest.mark.parametrize("spare", [0, 8192, 40960])
def test_a_full_disk_costs_only_the_steps_since_the_last_checkpoint(straight, small_disk, spare):  # noqa: F811
    """Nothing at all can be written, or metrics, or half of a checkpoint: one line, and it goes on from 4."""
    home = small_disk / "run"
    quiet(RUN, home, until=5)
    fill(small_disk, spare)
    with pytest.raises(OSError, match=r"(?i)no space left") as error:
        quiet(RUN, home)
    assert str(home) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300
    assert sorted(p.name for p in (home / "checkpoints").iterdir()) == ["step_00000004", "step_00000005"]
    (small_disk / "ballast").unlink()
    quiet(RUN, home)
    assert_same_run(home, straight)


def test_a_read_only_directory_is_one_line(straight, small_disk):  # noqa: F811
    home = small_disk / "run"
    quiet(RUN, home, until=5)
    assert mount("--bind", home / "checkpoints", home / "checkpoints")
    assert mount("-o", "remount,bind,ro", home / "checkpoints")
    try:
        with pytest.raises(OSError, match=r"could not save checkpoint .*step_00000008: .*Read-only") as error:
            quiet(RUN, home)
        assert "\n" not in str(error.value)
    finally:
        subprocess.run(["umount", str(home / "checkpoints")], check=True)
    assert checkpoint.steps(home / "checkpoints") == [4, 5]
    quiet(RUN, home)
    assert_same_run(home, straight)


def test_a_file_that_may_not_grow(straight, tmp_path):  # noqa: F811
    """The kernel refuses to write beyond a limit, as it does on a full disk; this needs no root."""
    quiet(RUN, tmp_path, until=5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1600, hard))
    try:
        with pytest.raises(OSError, match=r"(?i)file too large"):
            quiet(RUN, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.steps(tmp_path / "checkpoints")[:2] == [4, 5]
    quiet(RUN, tmp_path)
    assert_same_run(tmp_path, straight)


# --- signals --------------------------------------------------------------------------------------------

BUSY = """
import hashlib, sys
from experiments.interrupts import signals
with signals() as received:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # minutes in which no handler can run
"""


def test_a_second_signal_ends_a_process_that_cannot_listen():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(interrupts.GRACE + 0.5)
    assert process.poll() is None  # the first one only asks
    process.send_signal(signal.SIGINT)
    assert process.wait(interrupts.GRACE + 10) == interrupts.FORCED == 130
    process.stdout.close()


def test_signals_leave_everything_as_it_was():
    before = [signal.getsignal(number) for number in interrupts.NUMBERS]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    old = signal.set_wakeup_fd(writing)
    with interrupts.signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == ["SIGTERM"]
    assert signal.set_wakeup_fd(old) == writing
    assert [signal.getsignal(number) for number in interrupts.NUMBERS] == before
    os.close(reading)
    os.close(writing)


CONFIG = '''"""A long run."""
from test_training import RUN
from dataclasses import replace
config = replace(RUN, steps=1_000_000, checkpoint_every=0, eval_every=0, log_every=1)
'''


@pytest.mark.deep
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_with_130_and_a_checkpoint_of_its_last_step(tmp_path, number):
    (tmp_path / "long.py").write_text(CONFIG)
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", "train", str(tmp_path / "long.py"), "--out", str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not read_rows(out):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    last = read_rows(out)[-1]["step"]
    assert checkpoint.steps(out / "checkpoints") == [last]
    assert f"stopped by {number.name} at step {last}; the same command goes on from here" in said


# --- batches --------------------------------------------------------------------------------------------


SPOILT: set[int] = set()  # batches that have a token of no vocabulary, beside the config: one compilation


@dataclass(frozen=True)
class Spoiled(Echo):
    def batch(self, seed, step, size):
        batch = super().batch(seed, step, size)
        if step in SPOILT:
            batch["tokens"][1, 2] = self.vocab_size
        return batch


SKIPPING = replace(RUN, data=Spoiled(), max_bad_steps=3, log_every=1)


@pytest.fixture
def spoilt():
    yield SPOILT
    SPOILT.clear()


def test_an_unfit_batch_is_as_if_it_had_not_been(float32, spoilt):
    programs = step.programs(RUN)
    spoilt.add(7)
    bad = Spoiled().batch(0, 7, 6)
    batches = [Echo().batch(0, number, 6) for number in range(3)]

    def after(used):
        state = programs.initial(jax.random.key(0))
        for batch in used:
            state, metrics = programs.step(state, jax.device_put(batch))
        return state, metrics

    with_bad, _ = after([*batches, bad, batches[0]])
    without, _ = after([*batches, batches[0]])
    assert_bits((with_bad.params, with_bad.opt_state), (without.params, without.opt_state))
    assert (int(with_bad.step), int(with_bad.bad_steps), int(with_bad.bad_in_row)) == (5, 1, 0)
    state, metrics = after([*batches, bad, bad])
    assert (int(state.step), int(state.bad_steps), int(state.bad_in_row)) == (5, 2, 2)
    assert float(metrics["loss"]) != float(metrics["loss"])


def test_unfit_batches_are_skipped_and_named_and_counted_across_a_stop(float32, tmp_path, capsys, spoilt):
    spoilt |= {5, 6}
    run = SKIPPING
    whole = train.train(run, tmp_path / "whole")
    said = capsys.readouterr().out
    assert [f"step {n} skipped: tokens[1, 2] = 8 is outside [0, 8)" in said for n in (5, 6, 7, 8)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert whole.summary["bad_steps"] == 2
    counted = {r["step"]: (r["bad_steps"], r["bad_in_row"]) for r in whole.rows if r["kind"] == "train"}
    assert [counted[n] for n in (5, 6, 7, 8, 12)] == [(0, 0), (1, 1), (2, 2), (2, 0), (2, 0)]
    quiet(run, tmp_path / "parts", until=6)  # between the two
    parts = quiet(run, tmp_path / "parts")
    assert bare(parts.rows) == bare(whole.rows)
    assert_bits(parts.params, whole.params)


def test_many_unfit_batches_in_a_row_stop_the_run(float32, tmp_path, spoilt):
    spoilt |= {5, 6, 7, 8}
    with pytest.raises(train.NotFiniteError) as error:
        quiet(SKIPPING, tmp_path)
    assert str(error.value) == (
        "stopped at step 8: tokens[1, 2] = 8 is outside [0, 8), the last of 3 steps running that were "
        "skipped; look at the data"
    )
    rows = [row for row in read_rows(tmp_path) if row["kind"] == "train"]
    assert [(row["bad_steps"], row["loss"]) for row in rows[-3:]] == [
        (1, None), (2, None), (3, None),
    ]  # fmt: skip


def test_evaluation_names_an_unfit_batch(float32, spoilt):
    params = step.programs(RUN).initial(jax.random.key(0)).params
    spoilt.add(1)
    with pytest.raises(ValueError, match=r"split 'validation', batch 1: tokens\[1, 2\] = 8 is outside"):
        evaluate(SKIPPING, params, SKIPPING.data)
