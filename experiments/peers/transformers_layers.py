"""Times layers of Hugging Face transformers on the CPU; run by `python -m experiments.bench peers`.

    PYTHON transformers_layers.py NAME BATCH LENGTH WIDTH

PYTHON has torch and transformers, and need not have jax. Prints one JSON line: median seconds of
forward, and of forward with backward of a sum of squares with respect to inputs and parameters.
"""

import json
import statistics
import sys
import time

import torch
import transformers
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

REPEATS = 5


def mamba(width):
    layer = MambaMixer(transformers.MambaConfig(hidden_size=width), 0)
    return layer, layer


def mamba2(width):
    heads = 2 * width // 64
    layer = Mamba2Mixer(
        transformers.Mamba2Config(
            hidden_size=width, num_heads=heads, head_dim=64, n_groups=1, state_size=128
        ),
        0,
    )
    return layer, layer


def rg_lru(width):
    config = transformers.RecurrentGemmaConfig(hidden_size=width, lru_width=width, num_attention_heads=4)
    layer = RecurrentGemmaRecurrentBlock(config, 0)

    def run(x):
        position = torch.arange(x.shape[1])
        return layer(x, position_ids=position[None], attention_mask=None, use_cache=False)

    return layer, run


def gated_delta_net(width):
    head = width // 4
    config = transformers.Qwen3NextConfig(
        hidden_size=width, linear_num_value_heads=4, linear_num_key_heads=4, linear_key_head_dim=head,
        linear_value_head_dim=head,
    )  # fmt: skip
    layer = Qwen3NextGatedDeltaNet(config, 0)
    return layer, layer


def kda(width):
    config = transformers.KimiLinearConfig(hidden_size=width, linear_num_heads=4, linear_head_dim=width // 4)
    layer = KimiLinearDeltaAttention(config, 0)
    return layer, layer


def lightning_attention(width):
    config = transformers.MiniMaxConfig(
        hidden_size=width, num_attention_heads=4, head_dim=width // 4, num_hidden_layers=3,
        layer_types=["linear_attention"] * 3,
    )  # fmt: skip
    layer = MiniMaxLightningAttention(config, 0)
    return layer, lambda x: layer(x, None, None)


LAYERS = {make.__name__: make for make in (mamba, mamba2, rg_lru, gated_delta_net, kda, lightning_attention)}


def median_seconds(work):
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(name, batch, length, width):
    torch.manual_seed(0)
    layer, run = LAYERS[name](width)
    for parameter in layer.parameters():
        # Some of these are allocated and not filled: the model that would do it is not there.
        parameter.data = 0.1 * torch.randn_like(parameter)
    x = torch.randn(batch, length, width, requires_grad=True)

    def output():
        y = run(x)
        return y[0] if isinstance(y, tuple) else y

    def forward():
        with torch.no_grad():
            output()

    def backward():
        layer.zero_grad()
        x.grad = None
        (output() ** 2).sum().backward()

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    row = {"forward": median_seconds(forward), "forward_backward": median_seconds(backward)}
    print(json.dumps(row | {"versions": versions}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
