"""`NeuralMemory` of titans-pytorch; run as `clock.py` says."""

import torch
from clock import HEADS, load, main, torch_work

MemoryMLP = load("titans_pytorch.memory_models").MemoryMLP
NeuralMemory = load("titans_pytorch.neural_memory").NeuralMemory

CHUNK = 16


def titans(batch, length, width):
    """One write per chunk of 16 tokens, after which the weights move."""
    torch.manual_seed(0)
    head = width // HEADS
    layer = NeuralMemory(
        width, dim_head=head, heads=HEADS, chunk_size=CHUNK, batch_size=CHUNK, max_grad_norm=1.0,
        model=MemoryMLP(head, 2, 2.0), mem_model_norm_add_residual=False, post_rmsnorm=True, qk_rmsnorm=True,
    )  # fmt: skip
    x, token = torch.randn(batch, length, width), torch.randn(1, 1, width)
    state = None

    def step():
        nonlocal state
        _, state = layer(token, state=state)

    parameters = sum(p.numel() for p in layer.parameters())
    return torch_work(lambda: layer(x)[0], [x, *layer.parameters()], step, parameters)


if __name__ == "__main__":
    main(globals())
