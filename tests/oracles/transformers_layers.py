"""Fixtures from the layers of Hugging Face transformers (see README.md beside this file).

Each function below builds one small layer with random weights, runs it on random inputs in float32 on the CPU
and gives back its weights in this project's layout: matrices `[in, out]`, filters `[taps, channels]`.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers.models.jamba import modeling_jamba as jamba
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.llama import modeling_llama as llama
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.minimax import modeling_minimax as minimax
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next
from transformers.models.recurrent_gemma import modeling_recurrent_gemma as recurrent_gemma

FIXTURES = Path(__file__).parent / "fixtures"
# Longer than a chunk and a multiple of nothing.
BATCH, LENGTH, WIDTH = 2, 75, 24


def randomise(layer):
    """No weight at zero, at one or equal to its neighbour, at a size that keeps activations near one."""
    for name, parameter in layer.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data = torch.randn_like(parameter) * fan_in**-0.5 + ("norm" in name)
    return layer.eval()


def matrix(linear):
    return linear.weight.T


def columns(*linears):
    return torch.cat([matrix(linear) for linear in linears], 1)


def taps(conv):
    return conv.weight[:, 0].T


def mamba_layer(x):
    config = transformers.MambaConfig(hidden_size=WIDTH, state_size=5, expand=2, time_step_rank=3)
    layer = randomise(mamba.MambaMixer(config, 0))
    layer.A_log.data = torch.log(1 + torch.rand_like(layer.A_log) * 5)
    params = {
        "w_in": matrix(layer.in_proj), "conv": taps(layer.conv1d), "conv_bias": layer.conv1d.bias,
        "w_x": matrix(layer.x_proj), "w_dt": matrix(layer.dt_proj), "dt_bias": layer.dt_proj.bias,
        "A_log": layer.A_log, "D": layer.D, "w_out": matrix(layer.out_proj),
    }  # fmt: skip
    return "mamba", {"state_dim": 5, "dt_rank": 3}, params, layer(x)


def jamba_layer(x):
    config = transformers.JambaConfig(hidden_size=WIDTH, mamba_d_state=5, mamba_dt_rank=3, rms_norm_eps=1e-5)
    layer = randomise(jamba.JambaMambaMixer(config, 0))
    layer.A_log.data = torch.log(1 + torch.rand_like(layer.A_log) * 5)
    params = {
        "w_in": matrix(layer.in_proj), "conv": taps(layer.conv1d), "conv_bias": layer.conv1d.bias,
        "w_x": matrix(layer.x_proj), "w_dt": matrix(layer.dt_proj), "dt_bias": layer.dt_proj.bias,
        "dt_scale": layer.dt_layernorm.weight, "b_scale": layer.b_layernorm.weight,
        "c_scale": layer.c_layernorm.weight, "A_log": layer.A_log, "D": layer.D,
        "w_out": matrix(layer.out_proj),
    }  # fmt: skip
    return "mamba", {"state_dim": 5, "dt_rank": 3, "inner_norm": True}, params, layer(x)


def mamba2_layer(x):
    config = transformers.Mamba2Config(
        hidden_size=WIDTH, state_size=6, expand=2, num_heads=6, head_dim=8, n_groups=2, chunk_size=16,
        layer_norm_epsilon=1e-5,
    )  # fmt: skip
    layer = randomise(mamba2.Mamba2Mixer(config, 0))
    params = {
        "w_in": matrix(layer.in_proj), "conv": taps(layer.conv1d), "conv_bias": layer.conv1d.bias,
        "dt_bias": layer.dt_bias, "A_log": layer.A_log, "D": layer.D, "norm_scale": layer.norm.weight,
        "w_out": matrix(layer.out_proj),
    }  # fmt: skip
    return "mamba2", {"state_dim": 6, "head_dim": 8, "groups": 2}, params, layer(x)


def rg_lru_layer(x):
    config = transformers.RecurrentGemmaConfig(
        hidden_size=WIDTH, lru_width=36, num_attention_heads=3, conv1d_width=4, num_hidden_layers=1
    )
    layer = randomise(recurrent_gemma.RecurrentGemmaRecurrentBlock(config, 0))
    lru = layer.rg_lru
    # softplus of it is a rate: not larger than a token's.
    lru.recurrent_param.data = -2 + torch.rand_like(lru.recurrent_param)
    params = {
        "w_x": matrix(layer.linear_x), "x_bias": layer.linear_x.bias, "w_gate": matrix(layer.linear_y),
        "gate_bias": layer.linear_y.bias, "conv": taps(layer.conv_1d), "conv_bias": layer.conv_1d.bias,
        "w_r": lru.recurrent_gate_weight, "r_bias": lru.recurrent_gate_bias.reshape(-1),
        "w_i": lru.input_gate_weight, "i_bias": lru.input_gate_bias.reshape(-1),
        "Lambda": lru.recurrent_param, "w_out": matrix(layer.linear_out), "out_bias": layer.linear_out.bias,
    }  # fmt: skip
    position = torch.arange(LENGTH)[None]
    y = layer(x, position_ids=position, attention_mask=None, cache_position=position[0])
    return "rg_lru", {"channels": 36, "heads": 3}, params, y


def gated_delta_net_layer(x):
    config = transformers.Qwen3NextConfig(
        hidden_size=WIDTH, linear_num_value_heads=3, linear_num_key_heads=3, linear_key_head_dim=6,
        linear_value_head_dim=8, linear_conv_kernel_dim=4, rms_norm_eps=1e-5, num_hidden_layers=4,
    )  # fmt: skip
    layer = randomise(qwen3_next.Qwen3NextGatedDeltaNet(config, 0))
    layer.A_log.data = torch.log(torch.rand_like(layer.A_log) + 0.1)
    # Theirs keeps q, k, v and z (b and a) of one head together.
    heads = matrix(layer.in_proj_qkvz).reshape(WIDTH, 3, -1)
    q, k, v, z = (part.reshape(WIDTH, -1) for part in torch.split(heads, [6, 6, 8, 8], 2))
    b, a = matrix(layer.in_proj_ba).reshape(WIDTH, 3, 2).unbind(2)
    params = {
        "w_qkv": torch.cat([q, k, v], 1), "w_gate": z, "w_beta": b, "w_decay": a, "A_log": layer.A_log,
        "dt_bias": layer.dt_bias, "conv": taps(layer.conv1d), "norm_scale": layer.norm.weight,
        "w_out": matrix(layer.out_proj),
    }  # fmt: skip
    return "gated_delta_net", {"heads": 3, "key_dim": 6, "value_dim": 8}, params, layer(x)


def kda_layer(x):
    config = transformers.KimiLinearConfig(
        hidden_size=WIDTH, linear_num_heads=3, linear_head_dim=8, linear_conv_kernel_dim=4, rms_norm_eps=1e-5,
        num_hidden_layers=4,
    )  # fmt: skip
    layer = randomise(kimi.KimiLinearDeltaAttention(config, 0))
    forget = layer.forget_gate
    forget.A_log.data = torch.log(torch.rand_like(forget.A_log) + 0.1)
    params = {
        "w_qkv": columns(layer.q_proj, layer.k_proj, layer.v_proj), "w_beta": matrix(layer.b_proj),
        "w_decay_down": matrix(forget.f_a_proj), "w_decay_up": matrix(forget.f_b_proj),
        "A_log": forget.A_log.reshape(3, 1), "dt_bias": forget.dt_bias.reshape(3, 8),
        "w_gate_down": matrix(layer.g_a_proj), "w_gate_up": matrix(layer.g_b_proj),
        "gate_bias": torch.zeros(24), "conv": taps(layer.conv1d), "norm_scale": layer.o_norm.weight,
        "w_out": matrix(layer.o_proj),
    }  # fmt: skip
    return "kda", {"heads": 3}, params, layer(x)


def lightning_layer(x):
    config = transformers.MiniMaxConfig(
        hidden_size=WIDTH, num_attention_heads=3, head_dim=8, block_size=16, num_hidden_layers=3,
        layer_types=["linear_attention"] * 3, rms_norm_eps=1e-6,
    )  # fmt: skip
    layer = randomise(minimax.MiniMaxLightningAttention(config, 1))
    # Theirs keeps q, k and v of one head together; the slope of layer 1 of 3, with the constants of its code.
    heads = matrix(layer.qkv_proj).reshape(WIDTH, 3, 3, 8)
    params = {
        "w_qkv": heads.transpose(1, 2).reshape(WIDTH, -1), "w_gate": matrix(layer.output_gate),
        "norm_scale": layer.norm.weight, "w_out": matrix(layer.out_proj),
    }  # fmt: skip
    slope = 1 - 1 / (2 + 1e-5) + 1e-5
    return "lightning_attention", {"heads": 3, "slope": slope}, params, layer(x, None, None)


def attention_layer(x):
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=128,
    )
    config._attn_implementation = "eager"
    layer = randomise(llama.LlamaAttention(config, 0))
    rotation = llama.LlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    params = {
        "w_qkv": columns(layer.q_proj, layer.k_proj, layer.v_proj), "w_out": matrix(layer.o_proj),
    }  # fmt: skip
    return "attention", {"heads": 4, "kv_heads": 2}, params, layer(x, rotation, mask)


def write(make):
    """One fixture; weights and inputs depend on nothing but the layer's place in the list."""
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        name, settings, params, y = make(x)
    y = y[0] if isinstance(y, tuple) else y
    arrays = {"x": x, "y": y} | {f"params/{key}": value for key, value in params.items()}
    metadata = {
        "layer": name,
        "settings": json.dumps(settings),
        "source": f"transformers {transformers.__version__}, torch {torch.__version__}, {make.__name__}",
    }
    numbers = {key: np.ascontiguousarray(value.detach().float().numpy()) for key, value in arrays.items()}
    save_file(numbers, FIXTURES / f"transformers_{FILES.get(make.__name__, name)}.safetensors", metadata)
    print(f"{name}: |y| up to {np.abs(numbers['y']).max():.3f}")


# Named after the layer, but for a second setting of one.
FILES = {"jamba_layer": "jamba"}
LAYERS = (
    mamba_layer, mamba2_layer, rg_lru_layer, gated_delta_net_layer, kda_layer, lightning_layer,
    attention_layer, jamba_layer,
)  # fmt: skip

if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    for seed, make in enumerate(LAYERS):
        torch.manual_seed(seed)
        write(make)
