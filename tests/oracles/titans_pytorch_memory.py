"""Fixtures from NeuralMemory of titans-pytorch (see README.md beside this file).

Its rule of learning is compared, so its projections, norms and output gate are taken away: the "sequence"
holds q, k, v and the logits of the gates side by side, and what were projections cut them out. Chunks, over
which it averages gates, are of one token; its batches are our chunks.
"""

from functools import partial

import torch
from recording import B, H, T, load, record, unit
from torch import nn

D = 3
EXPAND = 2


class Cut(nn.Module):
    """Channels `start:stop` of the sequence."""

    def __init__(self, start: int, size: int):
        super().__init__()
        self.channels = slice(start, start + size)

    def forward(self, x):
        return x[..., self.channels]


class SiluMemory(nn.Module):
    """Two matrices with the activation of ours: theirs is an exact GELU."""

    def __init__(self):
        super().__init__()
        sizes = (D, EXPAND * D), (EXPAND * D, D)
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])

    def forward(self, x):
        return nn.functional.silu(x @ self.weights[0]) @ self.weights[1]


def neural_memory(model, batch, **settings):
    """The module without what is not the rule."""
    code = load("titans_pytorch.neural_memory")
    memory = code.NeuralMemory(
        3 * H * D + 3 * H, dim_head=D, heads=H, chunk_size=1, batch_size=batch, pre_rmsnorm=False,
        mem_model_norm_add_residual=False, model=model, **settings,
    )  # fmt: skip
    for i, name in enumerate(("to_queries", "to_keys", "to_values")):
        setattr(memory, name, Cut(i * H * D, H * D))
    for i, name in enumerate(("to_adaptive_step", "to_momentum", "to_decay_factor")):
        getattr(memory, name)[0] = Cut(3 * H * D + i * H, H)
    memory.retrieve_gate, memory.combine_heads = None, nn.Identity()
    return memory.double()


def run(memory, q, k, v, step, momentum, decay, weights):
    """Outputs, last weights and last momentum; `step`, `momentum` and `decay` are logits."""
    sequence = torch.cat([x.flatten(2) for x in (q, k, v, step, momentum, decay)], 2)
    # Its parameters are leaves of their own: put tensors that depend on ours in their place.
    names = [name for name, _ in memory.memory_model_parameters.named_parameters()]
    for name, w in zip(names, weights, strict=True):
        del memory.memory_model_parameters._parameters[name]
        setattr(memory.memory_model_parameters, name, w)
    o, state = memory(sequence)
    arrays = {"o": o.unflatten(2, (H, D))}
    for kind, group in zip(("weights", "momentum"), state.states, strict=True):
        for i, w in enumerate(group.values()):
            arrays[f"{kind}_{i}"] = w.reshape(B, H, *w.shape[-2:])
    return arrays


def one_matrix(memory, q, k, v, step, momentum, decay, w0):
    return run(memory, q, k, v, step, momentum, decay, (w0,))


def two_matrices(memory, q, k, v, step, momentum, decay, w1, w2):
    return run(memory, q, k, v, step, momentum, decay, (w1, w2))


DRAW = {
    "q": lambda: unit(B, T, H, D),
    "k": lambda: unit(B, T, H, D),
    "v": lambda: torch.randn(B, T, H, D),
    "step": lambda: torch.randn(B, T, H),
    "momentum": lambda: torch.randn(B, T, H),
    "decay": lambda: torch.randn(B, T, H) - 2,
    "w0": lambda: torch.randn(H, D, D) * D**-0.5,
    "w1": lambda: torch.randn(H, D, EXPAND * D) * D**-0.5,
    "w2": lambda: torch.randn(H, EXPAND * D, D) * (EXPAND * D) ** -0.5,
}


def linear_model():
    return load("titans_pytorch.memory_models").MemoryMLP(D, 1)


CASES = {
    "document": (one_matrix, linear_model, None, {}),
    "deep": (two_matrices, SiluMemory, 5, {}),
    "orthogonal": (one_matrix, linear_model, 5, {"spectral_norm_surprises": True}),
}

if __name__ == "__main__":
    for name, (function, model, batch, settings) in CASES.items():
        memory = neural_memory(model(), batch, **settings)
        source = "titans-pytorch::titans_pytorch.neural_memory.NeuralMemory"
        # Its functional transforms do not go through a mode, and it casts nothing.
        record(f"titans_{name}", partial(function, memory), source, "MIT", DRAW, double=False, chunk=batch)
