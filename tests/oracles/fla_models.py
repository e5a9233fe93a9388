"""Whole models of flash-linear-attention as fixtures (see README.md beside this file), without a GPU.

As transformers_models.py: that package's own modules and wiring, on the CPU. Its kernels want a GPU; in their
place stand its own naive functions, and for short convolutions, norms, rotary positions and attention the
functions of PyTorch that they are fast forms of.

    python tests/oracles/fla_models.py [TYPE ...]
"""

import importlib
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # triton is imported where it could not compile

import torch
import torch.nn.functional as F
from transformers_models import IDS, save, seeded

PLAIN = {"fuse_swiglu": False, "fuse_cross_entropy": False}
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 29, "norm_eps": 3e-6, **IDS}


def gla():
    return "gla.GLA", {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.5}


def gated_deltanet():
    return "gated_deltanet.GatedDeltaNet", {"num_heads": 2, "num_v_heads": 4, "head_dim": 5, "expand_v": 1.2}


def delta_net():
    return "delta_net.DeltaNet", {"num_heads": 3, "expand_v": 0.5, "tie_word_embeddings": True}


def kda():
    return "kda.KDA", {"num_heads": 2, "head_dim": 5, "expand_v": 1.2}


def retnet():
    attn = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 29, "rope_theta": 500.0}
    return "retnet.RetNet", {"num_heads": 3, "expand_v": 2.0, "attn": attn}


def hgrn2():
    return "hgrn2.HGRN2", {"expand_ratio": 8}


def mom():
    return "mom.Mom", {"num_heads": 2, "head_dim": 5, "expand_v": 1.2, "num_memories": 3, "topk": 2}


def rwkv7():
    ranks = {f"{name}_low_rank_dim": 3 + i for i, name in enumerate(("decay", "gate", "a", "v"))}
    return "rwkv7.RWKV7", {"head_dim": 8, "num_hidden_layers": 4, "fuse_swiglu": None, **ranks}


def transformer():
    return "transformer.Transformer", {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "window_size": 37}


def samba():
    attn = {"layers": [1], "num_heads": 2, "num_kv_heads": 1, "window_size": 29, "rope_theta": 500.0}
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "state_size": 5, "time_step_rank": 3, "expand": 3}
    return "samba.Samba", {**sizes, "attn": attn, "intermediate_size": None}


TYPES = (gla, gated_deltanet, delta_net, kda, retnet, transformer, samba, hgrn2, mom, rwkv7)


def short_conv(self, x, cu_seqlens=None, **_):
    if cu_seqlens is not None:  # sequences one after the other
        parts = x.split(cu_seqlens.diff().tolist(), 1)
        return torch.cat([short_conv(self, part)[0] for part in parts], 1), None
    padded = F.pad(x.transpose(1, 2), (self.kernel_size[0] - 1, 0))
    y = F.conv1d(padded, self.weight, self.bias, groups=x.shape[-1]).transpose(1, 2)
    return (F.silu(y) if self.activation else y), None


def rms_norm(self, x, residual=None, prenorm=False):
    x = x if residual is None else x + residual
    y = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
    return (y, x) if prenorm else y


def gated_rms_norm(self, x, gate):
    return rms_norm(self, x) * (gate.sigmoid() if self.activation == "sigmoid" else F.silu(gate))


def layer_norm(self, x, residual=None, prenorm=False):
    x = x if residual is None else x + residual
    y = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
    return (y, x) if prenorm else y


def group_norm(self, x):
    return F.group_norm(x.flatten(0, -2), self.num_groups, self.weight, self.bias, self.eps).view_as(x)


def norm_and_project(x, scale, norm_bias, weight, bias, eps=1e-5):
    return F.linear(F.rms_norm(x, x.shape[-1:], scale, eps), weight, bias)


def rotated(self, q, k, **_):
    half = torch.arange(0, self.dim, 2) / self.dim
    angle = (torch.arange(q.shape[1])[:, None] * self.base**-half)[:, None]

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    return turn(q), turn(k)


def attention(q, k, v, window_size, **_):
    """Arrays `[B, T, heads, channels]`; `window_size` is how far back a token sees, or -1, and 0."""
    time = torch.arange(q.shape[1])
    apart = time[:, None] - time
    seen = (apart >= 0) & ((window_size[0] < 0) | (apart <= window_size[0]))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def unit(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def grouped(q, k, v):
    """Unit queries and keys, one for each head of values."""
    more = v.shape[2] // q.shape[2]
    return unit(q).repeat_interleave(more, 2), unit(k).repeat_interleave(more, 2)


def naive(name):
    return importlib.import_module(f"fla.ops.{name}.naive")


def run_gla(q, k, v, gk=None, g=None, **_):
    return naive("gla").naive_recurrent_gla(q, k, v, g if gk is None else gk)


def run_gated_delta(q, k, v, g, beta, A_log, dt_bias, **_):
    log_decay = -A_log.exp() * F.softplus(g + dt_bias)
    run = naive("gated_delta_rule").naive_recurrent_gated_delta_rule
    return run(*grouped(q, k, v), v, beta.sigmoid(), log_decay)


def run_memories(q, k, v, g, beta, cu_seqlens=None, **_):
    """`chunk_gated_delta_rule` where gates are given as they are; sequences may stand one after the other."""
    streams = (q, k, v, beta, g)
    parts = [streams]
    if cu_seqlens is not None:
        parts = zip(*(x.split(cu_seqlens.diff().tolist(), 1) for x in streams), strict=True)
    run = naive("gated_delta_rule").naive_recurrent_gated_delta_rule
    return torch.cat([run(unit(q), unit(k), v, beta, g)[0] for q, k, v, beta, g in parts], 1), None


def run_delta(q, k, v, beta, **_):
    parts = (x.transpose(1, 2) for x in (unit(q), unit(k), v, beta))
    o, state = naive("delta_rule").delta_rule_recurrence(*parts)
    return o.transpose(1, 2), state


def run_kda(q, k, v, g, beta, A_log, dt_bias, **_):
    log_decay = importlib.import_module("fla.ops.kda.gate").naive_kda_gate(g, A_log, dt_bias)
    return naive("kda").naive_recurrent_kda(unit(q), unit(k), v, log_decay, beta.sigmoid())


def run_retention(q, k, v, **_):
    return naive("retention").naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None


def run_rwkv7(r, w, k, v, a, b=None, kk=None, **_):
    a, b = (a, b) if kk is None else (-kk, kk * a)
    run = importlib.import_module("fla.ops.generalized_delta_rule.dplr.naive").dplr_recurrence
    r = r * r.shape[-1] ** 0.5  # it divides by this
    o, state = run(*(x.transpose(1, 2) for x in (r, k, v, a, b, w)))
    return o.transpose(1, 2), state


def shifted(x, *_, **__):
    return importlib.import_module("fla.modules.token_shift").token_shift_ref(x), None


def rwkv7_without_kernels():
    """Its own plain forms of what it fuses."""
    ops = importlib.import_module("fla.ops.rwkv7")
    layer, model = (
        importlib.import_module(n) for n in ("fla.layers.rwkv7", "fla.models.rwkv7.modeling_rwkv7")
    )
    layer.token_shift = model.token_shift = shifted
    layer.l2_norm, layer.chunk_rwkv7, layer.fused_mul_recurrent_rwkv7 = unit, run_rwkv7, run_rwkv7
    for name, plain in (
        ("fused_addcmul.fused_addcmul_rwkv7", "torch_addcmul_rwkv7"),
        ("fused_k_update.fused_k_rwkv7", "k_update_ref"),
        ("gate_output_correction.gate_output_correction", "gate_output_correction_ref"),
    ):
        module, fused = name.split(".")
        setattr(layer, fused, getattr(importlib.import_module(f"{ops.__name__}.{module}"), plain))


def in_order(tensor, *args, **named):
    return torch.argsort(tensor, *args, **{**named, "stable": True})


def without_kernels():
    """Put the above where kernels would run."""
    # mom gathers each memory's tokens by a sort which on the CPU does not leave equals in their order.
    torch.Tensor.argsort = in_order
    modules = importlib.import_module("fla.modules")
    modules.ShortConvolution.forward = short_conv
    modules.RMSNorm.forward = rms_norm
    modules.LayerNorm.forward, modules.GroupNorm.forward = layer_norm, group_norm
    modules.FusedRMSNormGated.forward = gated_rms_norm
    modules.RotaryEmbedding.forward = rotated
    activations = importlib.import_module("fla.modules.activations").ACT2FN
    activations["silu"] = activations["swish"] = F.silu
    activations["sqrelu"] = lambda x: F.relu(x) ** 2
    rwkv7_without_kernels()
    importlib.import_module("fla.modules.mlp").swiglu = lambda gate, y: F.silu(gate) * y
    importlib.import_module("fla.layers.attn").flash_attn_func = attention
    runs = {
        "gla": run_gla, "hgrn2": run_gla, "gated_deltanet": run_gated_delta, "mom": run_memories,
        "delta_net": run_delta, "kda": run_kda, "multiscale_retention": run_retention,
    }  # fmt: skip
    for name, run in runs.items():
        layer = importlib.import_module(f"fla.layers.{name}")
        for kernel in [n for n in vars(layer) if n.startswith(("chunk_", "fused_recurrent_"))]:
            setattr(layer, kernel, run)
    layer = importlib.import_module("fla.layers.hgrn2")
    layer.swish, layer.rms_norm_linear = F.silu, norm_and_project
    layer = importlib.import_module("fla.layers.gated_deltanet").GatedDeltaNet
    layer._use_fused_qkv_conv = lambda *_, **__: False


def build(make):
    name, settings = make()
    package, prefix = name.split(".")
    module = importlib.import_module(f"fla.models.{package}")
    options = {key: value for key, value in (SIZES | PLAIN | settings).items() if value is not None}
    config = getattr(module, f"{prefix}Config")(**options)
    return getattr(module, f"{prefix}ForCausalLM")(config)


if __name__ == "__main__":
    without_kernels()
    for seed, make in enumerate(TYPES):
        if not sys.argv[1:] or make.__name__ in sys.argv[1:]:
            with torch.no_grad():
                save(seeded(100 + seed, lambda make=make: build(make)))
