"""Layers of Hugging Face transformers on the CPU; run as `clock.py` says."""

import torch
import transformers
from clock import HEADS, main, torch_work
from transformers.cache_utils import DynamicCache
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

PROMPT = 8  # tokens before the first step


def work(layer, batch, length, width, run, cache):
    """`run(x, cache)` gives the output; `cache` is empty and is filled by the layer."""
    torch.manual_seed(0)
    layer.eval()
    for parameter in layer.parameters():
        # Some of these are allocated and not filled: the model that would do it is not there.
        parameter.data = 0.1 * torch.randn_like(parameter)
    x, token = torch.randn(batch, length, width), torch.randn(1, 1, width)
    prompt = [torch.randn(1, PROMPT, width)]

    def step():
        if prompt:
            run(prompt.pop(), cache)
        run(token, cache)

    parameters = sum(p.numel() for p in layer.parameters())
    return torch_work(lambda: run(x, None), [x, *layer.parameters()], step, parameters)


def mamba(batch, length, width, **settings):
    config = transformers.MambaConfig(hidden_size=width, num_hidden_layers=1, **settings)
    layer = MambaMixer(config, 0)
    return work(layer, batch, length, width, layer, DynamicCache(config=config))


def mamba_mambapy(*sizes):
    """With the parallel scan of the package mambapy."""
    return mamba(*sizes, use_mambapy=True)


def mamba2(batch, length, width):
    heads = 2 * width // 64
    config = transformers.Mamba2Config(
        hidden_size=width, num_heads=heads, head_dim=64, n_groups=1, state_size=128, num_hidden_layers=1
    )
    layer = Mamba2Mixer(config, 0)
    return work(layer, batch, length, width, layer, DynamicCache(config=config))


def rg_lru(batch, length, width):
    """The state is in the module; position 0 resets it."""
    config = transformers.RecurrentGemmaConfig(hidden_size=width, lru_width=width, num_attention_heads=HEADS)
    layer = RecurrentGemmaRecurrentBlock(config, 0)

    def run(x, cache):
        start = PROMPT if cache and x.shape[1] == 1 else 0
        position = torch.arange(start, start + x.shape[1])[None]
        return layer(x, position_ids=position, attention_mask=None, use_cache=bool(cache))[0]

    return work(layer, batch, length, width, run, True)


def gated_delta_net(batch, length, width):
    head = width // HEADS
    config = transformers.Qwen3NextConfig(
        hidden_size=width, linear_num_value_heads=HEADS, linear_num_key_heads=HEADS, linear_key_head_dim=head,
        linear_value_head_dim=head, num_hidden_layers=4,
    )  # fmt: skip
    layer = Qwen3NextGatedDeltaNet(config, 0)
    return work(layer, batch, length, width, layer, DynamicCache(config=config))


def kda(batch, length, width):
    config = transformers.KimiLinearConfig(
        hidden_size=width, linear_num_heads=HEADS, linear_head_dim=width // HEADS, num_hidden_layers=4
    )
    layer = KimiLinearDeltaAttention(config, 0)
    return work(layer, batch, length, width, layer, DynamicCache(config=config))


def lightning_attention(batch, length, width):
    config = transformers.MiniMaxConfig(
        hidden_size=width, num_attention_heads=HEADS, head_dim=width // HEADS, num_hidden_layers=3,
        layer_types=["linear_attention"] * 3,
    )  # fmt: skip
    layer = MiniMaxLightningAttention(config, 0)

    def run(x, cache):
        return layer(x, None, None, past_key_values=cache)[0]

    return work(layer, batch, length, width, run, MiniMaxCache())


if __name__ == "__main__":
    main(globals())
