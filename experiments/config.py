"""What a run is: frozen dataclasses, their JSON, and the differences between two of them.

A `Run` holds everything that decides a result, and nothing else does. Its data is a frozen dataclass with
`build() -> experiments.sources.Source`.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

from experiments.mesh import ONE_DEVICE, Mesh
from layers.checks import require, require_choice, require_positive
from layers.fields import later

SCHEDULES = ("cosine", "wsd", "constant")
DTYPES = ("float32", "bfloat16")
INITIAL_STATES = ("zero", "carried", "shuffled", "gaussian")
# They decide what is kept of a run and where it runs, not what it computes: it may be continued with others.
KEEPING = ("checkpoint_every", "keep", "prefetch")
PLACING = "mesh"
# Their config types are imported by name; others have to be there already, loaded by whoever wrote them.
HOUSES = ("zoo", "layers", "experiments")
# The environment variable of modules to import nevertheless, `mine,my.layers`.
VOUCHED = "ZOO_MODULES"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (see `experiments.optimizer`). Raises ValueError for numbers out of range."""

    lr: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_fraction: float = 0.2  # part of the run over which "wsd" cools down
    min_lr_ratio: float = 0.1  # the last learning rate over the highest
    ssm_lr: float = 1e-3  # the highest for `ssm_*` parameters
    weight_decay: float = 0.1  # of `w_*` parameters
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0  # of all gradients together; None does not clip

    def __post_init__(self):
        require_choice(self, "schedule", SCHEDULES)
        ranges = {
            "> 0": (lambda x: x > 0, ("lr", "ssm_lr", "eps")),
            ">= 0": (lambda x: x >= 0, ("warmup_steps", "weight_decay")),
            "in [0, 1)": (lambda x: 0 <= x < 1, ("beta1", "beta2")),
            "in [0, 1]": (lambda x: 0 <= x <= 1, ("decay_fraction", "min_lr_ratio")),
        }
        for text, (inside, names) in ranges.items():
            for name in names:
                value = getattr(self, name)
                require(inside(value), f"optimizer: {name}={value} must be {text}")
        ok = self.clip_norm is None or self.clip_norm > 0
        require(ok, f"optimizer: clip_norm={self.clip_norm} must be > 0, or None for no clipping")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. Raises ValueError for numbers that do not fit."""

    model: Any  # lm.Config or classifier.Config, or `weights.FromWeights`
    data: Any  # a data config
    optimizer: Optimizer = Optimizer()
    steps: int = 1000
    batch_size: int = 32  # sequences per update
    accumulate: int = 1  # micro-batches that one update is computed in; the result is the same
    seed: int = 0  # of the parameters and of the data's order
    compute_dtype: str = "float32"  # of activations; parameters and states are float32
    loss_chunk: int | None = 4096  # positions whose logits exist at once; None for all
    log_every: int = 10
    eval_every: int = 0  # steps between evaluations; 0 for one at the end only
    eval_batch_size: int | None = None  # default batch_size
    eval_batches: int | None = None  # at most this many batches; None for the whole split
    eval_split: str = "validation"
    checkpoint_every: int = 0  # steps between checkpoints; 0 for one at the end only
    keep: int = 2  # newest checkpoints that stay
    max_bad_steps: int = 10  # updates in a row that may be skipped; see `experiments.train`
    # The state that a training batch begins with (see `experiments.state_passing`).
    initial_state: str = later("zero")
    state_scale: float = later(1.0)  # standard deviation of "gaussian"
    mesh: Mesh = later(ONE_DEVICE)  # of devices; one device unless given
    # What the parameters begin as (see `experiments.weights`); random where it is empty.
    initial_weights: str = later("")
    initial_fingerprint: str = later("")  # of these; filled in, or checked where it is given
    frozen: tuple[str, ...] = later(())  # parameters that stay as they are (see `experiments.frozen`)
    prefetch: int = later(2)  # batches that a thread makes ahead of the step (see `experiments.feed`)

    def __post_init__(self):
        require_positive(self, "steps", "batch_size", "accumulate", "log_every", "keep", "max_bad_steps")
        require_choice(self, "compute_dtype", DTYPES)
        require_choice(self, "initial_state", INITIAL_STATES)
        require(self.state_scale > 0, f"state_scale={self.state_scale} must be > 0")
        ok = isinstance(self.prefetch, int) and self.prefetch >= 0
        require(ok, f"prefetch={self.prefetch!r} must be an integer >= 0")
        for name in ("loss_chunk", "eval_batch_size", "eval_batches"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        for name in ("eval_every", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be >= 0")
        ok = self.batch_size % self.accumulate == 0
        require(ok, f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")
        require(hasattr(self.data, "build"), f"data={self.data!r} is not a data config: it has no build()")


def to_dict(value: Any) -> Any:
    """A config as JSON values; a dataclass becomes its fields and its `type`, `module:name`.

    A `later` field is left out while it has its default: configs from before it keep their fingerprints.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if _said(f, value)
        }
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{value!r} of {type(value).__name__} cannot stand in a config")


def _said(of: dataclasses.Field, value: Any) -> bool:
    return of.init and not (of.metadata.get("later") and getattr(value, of.name) == of.default)


def from_dict(value: Any) -> Any:
    """The config that `to_dict` was given; fields added since take their defaults.

    Lists become tuples. Only config types are made: frozen dataclasses of the project's own packages, or of
    a module that is loaded already; no other module is imported, whatever `value` names. Raises ValueError,
    one line, for a type or a field that does not exist (any more) and for values that do not fit.
    """
    if isinstance(value, list):
        return tuple(from_dict(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {key: from_dict(item) for key, item in value.items() if key != "type"}
    if "type" not in value:
        return fields
    name = value["type"]
    made = _type(name)
    known = {f.name for f in dataclasses.fields(made) if f.init}
    unknown = sorted(name if name.isidentifier() else repr(name) for name in fields.keys() - known)
    require(not unknown, f"{name} has no field {', '.join(unknown)}")
    try:
        return made(**fields)
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None


def _type(name: Any) -> type:
    """The config type called `module:name`."""
    module, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    # vars(): a module may import others when it is asked for a name that it has not.
    found = vars(there).get(attribute) if (there := _module(module)) else None
    # One that the module has imported from elsewhere is not its own.
    ok = isinstance(found, type) and dataclasses.is_dataclass(found) and found.__module__ == module
    frozen = ok and cast(Any, found).__dataclass_params__.frozen
    hint = (
        "" if there else f"; modules beyond the zoo's are imported if the environment has them in {VOUCHED}"
    )
    require(frozen, f"there is no config type {name!r}{hint}")
    return cast(type, found)


def _module(name: str) -> ModuleType | None:
    if name not in sys.modules and (name.split(".")[0] in HOUSES or name in _vouched()):
        try:
            return importlib.import_module(name)
        except (ImportError, ValueError):  # absent, or malformed as in "zoo..lm"
            return None
    return sys.modules.get(name)


def _vouched() -> list[str]:
    return os.environ.get(VOUCHED, "").split(",")


def vouch(value: Any) -> None:
    """Let the processes that are started from now on import the modules that `value` has its types from."""
    types = [v for path, v in _flat(to_dict(value)).items() if path.rpartition(".")[2] == "type"]
    modules = {str(name).partition(":")[0] for name in types}
    beyond = {name for name in modules if name.split(".")[0] not in HOUSES} - set(_vouched())
    if beyond:
        os.environ[VOUCHED] = ",".join([*filter(None, _vouched()), *sorted(beyond)])


def fingerprint(value: Any) -> str:
    """A short name for a config: equal exactly when `to_dict` is."""
    return hashlib.sha256(json.dumps(to_dict(value), sort_keys=True).encode()).hexdigest()[:16]


def difference(old: Any, new: Any) -> list[str]:
    """Fields in which two configs differ, one `path: old -> new` each; those of KEEPING and the mesh do not
    count."""
    before, after = _flat(to_dict(old)), _flat(to_dict(new))
    counted = (p for p in before | after if p not in KEEPING and p.partition(".")[0] != PLACING)
    paths = [p for p in counted if before.get(p) != after.get(p)]
    return [f"{p}: {before.get(p, 'absent')!r} -> {after.get(p, 'absent')!r}" for p in paths]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    return {p: v for key, item in value.items() for p, v in _flat(item, f"{path}.{key}".lstrip(".")).items()}
