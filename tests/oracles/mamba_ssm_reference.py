"""Fixtures from the reference functions of mamba_ssm (see README.md beside this file)."""

import torch
from recording import B, T, absent, load, record

D, N = 6, 5
NOT_CALLED = (
    "selective_scan_cuda", "mamba_ssm.ops.triton.layer_norm", "mamba_ssm.ops.triton.ssd_combined",
)  # fmt: skip


def last(x):
    """Time after channels."""
    return x.transpose(1, 2)


def selective_scan(x, dt, a, b, c, d):
    reference = load("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    y, state = reference(last(x), last(dt), a, last(b), last(c), d, return_last_state=True)
    return {"o": last(y), "state": state}


def ssd(q, k, v, log_decay, state):
    reference = load("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete
    o, state = reference(v, log_decay, k, q, T, state.mT[:, None])
    return {"o": o, "state": state.mT}


SCAN_DRAW = {
    "x": lambda: torch.randn(B, T, D),
    "dt": lambda: torch.nn.functional.softplus(torch.randn(B, T, D) - 1),
    "a": lambda: -torch.exp(torch.randn(D, N)),
    "b": lambda: torch.randn(B, T, N),
    "c": lambda: torch.randn(B, T, N),
    "d": lambda: torch.randn(D),
}
if __name__ == "__main__":
    with absent(*NOT_CALLED):
        for name, run, function, draw in (
            ("selective_scan", selective_scan, "ops.selective_scan_interface.selective_scan_ref", SCAN_DRAW),
            ("ssd", ssd, "modules.ssd_minimal.ssd_minimal_discrete", None),
        ):
            record(f"mamba_ssm_{name}", run, f"mamba_ssm::mamba_ssm.{function}", "Apache-2.0", draw)
