"""States on disk: the same bits come back, to the same model, or one line says why not."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from zoo import lm, registry, states
from zoo.generation import generate, prefill

WINDOW = registry.config("attention", 8, heads=2, window=4)
S5 = registry.config("s5", 8, state_dim=4)  # complex numbers
CFG = lm.Config(vocab_size=11, width=8, depth=2, pattern=(S5, WINDOW), mlp="none")


@pytest.fixture(scope="module")
def params():
    with jax.enable_x64(False):
        return jax.tree.map(lambda p: 3 * p, lm.init(jax.random.key(0), CFG))


@pytest.fixture(scope="module")
def session(params):
    with jax.enable_x64(False):
        return prefill(params, CFG, [[1, 2, 3, 4, 5], [6]])


@pytest.fixture
def saved(params, session, tmp_path, float32):
    return zoo.save_state(tmp_path / "a.state", session, params, CFG, note="a note")


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_going_on_from_the_disk_is_going_on_bit_for_bit(params, session, saved):
    loaded = zoo.load_state(saved, params, CFG)
    same(loaded, session)
    kept = generate(params, CFG, steps=6, session=session, with_session=True)
    read = generate(params, CFG, steps=6, session=loaded, with_session=True)
    np.testing.assert_array_equal(read[0], kept[0])
    same(read[1], kept[1])


def test_a_file_says_what_it_is(params, saved):
    about = states.read_about(saved)
    assert (about.kind, about.rows, about.tokens, about.note) == ("session", 2, [5, 1], "a note")
    assert about.params == states.params_digest(params)
    assert about.model["blocks.1.layer"] == "attention" and about.model["blocks.1.window"] == 4
    assert [p.name for p in saved.parent.iterdir()] == ["a.state"]


def test_bare_states_and_64_bits(params, tmp_path):
    wide = jax.tree.map(lambda p: jnp.asarray(p, float), params)
    state = lm.apply(wide, CFG, jnp.array([[1, 2, 3]]))[1]
    assert any(leaf.dtype == jnp.complex128 for leaf in jax.tree.leaves(state))
    path = zoo.save_state(tmp_path / "bare", state, wide, CFG)
    same(zoo.load_state(path, wide, CFG), state)
    with jax.enable_x64(False), pytest.raises(states.StateError, match="enable jax_enable_x64"):
        zoo.load_state(path, wide, CFG)


def test_flipped_bits_and_truncations_are_noticed(saved):
    whole = saved.read_bytes()
    random = np.random.default_rng(0)
    for at in range(0, len(whole), 2):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(random.integers(8))
        saved.write_bytes(damaged)
        with pytest.raises(states.StateError, match="is damaged") as caught:
            states.read_about(saved)
        assert "\n" not in str(caught.value)
    for size in {*range(0, len(whole), 97), len(whole) - 1}:
        saved.write_bytes(whole[:size])
        with pytest.raises(states.StateError, match="is damaged"):
            states.read_about(saved)
    saved.write_bytes(whole + b"\0")
    with pytest.raises(states.StateError, match="is damaged"):
        states.read_about(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 12}, "another model: vocab_size is 11 there and 12 here"),
        ({"depth": 4}, "another model: depth is 2 there and 4 here"),
        ({"pattern": (S5,)}, "blocks.1.layer is 'attention' there and 's5' here"),
        (
            {"pattern": (S5, dataclasses.replace(WINDOW, rope_base=500.0))},
            "blocks.1.rope_base is 10000.0 there and 500.0 here",
        ),
    ],
)
def test_a_state_of_another_config_is_refused(params, saved, changes, message):
    with pytest.raises(states.StateError, match=message) as caught:
        zoo.load_state(saved, params, dataclasses.replace(CFG, **changes))
    assert str(saved) in str(caught.value)


def test_a_state_of_other_parameters_is_refused(params, saved):
    other = {**params, "norm_final": params["norm_final"].at[3].add(1e-6)}
    with pytest.raises(states.StateError, match="the config is the same, the parameters are not"):
        zoo.load_state(saved, other, CFG)


def test_how_a_model_is_computed_makes_no_other_model(params, saved, session):
    cfg = dataclasses.replace(CFG, piece=4, remat=False, pattern=(S5, WINDOW, S5, WINDOW))
    same(zoo.load_state(saved, params, cfg), session)


def test_nothing_is_overwritten_unasked(params, session, saved):
    before = saved.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        zoo.save_state(saved, session, params, CFG)
    assert saved.read_bytes() == before
    zoo.save_state(saved, session.rows([1]), params, CFG, overwrite=True)
    assert states.read_about(saved).tokens == [1]


def test_a_faster_writer_wins(params, session, tmp_path, monkeypatch, float32):
    """The name is taken between the look and the writing."""
    path = tmp_path / "raced.state"

    def slow(*args, **kwargs):
        write(*args, **kwargs)
        path.write_text("theirs")

    write = states.save_file
    monkeypatch.setattr(states, "save_file", slow)
    with pytest.raises(FileExistsError):
        zoo.save_state(path, session, params, CFG)
    assert [p.name for p in tmp_path.iterdir()] == ["raced.state"] and path.read_text() == "theirs"


def test_a_write_that_fails_leaves_nothing(params, session, saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(states, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        zoo.save_state(saved, session, params, CFG, overwrite=True)
    assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1


def test_what_is_no_state_is_not_saved(params, session, tmp_path, float32):
    for wrong in (session.replace(logits=session.logits[:, :5]), session.state[0], params):
        with pytest.raises(states.StateError, match=r"is no (session|state) of this model"):
            zoo.save_state(tmp_path / "wrong", wrong, params, CFG)
    assert not list(tmp_path.iterdir())


def test_other_files_are_no_states(tmp_path, params):
    with pytest.raises(FileNotFoundError, match="no state at"):
        zoo.load_state(tmp_path / "nowhere", params, CFG)
    for content in (b"", b"{}", json.dumps({"a": 1}).encode() * 9):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(states.StateError, match="damaged or is no state"):
            zoo.load_state(tmp_path / "other", params, CFG)


def test_files_are_readable_by_those_who_read_others(saved):
    mask = os.umask(0)
    os.umask(mask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~mask
