"""What a run costs, and runs made equal in one cost: parameters, FLOPs, state bytes or tokens.

    runs = matched(runs, Budget("params"))      every MLP as wide as brings its model to the first's count

Parameters are met by the width of the MLP, FLOPs and tokens by the number of steps. A state cannot be had in
every size: there the config has to choose, and is held to it.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from experiments.config import Run
from experiments.flops import train_flops
from experiments.step import model_module
from layers.checks import require, require_choice
from zoo import lm

KINDS = ("params", "flops", "state_bytes", "tokens")
WIDEST_MLP = 16  # times the width of the model


@dataclass(frozen=True)
class Costs:
    """What a run takes. `params` counts embeddings, `inner_params` does not (nor an untied head)."""

    params: int
    inner_params: int
    active_params: int  # that one token meets
    state_bytes: int  # of one sequence, float32
    tokens: int  # positions of all training batches, padding included
    flops: float  # 3 x forward of all of them: recomputation is not counted, the head only where it is read


@dataclass(frozen=True)
class Budget:
    """One cost that all runs have in common, up to `tolerance`; `value` None: that of the first run."""

    kind: str
    value: float | None = None
    tolerance: float = 0.02

    def __post_init__(self):
        require_choice(self, "kind", KINDS)
        require(0 < self.tolerance < 1, f"budget: tolerance={self.tolerance} must lie in (0, 1)")
        ok = self.value is None or self.value > 0
        require(ok, f"budget: value={self.value} must be > 0, or None for that of the first run")


@lru_cache(8)
def build(data: Any):
    """The source of a data config; made once, as long as only a few are in use."""
    return data.build()


def costs(run: Run) -> Costs:
    """From the config, the shapes of its batches (the first one's, or those that the source calls `alike`),
    and nothing that was trained."""
    model, module = run.model, model_module(run.model)
    source, tokens, flops = build(run.data), 0, 0.0
    alike = getattr(source, "alike", lambda seed, steps, size: [(steps, 0)])
    for count, step in alike(run.seed, run.steps, run.batch_size):
        batch = source.batch(run.seed, step, run.batch_size)
        inputs = batch["tokens"] if "tokens" in batch else batch["inputs"]
        tokens += count * inputs.shape[0] * inputs.shape[1]
        flops += count * train_flops(model, batch)
    params = module.param_count(model)
    active = lm.active_param_count(model) if module is lm else params
    return Costs(
        params=params,
        inner_params=params - _outer_params(model),
        active_params=active,
        state_bytes=module.state_bytes(model),
        tokens=tokens,
        flops=flops,
    )


def _outer_params(model: Any) -> int:
    """Of embedding and head."""
    if isinstance(model, lm.Config):
        return model.vocab_size * model.width * (1 if model.tie else 2)
    return 0


def matched(runs: tuple[tuple[str, Run], ...], budget: Budget | None) -> tuple[tuple[str, Run], ...]:
    """Labelled runs that all meet the budget. ValueError, with every figure, where one cannot."""
    if budget is None:
        return runs
    value = budget.value or getattr(costs(runs[0][1]), budget.kind)
    met = tuple((label, _match(run, budget.kind, value)) for label, run in runs)
    spent = {label: getattr(costs(run), budget.kind) for label, run in met}
    off = {label: x for label, x in spent.items() if abs(x / value - 1) > budget.tolerance}
    require(
        not off,
        f"budget of {value:,.0f} {budget.kind} is not met within {budget.tolerance:.0%} by "
        + ", ".join(f"{label} ({x:,.0f})" for label, x in off.items()),
    )
    return met


def _match(run: Run, kind: str, value: float) -> Run:
    if kind in ("flops", "tokens"):
        return dataclasses.replace(run, steps=max(1, round(run.steps * value / getattr(costs(run), kind))))
    if kind == "params" and run.model.mlp != "none":
        return dataclasses.replace(run, model=with_params(run.model, value))
    return run


def with_params(model: Any, parameters: float) -> Any:
    """`model` with the MLP width, a multiple of 8, that brings it closest to `parameters`."""
    width, count = model.width, model_module(model).param_count

    def of_hidden(hidden: int) -> Any:
        return dataclasses.replace(model, expansion=hidden / width)

    # The count is linear in the hidden width.
    least = count(of_hidden(8))
    slope = (count(of_hidden(16)) - least) / 8
    steps = round((parameters - least) / (8 * slope))
    return of_hidden(8 * min(max(1 + steps, 1), WIDEST_MLP * width // 8))
