"""Gated linear attention on a GPU, in the interpreter: values and gradients against the definition."""

import jax.numpy as jnp
import pytest
from kernels import BOUND, assert_no_races, assert_parity, cut_into_spans, head_inputs, on_documents, results

from pallas_kernels.gated_linear_attention import gated_linear_attention

deep = pytest.mark.deep


@pytest.fixture(autouse=True)
def small(monkeypatch):
    cut_into_spans(monkeypatch)


def arguments(length, decay, dtype, **sizes):
    *tokens, g, state = head_inputs(length, decay, **sizes)
    return *(x.astype(dtype) for x in tokens), g, state


def attention(batch, length, packed):
    return on_documents(gated_linear_attention, batch, length, packed)


@pytest.mark.parametrize(
    ("length", "packed", "decay", "dtype", "sizes"),
    [
        (131, True, "head", "float32", {}),
        (250, True, "head", "bfloat16", {"H": 2}),
        (131, True, "channel", "bfloat16", {"K": 16}),
        pytest.param(1, False, "head", "float32", {"B": 2}, marks=deep),
        pytest.param(1, False, "channel", "bfloat16", {"B": 2}, marks=deep),
        pytest.param(53, False, "none", "float32", {"G": 2, "H": 2, "V": 72}, marks=deep),
        pytest.param(131, True, "head", "bfloat16", {"B": 2, "K": 256, "V": 128}, marks=deep),
        pytest.param(131, True, "channel", "bfloat16", {"K": 256, "H": 2, "V": 128}, marks=deep),
        pytest.param(131, False, "head", "float32", {"K": 128}, marks=deep),
        pytest.param(250, True, "channel", "float32", {"K": 72, "B": 2}, marks=deep),
        pytest.param(250, False, "channel", "bfloat16", {"H": 2}, marks=deep),
    ],
)
def test_values_and_gradients(length, packed, decay, dtype, sizes):
    given = arguments(length, decay, dtype, **sizes)
    assert_parity(attention(len(given[0]), length, packed), given, "gpu", BOUND[dtype])


@pytest.mark.parametrize("decay", ["head", pytest.param("channel", marks=deep)])
def test_decays_that_forget_at_once(decay):
    """A gate that closes within a chunk: no exponent is positive, and what is left of the rest is exact."""
    q, k, v, g, state = arguments(70, decay, "float32")
    g = g.at[:, 5::9].set(-400.0)
    assert_parity(attention(1, 70, False), (q, k, v, g, state), "gpu", BOUND["float32"])


def test_refuses_wide_heads_and_mixed_types():
    with pytest.raises(ValueError, match="at most 256 channels"):
        results(attention(1, 1, False), arguments(1, "head", "float32", V=257), "gpu")
    q, *rest = arguments(1, "head", "float32")
    with pytest.raises(ValueError, match="of one dtype"):
        results(attention(1, 1, False), (q.astype(jnp.bfloat16), *rest), "gpu")


@deep
@pytest.mark.parametrize(("decay", "dtype"), [("head", "bfloat16"), ("channel", "float32")])
def test_no_races(decay, dtype, monkeypatch):
    assert_no_races(attention(1, 250, True), arguments(250, decay, dtype), monkeypatch)
