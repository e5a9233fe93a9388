"""Published weights (tests/oracles/transformers_models.py): logits, continuations, and the way back."""

import json
import pathlib
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import config
from zoo import lm, mlp, registry
from zoo.pretrained import load_pretrained, save_pretrained

FOLDERS = sorted((pathlib.Path(__file__).parent / "oracles" / "fixtures").glob("pretrained_*"))
PROMPT = 33


def float32(folder, **more):
    """With the precision of those who made the fixture."""
    return load_pretrained(folder, dtype=np.float32, **more)


# One of a kind for every round of work, the others with `make test-deep`: nearly all of it is compilation.
FIRST = {"pretrained_mamba", "pretrained_recurrent_gemma", "pretrained_qwen3_next", "pretrained_gla"}
MARKED = [pytest.param(f, marks=() if f.name in FIRST else pytest.mark.deep) for f in FOLDERS]


@pytest.mark.parametrize("folder", MARKED, ids=[f.name.removeprefix("pretrained_") for f in FOLDERS])
def test_logits_and_continuation(folder):
    """200 tokens at once; then 20 of them found greedily, by a prefill and single steps."""
    cfg, params = float32(folder)
    expected = load_file(folder / "expected.safetensors")
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    run = jax.jit(lambda params, tokens: lm.apply(params, cfg, tokens)[:2])
    logits, _ = run(params, tokens)
    error = np.abs(logits - expected["logits"]).max() / np.abs(expected["logits"]).max()
    print(f"{folder.name}: {error:.1e}")
    assert error <= 1e-4

    def go_on(carry, _):
        state, token = carry
        logits, state = lm.step(params, cfg, token, state)
        return (state, jnp.argmax(logits, -1)), token

    @jax.jit
    def greedy(params, prompt):
        logits, state, _ = lm.apply(params, cfg, prompt)
        return jax.lax.scan(go_on, (state, jnp.argmax(logits[:, -1], -1)), None, 20)[1].T

    np.testing.assert_array_equal(greedy(params, tokens[:, :PROMPT]), expected["greedy"])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name.removeprefix("pretrained_"))
def test_export_of_an_import_is_the_checkpoint(folder, tmp_path):
    cfg, params = float32(folder)
    save_pretrained(tmp_path / "out", cfg, params, like=folder)
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "out", folder))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and ours[key].shape == theirs[key].shape
        assert ours[key].tobytes() == theirs[key].tobytes(), key
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def broken(tmp_path, name="qwen3_next", config=(), drop=(), **tensors):
    """A copy of a fixture with changes to its options and tensors."""
    source = next(f for f in FOLDERS if f.name == f"pretrained_{name}")
    folder = tmp_path / "broken"
    shutil.copytree(source, folder)
    options = json.loads((folder / "config.json").read_text()) | dict(config)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in options.items() if v != "absent"}))
    arrays = load_file(folder / "model.safetensors") | {k: np.asarray(v) for k, v in tensors.items()}
    save_file({k: v for k, v in arrays.items() if k not in drop}, folder / "model.safetensors")
    return folder


def test_all_that_is_wrong_with_tensors_is_one_message(tmp_path):
    at = "model.layers.0.linear_attn"
    folder = broken(
        tmp_path,
        drop=[f"{at}.A_log", "lm_head.weight"],
        **{"mtp.fc.weight": np.zeros((3, 4), np.float32), f"{at}.dt_bias": np.zeros(5, np.float32)},
        **{"model.norm.weight": np.zeros(20, np.int8)},
    )
    with pytest.raises(ValueError, match="5 problems") as caught:
        float32(folder)
    for line in (
        f"tensor {at}.A_log [6] is missing",
        "tensor lm_head.weight [61, 20] is missing",
        "tensor mtp.fc.weight [3, 4] is unknown",
        f"tensor {at}.dt_bias is [5], not [6]",
        "tensor model.norm.weight has dtype I8",
    ):
        assert line in str(caught.value)


def test_all_that_is_wrong_with_options_is_in_it_too(tmp_path):
    changes = {
        "surprise": 1,
        "hidden_act": "relu",
        "attention_bias": True,
        "head_dim": "8",
        "vocab_size": "absent",
    }
    with pytest.raises(ValueError) as caught:
        float32(broken(tmp_path, config=changes))
    for line in (
        "option surprise=1 is unknown",
        "option hidden_act='relu' is not supported",
        "option attention_bias=True is not supported",
        "option head_dim='8' must be of type int",
        "option vocab_size is missing",
    ):
        assert line in str(caught.value)


def test_options_that_are_read_late_are_refused_by_name(tmp_path):
    changes = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
    folder = broken(tmp_path, config=changes, extra=np.zeros(2, np.float32))
    with pytest.raises(ValueError) as caught:
        float32(folder)
    for line in (
        "rope_type='yarn' is not supported",
        "rope_parameters.factor=4.0 is unknown",
        "tensor extra [2]",
    ):
        assert line in str(caught.value)


def test_tensors_are_left_out_on_purpose_only(tmp_path):
    folder = broken(tmp_path, **{"mtp.fc.weight": np.zeros((3, 4), np.float32)})
    with pytest.raises(ValueError, match=r"mtp\.fc\.weight"):
        float32(folder)
    assert float32(folder, without=("mtp.",))[0].vocab_size == 61


def test_a_file_that_was_cut_short(tmp_path):
    folder = broken(tmp_path, config={"surprise": 1})
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors cannot be read.*surprise"):
        float32(folder)


def test_types_that_are_not_supported_name_those_that_are(tmp_path):
    with pytest.raises(
        ValueError, match="model_type='llama' is not supported; these are: mamba, falcon_mamba"
    ):
        float32(broken(tmp_path, config={"model_type": "llama"}))


def test_nothing_but_safetensors_is_read(tmp_path):
    folder = broken(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model\.bin, a pickle, which is not read"):
        float32(folder)
    with pytest.raises(FileNotFoundError, match="neither a directory nor the name of a model"):
        float32(tmp_path / "nowhere")


def sharded(folder, parts=3):
    """The weights in several files with an index."""
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {key: f"model-{i % parts}.safetensors" for i, key in enumerate(arrays)}
    for name in set(where.values()):
        save_file({k: v for k, v in arrays.items() if where[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return where


def test_shards_are_one_checkpoint(tmp_path):
    folder = broken(tmp_path, "mamba")
    _, whole = float32(folder)
    where = sharded(folder)
    cfg, parts = float32(folder)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    save_pretrained(tmp_path / "out", cfg, parts, like=folder, shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    jax.tree.map(np.testing.assert_array_equal, float32(tmp_path / "out")[1], whole)
    key = next(iter(where))
    index = {"weight_map": where | {key: "model-9.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-9\.safetensors cannot be read"):
        float32(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "linked.safetensors"]
)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    folder = broken(tmp_path, "mamba")
    where = sharded(folder)
    shutil.copy(folder / "model-0.safetensors", tmp_path / "model.safetensors")
    (folder / "linked.safetensors").symlink_to(tmp_path / "model.safetensors")
    where = {k: name if v == "model-0.safetensors" else v for k, v in where.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match="leads out of the folder"):
        float32(folder)


def test_the_hubs_cache_keeps_files_beside_its_snapshots(tmp_path):
    source = broken(tmp_path, "mamba")
    snapshot, blobs = tmp_path / "models--x/snapshots/abc", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(source.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    assert float32(snapshot)[0] == float32(source)[0]


def test_dtype_and_sharding_are_chosen_on_load(tmp_path):
    folder = broken(tmp_path, "mamba")
    cfg, half = load_pretrained(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    save_pretrained(tmp_path / "half", cfg, half, like=folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    seen = {}

    def sharding(path, shape):
        seen[path] = shape
        return here

    _, params = load_pretrained(folder, dtype=None, sharding=sharding)
    assert seen["blocks/0/0/mixer/w_in"] == (3, 20, 80) and seen["w_embed"] == (61, 20)
    assert all(leaf.sharding == here and leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_a_tied_head_that_is_written_out(tmp_path):
    """It is the embedding, or the checkpoint contradicts itself; and it is exported again."""
    source = next(f for f in FOLDERS if f.name == "pretrained_mamba")
    embedding = load_file(source / "model.safetensors")["backbone.embeddings.weight"]
    folder = broken(tmp_path, "mamba", **{"lm_head.weight": embedding})
    cfg, params = float32(folder)
    save_pretrained(tmp_path / "out", cfg, params, like=folder)
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].tobytes() == embedding.tobytes()
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="differs from the embedding"):
        float32(broken(tmp_path, "mamba", **{"lm_head.weight": embedding + 1}))


def test_constants_that_their_files_carry_are_checked(tmp_path):
    wrong = {"model.layers.0.self_attn.slope_rate": np.full((4, 1, 1), 0.3, np.float32)}
    with pytest.raises(ValueError, match="slope_rate is not what the options make it"):
        float32(broken(tmp_path, "minimax", **wrong))


def test_an_export_is_of_the_model_it_is_like(tmp_path):
    cfg, params = float32(FOLDERS[0])
    with pytest.raises(ValueError, match="the model differs"):
        save_pretrained(tmp_path / "out", cfg, params, like=broken(tmp_path, "mamba"))
    assert not (tmp_path / "out").exists()
    save_pretrained(tmp_path / "out", cfg, params, like=FOLDERS[0])
    with pytest.raises(FileExistsError, match="already holds"):
        save_pretrained(tmp_path / "out", cfg, params, like=FOLDERS[0])


def test_what_models_may_have_besides_leaves_written_configs_as_they_were():
    """Fields that came for them are not written while they say nothing, so that runs keep their addresses."""
    later = {
        "qk_norm",
        "out_bias",
        "eps",
        "embed_scale",
        "logit_cap",
        "inner_scale",
        "key_heads",
        "gate_bias",
        "norm_embed",
        "first",
        "cumulative",
        "values",
        "value_rank",
        "unit_eps",
        "routed_queries",
        "own_projections",
    }
    names = ("attention", "mamba", "mamba2", "gated_delta_net", "kda", "gla", "retnet", "hgrn2", "rwkv7")
    for name in (*names, "mixture_of_memories"):
        cfg = lm.Config(vocab_size=7, width=16, depth=2, pattern=(registry.config(name, 16),))
        saved = config.to_dict(cfg)
        assert not later & (saved.keys() | saved["pattern"][0].keys())
    full, _ = float32(next(f for f in FOLDERS if f.name == "pretrained_qwen3_next"))
    assert config.from_dict(json.loads(json.dumps(config.to_dict(full)))) == full


def test_numbers_of_a_model_with_blocks_of_its_own():
    """Counted by hand from a mixture of 5 experts of 9, 2 a token, one of 11 for all, in 4 of 5 blocks."""
    cfg, params = float32(next(f for f in FOLDERS if f.name == "pretrained_qwen3_next"))
    assert lm.param_count(cfg) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert lm.param_count(cfg) - lm.active_param_count(cfg) == 4 * 3 * (3 * 20 * 9)
    mixers = sum(layer.flops_per_token(100) for layer in cfg.layers)
    mixtures = 4 * (2 * 3 * 20 * 9 + 20 * 5 + 3 * 20 * 11 + 20)
    assert lm.flops_per_token(cfg, 100) == mixers + 2 * (mixtures + 3 * 20 * 29) + 2 * 20 * 61
    assert lm.state_bytes(cfg) == sum(layer.state_bytes() for layer in cfg.layers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 4, "bias": True}, "experts have no biases"),
        ({"experts": 4, "experts_per_token": 5}, "experts_per_token=5 exceeds experts=4"),
        ({"experts": 6, "expert_groups": 3}, "need sigmoid scores"),
        ({"experts": 6, "expert_groups": 4, "score": "sigmoid"}, "groups of 6 experts"),
        ({"experts": 4, "score_bias": True}, "score_bias needs sigmoid scores"),
        ({"kind": "relu"}, "choose from swiglu, geglu, gelu"),
    ],
)
def test_mlps_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        mlp.Config(hidden=8, **fields)


def test_kimi_linear_in_the_spelling_of_its_publisher(tmp_path):
    """Sizes and places of the linear layers in a table, counted from 1, and dense MLPs by their own name."""
    theirs = {"kda_layers": [1, 2, 3, 4], "full_attn_layers": [5], "head_dim": 6, "num_heads": 2}
    changes = {"linear_attn_config": theirs | {"short_conv_kernel_size": 4}, "first_k_dense_replace": 1}
    gone = ("layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim")
    source = next(f for f in FOLDERS if f.name == "pretrained_kimi_linear")
    arrays = load_file(source / "model.safetensors")
    named = [k for k in arrays if "layers.0.block_sparse_moe" in k]
    renamed = {k.replace("block_sparse_moe", "mlp"): arrays[k] for k in named}
    changes |= dict.fromkeys(gone, "absent")
    folder = broken(tmp_path, "kimi_linear", config=changes, drop=named, **renamed)
    (cfg, params), (expected, original) = float32(folder), float32(source)
    assert cfg == expected
    jax.tree.map(np.testing.assert_array_equal, params, original)
    changes["linear_attn_config"] = theirs | {"beta_scale": 2}
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"linear_attn_config\.beta_scale is unknown"):
        float32(broken(tmp_path, "kimi_linear", config=changes, drop=named, **renamed))


def test_names_on_the_hub_need_its_package(tmp_path, monkeypatch):
    folder, seen = broken(tmp_path, "mamba"), []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^somebody/mamba is no directory; to fetch it, pip install"
    ):
        float32("somebody/mamba")
    fake = types.ModuleType("huggingface_hub")
    fake.snapshot_download = lambda name, **how: seen.append((name, how)) or str(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert float32("somebody/mamba", revision="v1")[0] == float32(folder)[0]
    assert seen[0][0] == "somebody/mamba" and seen[0][1]["revision"] == "v1"
    assert not any(pattern.endswith((".bin", ".py")) for pattern in seen[0][1]["allow_patterns"])
