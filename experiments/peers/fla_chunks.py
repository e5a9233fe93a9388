"""The PyTorch forms of flash-linear-attention's ops, chunkwise where there is one; run as `clock.py` says.

Leaves are drawn in the order of a function's arguments.
"""

import dataclasses

import torch
from clock import HEADS, load, main, torch_work


class Draw:
    """Inputs by name, `[B, T, H, ...]`, or `[B, H, T, ...]` with `heads_first`."""

    def __init__(self, batch, length, width, heads_first=False):
        torch.manual_seed(0)
        self.shape = (batch, HEADS, length) if heads_first else (batch, length, HEADS)
        self.size = width // HEADS
        self.leaves = []

    def leaf(self, x):
        self.leaves.append(x)
        return x

    def normal(self, n=1):
        return [self.leaf(torch.randn(*self.shape, self.size)) for _ in range(n)]

    def unit(self):
        return self.leaf(torch.nn.functional.normalize(torch.randn(*self.shape, self.size), dim=-1))

    def rate(self, *last):
        return self.leaf(torch.rand(*self.shape, *last))

    def decay(self, *last):
        return self.leaf(-0.1 * torch.rand(*self.shape, *last))

    def channels(self):
        return self.decay(self.size)

    def work(self, run):
        return torch_work(lambda: run(*self.leaves), self.leaves)


def fla_simple_gla(*sizes):
    draw = Draw(*sizes)
    draw.normal(3), draw.decay()
    naive = load("fla.ops.simple_gla.naive").naive_chunk_simple_gla
    return draw.work(lambda q, k, v, g: naive(q, k, v, g)[0])


def fla_linear_attn(*sizes):
    draw = Draw(*sizes)
    draw.normal(3)
    return draw.work(load("fla.ops.linear_attn.naive").naive_chunk_linear_attn)


def fla_gla(*sizes):
    draw = Draw(*sizes)
    draw.normal(3), draw.channels()
    naive = load("fla.ops.gla.naive").naive_recurrent_gla
    return draw.work(lambda q, k, v, g: naive(q, k, v, g)[0])


def fla_rwkv6(*sizes):
    """Forward only: it writes in place what its own backward pass would need."""
    draw = Draw(*sizes, heads_first=True)
    draw.normal(3), draw.channels(), draw.leaf(torch.randn(HEADS, draw.size))
    work = draw.work(load("fla.ops.rwkv6.chunk_naive").naive_chunk_rwkv6)
    return dataclasses.replace(work, forward_backward=None)


def fla_delta_rule(*sizes):
    draw = Draw(*sizes, heads_first=True)
    draw.normal(), draw.unit(), draw.normal(), draw.rate()
    naive = load("fla.ops.delta_rule.naive").delta_rule_chunkwise
    return draw.work(lambda q, k, v, beta: naive(q, k, v, beta)[0])


def fla_gated_delta_rule(*sizes):
    draw = Draw(*sizes)
    draw.normal(), draw.unit(), draw.normal(), draw.decay(), draw.rate()
    naive = load("fla.ops.gated_delta_rule.naive").naive_chunk_gated_delta_rule
    return draw.work(lambda q, k, v, g, beta: naive(q, k, v, g, beta)[0])


def fla_kda(*sizes):
    draw = Draw(*sizes)
    draw.normal(), draw.unit(), draw.normal(), draw.channels(), draw.rate()
    naive = load("fla.ops.kda.naive").naive_chunk_kda
    return draw.work(lambda q, k, v, g, beta: naive(q, k, v, g, beta)[0])


def fla_gdn2(*sizes):
    draw = Draw(*sizes)
    draw.normal(), draw.unit(), draw.normal(), draw.channels(), draw.rate(draw.size), draw.rate(draw.size)
    naive = load("fla.ops.gdn2.naive").naive_chunk_gdn2
    return draw.work(lambda q, k, v, g, erase, write: naive(q, k, v, g, erase, write)[0])


def fla_comba(*sizes):
    draw = Draw(*sizes)
    draw.normal(), draw.unit(), draw.normal(), draw.unit(), draw.decay(), draw.rate()
    naive = load("fla.ops.comba.naive").naive_chunk_comba
    return draw.work(lambda q, k, v, p, g, beta: naive(q, k, v, p, g, beta)[0])


def _transition(draw):
    """q, k, v, and the two vectors of the transition."""
    draw.normal(), draw.unit(), draw.normal(), draw.unit(), draw.leaf(-0.5 * draw.leaves[-1].clone())


def fla_dplr(*sizes):
    draw = Draw(*sizes, heads_first=True)
    _transition(draw), draw.channels()
    naive = load("fla.ops.generalized_delta_rule.dplr.naive").dplr_chunkwise
    return draw.work(lambda *inputs: naive(*inputs)[0])


def fla_iplr(*sizes):
    draw = Draw(*sizes, heads_first=True)
    _transition(draw)
    naive = load("fla.ops.generalized_delta_rule.iplr.naive").iplr_chunkwise
    return draw.work(lambda *inputs: naive(*inputs)[0])


def fla_momentum_delta_rule(*sizes):
    draw = Draw(*sizes)
    draw.normal(), draw.unit(), draw.normal(), draw.unit()
    draw.decay(), draw.decay(), draw.rate(), draw.rate()
    draw.leaves[1].mul_(0.3)  # steps short enough for momenta near 1
    naive = load("fla.ops.momentum_delta_rule.naive").chunk_momentum_delta_rule_ref
    return draw.work(lambda *inputs: naive(*inputs)[0])


def fla_ttt(*sizes):
    draw = Draw(*sizes)
    draw.normal(), draw.unit(), draw.normal()
    scale, bias = torch.ones(HEADS, draw.size), torch.zeros(HEADS, draw.size)
    draw.leaf(scale), draw.leaf(bias), draw.leaf(0.3 * torch.rand(*draw.shape, 1))
    naive = load("fla.ops.ttt.naive").chunk_ttt_linear_ref
    # It scales q where it lies.
    return draw.work(lambda q, *inputs: naive(q * 1, *inputs)[0])


def fla_hgrn(batch, length, width):
    torch.manual_seed(0)
    x, decay = torch.randn(batch, length, width), -0.1 * torch.rand(batch, length, width)
    naive = load("fla.ops.hgrn.naive").naive_recurrent_hgrn
    return torch_work(lambda: naive(x, decay)[0], [x, decay])


if __name__ == "__main__":
    main(globals())
