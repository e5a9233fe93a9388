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


def schedule(cfg: Optimizer, steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate of update 0, 1, ..., `steps` - 1: a linear rise to `peak` (default `cfg.lr`), then

    "cosine" falls along half a cosine to `min_lr_ratio * peak`; "wsd" stays, and falls linearly over the last
    `decay_fraction` of the run; "constant" stays.
    """
    peak = cfg.lr if peak is None else peak
    hold = steps - cfg.decay_fraction * steps if cfg.schedule == "wsd" else cfg.warmup_steps

    def rate(count):
        rise = jnp.minimum(1.0, (count + 1) / max(cfg.warmup_steps, 1))
        if cfg.schedule == "constant":
            return peak * rise
        done = jnp.clip((count - hold) / max(steps - hold, 1), 0.0, 1.0)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * done)) if cfg.schedule == "cosine" else 1 - done
        return peak * rise * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * fall)

    return rate


def group(path, _leaf=None) -> str:
    """The group of the parameter at `path`, "decay", "ssm" or "plain", by the last name on it."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return "decay" if name.startswith("w_") else "ssm" if name.startswith("ssm_") else "plain"


def _groups(params):
    return jax.tree_util.tree_map_with_path(group, params)


def make(cfg: Optimizer, steps: int) -> optax.GradientTransformation:
    """Clip, Adam, decoupled decay, learning rate."""
    usual = optax.scale_by_learning_rate(schedule(cfg, steps))
    slow = optax.scale_by_learning_rate(schedule(cfg, steps, min(cfg.lr, cfg.ssm_lr)))
    return optax.chain(
        optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps),
        optax.add_decayed_weights(
            cfg.weight_decay, lambda params: jax.tree.map(lambda name: name == "decay", _groups(params))
        ),
        optax.multi_transform({"decay": usual, "plain": usual, "ssm": slow}, _groups),
    )
