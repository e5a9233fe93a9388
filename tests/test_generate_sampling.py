"""Samplers against definitions in NumPy, and against the probabilities that they state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.generation import sampling
from zoo.generation.sampling import Sampling

V, DRAWS = 9, 20_000
NEVER = -np.inf


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def by_rank(x):
    """Ids from the likeliest; of equal ones the lowest first."""
    return sorted(range(len(x)), key=lambda i: (-x[i], i))


def only(x, kept):
    return np.array([x[i] if i in kept else NEVER for i in range(len(x))])


def numpy_top_k(x, k):
    return only(x, by_rank(x)[:k])


def numpy_top_p(x, p):
    likely, kept, total = softmax(x), [], 0.0
    for i in by_rank(x):
        kept.append(i)
        total += likely[i]
        if total >= p:
            break
    return only(x, kept)


def numpy_min_p(x, p):
    likely = softmax(x)
    return only(x, np.flatnonzero(likely >= p * likely.max()))


def numpy_penalised(x, seen, penalty):
    return np.array(
        [(v / penalty if v > 0 else v * penalty) if s else v for v, s in zip(x, seen, strict=True)]
    )


def cases(seed):
    """Logits: generic, with ties, with one that towers, with some that are excluded."""
    random = np.random.default_rng(seed)
    generic = random.normal(size=V) * 2
    tied = random.integers(-1, 2, V).astype(float)
    towering = np.where(np.arange(V) == 4, 50.0, generic)
    return [generic, tied, towering, np.where(np.arange(V) % 3 == 0, NEVER, generic)]


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (sampling.top_k, numpy_top_k, range(1, V + 1)),
        (sampling.top_p, numpy_top_p, (1e-9, 0.1, 0.5, 0.9, 0.999)),
        (sampling.min_p, numpy_min_p, (1e-6, 0.05, 0.3, 0.99)),
    ],
)
def test_filters_are_their_definitions(ours, theirs, settings):
    for setting in settings:
        filtered = jax.jit(lambda x, s=setting: ours(x, s))
        for seed in range(5):
            for x in cases(seed):
                np.testing.assert_array_equal(filtered(x), theirs(x, setting), err_msg=f"{setting} {x}")


def test_min_p_keeps_the_likeliest_of_all_ties():
    np.testing.assert_array_equal(sampling.min_p(jnp.zeros(V), 1.0), np.zeros(V))


def test_penalty_is_its_definition():
    random = np.random.default_rng(0)
    for penalty in (0.5, 1.0, 1.7):
        x, seen = random.normal(size=V), random.random(V) < 0.5
        expected = numpy_penalised(x, seen, penalty)
        np.testing.assert_allclose(sampling.penalised(x, seen, penalty), expected, rtol=1e-15)


def counts(settings, x, seen=None):
    """How often each token comes in DRAWS draws."""
    seen = jnp.zeros(V, bool) if seen is None else jnp.asarray(seen)
    keys = jax.random.split(jax.random.key(7), DRAWS)
    tokens = jax.jit(jax.vmap(lambda key, s: s(key, jnp.asarray(x), seen), (0, None)))(keys, settings)
    return np.bincount(tokens, minlength=V)


def assert_drawn_from(drawn, likely):
    """Within 5 standard deviations of a binomial, and never where the probability is 0."""
    deviation = np.sqrt(DRAWS * likely * (1 - likely))
    assert np.all(np.abs(drawn - DRAWS * likely) <= 5 * deviation + 1e-9), (drawn / DRAWS, likely)


def test_draws_have_the_stated_probabilities():
    x = np.array([0.9, 0.6, 0.4, -0.2, -0.3, -0.5, -0.6, -1.0, -3.0])
    seen = np.arange(V) % 2 == 0
    y = numpy_penalised(x, seen, 1.5) / 0.7
    assert_drawn_from(counts(Sampling(), x), softmax(x))
    assert_drawn_from(counts(Sampling(temperature=2.5), x), softmax(x / 2.5))
    assert_drawn_from(counts(Sampling(top_k=3), x), softmax(numpy_top_k(x, 3)))
    assert_drawn_from(counts(Sampling(top_p=0.8), x), softmax(numpy_top_p(x, 0.8)))
    assert_drawn_from(counts(Sampling(min_p=0.2), x), softmax(numpy_min_p(x, 0.2)))
    every = Sampling(temperature=0.7, top_k=7, top_p=0.95, min_p=0.3, repetition_penalty=1.5)
    parts = [y, numpy_top_k(y, 7)]
    parts.append(numpy_top_p(parts[-1], 0.95))
    parts.append(expected := numpy_min_p(parts[-1], 0.3))
    left = [int(np.isfinite(part).sum()) for part in parts]
    assert left == sorted(set(left), reverse=True) and left[-1] > 1  # every part has something to do
    assert_drawn_from(counts(every, x, seen), softmax(expected))


def test_the_count_test_can_fail():
    x = cases(3)[0]
    with pytest.raises(AssertionError):
        assert_drawn_from(counts(Sampling(temperature=1.05), x), softmax(x))


def test_greedy_takes_the_first_of_the_largest():
    x = np.array([0.0, 3.0, 3.0, 1.0])
    assert Sampling(temperature=None)(jax.random.key(0), jnp.asarray(x), jnp.zeros(4, bool)) == 1
    penalised = Sampling(temperature=None, repetition_penalty=2.0)
    assert penalised(jax.random.key(0), jnp.asarray(x), jnp.arange(4) == 1) == 2


def test_another_temperature_is_no_other_program():
    compiled = []

    @jax.jit
    def draw(settings, key, x):
        compiled.append(settings)
        return settings(key, x, jnp.zeros(V, bool))

    for temperature in (0.5, 1.0, 2.0):
        draw(Sampling(temperature=temperature, top_p=0.9), jax.random.key(0), jnp.zeros(V))
    assert len(compiled) == 1


def test_what_does_nothing_is_left_out():
    found = sampling.checked(Sampling(temperature=0, top_k=V, top_p=1.0, repetition_penalty=1), V)
    assert found == Sampling(temperature=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": "hot"}, "temperature='hot' must be a finite number"),
        ({"top_k": 0}, r"top_k=0 must be an integer in \[1, 9\]"),
        ({"top_k": 10}, "top_k=10"),
        ({"top_k": 2.0}, "top_k=2.0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -1.0}, "min_p=-1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        sampling.checked(Sampling(**settings), V)
