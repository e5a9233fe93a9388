"""Published weights of xLSTM and Zamba2: other spellings, refused options, and weights that are shared.

Their logits, continuations and the way back are in test_pretrained.py.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_pretrained import FOLDERS, broken, float32

from zoo import lm
from zoo.pretrained import save_pretrained

_FUSED = ("q", "k", "v", "ogate_preact")


def fixture(name):
    return next(f for f in FOLDERS if f.name == f"pretrained_{name}")


def test_xlstm_with_fused_matrices(tmp_path):
    """`weight_mode="fused"`: the same numbers in fewer tensors, and back again."""
    source = fixture("xlstm")
    arrays = load_file(source / "model.safetensors")
    parts = {
        "mlstm_layer.qkv_opreact.weight": [
            f"mlstm_layer.{n}.weight" for n in ("q", "k", "v", "ogate_preact")
        ],
        "mlstm_layer.ifgate_preact.weight": [f"mlstm_layer.{n}gate_preact.weight" for n in "if"],
        "mlstm_layer.ifgate_preact.bias": [f"mlstm_layer.{n}gate_preact.bias" for n in "if"],
        "ffn.proj_up_gate_z.weight": ["ffn.proj_up_gate.weight", "ffn.proj_up.weight"],
    }
    blocks = [f"backbone.blocks.{n}." for n in range(3)]
    fused = {
        at + new: np.concatenate([arrays[at + name] for name in names])
        for at in blocks
        for new, names in parts.items()
    }
    gone = [at + name for at in blocks for names in parts.values() for name in names]
    folder = broken(tmp_path, "xlstm", config={"weight_mode": "fused"}, drop=gone, **fused)
    (cfg, params), (expected, original) = float32(folder), float32(source)
    assert cfg == expected
    jax.tree.map(np.testing.assert_array_equal, params, original)
    save_pretrained(tmp_path / "out", cfg, params, like=folder)
    ours = load_file(tmp_path / "out/model.safetensors")
    assert {key: ours[key].tobytes() for key in fused} == {key: a.tobytes() for key, a in fused.items()}


@pytest.mark.parametrize(
    ("name", "changes", "lines"),
    [
        (
            "xlstm",
            {
                "use_bias": True,
                "add_out_norm": False,
                "weight_mode": "split",
                "num_heads": 4,
                "num_blocks": 9,
            },
            [
                "use_bias=True is not supported, only False",
                "add_out_norm=False is not supported, only True",
                "weight_mode='split' is not supported, only 'single' or 'fused'",
                "qk_dim_factor: num_heads=4 does not divide 6 channels",
                "num_blocks=9 contradicts the rest, by which it is 3",
            ],
        ),
        (
            "zamba2",
            {
                "tie_word_embeddings": False,
                "hidden_act": "silu",
                "use_long_context": True,
                "num_key_value_heads": 2,
                "hybrid_layer_ids": [1],
                "layers_block_type": ["mamba", "hybrid", "hybrid", "attention"],
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4},
            },
            [
                "tie_word_embeddings=False is not supported, only True",
                "hidden_act='silu' is not supported, only 'gelu'",
                "use_long_context=True is not supported",
                "use_shared_attention_adapter=True needs as many heads of keys as of queries",
                "hybrid_layer_ids=[1] contradicts the rest, by which it is [1, 2]",
                "layers_block_type has 'attention', not only 'mamba' and 'hybrid'",
                "layers_block_type has 4 entries for 5 layers",
                "rope_type='linear' is not supported",
            ],
        ),
    ],
)
def test_options_of_hybrids_are_refused_by_name(tmp_path, name, changes, lines):
    with pytest.raises(ValueError) as caught:
        float32(broken(tmp_path, name, config=changes))
    for line in lines:
        assert f"option {line}" in str(caught.value)


def test_zamba2_keeps_what_is_shared_once():
    """Two blocks for three calls, and a state for each call."""
    cfg, params = float32(fixture("zamba2"))
    assert [block.calls for block in cfg.blocks] == [None, 0, 1, None, 0] and len(cfg.shared) == 2
    assert len(params["blocks"][-1]) == 2 and lm.param_count(cfg) == sum(
        p.size for p in jax.tree.leaves(params)
    )
    assert lm.state_bytes(cfg) == sum(s.size * 4 for s in jax.tree.leaves(lm.init_state(cfg, 1)))


def test_zamba2_refuses_a_second_copy_that_is_not_left_out(tmp_path):
    source = fixture("zamba2")
    at = "model.layers.{}.shared_transformer.pre_ff_layernorm.weight"
    copy = {at.format(4): load_file(source / "model.safetensors")[at.format(1)]}
    folder = broken(tmp_path, "zamba2", **copy)
    with pytest.raises(ValueError, match=r"tensor model\.layers\.4\.shared_transformer.* is unknown"):
        float32(folder)
    assert float32(folder, without=("model.layers.4.shared_transformer.",))[0] == float32(source)[0]
