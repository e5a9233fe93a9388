"""How every Config validates itself: each check raises ValueError and names the layer and the field."""

from typing import Any

from layers.heads import ExpandedHeads


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`: how every Config validates itself."""
    if not condition:
        raise ValueError(message)


def require_positive(cfg: object, *names: str) -> None:
    """Every named field of `cfg` is an integer of at least 1."""
    for name in names:
        value = getattr(cfg, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(ok, f"{_layer(cfg)}: {name}={value!r} must be an integer >= 1")


def require_not_negative(cfg: object, *names: str) -> None:
    """Every named field of `cfg` is at least 0."""
    for name in names:
        value = getattr(cfg, name)
        require(value >= 0, f"{_layer(cfg)}: {name}={value} must be >= 0")


def require_above_zero(cfg: object, *names: str) -> None:
    """Every named field of `cfg` is a number > 0."""
    for name in names:
        value = getattr(cfg, name)
        require(value > 0, f"{_layer(cfg)}: {name}={value} must be > 0")


def require_divides(cfg: object, divisor: str, dividend: str) -> None:
    """Field `divisor` divides field `dividend`."""
    a, b = getattr(cfg, divisor), getattr(cfg, dividend)
    require(b % a == 0, f"{_layer(cfg)}: {divisor}={a} does not divide {dividend}={b}")


def require_choice(cfg: object, name: str, choices: tuple[str, ...]) -> None:
    """Field `name` is one of `choices`."""
    value = getattr(cfg, name)
    require(value in choices, f"{_layer(cfg)}: {name}={value!r}; choose from {', '.join(choices)}")


def require_rotary(cfg: Any, head_width: int) -> None:
    """Rotary positions, which `rope_base` asks for, turn pairs of channels."""
    ok = cfg.rope_base is None or head_width % 2 == 0
    require(ok, f"{_layer(cfg)}: rotary positions need an even head width, not {head_width}")


def require_head_dims(cfg: object) -> None:
    """`width`, `heads`, `key_dim` and `value_dim` are positive; the last two may be None, width / heads."""
    require_positive(cfg, "width", "heads")
    for name in ("key_dim", "value_dim"):
        if getattr(cfg, name) is None:
            require_divides(cfg, "heads", "width")
        else:
            require_positive(cfg, name)


def require_expanded_heads(cfg: ExpandedHeads) -> None:
    """`width` and `expand` are positive; `head_dim` divides their product."""
    require_positive(cfg, "width", "expand")
    require(
        cfg.P >= 1 and cfg.channels % cfg.P == 0,
        f"{_layer(cfg)}: head_dim={cfg.head_dim} does not divide expand * width = {cfg.channels}",
    )


def require_sets(cfg: object) -> None:
    """`sets`, how many parameter sets the channels share, is None (one each) or divides `width`."""
    if getattr(cfg, "sets", None) is not None:
        require_positive(cfg, "sets")
        require_divides(cfg, "sets", "width")


def _layer(cfg: object) -> str:
    return type(cfg).__module__.rsplit(".", 1)[-1]
