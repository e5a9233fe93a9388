"""Generation: padding, pieces, chunks, neighbours and stops change nothing that they should not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sessions
from chains import assert_close

import zoo
from experiments.tokenizer import ByteTokenizer, CharTokenizer
from zoo import generation, lm, registry
from zoo.generation import generate, layout, prefill, reading, stream, writing

WINDOW = registry.config("attention", 16, heads=2, window=4)
CFG = lm.Config(vocab_size=23, width=16, depth=2, pattern=("gla", WINDOW), mlp="gelu")
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16]]
KEYS = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(5), row))(jnp.arange(3))
LETTERS = CharTokenizer("".join(sorted("abcdefghijklmnop \n.,'-")), separator=False)


@pytest.fixture(scope="module")
def params():
    """In float64; large enough that tokens hang on what was read."""
    return jax.tree.map(lambda p: 3 * p, lm.init(jax.random.key(0), CFG))


def states_close(actual, desired):
    assert_close(sessions.visible(actual.state), sessions.visible(desired.state))
    assert_close(actual.logits, desired.logits)
    np.testing.assert_array_equal(actual.seen, desired.seen)
    np.testing.assert_array_equal(actual.length, desired.length)


def test_zoo_names_it():
    assert zoo.generate is generate and "save_state" in dir(zoo)
    with pytest.raises(AttributeError, match="no attribute 'degenerate'"):
        zoo.degenerate  # noqa: B018


def test_greedy_is_the_argmax_of_the_whole_sequence_row_by_row(params):
    found = generate(params, CFG, PROMPTS, 7, temperature=0)
    whole = jax.jit(lambda x: jnp.argmax(lm.apply(params, CFG, x)[0], -1))
    for prompt, row in zip(PROMPTS, found, strict=True):
        x = np.zeros((1, 16), int)  # what comes after makes no difference
        x[0, : len(prompt) + 7] = [*prompt, *row]
        np.testing.assert_array_equal(row, whole(x)[0, len(prompt) - 1 : len(prompt) + 6])


def test_a_row_is_what_it_is_alone(params):
    """Tokens drawn, and states, of the longest, the shortest and another one."""
    found, session = generate(params, CFG, PROMPTS, 7, key=KEYS, repetition_penalty=1.3, with_session=True)
    for row, prompt in enumerate(PROMPTS):
        alone, own = generate(
            params, CFG, prompt, 7, key=KEYS[row : row + 1], repetition_penalty=1.3, with_session=True
        )
        np.testing.assert_array_equal(found[row], alone[0])
        states_close(session.rows([row]), own)


@pytest.mark.parametrize("piece", [1, 2, 4, 5])
def test_pieces_are_the_whole(params, piece):
    whole = prefill(params, CFG, PROMPTS)
    states_close(prefill(params, CFG, PROMPTS, piece=piece), whole)
    first = prefill(params, CFG, [prompt[:2] for prompt in PROMPTS])
    rest = [prompt[2:] for prompt in PROMPTS]
    states_close(prefill(params, CFG, rest, first, piece=piece), whole)


def test_long_unequal_rows_go_on_from_states(params):
    """More than one round of pieces, a row of whole pieces, one without any, and one that is empty."""
    first = prefill(params, CFG, np.ones((4, 3), int))
    random = np.random.default_rng(0)
    rows = [random.integers(0, 23, n) for n in (11, 8, 2, 0)]
    further = prefill(params, CFG, rows, first, piece=4)
    for number, row in enumerate(rows):
        alone = prefill(params, CFG, np.concatenate([[1, 1, 1], row]))
        states_close(further.rows([number]), alone)


def test_one_text_is_forked_for_several_prompts(params):
    document = prefill(params, CFG, PROMPTS[0])
    found = generate(params, CFG, [[1, 2], [3], []], 5, session=document, temperature=0)
    for row, more in zip(found, ([1, 2], [3], []), strict=True):
        alone = generate(params, CFG, [*PROMPTS[0], *more], 5, temperature=0)
        np.testing.assert_array_equal(row, alone[0])
    assert document.length.tolist() == [9]  # and is still what it was


def test_going_on_is_not_stopping_bit_for_bit(params, float32):
    here = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    whole, last = generate(here, CFG, PROMPTS, 9, key=KEYS, with_session=True)
    part, session = generate(here, CFG, PROMPTS, 4, key=KEYS, with_session=True)
    rest, end = generate(here, CFG, steps=5, key=KEYS, session=session, with_session=True)
    np.testing.assert_array_equal(np.concatenate([part, rest], 1), whole)
    jax.tree.map(np.testing.assert_array_equal, end, last)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_streamed_tokens_and_states_are_the_unstreamed_bit_for_bit(params, chunk, float32):
    here = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    whole, last = generate(here, CFG, PROMPTS, 10, key=KEYS, with_session=True)
    parts = stream(here, CFG, PROMPTS, 10, key=KEYS, chunk=chunk)
    seen = list(parts)
    assert len(seen) == -(-10 // chunk)
    np.testing.assert_array_equal(np.concatenate(seen, 1), whole)
    jax.tree.map(np.testing.assert_array_equal, parts.session, last)


def test_stop_tokens_end_a_row_and_its_state_there(params):
    free = generate(params, CFG, PROMPTS, 12, key=KEYS)
    stop = int(free[0, 3])
    found, session = generate(params, CFG, PROMPTS, 12, key=KEYS, stop=stop, with_session=True)
    ends = [int(np.append(np.flatnonzero(row == stop), 11)[0]) + 1 for row in free]
    assert len(set(ends)) > 1
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(found[row], [*free[row, :end], *[-1] * (12 - end)])
        states_close(session.rows([row]), prefill(params, CFG, [*PROMPTS[row], *free[row, :end]]))


def test_the_loop_ends_when_all_rows_have(params):
    """Steps that were not needed are not taken: a million of them would be noticed."""
    one = int(generate(params, CFG, [[1]], 1, temperature=0)[0, 0])
    found = generate(params, CFG, [[1]], 1_000_000, temperature=0, stop=[one])
    assert found.shape == (1, 1_000_000) and (found[0, 1:] == -1).all()


def test_ids_beyond_the_limit_are_not_produced(params):
    found = generate(params, CFG, PROMPTS, 40, temperature=5.0, limit=6)
    assert set(np.unique(found)) == set(range(6))


def test_a_sampler_of_ones_own(params):
    def second(key, logits, seen):
        return jnp.argsort(-logits)[1]

    found = generate(params, CFG, [[1]], 3, sampler=second)
    logits = prefill(params, CFG, [[1]]).logits
    assert found[0, 0] == jnp.argsort(-logits[0])[1]


def test_memory_does_not_grow_with_what_is_written(params):
    """The program for 4,096 tokens holds 16 bytes a row more for each, its own tokens, than that for 64."""
    session = prefill(params, CFG, PROMPTS)
    rules = writing.Rules(KEYS, generation.Sampling())

    def held(size):
        lowered = writing._write.lower(
            *layout.model(params, CFG), session, jnp.full(3, size), rules.keys, rules.sampler,
            CFG, (), CFG.vocab_size, None, size, False, None,
        )  # fmt: skip
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    assert held(4096) - held(64) <= 16 * 3 * (4096 - 64)
    states = sum(leaf.nbytes for leaf in jax.tree.leaves(session.state))
    after = prefill(params, CFG, np.ones((3, 50), int))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(after.state)) == states


DEEP = lm.Config(vocab_size=11, width=8, depth=5, pattern=("lru", "gla"), moe_every=2, experts=2, mlp="gelu")


def test_blocks_apart_are_the_same_model():
    """Blocks that repeat, a tail and mixtures of experts, apart: one step, and there and back."""
    params, apart = lm.init(jax.random.key(3), DEEP), layout.apart(DEEP)
    other, found = layout.model(params, DEEP)
    assert found == apart != DEEP and apart.blocks == DEEP.blocks
    state = lm.init_state(DEEP, 2)
    assert jax.tree.map(jnp.shape, layout.unstacked(DEEP, state)) == jax.tree.map(
        jnp.shape, lm.init_state(apart, 2)
    )
    token = jnp.array([3, 7])
    logits, after = lm.step(params, DEEP, token, state)
    same, moved = lm.step(other, apart, token, layout.unstacked(DEEP, state))
    assert_close(same, logits)
    assert_close(layout.stacked(DEEP, moved), after)
    jax.tree.map(np.testing.assert_array_equal, layout.stacked(DEEP, layout.unstacked(DEEP, after)), after)


def test_deep_models_stay_stacked():
    deep = dataclasses.replace(DEEP, depth=layout.MOST + 1)
    assert layout.apart(deep) == dataclasses.replace(deep, tie=False)
    assert layout.alike(layout.apart(deep), deep) and not layout.alike(layout.apart(DEEP), DEEP)


def test_prefill_memory_is_that_of_a_piece(params):
    def held(length, piece):
        tokens = np.zeros((1, piece), np.int32)
        state = lm.init_state(CFG, 1)
        args = (params, CFG, tokens, None, None, state, None)
        return reading._read.lower(*args, dtype=None).compile().memory_analysis().temp_size_in_bytes

    assert held(4096, 64) < held(4096, 4096) / 8


TEXT = "abc"


def text(params, prompt=TEXT, steps=60, **settings):
    return generate(
        params,
        CFG,
        prompt,
        steps,
        tokenizer=LETTERS,
        key=KEYS[: 1 if isinstance(prompt, str) else 2],
        **settings,
    )


def test_text_is_the_text_of_the_tokens(params):
    tokens = generate(params, CFG, LETTERS.encode(TEXT), 60, key=KEYS[:1], limit=LETTERS.vocab_size)
    assert text(params) == LETTERS.decode(tokens[0])
    assert text(params, [TEXT, "p"])[0] == text(params)


def test_new_texts_begin_with_the_separator_and_those_that_go_on_do_not(params):
    with_separator = CharTokenizer(LETTERS.characters, separator=True)
    ids = LETTERS.encode(TEXT)
    _, session = generate(params, CFG, TEXT, 1, tokenizer=with_separator, with_session=True, temperature=0)
    states_close(session, generate(params, CFG, [22, *ids], 1, temperature=0, with_session=True)[1])
    _, further = generate(
        params, CFG, TEXT, 1, tokenizer=with_separator, session=session, with_session=True, temperature=0
    )
    again = generate(params, CFG, ids, 1, session=session, with_session=True, temperature=0)[1]
    states_close(further, again)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_streamed_text_is_the_unstreamed(params, chunk):
    one = stream(params, CFG, TEXT, 60, tokenizer=LETTERS, key=KEYS[:1], chunk=chunk)
    assert "".join(one) == text(params)
    several = stream(params, CFG, [TEXT, "p"], 60, tokenizer=LETTERS, key=KEYS[:2], chunk=chunk)
    assert ["".join(parts) for parts in zip(*several, strict=True)] == text(params, [TEXT, "p"])


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_stop_strings_cut_text_and_state(params, chunk):
    whole = text(params)
    stop = whole[20:23]
    at = whole.index(stop)
    parts = stream(params, CFG, TEXT, 60, tokenizer=LETTERS, key=KEYS[:1], chunk=chunk, stop=["never", stop])
    assert "".join(parts) == whole[:at]
    read = [*LETTERS.encode(TEXT + whole[: at + 3])]
    states_close(parts.session, prefill(params, CFG, read))


def test_stop_strings_of_one_row_leave_the_others(params):
    whole = text(params, [TEXT, "p"])
    stop = whole[0][20:23]
    found, session = text(params, [TEXT, "p"], stop=stop, with_session=True)
    assert found == [t[: t.index(stop)] if stop in t else t for t in whole]
    assert found[1] != "" and len(found[1]) != len(found[0])
    for row, prompt in enumerate([TEXT, "p"]):
        read = [*LETTERS.encode(prompt + found[row] + stop * (stop in whole[row]))]
        states_close(session.rows([row]), prefill(params, CFG, read))


def test_text_ends_before_a_stop_token(params):
    whole = text(params)
    stop = int(LETTERS.encode(whole[9])[0])
    assert text(params, stop=stop) == whole[: whole.index(whole[9])]


def test_streams_end_with_their_last_token(params):
    """A stop string that has begun when the tokens end is text."""
    whole = text(params)
    assert text(params, stop=whole[-1] + "never") == whole


class Broken(ByteTokenizer):
    """Draws of a model of 23 ids, as bytes that are whole characters only now and then."""

    table = "aé€😀".encode() + bytes([0xFF, 0x80]) + b"bcdef\n ghi"
    vocab_size, separator = 23, None

    def encode(self, text):
        return np.zeros(len(text), np.int32)

    def decode(self, ids):
        return bytes(self.table[i % len(self.table)] for i in ids).decode(errors="replace")


@pytest.mark.parametrize("chunk", [1, 4])
def test_half_characters_wait_for_their_other_half(params, chunk):
    settings = {"key": KEYS[:1], "temperature": 3.0}
    tokens = generate(params, CFG, np.zeros(2, int), 200, **settings)
    parts = list(stream(params, CFG, "xx", 200, tokenizer=Broken(), chunk=chunk, **settings))
    assert "".join(parts) == Broken().decode(tokens[0])
    assert any("�" in part for part in parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], []]}, "prompt is empty"),
        ({"prompt": [[1], [23]]}, r"token ids must be in \[0, 23\)"),
        ({"prompt": [[-1]]}, r"token ids must be in \[0, 23\)"),
        ({"prompt": [[0.5]]}, "holds token ids, not float64"),
        ({"prompt": np.zeros((1, 1, 1), int)}, "1 or 2 axes, not 3"),
        ({"prompt": None}, "neither a prompt nor a session"),
        ({"prompt": "abc"}, "needs a tokenizer"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"piece": 0}, "piece=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"limit": 24}, "limit=24"),
        ({"stop": [23]}, r"stop token \[23\] is outside"),
        ({"stop": "x"}, "stop strings go with prompts that are text"),
        ({"prompt": "a", "tokenizer": LETTERS, "stop": ""}, "stop string"),
        ({"prompt": "a", "tokenizer": LETTERS, "stop": [0.5]}, "stop string"),
        ({"key": KEYS}, "keys for 1 rows"),
        ({"top_p": 2.0}, "top_p=2.0"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(params, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate(params, CFG, **{"prompt": [[1]], "steps": 2, **changes})
    assert "\n" not in str(caught.value)


def test_as_many_prompts_as_texts(params):
    session = prefill(params, CFG, PROMPTS[:2])
    with pytest.raises(ValueError, match="3 prompts for 2 texts"):
        generate(params, CFG, PROMPTS, 2, session=session)


def test_logits_that_are_no_numbers_are_said(params):
    broken = {**params, "norm_final": params["norm_final"] * np.nan}
    with pytest.raises(RuntimeError, match="logits of row 0 are not finite"):
        generate(broken, CFG, [[1]], 2)


def test_pieces_refuse_what_the_whole_refuses(params):
    cfg = dataclasses.replace(CFG, pattern=(registry.config("attention", 16, max_length=8),))
    here = lm.init(jax.random.key(0), cfg)
    for piece in (4, 100):
        with pytest.raises(ValueError, match="9 tokens are more than max_length=8"):
            prefill(here, cfg, np.zeros(9, int), piece=piece)
