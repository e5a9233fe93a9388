"""Fixtures from the layers of smaller packages: rwkv and minGRU-pytorch (see README.md beside this file).

As in `transformers_layers.py`: random weights and inputs, and the weights in this project's layout. Unlike
there all is computed in float64 on numbers that float32 holds.
"""

import json
import os
import zlib
from unittest import mock

import torch
from recording import Double, load, write

os.environ["RWKV_V7_ON"] = "1"
BATCH, LENGTH, WIDTH = 2, 67, 24


def normal(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float32)).double()


def matrix(rows, columns):
    return normal(rows, columns, scale=rows**-0.5)


def rwkv7(x):
    """Their norm's eps is that of heads of 64 channels; ours goes with the width of the head.

    LayerNorm(o) with 64e-5 is LayerNorm(o / 8^1/2) with 8e-5. So theirs reads with r times 8^1/2, and its
    bonus, which r times k takes part in, is that much smaller. Theirs writes
    e^{-1/2} with six digits and has no eps in the length of k.
    """
    # Compiled code does not go through a mode.
    with mock.patch("torch.jit.script", lambda function: function):
        step = load("rwkv.model").RWKV_x070_TMix_one
    heads, K, decay, rate, gate = 3, 8, 4, 5, 6
    root = 8**0.5
    params = {
        "mix": torch.rand(6, WIDTH, dtype=torch.float32).double(),
        **{f"w_{name}": matrix(WIDTH, WIDTH) for name in ("r", "k", "v", "out")},
        "decay_bias": normal(WIDTH), "w_decay_down": matrix(WIDTH, decay), "w_decay_up": matrix(decay, WIDTH),
        "rate_bias": normal(WIDTH), "w_rate_down": matrix(WIDTH, rate), "w_rate_up": matrix(rate, WIDTH),
        "w_gate_down": matrix(WIDTH, gate), "w_gate_up": matrix(gate, WIDTH), "removal_scale": normal(WIDTH),
        "rate_scale": normal(WIDTH), "bonus": normal(heads, K), "norm_scale": normal(heads, K),
        "norm_bias": normal(heads, K),
    }  # fmt: skip
    # In the order of their arguments; ours is r, w, k, v, a, g.
    arguments = [
        *params["mix"], params["decay_bias"], params["w_decay_down"], params["w_decay_up"],
        params["rate_bias"], params["w_rate_down"], params["w_rate_up"], None, None, None,
        params["w_gate_down"], params["w_gate_up"], params["removal_scale"], params["rate_scale"],
        (params["bonus"] / root).flatten(), params["w_r"] * root, params["w_k"], params["w_v"],
        params["w_out"], params["norm_scale"].flatten(), params["norm_bias"].flatten(),
    ]  # fmt: skip
    rows = []
    for tokens in x:
        last, state, row = torch.zeros(WIDTH), torch.zeros(heads, K, K), []
        for token in tokens:
            with Double():
                y, last, state, _ = step(0, heads, K, token, last, None, state, *arguments)
            row.append(y)
        rows.append(torch.stack(row))
    ranks = {"decay_rank": decay, "rate_rank": rate, "gate_rank": gate}
    return "rwkv7", {"head_dim": K, **ranks}, params, torch.stack(rows)


def min_gru(x):
    """Theirs has the candidate before the gate; ours after it."""
    layer = load("minGRU_pytorch.minGRU").minGRU(WIDTH, expansion_factor=2.0)
    w_in, w_out = matrix(WIDTH, 4 * WIDTH), matrix(2 * WIDTH, WIDTH)
    z, c = w_in.chunk(2, 1)
    layer.to_hidden_and_gate.weight.data = torch.cat([c, z], 1).T
    layer.to_out.weight.data = w_out.T
    params = {"w_in": w_in, "bias": torch.zeros(4 * WIDTH), "w_out": w_out}
    return "min_gru", {"expand": 2}, params, layer(x)


def min_lstm(x):
    """As min_gru: candidate, f, i in theirs."""
    layer = load("minGRU_pytorch.minLSTM").minLSTM(WIDTH, expansion_factor=2.0)
    w_in, w_out = matrix(WIDTH, 6 * WIDTH), matrix(2 * WIDTH, WIDTH)
    f, i, c = w_in.chunk(3, 1)
    layer.to_hidden_and_f_i_gate.weight.data = torch.cat([c, f, i], 1).T
    layer.to_out.weight.data = w_out.T
    params = {"w_in": w_in, "bias": torch.zeros(6 * WIDTH), "w_out": w_out}
    return "min_lstm", {"expand": 2}, params, layer(x)


def record(make, prefix: str, source: str, licence: str, bound: float):
    torch.manual_seed(zlib.crc32(source.encode()))
    torch.set_default_dtype(torch.float64)
    x = normal(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        name, settings, params, y = make(x)
    assert y.dtype == torch.float64
    arrays = {"x": x.float(), "y": y} | {f"params/{key}": value.float() for key, value in params.items()}
    numbers = {key: value.detach().numpy() for key, value in arrays.items()}
    settings = {"layer": name, "settings": json.dumps(settings), "bound": bound}
    write(f"{prefix}_{name}", numbers, source, licence, settings)


if __name__ == "__main__":
    record(rwkv7, "rwkv", "rwkv::rwkv.model.RWKV_x070_TMix_one", "Apache-2.0", 1e-6)
    record(min_gru, "mingru", "minGRU-pytorch::minGRU_pytorch.minGRU.minGRU", "MIT", 1e-13)
    record(min_lstm, "mingru", "minGRU-pytorch::minGRU_pytorch.minLSTM.minLSTM", "MIT", 1e-13)
