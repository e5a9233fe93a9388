"""The DPLR rule as GPU kernels throughout, in the interpreter: against the definition."""

import pytest
from kernels import (
    BOUND,
    assert_no_races,
    assert_parity,
    cut_into_spans,
    head_inputs,
    on_documents,
    rates,
    results,
    unit_keys,
)

from pallas_kernels.dplr import dplr

deep = pytest.mark.deep


@pytest.fixture(autouse=True)
def small(monkeypatch):
    cut_into_spans(monkeypatch)


def arguments(length, decay, dtype, *, separate=True, correlation=0.0, **sizes):
    """What `a` recalls is removed at a rate, and written are v with a key of its own or with b."""
    q, k, v, g, state = head_inputs(length, decay, **sizes)
    removed = unit_keys(k[:, ::-1], correlation)
    tokens = q, k * k.shape[-1] ** -0.5, v, -removed, rates(k) * removed
    q, k, v, a, b = (x.astype(dtype) for x in tokens)
    return q, k if separate else None, v, a, b, g, state


def rule(batch, length, packed):
    return on_documents(dplr, batch, length, packed)


@pytest.mark.parametrize(
    ("length", "packed", "decay", "dtype", "how"),
    [
        (131, True, "channel", "bfloat16", {"K": 16}),
        (5, False, "head", "bfloat16", {"separate": False}),
        pytest.param(70, True, "head", "float32", {"separate": False}, marks=deep),
        pytest.param(131, True, "channel", "float32", {}, marks=deep),
        pytest.param(1, False, "head", "bfloat16", {"B": 2}, marks=deep),
        pytest.param(250, False, "none", "bfloat16", {"separate": False, "H": 2}, marks=deep),
        pytest.param(250, True, "channel", "bfloat16", {"K": 256, "V": 128}, marks=deep),
        pytest.param(53, True, "channel", "float32", {"V": 72, "B": 2}, marks=deep),
        pytest.param(131, False, "channel", "bfloat16", {"K": 128, "separate": False}, marks=deep),
    ],
)
def test_values_and_gradients(length, packed, decay, dtype, how):
    given = arguments(length, decay, dtype, **how)
    assert_parity(rule(len(given[0]), length, packed), given, "gpu", BOUND[dtype])


@pytest.mark.parametrize(("length", "separate"), [(70, False), pytest.param(131, True, marks=deep)])
def test_a_recalls_the_memory_before_gates_that_forget_at_once(length, separate):
    """No exponent is positive, and what is recalled of the token before is exact."""
    q, k, v, a, b, g, state = arguments(length, "channel", "float32", separate=separate)
    g = g.at[:, 1::9].set(-400.0).at[:, 3::9, :, ::2].set(-90.0)
    assert_parity(rule(1, length, False), (q, k, v, a, b, g, state), "gpu", BOUND["float32"])


@deep
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_that_are_nearly_one(dtype):
    """Correlated keys: the inverse of a chunk has large entries that cancel."""
    given = arguments(131, "channel", dtype, correlation=2.0)
    assert_parity(rule(1, 131, False), given, "gpu", BOUND[dtype])


def test_refuses_what_shared_memory_cannot_hold_and_mixed_types():
    q, *rest = arguments(1, "channel", "bfloat16")
    with pytest.raises(ValueError, match="of one dtype"):
        results(rule(1, 1, False), (q.astype("float32"), *rest), "gpu")
    with pytest.raises(ValueError, match="float32 keys of at most 64 channels"):
        results(rule(1, 1, False), arguments(1, "head", "float32", K=65), "gpu")
    with pytest.raises(ValueError, match="values of at most 256 channels"):
        results(rule(1, 1, False), arguments(1, "head", "bfloat16", V=257), "gpu")


@deep
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_races(dtype, monkeypatch):
    assert_no_races(rule(1, 250, True), arguments(250, "channel", dtype), monkeypatch)
