"""The channel mixer of a block: an MLP with a norm before it, or a mixture of experts.

In every `moe_every`-th block the MLP is a mixture of E experts, as Mixtral's and Jamba's: with
p = softmax(W_router x), the `experts_per_token` largest p, scaled to sum to one, weigh the outputs of their
experts. Every expert runs on every token and the foreign ones are masked: no token is dropped and none sees
another, except through the loss balance * E * sum_e f_e p_e, f_e the fraction of tokens that chose e and
p_e its mean probability (Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, arXiv 2101.03961 eq. 4-6).
"""

import jax
import jax.numpy as jnp
from jax import Array

from layers.common import Params, dense, rms_norm, weight, wide
from layers.routing import balance, route

KINDS = ("swiglu", "gelu", "none")


def init(in_key: Array, out_key: Array, router_key: Array, cfg, moe: bool) -> Params:
    """Matrices of one MLP `[D, hidden]`, `[hidden, D]`, or of E of them and their router `[D, E]`."""
    inner = 2 * cfg.hidden if cfg.mlp == "swiglu" else cfg.hidden
    experts = (cfg.experts,) if moe else ()
    params = {
        "w_in": weight(in_key, cfg.width, *experts, inner),
        "w_out": weight(out_key, cfg.hidden, *experts, cfg.width),
    }
    return params | ({"w_router": weight(router_key, cfg.width, cfg.experts)} if moe else {})


def _inner(params: Params, kind: str, x: Array) -> Array:
    """What the MLP, or every expert, makes of its input before `w_out`."""
    inner = dense(x, params["w_in"])
    if kind == "gelu":
        return jax.nn.gelu(inner)
    gate, value = jnp.split(inner, 2, -1)
    return jax.nn.silu(gate) * value


def apply(block: Params, cfg, x: Array) -> tuple[Array, dict[str, Array]]:
    """`x [..., D] + mlp(norm(x))` and aux; `cfg` is a `blocks.Config`, `block` has `mlp` and `norm_mlp`."""
    if not cfg.hidden:
        return x, {}
    normed, params = rms_norm(x, block["norm_mlp"]), block["mlp"]
    inner = _inner(params, cfg.mlp, normed)
    if "w_router" not in params:
        return x + dense(inner, params["w_out"]), {}
    weights, chosen, probabilities = route(dense(wide(normed), params["w_router"]), cfg.experts_per_token)
    loss, load, _ = balance(chosen, probabilities)
    inner = inner * weights[..., None].astype(inner.dtype)
    y = x + jnp.einsum("...ef,fed->...d", inner, params["w_out"].astype(x.dtype))
    return y, {"expert_balance_loss": cfg.balance * loss, "expert_load": load}
