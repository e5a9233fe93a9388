"""Models in print have the parameters that the print says; sizes are what they are called."""

import pytest

from zoo import lm, presets


@pytest.mark.parametrize("name", presets.PUBLISHED)
def test_published_counts(name):
    published = presets.PUBLISHED[name].parameters
    count = lm.param_count(presets.model(name))
    if isinstance(published, int):
        assert count == published
    else:
        assert count == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("family", presets.HYBRIDS)
def test_hybrids_come_near_their_budget(family):
    """Whole patterns only, so that a step can be large."""
    for size, (_, budget) in presets.SIZES.items():
        cfg = presets.model(f"{family}-{size}")
        step = len(cfg.pattern) * lm.param_count(cfg) / cfg.depth
        assert abs(lm.param_count(cfg) - budget) <= 0.6 * step


def test_any_layer_has_the_sizes():
    cfg = presets.model("kda-370m", tie=False)
    assert cfg.width == 1024
    assert not cfg.tie
    tied = presets.model("kda-370m")
    assert lm.param_count(tied) == pytest.approx(370e6, rel=0.05)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"unknown preset 'mamba-130' \(did you mean 'mamba-130m'\?\)"):
        presets.model("mamba-130")
