"""Published weights of flash-linear-attention whose options change which tensors there are.

Their numbers: tests/test_pretrained.py.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_pretrained import FOLDERS, broken, float32

from layers import hgrn2, mixture_of_memories, rwkv7
from zoo.pretrained import save_pretrained


def fixture(name):
    return next(f for f in FOLDERS if f.name == f"pretrained_{name}")


def tensors(name):
    return load_file(fixture(name) / "model.safetensors")


def exported(folder, tmp_path):
    """The model of `folder`, after a check that its export is what it came from."""
    cfg, params = float32(folder)
    save_pretrained(tmp_path / "out", cfg, params, like=folder)
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "out", folder))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)
    return cfg, params


def test_older_files_of_rwkv7_have_all_shifts_in_one_tensor(tmp_path):
    arrays, names = tensors("rwkv7"), ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
    separate = {at: [f"model.layers.{at}.attn.{name}" for name in names] for at in range(4)}
    together = {
        f"model.layers.{at}.attn.x_x": np.concatenate([arrays[key].reshape(1, -1) for key in keys])
        for at, keys in separate.items()
    }
    gone = [key for keys in separate.values() for key in keys]
    cfg, params = exported(broken(tmp_path, "rwkv7", drop=gone, **together), tmp_path)
    expected = float32(fixture("rwkv7"))
    assert cfg == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])


def test_rwkv7_without_biases_and_first_norm(tmp_path):
    gone = [key for key in tensors("rwkv7") if key.endswith("norm.bias") and "g_norm" not in key]
    gone += ["model.layers.0.pre_norm.weight", "lm_head.weight"]
    changes = {"norm_bias": False, "norm_first": False, "tie_word_embeddings": True, "fuse_norm": False}
    cfg, params = exported(broken(tmp_path, "rwkv7", config=changes, drop=gone), tmp_path)
    assert "norm_embed" not in params and "w_head" not in params and params["norm_final"].shape == (24,)
    assert [layer.values for layer in cfg.layers if isinstance(layer, rwkv7.Config)] == ["first"] + [
        "mixed"
    ] * 3
    assert {layer.unit_eps for layer in cfg.layers if isinstance(layer, rwkv7.Config)} == {1e-24}


def test_hgrn2_without_bounds(tmp_path):
    folder = broken(tmp_path, "hgrn2", {"use_lower_bound": False}, drop=["model.lower_bounds"])
    cfg, _ = exported(folder, tmp_path)
    assert cfg.layers == (hgrn2.Config(width=24, head_dim=8),) * 3


@pytest.mark.parametrize("shared", [True, False])
def test_mom_with_one_projection_for_all_memories(shared, tmp_path):
    own = [
        key
        for key in tensors("mom")
        if any(f"{letter}_proj.{n}" in key for letter in "kvab" for n in range(3))
    ]
    changes = {"single_kv_proj": True, "shared_mem": shared}
    cfg, _ = exported(broken(tmp_path, "mom", changes, drop=own), tmp_path)
    assert not cfg.layers[0].own_projections and cfg.layers[0].shared is shared


def test_mom_without_shared_memory_and_gate(tmp_path):
    gone = [key for key in tensors("mom") if "shared_" in key or "g_proj" in key]
    changes = {"use_output_gate": False, "shared_mem": False, "topk": 1}
    cfg, _ = exported(broken(tmp_path, "mom", changes, drop=gone), tmp_path)
    layer = cfg.layers[0]
    assert isinstance(layer, mixture_of_memories.Config) and (layer.gate, layer.top_k) == (False, 1)


ATTENTION = {"layers": [1], "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "changes", "lines"),
    [
        (
            "rwkv7",
            {"attn": ATTENTION, "hidden_act": "relu", "value_dim": [48] * 4, "norm_eps": "small"},
            (
                "attn={",
                "hidden_act='relu' is",
                "value_dim=[48, 48, 48, 48] contradicts",
                "norm_eps='small' must",
            ),
        ),
        (
            "mom",
            {"attn": ATTENTION, "use_short_conv": False, "mom_backend": "gla", "num_slots": 3},
            ("attn={", "use_short_conv=False is", "mom_backend='gla' is", "num_slots=3 is unknown"),
        ),
        (
            "hgrn2",
            {"attn": ATTENTION, "use_short_conv": True, "num_heads": 4, "attnres_block_size": 2},
            ("attn={", "use_short_conv=True is", "num_heads=4 contradicts", "attnres_block_size=2 is"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_refused_at_once(name, changes, lines, tmp_path):
    folder = broken(tmp_path, name, changes, drop=["model.norm.weight"])
    with pytest.raises(ValueError, match=f"{len(lines) + 1 - ('norm_eps' in changes)} problems") as caught:
        float32(folder)
    assert all(f"option {line}" in str(caught.value) for line in lines)
    assert json.loads((folder / "config.json").read_text()).keys() >= changes.keys()
