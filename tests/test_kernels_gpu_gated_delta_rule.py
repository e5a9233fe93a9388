"""The gated delta rule as GPU kernels throughout, in the interpreter: against the definition."""

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

from pallas_kernels.gated_delta_rule import gated_delta_rule

deep = pytest.mark.deep


@pytest.fixture(autouse=True)
def small(monkeypatch):
    cut_into_spans(monkeypatch)


def arguments(length, decay, dtype, correlation=0.0, **sizes):
    q, k, v, g, state = head_inputs(length, decay, **sizes)
    k = unit_keys(k, correlation)
    return *(x.astype(dtype) for x in (q, k, rates(k) * v, rates(k) * k)), g, state


def rule(batch, length, packed):
    return on_documents(gated_delta_rule, batch, length, packed)


@pytest.mark.parametrize(
    ("length", "packed", "decay", "dtype", "sizes"),
    [
        (131, True, "head", "float32", {}),
        (131, True, "channel", "bfloat16", {"K": 16}),
        pytest.param(1, False, "head", "bfloat16", {"B": 2}, marks=deep),
        pytest.param(131, True, "channel", "float32", {"V": 128}, marks=deep),
        pytest.param(250, True, "head", "bfloat16", {"K": 256, "V": 128}, marks=deep),
        pytest.param(131, False, "channel", "bfloat16", {"K": 128, "H": 2}, marks=deep),
        pytest.param(53, True, "channel", "float32", {"V": 24, "B": 2}, marks=deep),
    ],
)
def test_values_and_gradients(length, packed, decay, dtype, sizes):
    given = arguments(length, decay, dtype, **sizes)
    assert_parity(rule(len(given[0]), length, packed), given, "gpu", BOUND[dtype])


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=deep), "bfloat16"])
def test_keys_that_are_nearly_one(dtype):
    """Correlated keys: the inverse of a chunk has large entries that cancel."""
    given = arguments(131, "head", dtype, correlation=2.0)
    assert_parity(rule(1, 131, False), given, "gpu", BOUND[dtype])


def test_refuses_what_shared_memory_cannot_hold():
    with pytest.raises(ValueError, match="float32 keys of at most 64 channels"):
        results(rule(1, 1, False), arguments(1, "head", "float32", K=65), "gpu")
    with pytest.raises(ValueError, match="at most 256 channels"):
        results(rule(1, 1, False), arguments(1, "head", "bfloat16", V=257), "gpu")


@deep
@pytest.mark.parametrize(("decay", "dtype"), [("head", "float32"), ("channel", "bfloat16")])
def test_no_races(decay, dtype, monkeypatch):
    assert_no_races(rule(1, 250, True), arguments(250, decay, dtype), monkeypatch)
