"""All that `zoo fit` says about one set of runs: fits, intervals, profiles, optima, doubts."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.scaling import doubt, envelope, huber, overtraining, profiles, published, varpro
from experiments.scaling.data import Runs, Table, require_determined
from experiments.scaling.law import Cost, Law, compute_of, cost_of
from layers.checks import require

FITTED = ("E", "A", "B", "alpha", "beta", "a", "b")  # what has an interval, beside N* and D*
MISFIT = 0.05  # of the FLOPs of a run against the formula, from which on it is flagged
FORMS = ("surface", "overtraining", "both")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Raises ValueError, with the option, for what cannot be."""

    delta: float = huber.DELTA
    resamples: int = doubt.RESAMPLES
    seed: int = 0
    budgets: tuple[float, ...] = ()  # of compute; none: those of the runs, and ten times the largest
    form: str | None = None  # of FORMS; None: both where the CSV has tokens per parameter, else the surface

    def __post_init__(self):
        require(0 < self.delta < math.inf, f"--delta {self.delta} must be above 0")
        require(self.resamples >= 0, f"--resamples {self.resamples} must be at least 0")
        require(0 <= self.seed < 2**64, f"--seed {self.seed} must be from 0 to 2**64 - 1")
        require(all(0 < c < math.inf for c in self.budgets), f"--budgets {self.budgets} must be above 0")
        require(
            self.form is None or self.form in FORMS, f"--form {self.form!r}; choose from {', '.join(FORMS)}"
        )


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything found out about `runs`; laws in the units of the data."""

    name: str
    runs: Runs
    settings: Settings
    convention: dict[str, str]  # what N, D, C and L are
    cost: Cost
    varpro: Law | None
    huber: Law | None
    overtraining: overtraining.Overtraining | None
    profiles: profiles.Profiles
    bias: profiles.Bias | None
    envelope: envelope.Envelope
    budgets: np.ndarray  # [K] compute of the optima that are reported
    samples: np.ndarray  # [S, 7 + 2 K] of the bootstrap: FITTED, log N*, log D*
    sensitivity: dict[str, dict[Any, Law]]
    held_out: list[doubt.HeldOut]
    noise: tuple[float, int] | None
    flags: list[str]

    @property
    def law(self) -> Law:
        """The least-squares law that the report is built on: of five parameters, else of four."""
        if self.varpro is not None:
            return self.varpro
        assert self.overtraining is not None
        return self.overtraining.law

    @property
    def methods(self) -> dict[str, Law]:
        """Laws by the name of their fit."""
        tied = None if self.overtraining is None else self.overtraining.law
        laws = {"varpro": self.varpro, "huber": self.huber, "overtraining": tied}
        return {name: law for name, law in laws.items() if law is not None}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % intervals of FITTED; empty without a bootstrap."""
        if len(self.samples) == 0:
            return {}
        low, high = doubt.intervals(self.samples)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(FITTED)}

    def optimum_intervals(self) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """95 % intervals of N* and D* at each budget; empty without a bootstrap."""
        if len(self.samples) == 0:
            return []
        low, high = (np.exp(x[len(FITTED) :]) for x in doubt.intervals(self.samples))
        k = len(self.budgets)
        return [((low[i], high[i]), (low[k + i], high[k + i])) for i in range(k)]


def run(name: str, runs: Runs, settings: Settings, table: Table, notes: list[str]) -> Study:
    """Fit `runs`, which came from `table`, with `notes` on what was left out.

    Raises ValueError where the runs do not determine the law.
    """
    form = settings.form or ("both" if table.multiplier is not None else "surface")
    surface = form != "overtraining"
    require_determined(runs, tied=not surface)
    cost = cost_of(runs, table.columns["flops"])
    least_squares = varpro.fit(runs) if surface else None
    robust = _robust(runs, settings.delta, least_squares)
    tied = None if form == "surface" else overtraining.fit(runs)
    law = least_squares if least_squares is not None else tied.law  # type: ignore[union-attr]
    found = profiles.fit(runs)
    budgets = _budgets(settings, found, runs)
    measure = doubt.optima(cost, budgets)
    samples, failed = np.zeros((0, len(FITTED) + 2 * len(budgets))), 0
    if surface and settings.resamples:
        samples, failed = doubt.bootstrap(
            runs, measure, law, resamples=settings.resamples, seed=settings.seed
        )
    usable = law.A > 0 and law.B > 0
    study = Study(
        name=name,
        runs=runs,
        settings=settings,
        convention=_convention(table, cost),
        cost=cost,
        varpro=least_squares,
        huber=robust,
        overtraining=tied,
        profiles=found,
        bias=profiles.bias(law, cost, runs) if usable and found.used else None,
        envelope=envelope.fit(runs),
        budgets=budgets,
        samples=samples.reshape(-1, len(FITTED) + 2 * len(budgets)),
        sensitivity={} if robust is None else _sensitivity(runs, law, robust),
        held_out=doubt.largest_held_out(runs, form=form, delta=settings.delta),
        noise=doubt.noise(runs),
        flags=list(notes),
    )
    study.flags.extend(_flags(study, failed))
    return study


def _robust(runs: Runs, delta: float, least_squares: Law | None) -> Law | None:
    return None if least_squares is None else huber.fit(runs, delta=delta, starts=[least_squares])


def _budgets(settings: Settings, found: profiles.Profiles, runs: Runs) -> np.ndarray:
    if settings.budgets:
        return np.array(settings.budgets)
    compute = compute_of(runs)
    own = [p.compute for p in found.budgets] or list(np.geomspace(compute.min(), compute.max(), 4))
    return np.array([*own, profiles.BEYOND * max(own)])


def _sensitivity(runs: Runs, law: Law, robust: Law) -> dict[str, dict[Any, Law]]:
    return {
        "delta": doubt.by_delta(runs, [law, robust]),
        "without the largest residuals": doubt.trimmed(runs, law),
        "without a budget": doubt.without_budgets(runs, law),
        "without a run": doubt.without_each(runs, law),
    }


def _convention(table: Table, cost: Cost) -> dict[str, str]:
    columns = table.columns
    others = [c for c in table.header if "param" in c.lower() and c != columns["params"]]
    also = f" (there is also {', '.join(others)})" if others else ""
    tokens = f"column {columns['tokens']!r}"
    if columns["tokens"] not in table.header:
        tokens = f"N times column {table.multiplier!r}"
    return {
        "N": f"column {columns['params']!r}, parameters as counted there{also}",
        "D": tokens,
        "C": str(cost),
        "L": f"column {columns['loss']!r}, in its units",
    }


def _flags(study: Study, failed: int) -> list[str]:
    """One line for everything that makes the results doubtful."""
    runs, law = study.runs, study.law
    found = [] if study.varpro is None else varpro.flags(study.varpro, runs)
    found += [] if study.huber is None else huber.flags(study.huber, runs)
    if study.cost.misfit > MISFIT:
        found.append(f"FLOPs of a run differ by {100 * study.cost.misfit:.0f} % from {study.cost}")
    found += [
        f"outlier: {runs.line(row)} lies {_percent(law, runs, row)} from the fit"
        for row in doubt.outliers(law, runs)
    ]
    if not study.profiles.budgets:
        found.append("no isoFLOP profiles: no three sizes have the same compute, or the same `budget`")
    elif len(study.profiles.used) == 1:
        found.append("one isoFLOP budget has a minimum: no power law through minima")
    found += study.profiles.flags() + study.envelope.flags()
    found += [] if study.bias is None else study.bias.flags(law)
    if failed:
        found.append(
            f"{failed} of {study.settings.resamples} bootstrap samples determine no law and are left out"
        )
    if not study.held_out:
        found.append("no prediction of held-out runs: the others do not determine a law")
    return found


def _percent(law: Law, runs: Runs, row: int) -> str:
    return f"{100 * law.residuals(runs)[row]:+.2g} %"


def to_dict(study: Study) -> dict[str, Any]:
    """The study as JSON values: fits by name, `huber: {E, A, B, alpha, beta, ...}`; null is no number."""
    runs, settings = study.runs, study.settings
    result: dict[str, Any] = {
        "runs": len(runs),
        "convention": study.convention,
        "cost": {"factor": study.cost.factor, "power": study.cost.power, "misfit": study.cost.misfit},
    }
    if study.varpro is not None:
        result["varpro"] = study.varpro.to_dict() | _quality(study.varpro, runs)
    if study.huber is not None:
        quality = _quality(study.huber, runs) | {"objective": huber.value(study.huber, runs, settings.delta)}
        result["huber"] = study.huber.to_dict() | {"delta": settings.delta} | quality
    if study.overtraining is not None:
        result["overtraining"] = study.overtraining.to_dict() | _quality(study.overtraining.law, runs)
    result |= {
        "approach1": _approach(study.envelope.params_law, study.envelope.tokens_law),
        "approach2": _approach(study.profiles.params, study.profiles.tokens) | _profiles(study),
        "approach3": {name: _exponents(study.cost, law) for name, law in study.methods.items()},
        "optima": _optima(study),
        "bootstrap": _bootstrap(study),
        "sensitivity": {
            kind: [{"of": key, **law.to_dict()} for key, law in laws.items()]
            for kind, laws in study.sensitivity.items()
        },
        "held_out": [_held_out(held, runs) for held in study.held_out],
        "noise": None if study.noise is None else {"sd": study.noise[0], "freedom": study.noise[1]},
        "published": [vars(row) for row in published.of(study.name)],
        "flags": study.flags,
    }
    return _plain(result)


def _quality(law: Law, runs: Runs) -> dict[str, float]:
    rest = runs.loss - law.loss(runs.params, runs.tokens)
    logs = law.residuals(runs)
    return {"sum_of_squares": float(rest @ rest), "rms_log_residual": float(np.sqrt(np.mean(logs**2)))}


def _exponents(cost: Cost, law: Law) -> dict[str, float]:
    return dict(zip(("a", "b"), cost.exponents(law), strict=True))


def _approach(params: profiles.PowerLaw | None, tokens: profiles.PowerLaw | None) -> dict[str, Any]:
    if params is None or tokens is None:
        return {"a": None, "b": None, "params": None, "tokens": None}
    laws = {"params": params.to_dict(), "tokens": tokens.to_dict()}
    return {"a": params.exponent, "b": tokens.exponent, **laws}


def _profiles(study: Study) -> dict[str, Any]:
    keys = ("compute", "params", "tokens", "loss", "problem", "remark")
    minima = [{key: getattr(p, key) for key in keys} for p in study.profiles.budgets]
    bias = None if study.bias is None else vars(study.bias)
    return {"minima": minima, "bias": bias}


def _optima(study: Study) -> list[dict[str, Any]]:
    """The best N, D and loss of each budget."""
    params, tokens = study.cost.optimum(study.law, study.budgets)
    rows = [
        {"compute": c, "params": n, "tokens": d, "loss": loss}
        for c, n, d, loss in zip(study.budgets, params, tokens, study.law.loss(params, tokens), strict=True)
    ]
    for row in rows:
        row["beyond"] = beyond(study.runs, row["compute"], row["params"])
    for row, (of_params, of_tokens) in zip(rows, study.optimum_intervals(), strict=False):
        row |= {"params_interval": of_params, "tokens_interval": of_tokens}
    return rows


def beyond(runs: Runs, compute: float, params: float) -> str:
    """In what respect an optimum lies outside the runs; empty where it does not."""
    found = ["compute"] if compute > compute_of(runs).max() * 1.01 else []
    if not runs.params.min() <= params <= runs.params.max():
        found.append("size")
    return " and ".join(found)


def _bootstrap(study: Study) -> dict[str, Any]:
    settings = {"resamples": study.settings.resamples, "seed": study.settings.seed, "level": 0.95}
    return settings | {"used": len(study.samples), "intervals": study.intervals()}


def _held_out(held: doubt.HeldOut, runs: Runs) -> dict[str, Any]:
    means = {name: float(np.abs(errors).mean()) for name, errors in held.errors.items()}
    unseen = runs.take(held.rows)
    sizes = {"params": unseen.params, "tokens": unseen.tokens, "loss": unseen.loss}
    return {"rule": held.rule, **sizes, "relative_errors": held.errors, "mean_absolute_error": means}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(x) for x in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
