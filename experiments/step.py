"""One step of training as a compiled program: gradients, update, and what is told of them.

    programs = Programs(run)                 compiled once per shape of batch
    state = programs.initial(key)
    state, metrics = programs.step(state, batch)

On a mesh (see `experiments.mesh`) the same program runs on all its devices.
"""

import time
from dataclasses import dataclass
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from experiments import faults, frozen, mesh, optimizer, state_passing
from experiments.agreement import Agreement, told
from experiments.config import Optimizer, Run
from experiments.losses import continued_losses, model_losses
from layers.checks import require
from zoo import autoencoder, classifier, lm, sharding

# What each kind of model is trained on.
KINDS: dict[ModuleType, str] = {lm: "language", classifier: "classification", autoencoder: "reconstruction"}


@struct.dataclass
class TrainState:
    step: Array  # batches used
    bad_steps: Array  # of which skipped
    bad_in_row: Array  # of which just now
    params: Any
    opt_state: Any
    passed: Any = None  # what a batch leaves to the next (see `experiments.state_passing`)


def model_module(model: Any) -> ModuleType:
    """The functions of a model Config."""
    modules: dict[type, ModuleType] = {module.Config: module for module in KINDS}
    require(type(model) in modules, f"model={model!r} is no Config of zoo's lm, classifier or autoencoder")
    return modules[type(model)]


def init_state(run: Run, key: Array, initial: Any = None) -> TrainState:
    """Step 0, with the parameters `initial` if they are given."""
    if initial is None:
        params = model_module(run.model).init(key, run.model)
    else:  # copies, which may be donated
        params = jax.tree.map(jnp.copy, initial)
    zero = jnp.zeros((), jnp.int32)
    numbers = optimizer.numbers(run.optimizer, run.steps)
    opt_state = optimizer.make(run.optimizer, numbers).init(frozen.split(params, run.frozen)[0])
    return TrainState(zero, zero, zero, params, opt_state, state_passing.first(run, key))


def accumulated_gradient(run: Run, params: Any, batch: dict[str, Array], state: Any = None):
    """`(gradient, mean loss with auxiliary losses, sums, aux, last state)` of a batch, part by part.

    Losses are summed over labelled positions and divided by their number in the whole batch, so the
    result does not depend on how the batch is cut. Auxiliary losses of the layers weigh by those positions.
    `state` is what the rows begin with; without it they begin empty, and the last state is None. The gradient
    has None in the places of frozen parameters.
    """
    trained, still = frozen.split(params, run.frozen)
    tokens = jnp.maximum((batch["targets"] >= 0).sum(), 1)
    how = {"chunk": run.loss_chunk, "dtype": jnp.dtype(run.compute_dtype)}

    def objective(trained, part, begun):  # here, and only here, a model meets what it is trained on
        params = frozen.join(trained, still)
        if begun is None:
            (sums, aux), last = model_losses(params, run.model, part, **how), None
        else:
            sums, aux, last = continued_losses(params, run.model, part, begun, **how)
        extra = sum(value for name, value in aux.items() if name.endswith("_loss"))
        return (sums["loss"] + sums["tokens"] * extra) / tokens, (sums, aux, last)

    def add(grads, part):
        (loss, out), new = jax.value_and_grad(objective, has_aux=True)(trained, *part)
        return jax.tree.map(jnp.add, grads, new), (loss, *out)

    def cut(x):
        return sharding.constrain(x.reshape(run.accumulate, -1, *x.shape[1:]), None, sharding.ROWS)

    parts = jax.tree.map(cut, batch)
    parts = parts, state_passing.cut(state, run.accumulate)
    grads, (loss, sums, aux, last) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), parts)
    sums = {name: value.sum() for name, value in sums.items()}
    return (
        grads,
        loss.sum(),
        sums,
        {name: value.mean(0) for name, value in aux.items()},
        state_passing.join(last),
    )


def make_train_step(run: Run):
    """`(state, batch, numbers=those of the run's optimizer) -> (state, metrics)`.

    When the loss or the gradient is not finite, or the batch is not sound (see `experiments.faults`),
    parameters and optimiser stay as they are, and so does the schedule, which counts the updates that were
    made.
    """
    own = optimizer.numbers(run.optimizer, run.steps)

    def train_step(state: TrainState, batch: dict[str, Array], numbers: optimizer.Numbers = own):
        update = optimizer.make(run.optimizer, numbers).update
        rate = optimizer.schedule(run.optimizer.schedule, numbers)
        begun = state_passing.begin(run, state.passed, state.step)
        grads, loss, sums, aux, last = accumulated_gradient(run, state.params, batch, begun)
        norm = optax.tree.norm(grads)
        sound = faults.sound(run.model, batch)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm) & sound
        trained, still = frozen.split(state.params, run.frozen)
        updates, opt_state = update(grads, state.opt_state, trained)
        proposed = (optax.apply_updates(trained, updates), opt_state)
        kept = (trained, state.opt_state)
        trained, opt_state = jax.tree.map(lambda new, old: jnp.where(ok, new, old), proposed, kept)
        params = frozen.join(trained, still)
        bad_steps, bad_in_row = state.bad_steps + ~ok, jnp.where(ok, 0, state.bad_in_row + 1)
        metrics = {
            "loss": jnp.where(sound, sums["loss"] / jnp.maximum(sums["tokens"], 1), jnp.nan),
            "accuracy": sums["correct"] / jnp.maximum(sums["tokens"], 1),
            "grad_norm": norm,
            "lr": rate(state.step - state.bad_steps),
            "bad_steps": bad_steps,
            "bad_in_row": bad_in_row,
            **aux,
        }
        passed = state_passing.keep(run, state.passed, last, ok)
        return TrainState(state.step + 1, bad_steps, bad_in_row, params, opt_state, passed), metrics

    return train_step


def shapes_of(batch: dict[str, Array]) -> tuple:
    """What a compiled step is made for."""
    return tuple(sorted((name, x.shape, x.dtype.name) for name, x in batch.items()))


class _Step:
    """A step compiled once per shape of batch, and the seconds that took."""

    def __init__(self, run: Run, placement: mesh.Placement):
        self.run, self.placement = run, placement
        self.numbers = optimizer.numbers(run.optimizer, run.steps)
        self.agreement = Agreement(placement.mesh) if jax.process_count() > 1 else None
        self.made: dict[tuple, Any] = {}
        self.seconds = 0.0

    def lower(self, state: TrainState, batch: dict[str, Any]) -> jax.stages.Lowered:
        """The program for a state and a batch, which may be structs with shardings, and numbers."""
        places: dict[str, Any] = {}
        if self.placement.mesh is not None:
            places = {"out_shardings": (self.placement.of_state(state), self.placement.whole())}
        step = make_train_step(self.run)
        if self.agreement is not None:
            step = told(step)
        with self.placement.ambient():
            return jax.jit(step, donate_argnums=0, **places).lower(state, batch, self.numbers)

    def __call__(
        self,
        state: TrainState,
        batch: dict[str, Array],
        asked: bool = False,
        numbers: optimizer.Numbers | None = None,
    ):
        """`(state, metrics)`, with the `numbers` of another run if they are given.

        Of many processes, metrics have `asked`: whether one of them was `asked`.
        """
        if self.agreement is not None:
            batch = batch | {"asked": self.agreement.flag(asked)}
        shapes = shapes_of(batch)
        if shapes not in self.made:
            start = time.perf_counter()
            self.made[shapes] = self.lower(state, batch).compile()
            self.seconds += time.perf_counter() - start
        return self.made[shapes](state, batch, numbers or self.numbers)


class Programs:
    """What a run computes, compiled."""

    def __init__(self, run: Run, devices: Any = None):
        """On `devices`, those of the backend unless given: they may be of a machine that is not here."""
        self.placement = mesh.Placement(run.mesh, devices)
        self.initial = mesh.jit_into(self.placement, partial(init_state, run), jax.random.key(0))
        self.step = _Step(run, self.placement)

    def template(self) -> Any:
        """The state of step 0 as structs, on the mesh with shardings."""
        state = jax.eval_shape(self.initial, jax.random.key(0))
        if self.placement.mesh is None:
            return state
        places = self.placement.of_state(state)
        return jax.tree.map(lambda x, place: x.update(sharding=place), state, places)


@dataclass(frozen=True)
class NoData:
    """In the place of data, which no program depends on: there is nothing to build."""

    build: None = None


SHAPING = ("schedule", "beta1", "beta2", "eps", "clip_norm")  # what a program has of an optimizer
# And what it has of a run beside that.
FIELDS = (
    "model",
    "batch_size",
    "accumulate",
    "compute_dtype",
    "loss_chunk",
    "initial_state",
    "state_scale",
    "frozen",
    "mesh",
)


def _fields(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


@lru_cache(8)
def _shared(run: Run) -> Programs:
    return Programs(run)


def programs(run: Run) -> Programs:
    """Those of `run`, whose step is to be given its `numbers`.

    Runs that differ in their seed, length, data or the numbers of their optimizer share them.
    """
    optimizer = Optimizer(**_fields(run.optimizer, SHAPING))
    return _shared(Run(data=NoData(), optimizer=optimizer, **_fields(run, FIELDS)))
