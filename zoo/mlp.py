"""The channel mixer of a block: an MLP with a norm before it, or a mixture of experts.

In every `moe_every`-th block the MLP is a mixture of E experts, as Mixtral's and Jamba's: with
p = softmax(W_router x), the `experts_per_token` largest p, scaled to sum to one, weigh the outputs of their
experts. Every expert runs on every token and the foreign ones are masked: no token is dropped and none sees
another, except through the loss balance * E * sum_e f_e p_e, f_e the fraction of tokens that chose e and
p_e its mean probability (Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, arXiv 2101.03961 eq. 4-6).

Published models differ in how a token chooses. Their p may be sigmoid(W_router x) (`score`), may weigh as
they are (`renormalise`) or times `scale`; a bias may be added where experts are chosen and not where they are
weighed (`score_bias`), and experts may stand in groups of which a token chooses first, by the sum of the two
largest in each (`expert_groups`; DeepSeek-AI 2024, arXiv 2412.19437). One more expert may see every token
(`shared`), times sigmoid(w x) with `shared_gate`. An MLP that shares its weights with others may add a matrix
of rank `adapter` of its own to the first one (Glorioso et al. 2024, arXiv 2411.15242).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from layers.checks import require, require_choice, require_not_negative, require_positive
from layers.common import Params, adapted, adapter_init, dense, weight, wide
from layers.fields import later
from layers.routing import balance, chosen_weights, route

KINDS = ("swiglu", "gelu", "none")
ACTIVATIONS = ("swiglu", "geglu", "gelu")
SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One MLP, or E experts and their router. Raises ValueError for numbers that do not fit together."""

    hidden: int  # width of the MLP, or of every expert
    kind: str = "swiglu"
    bias: bool = False  # of both matrices; none of experts
    experts: int = 0  # E; 0 for one MLP
    experts_per_token: int = 2
    balance: float = 0.01  # coefficient of the experts' load-balancing loss
    score: str = "softmax"
    renormalise: bool = True  # weights of the chosen experts sum to one
    scale: float = 1.0  # of the weights
    score_bias: bool = False
    expert_groups: int = 1
    groups_per_token: int = 1
    shared: int = 0  # hidden width of the expert that every token meets; 0 for none
    shared_gate: bool = False
    exact: bool = later(False)  # GELU by the error function, not by tanh
    adapter: int = later(0)  # rank; 0 for none

    def __post_init__(self):
        require_positive(self, "hidden", "experts_per_token", "expert_groups", "groups_per_token")
        require_choice(self, "kind", ACTIVATIONS)
        require_choice(self, "score", SCORES)
        require_not_negative(self, "experts", "shared", "balance", "adapter")
        if self.experts:
            require(not self.bias, "mlp: experts have no biases")
            require(not self.adapter, "mlp: experts have no adapters")
            k, groups = self.experts_per_token, self.expert_groups
            require(k <= self.experts, f"experts_per_token={k} exceeds experts={self.experts}")
            ok = self.experts % groups == 0 and self.groups_per_token <= groups
            require(ok, f"mlp: {self.groups_per_token} of {groups} groups of {self.experts} experts")
            ok = groups == 1 or (self.score == "sigmoid" and self.experts // groups >= 2)
            require(ok, f"mlp: expert_groups={groups} need sigmoid scores and two experts in each")
            ok = self.score == "sigmoid" or not self.score_bias
            require(ok, "mlp: score_bias needs sigmoid scores")

    def inner(self, hidden: int) -> int:
        """Columns of the first matrix of an MLP of width `hidden`."""
        return hidden if self.kind == "gelu" else 2 * hidden

    def weights(self, width: int) -> int:
        """Of one MLP, or of one expert."""
        inner = self.inner(self.hidden)
        return width * (inner + self.hidden) + self.adapter * (width + inner)

    def active(self, width: int) -> int:
        """Weights that one token meets, the router's among them."""
        if not self.experts:
            return self.weights(width)
        shared = width * (self.inner(self.shared) + self.shared + self.shared_gate) if self.shared else 0
        return self.experts_per_token * self.weights(width) + width * self.experts + shared

    def idle(self, width: int) -> int:
        """Weights of the experts that a token does not go to."""
        return (self.experts - self.experts_per_token) * self.weights(width) if self.experts else 0


def init(in_key: Array, out_key: Array, router_key: Array, cfg: Config, width: int) -> Params:
    """Matrices of one MLP `[D, hidden]`, `[hidden, D]`, or of E of them and their router `[D, E]`."""
    experts = (cfg.experts,) if cfg.experts else ()
    params: Params = {
        "w_in": weight(in_key, width, *experts, cfg.inner(cfg.hidden)),
        "w_out": weight(out_key, cfg.hidden, *experts, width),
    }
    if cfg.bias:
        params |= {"in_bias": jnp.zeros(cfg.inner(cfg.hidden)), "out_bias": jnp.zeros(width)}
    if cfg.adapter:
        params["adapter"] = adapter_init(router_key, cfg.adapter, width, {"in": cfg.inner(cfg.hidden)})
    return params | (_init_choice(router_key, cfg, width) if cfg.experts else {})


def _init_choice(key: Array, cfg: Config, width: int) -> Params:
    """The router, and what every token meets beside its experts."""
    params: Params = {"w_router": weight(key, width, cfg.experts)}
    if cfg.score_bias:
        params["score_bias"] = jnp.zeros(cfg.experts)
    if cfg.shared:
        in_key, out_key, gate_key = jax.random.split(jax.random.fold_in(key, 1), 3)
        params["shared"] = {
            "w_in": weight(in_key, width, cfg.inner(cfg.shared)),
            "w_out": weight(out_key, cfg.shared, width),
        }
        if cfg.shared_gate:
            params["shared"]["w_gate"] = weight(gate_key, width, 1)
    return params


def _inner(params: Params, cfg: Config, x: Array) -> Array:
    """What the MLP, or every expert, makes of its input before `w_out`."""
    inner = dense(x, params["w_in"])
    if cfg.bias:
        inner = inner + params["in_bias"].astype(inner.dtype)
    if cfg.adapter:
        inner = inner + adapted(params["adapter"], ("in",), x)
    if cfg.kind == "gelu":
        return jax.nn.gelu(inner, approximate=not cfg.exact)
    gate, value = jnp.split(inner, 2, -1)
    act = jax.nn.silu if cfg.kind == "swiglu" else partial(jax.nn.gelu, approximate=not cfg.exact)
    return act(gate) * value


def _choice(params: Params, cfg: Config, x: Array) -> tuple[Array, Array, Array]:
    """Weights, choices and probabilities of the experts, `[..., E]`."""
    logits = dense(wide(x), params["w_router"])
    if cfg.score == "softmax":
        weights, chosen, probabilities = route(logits, cfg.experts_per_token, cfg.renormalise)
    else:
        probabilities = jax.nn.sigmoid(logits)
        biased = probabilities + params["score_bias"] if cfg.score_bias else probabilities
        biased = _best_groups(cfg, biased)
        weights, chosen = chosen_weights(probabilities, biased, cfg.experts_per_token, cfg.renormalise)
    return weights if cfg.scale == 1 else weights * cfg.scale, chosen, probabilities


def _best_groups(cfg: Config, scores: Array) -> Array:
    """`scores [..., E]`, those outside the best `groups_per_token` groups at minus infinity."""
    if cfg.expert_groups == 1:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], cfg.expert_groups, -1)
    best_two = jnp.sum(jax.lax.top_k(grouped, 2)[0], -1)
    _, best = jax.lax.top_k(best_two, cfg.groups_per_token)
    kept = jnp.any(best[..., None] == jnp.arange(cfg.expert_groups), -2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _mixture(params: Params, cfg: Config, x: Array, inner: Array) -> tuple[Array, dict[str, Array]]:
    weights, chosen, probabilities = _choice(params, cfg, x)
    loss, load, _ = balance(chosen, probabilities)
    inner = inner * weights[..., None].astype(inner.dtype)
    y = jnp.einsum("...ef,fed->...d", inner, params["w_out"].astype(x.dtype))
    if cfg.shared:
        shared = params["shared"]
        met = dense(_inner(shared, cfg, x), shared["w_out"])
        y = y + (jax.nn.sigmoid(dense(x, shared["w_gate"])) * met if cfg.shared_gate else met)
    return y, {"expert_balance_loss": cfg.balance * loss, "expert_load": load}


def apply(params: Params, cfg: Config, x: Array) -> tuple[Array, dict[str, Array]]:
    """The MLP's output for `x [..., D]`, which has been normalised, and aux."""
    inner = _inner(params, cfg, x)
    if cfg.experts:
        return _mixture(params, cfg, x, inner)
    y = dense(inner, params["w_out"])
    return y + params["out_bias"].astype(y.dtype) if cfg.bias else y, {}
