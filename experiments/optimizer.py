"""AdamW with three groups of parameters, told apart by name (see `layers/__init__.py`), and schedules.

    w_*      weight decay, the learning rate
    ssm_*    no decay, min(learning rate, ssm_lr): a time-invariant state space diverges at the others' rate
    others   no decay, the learning rate

Loshchilov & Hutter 2017 (arXiv 1711.05101); WSD: Hu et al. 2024 (arXiv 2404.06395) sec. 4; the rate of
state-space dynamics: Gu et al. 2022 (arXiv 2111.00396) app. D.2.
"""

import jax
import jax.numpy as jnp
import optax

from experiments.config import Optimizer

Numbers = dict[str, float]


def numbers(cfg: Optimizer, steps: int) -> Numbers:
    """What differs between runs of one program: rates, decay, and the course of `steps` updates."""
    hold = steps - cfg.decay_fraction * steps if cfg.schedule == "wsd" else cfg.warmup_steps
    return {
        "lr": float(cfg.lr),
        "ssm_lr": float(min(cfg.lr, cfg.ssm_lr)),
        "rise": float(max(cfg.warmup_steps, 1)),
        "hold": float(hold),  # the update at which the fall begins
        "fall": float(max(steps - hold, 1)),  # how many it takes
        "min_lr_ratio": float(cfg.min_lr_ratio),
        "weight_decay": float(cfg.weight_decay),
    }


def schedule(kind: str, of: Numbers, peak: str = "lr") -> optax.Schedule:
    """Learning rate of update 0, 1, ...: a linear rise to `of[peak]`, then

    "cosine" falls along half a cosine to `min_lr_ratio` of it; "wsd" stays, and falls linearly over the last
    `decay_fraction` of the run; "constant" stays.
    """

    def rate(count):
        rise = jnp.minimum(1.0, (count + 1) / of["rise"])
        if kind == "constant":
            return of[peak] * rise
        done = jnp.clip((count - of["hold"]) / of["fall"], 0.0, 1.0)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * done)) if kind == "cosine" else 1 - done
        return of[peak] * rise * (of["min_lr_ratio"] + (1 - of["min_lr_ratio"]) * fall)

    return rate


def group(path, _leaf=None) -> str:
    """The group of the parameter at `path`, "decay", "ssm" or "plain", by the last name on it."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return "decay" if name.startswith("w_") else "ssm" if name.startswith("ssm_") else "plain"


def _groups(params):
    return jax.tree_util.tree_map_with_path(group, params)


def make(cfg: Optimizer, of: Numbers) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay, learning rate; `of` are the `numbers` of `cfg`, arrays if need be."""
    usual = optax.scale_by_learning_rate(schedule(cfg.schedule, of))
    slow = optax.scale_by_learning_rate(schedule(cfg.schedule, of, "ssm_lr"))
    return optax.chain(
        optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps),
        optax.add_decayed_weights(
            of["weight_decay"], lambda params: jax.tree.map(lambda name: name == "decay", _groups(params))
        ),
        optax.multi_transform({"decay": usual, "plain": usual, "ssm": slow}, _groups),
    )
