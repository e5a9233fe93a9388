"""Fixtures from the reference functions of flash-linear-attention (see README.md beside this file).

Each function below takes arrays in this project's layout, `[B, T, H, ...]`, calls the published function in
its own and gives back what it returned, `[B, T, H, V]` and `[B, H, K, V]`. Scales of q are left as they are
where they cannot be set to 1.
"""

import torch
from recording import B, H, K, T, V, load, log_decay, record, unit

LEVELS = 7  # of T tokens
MINI_BATCH = 7
STEPS = 2  # of the delta rule per token


def first(x):
    """Heads before time."""
    return x.transpose(1, 2)


def both(result):
    return dict(zip(("o", "state"), result, strict=True))


def gla(q, k, v, log_decays, state):
    naive = load("fla.ops.gla.naive").naive_recurrent_gla
    return both(naive(q, k, v, log_decays, state, output_final_state=True))


def simple_gla(q, k, v, log_decay, state):
    naive = load("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
    return both(naive(q, k, v, log_decay, 1.0, state))


def retention(q, k, v):
    naive = load("fla.ops.retention.naive").naive_retention
    return {"o": first(naive(first(q), first(k), first(v)))}


def linear_attn(q, k, v, state):
    naive = load("fla.ops.linear_attn.naive").naive_recurrent_linear_attn
    return both(naive(q, k, v, 1.0, state, output_final_state=True))


def rwkv6(q, k, v, log_decays, bonus, state):
    naive = load("fla.ops.rwkv6.recurrent_naive").naive_recurrent_rwkv6
    o, state = naive(*map(first, (q, k, v, log_decays)), bonus, 1.0, state, output_final_state=True)
    return {"o": first(o), "state": state}


def based(q, k, v):
    """The sums above and below the line: the last column of v is ones."""
    naive = load("fla.ops.based.naive").naive_parallel_based
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return {"o": first(naive(first(q), first(k), first(v), use_norm=False))}


def log_linear(q, k, v, log_decay, levels):
    naive = load("fla.ops.log_linear_attn.naive").naive_log_linear_attn
    return {"o": naive(q, k, v, log_decay, levels)}


def delta_rule(q, k, v, beta, state):
    naive = load("fla.ops.delta_rule.naive").delta_rule_recurrence
    o, state = naive(*map(first, (q, k, v, beta)), state)
    return {"o": first(o), "state": state}


def gated_delta_rule(q, k, v, beta, log_decay, state):
    naive = load("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    return both(naive(q, k, v, beta, log_decay, 1.0, state, output_final_state=True))


def gated_delta_product(q, k_steps, v_steps, beta_steps, log_decay, state):
    naive = load("fla.ops.gated_delta_product.naive").naive_recurrent_gated_delta_product
    o, state = naive(
        q, k_steps, v_steps, log_decay, beta_steps, 1.0, initial_state=state, output_final_state=True,
        num_householder=STEPS,
    )  # fmt: skip
    return {"o": o, "state": state}


def kda(q, k, v, log_decays, beta, state):
    naive = load("fla.ops.kda.naive").naive_recurrent_kda
    return both(naive(q, k, v, log_decays, beta, 1.0, state, output_final_state=True))


def gdn2(q, k, v, log_decays, erase, write, state):
    naive = load("fla.ops.gdn2.naive").naive_recurrent_gdn2
    return both(naive(q, k, v, log_decays, erase, write, 1.0, state, output_final_state=True))


def comba_recurrent(q, k, v, p, beta, log_decay, state):
    """Recalls from the memory after its decay; the models do so before: comba_chunk."""
    naive = load("fla.ops.comba.naive").naive_recurrent_comba
    return both(naive(q, k, v, p, beta, log_decay, 1.0, state, output_final_state=True))


def comba_chunk(q, k, v, p, beta, log_decay, state):
    naive = load("fla.ops.comba.naive").naive_chunk_comba
    return both(naive(q, k, v, p, log_decay, beta, 16, 1.0, state, output_final_state=True))


def dplr(q, k, v, p, b, log_decays, state):
    naive = load("fla.ops.generalized_delta_rule.dplr.naive").dplr_recurrence
    o, state = naive(*map(first, (q, k, v, p, b, log_decays)), state)
    return {"o": first(o), "state": state}


def iplr(q, k, v, p, b, state):
    naive = load("fla.ops.generalized_delta_rule.iplr.naive").iplr_recurrence
    o, state = naive(*map(first, (q, k, v, p, b)), state)
    return {"o": first(o), "state": state}


def momentum_delta_rule(q, k, v, p, eta, log_decay, log_momentum, state, momentum):
    """With beta = 1: their rate of reading the momentum has no place in the op."""
    naive = load("fla.ops.momentum_delta_rule.naive").recurrent_momentum_delta_rule_ref
    o, (state, momentum) = naive(
        q, k, v, log_decay, log_momentum, p, torch.ones_like(eta), eta, 1.0, state, momentum, True
    )
    return {"o": o, "state": state, "momentum": momentum}


def hgrn(x, x_decay, x_state):
    naive = load("fla.ops.hgrn.naive").naive_recurrent_hgrn
    return both(naive(x, x_decay, x_state, output_final_state=True))


def ttt(q, k, target, scale, bias, eta, weights, weights_bias):
    """T is a multiple of the mini-batch: what theirs pads with moves the bias of the last one.

    Gradients are those of the states alone, because ours gives q + LN(z) where theirs gives z + LN(z).
    """
    naive = load("fla.ops.ttt.naive").chunk_ttt_linear_ref
    o, weights, weights_bias = naive(
        q, k, target, scale, bias, eta, 1.0, 1e-6, MINI_BATCH, weights, weights_bias, output_final_state=True
    )
    return {"o": o, "weights": weights, "weights_bias": weights_bias}


DRAW = {
    "bonus": lambda: torch.randn(H, K),
    "levels": lambda: torch.rand(B, T, H, LEVELS),
    "k_steps": lambda: unit(B, STEPS * T, H, K),
    "v_steps": lambda: torch.randn(B, STEPS * T, H, V),
    "beta_steps": lambda: 2 * torch.rand(B, STEPS * T, H),
    "erase": lambda: torch.rand(B, T, H, K),
    "write": lambda: torch.rand(B, T, H, V),
    "b": lambda: 0.7 * unit(B, T, H, K),
    "momentum": lambda: torch.randn(B, H, K, V),
    "x": lambda: torch.randn(B, T, V),
    "x_decay": lambda: log_decay(B, T, V),
    "x_state": lambda: torch.randn(B, V),
    "scale": lambda: 1 + 0.3 * torch.randn(H, K),
    "bias": lambda: 0.3 * torch.randn(H, K),
    "weights": lambda: 0.5 * torch.randn(B, H, K, K),
    "weights_bias": lambda: 0.3 * torch.randn(B, H, 1, K),
}
WHOLE = T // MINI_BATCH * MINI_BATCH
MEMORY_DRAW = {
    "q": lambda: torch.randn(B, WHOLE, H, K),
    "k": lambda: unit(B, WHOLE, H, K),
    "target": lambda: torch.randn(B, WHOLE, H, K),
    "eta": lambda: 0.3 * torch.rand(B, WHOLE, H, 1),
}
DRAWS = {"ttt": MEMORY_DRAW, "momentum_delta_rule": {"eta": lambda: torch.rand(B, T, H)}}

SOURCES = {
    gla: "gla.naive.naive_recurrent_gla",
    simple_gla: "simple_gla.naive.naive_recurrent_simple_gla",
    retention: "retention.naive.naive_retention",
    linear_attn: "linear_attn.naive.naive_recurrent_linear_attn",
    rwkv6: "rwkv6.recurrent_naive.naive_recurrent_rwkv6",
    based: "based.naive.naive_parallel_based",
    log_linear: "log_linear_attn.naive.naive_log_linear_attn",
    delta_rule: "delta_rule.naive.delta_rule_recurrence",
    gated_delta_rule: "gated_delta_rule.naive.naive_recurrent_gated_delta_rule",
    gated_delta_product: "gated_delta_product.naive.naive_recurrent_gated_delta_product",
    kda: "kda.naive.naive_recurrent_kda",
    gdn2: "gdn2.naive.naive_recurrent_gdn2",
    comba_recurrent: "comba.naive.naive_recurrent_comba",
    comba_chunk: "comba.naive.naive_chunk_comba",
    dplr: "generalized_delta_rule.dplr.naive.dplr_recurrence",
    iplr: "generalized_delta_rule.iplr.naive.iplr_recurrence",
    momentum_delta_rule: "momentum_delta_rule.naive.recurrent_momentum_delta_rule_ref",
    hgrn: "hgrn.naive.naive_recurrent_hgrn",
    ttt: "ttt.naive.chunk_ttt_linear_ref",
}

if __name__ == "__main__":
    for run, function in SOURCES.items():
        name = run.__name__
        record(
            f"fla_{name}", run, f"fla-core::fla.ops.{function}", "MIT", DRAW | DRAWS.get(name, {}),
            silent=("o",) if run is ttt else (),
        )  # fmt: skip
