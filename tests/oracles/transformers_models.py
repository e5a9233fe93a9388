"""Whole models of Hugging Face transformers as fixtures (see README.md beside this file).

Each function below configures one small model. It gets random weights and is saved as transformers saves it
(config.json, model.safetensors); beside it stands expected.safetensors: `tokens [B, T]`, their `logits
[B, T, vocab]` in float32 on the CPU, and `greedy [B, N]`, what the model continues the first `PROMPT` of them
by, each token found by running the whole sequence again.

    python tests/oracles/transformers_models.py [TYPE ...]
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"
BATCH, LENGTH, PROMPT, STEPS = 2, 200, 33, 20
VOCAB = 61
IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def mamba():
    return transformers.MambaConfig(
        hidden_size=20, state_size=5, num_hidden_layers=3, time_step_rank=3, **IDS
    )


def mamba2():
    return transformers.Mamba2Config(
        hidden_size=24, num_heads=6, head_dim=8, n_groups=3, state_size=5, num_hidden_layers=3, chunk_size=16,
        **IDS,
    )  # fmt: skip


def falcon_mamba():
    return transformers.FalconMambaConfig(
        hidden_size=20, state_size=5, num_hidden_layers=3, expand=3, conv_kernel=3, mixer_rms_eps=3e-5,
        tie_word_embeddings=False, **IDS,
    )  # fmt: skip


def recurrent_gemma():
    return transformers.RecurrentGemmaConfig(
        hidden_size=24, lru_width=36, num_attention_heads=3, num_key_value_heads=1, intermediate_size=60,
        num_hidden_layers=5, attention_window_size=37, logits_soft_cap=5.0, **IDS,
    )  # fmt: skip


def minimax():
    return transformers.MiniMaxConfig(
        hidden_size=20, num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=13,
        num_hidden_layers=4, num_local_experts=5, num_experts_per_tok=2, block_size=16,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        linear_attn_alpha_factor=1.5, full_attn_beta_factor=0.75, mlp_alpha_factor=1.25, mlp_beta_factor=0.5,
        **IDS,
    )  # fmt: skip


def qwen3_next():
    return transformers.Qwen3NextConfig(
        hidden_size=20, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=29,
        num_hidden_layers=5, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=5,
        linear_value_head_dim=3, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=9,
        shared_expert_intermediate_size=11, mlp_only_layers=[1], norm_topk_prob=True, **IDS,
    )  # fmt: skip


def kimi_linear():
    return transformers.KimiLinearConfig(
        hidden_size=20, num_attention_heads=3, num_key_value_heads=3, intermediate_size=29,
        moe_intermediate_size=9, num_hidden_layers=5, linear_num_heads=2, linear_head_dim=6, kv_lora_rank=7,
        qk_rope_head_dim=4, qk_nope_head_dim=5, v_head_dim=3, num_local_experts=6, num_experts_per_tok=2,
        n_shared_experts=2, n_group=2, topk_group=1, q_lora_rank=None, **IDS,
    )  # fmt: skip


def jamba():
    return transformers.JambaConfig(
        hidden_size=20, num_attention_heads=4, num_key_value_heads=2, intermediate_size=13,
        num_hidden_layers=6,
        num_experts=4, num_experts_per_tok=2, attn_layer_period=4, attn_layer_offset=2, mamba_d_state=5,
        mamba_dt_rank=3, max_position_embeddings=512, **IDS,
    )  # fmt: skip


def xlstm():
    return transformers.xLSTMConfig(
        hidden_size=20, num_heads=2, num_hidden_layers=3, qk_dim_factor=0.3, v_dim_factor=1.4,
        ffn_proj_factor=2.3, ffn_round_up_to_multiple_of=7, gate_soft_cap=3.0, output_logit_soft_cap=4.0,
        norm_eps=3e-5, eps=1e-3, chunk_size=16, **IDS,
    )  # fmt: skip


def zamba2():
    """Two shared blocks in turn, each with adapters for everything, and rotary positions."""
    return transformers.Zamba2Config(
        hidden_size=20, num_hidden_layers=5, mamba_d_state=5, mamba_d_conv=3, mamba_expand=3, mamba_ngroups=2,
        n_mamba_heads=6, time_step_min=0.3, intermediate_size=13, num_attention_heads=4, num_mem_blocks=2,
        use_shared_attention_adapter=True, adapter_rank=3, use_mem_rope=True, rms_norm_eps=3e-5,
        layers_block_type=[("mamba", "hybrid")[n] for n in (0, 1, 1, 0, 1)], chunk_size=16, **IDS,
    )  # fmt: skip


def zamba2_grouped():
    """One shared block with grouped queries, for which theirs has no adapters, and without positions."""
    return transformers.Zamba2Config(
        hidden_size=20, num_hidden_layers=6, mamba_d_state=5, n_mamba_heads=5, intermediate_size=13,
        num_attention_heads=4, num_key_value_heads=2, num_mem_blocks=1, adapter_rank=3, chunk_size=16,
        layers_block_type=["mamba", "mamba", "hybrid"] * 2, **IDS,
    )  # fmt: skip


TYPES = (
    mamba, mamba2, falcon_mamba, recurrent_gemma, minimax, kimi_linear, jamba, qwen3_next, xlstm, zamba2,
    zamba2_grouped,
)  # fmt: skip


def randomise(model):
    """No weight at zero, at one or equal to its neighbour, at a size that keeps activations near one."""
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "bias" in n)]
    for name, tensor in tensors:
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 9
        centre = 1.0 if "norm" in name and tensor.dim() == 1 and float(tensor.data.abs().sum()) else 0.0
        tensor.data = torch.randn_like(tensor) * fan_in**-0.5 + centre
        if name.endswith(("A_log", "recurrent_param")):
            tensor.data = torch.rand_like(tensor) * 2 - 2
        if "adapter" in name:  # small beside what they are added to, or rounding grows a thousandfold
            tensor.data *= 0.55
    return model.eval().float()


def greedy(model, tokens):
    for _ in range(STEPS):
        best = model(tokens, use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, best[:, None]], 1)
    return tokens[:, -STEPS:]


def seeded(seed, make):
    """A model whose weights depend on nothing but the seed."""
    torch.manual_seed(seed)
    return randomise(make())


def save(model, name=None):
    folder = FIXTURES / f"pretrained_{name or model.config.model_type}"
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
    logits = model(tokens, use_cache=False).logits.float()
    expected = {"tokens": tokens, "logits": logits, "greedy": greedy(model, tokens[:, :PROMPT])}
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")
    for path in folder.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e3
    print(f"{folder.name}: {size:.0f} kB, |logits| up to {logits.abs().max():.2f}, {expected['greedy'][0]}")


def build(make):
    config = make()
    config._attn_implementation = config._experts_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config)


if __name__ == "__main__":
    for seed, make in enumerate(TYPES):
        if not sys.argv[1:] or make.__name__ in sys.argv[1:]:
            with torch.no_grad():
                save(seeded(seed, lambda make=make: build(make)), make.__name__)
