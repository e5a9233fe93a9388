"""What a config.json may say: an option is read, may have some values, changes nothing, or is wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

REQUIRED = object()
# They are about files, training, or what surrounds the model, in every family.
WITHOUT_EFFECT = (
    "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype",
    "eos_token_id", "initializer_range", "keys_to_ignore_at_inference", "model_type", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
)  # fmt: skip

COUNTED = ("layers", "layer", "experts", "heads")
MOST, MOST_EXPERTS = 10_000, 200_000


@dataclass(frozen=True)
class Option:
    """One option: its types, its default where it may be missing, and what it may be."""

    kinds: tuple[type, ...]
    default: Any = REQUIRED
    allowed: tuple[Any, ...] | None = None  # other values are refused
    same: Callable[[SimpleNamespace], Any] | None = None  # other values contradict the rest

    def problem(self, name: str, value: Any, read: SimpleNamespace) -> str | None:
        """What is wrong with `value`, given the options before it."""
        if value is None and self.default is None:
            return None
        number = not isinstance(value, bool) or bool in self.kinds
        if not isinstance(value, self.kinds) or not number:
            return f"{name}={value!r} must be of type {' or '.join(k.__name__ for k in self.kinds)}"
        if self.allowed is not None and value not in self.allowed:
            return f"{name}={value!r} is not supported, only {' or '.join(map(repr, self.allowed))}"
        return None if self.same is None else self._contradiction(name, value, read)

    def _contradiction(self, name: str, value: Any, read: SimpleNamespace) -> str | None:
        assert self.same is not None
        try:
            other = self.same(read)
        except (AttributeError, TypeError, ArithmeticError):  # what it is made of is missing or wrong itself
            return None
        return None if value == other else f"{name}={value!r} contradicts the rest, by which it is {other!r}"


def integer(default: Any = REQUIRED) -> Option:
    return Option((int,), default)


def number(default: Any = REQUIRED) -> Option:
    return Option((int, float), default)


def flag(default: Any = REQUIRED) -> Option:
    return Option((bool,), default)


def text(default: Any = REQUIRED) -> Option:
    return Option((str,), default)


def listed(default: Any = REQUIRED) -> Option:
    return Option((list,), default)


def table(default: Any = REQUIRED) -> Option:
    return Option((dict,), default)


def only(*allowed: Any) -> Option:
    """The first of `allowed` where it is missing; other values are refused."""
    return Option((*{type(value) for value in allowed}, int, float), allowed[0], allowed)


def derived(rule: Callable[[SimpleNamespace], Any]) -> Option:
    """May be missing; where it is not it says again what `rule` makes of the options before it."""
    return Option((object,), None, same=rule)


def read(options: dict[str, Option | None], config: dict[str, Any]) -> tuple[SimpleNamespace, list[str]]:
    """The options of `config` by name, and everything that is wrong with it.

    `options` has None for what a family knows and the computation does not depend on.
    """
    values, problems = SimpleNamespace(), []
    for name, option in options.items():
        if option is None:
            continue
        value = config.get(name, option.default)
        if value is REQUIRED:
            problems.append(f"option {name} is missing")
            continue
        wrong = option.problem(name, value, values) if name in config else None
        problems += [f"option {wrong}"] if wrong else []
        setattr(values, name, value)
    known = options.keys() | set(WITHOUT_EFFECT)
    problems += [f"option {name}={config[name]!r} is unknown" for name in sorted(config.keys() - known)]
    return values, problems


def too_many(config: dict[str, Any]) -> list[str]:
    """Options that count what a plan lists one by one, beyond any model: they are not to take the memory."""
    counts = {n: v for n, v in config.items() if isinstance(v, int) and n.endswith(COUNTED)}
    problems = [f"option {name}={value} exceeds {MOST:,}" for name, value in counts.items() if value > MOST]
    layers = max((v for n, v in counts.items() if n.endswith("layers")), default=1)
    experts = max((v for n, v in counts.items() if n.endswith("experts")), default=1)
    if not problems and layers * experts > MOST_EXPERTS:
        problems.append(f"options ask for {layers} x {experts} experts, more than {MOST_EXPERTS:,}")
    return problems


def rope(values: SimpleNamespace, share: float = 1.0) -> tuple[float, float, list[str]]:
    """Base and share of rotary positions, in the newer spelling or the older one, and what is wrong."""
    given = values.rope_parameters or {}
    older = {"rope_theta": values.rope_theta, "partial_rotary_factor": values.partial_rotary_factor}
    given = {k: v for k, v in older.items() if v is not None} | given
    kind = given.pop("rope_type", given.pop("type", "default"))
    problems = [] if kind == "default" else [f"option rope_type={kind!r} is not supported, only 'default'"]
    base, share = given.pop("rope_theta", 10000.0), given.pop("partial_rotary_factor", share)
    problems += [f"option rope_parameters.{name}={value!r} is unknown" for name, value in given.items()]
    return float(base), float(share), problems


ROPE: dict[str, Option | None] = {
    "rope_parameters": table(None),
    "rope_theta": number(None),
    "partial_rotary_factor": number(None),
    "rope_scaling": Option((dict,), None, ()),
}
