"""What `zoo fit` makes of runs: profiles and their bias, envelopes, doubts, files, pictures, refusals."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.scaling import (
    cli,
    data,
    doubt,
    envelope,
    figures,
    law,
    profiles,
    published,
    report,
    study,
    varpro,
)

CHINCHILLA = law.Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
SKEWED = law.Law(1.8, 60.0, 9e4, 0.22, 0.55)
EVEN = law.Law(1.8, 500.0, 900.0, 0.34, 0.34)


def isoflop(truth, budgets=4, width=4.0, off=1.0, sizes=7, noise=0.0, seed=0):
    """Runs at fixed compute, at sizes up to `width` times below and above `off` times the best."""
    rng = np.random.default_rng(seed)
    compute = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    best, _ = law.Cost().optimum(truth, compute)
    n = best * off * np.tile(np.geomspace(1 / width, width, sizes), budgets)
    d = compute / (6 * n)
    return data.runs(n, d, truth.loss(n, d) * np.exp(rng.normal(0, noise, len(n))))


def test_parabolas_find_minima_of_parabolas_exactly():
    compute = np.repeat([1e18, 1e20], 4)
    best = 0.2 * compute**0.48
    n = best * np.tile([0.3, 0.9, 2.0, 5.0], 2)
    runs = data.runs(n, compute / (6 * n), 2 + 0.1 * np.log(n / best) ** 2)
    found = profiles.fit(runs)
    assert [p.params for p in found.budgets] == pytest.approx(
        list(0.2 * np.array([1e18, 1e20]) ** 0.48), rel=1e-9
    )
    assert found.params.exponent == pytest.approx(0.48, rel=1e-9)
    assert found.params.coefficient == pytest.approx(0.2, rel=1e-6)
    assert found.tokens.exponent == pytest.approx(0.52, rel=1e-9)
    assert found.params(1e19) * found.tokens(1e19) == pytest.approx(1e19 / 6, rel=1e-9)


def test_bias_is_nothing_for_equal_exponents_and_centred_sizes_and_grows_with_width():
    cost = law.Cost()
    even = profiles.bias(EVEN, cost, isoflop(EVEN, width=16))
    assert even.largest < 1e-9 and even.flags(EVEN) == []
    errors = [profiles.bias(SKEWED, cost, isoflop(SKEWED, width=w)) for w in (1.5, 4, 16)]
    sizes = [abs(bias.params).max() for bias in errors]
    assert sizes[0] < 0.02 < sizes[1] < sizes[2] and sizes[2] > 0.2
    # Relative sizes are the same at all budgets: slopes are right, only the constant is off.
    assert abs(errors[2].exponents[0]) < 0.02
    assert errors[0].flags(SKEWED) == [] and "known bias" in errors[2].flags(SKEWED)[0]
    off = profiles.bias(EVEN, cost, isoflop(EVEN, width=8, off=4.0))
    assert abs(off.params).max() > 0.05 and off.flags(EVEN)


def test_bias_is_what_parabolas_really_get_wrong():
    runs = isoflop(SKEWED, width=8)
    bias = profiles.bias(SKEWED, law.Cost(), runs)
    found = profiles.fit(runs)
    true, _ = law.Cost().optimum(SKEWED, [p.compute for p in found.budgets])
    np.testing.assert_allclose(bias.params, [p.params for p in found.budgets] / true - 1, atol=1e-9)


def test_edge_minima_are_named_and_left_out():
    right = isoflop(CHINCHILLA, budgets=3)
    beyond = isoflop(CHINCHILLA, budgets=1, width=1.5, off=12.0)
    beyond = data.runs(beyond.params * 100, beyond.tokens * 100, beyond.loss)
    bent = data.runs(
        beyond.params * 50, beyond.tokens * 50, 2 - 0.1 * np.log(beyond.params / 1e10) ** 2 / 100
    )
    columns = [
        np.concatenate([getattr(r, c) for r in (right, beyond, bent)]) for c in ("params", "tokens", "loss")
    ]
    found = profiles.fit(data.runs(*columns))
    assert [bool(p.problem) for p in found.budgets] == [False] * 3 + [True] * 2
    flags = found.flags()
    assert any("edge minimum, below the smallest size" in flag for flag in flags)
    assert any("its parabola has no minimum" in flag for flag in flags)
    assert found.params == profiles.fit(right).params
    # The lowest point is within the sizes, and yet no size above it has a higher loss.
    falling = isoflop(CHINCHILLA, budgets=2, width=8, off=1 / 7)
    assert all("the largest size has the lowest loss" in p.problem for p in profiles.fit(falling).budgets)
    narrow = profiles.fit(isoflop(CHINCHILLA, sizes=3))
    assert any("three sizes" in flag for flag in narrow.flags())


def test_budgets_are_told_apart_by_compute_or_by_their_column():
    runs = isoflop(CHINCHILLA)
    jittered = data.runs(runs.params, runs.tokens * (1 + 0.02 * np.sin(np.arange(28))), runs.loss)
    assert [len(rows) for rows in profiles.budgets(jittered)] == [7, 7, 7, 7]
    spread = replace(runs, tokens=np.geomspace(1e18, 1e21, 28) / (6 * runs.params))
    assert profiles.budgets(spread) == []
    named = replace(spread, budget=np.repeat([1.0, 2.0, 3.0, 4.0], 7))
    assert [len(rows) for rows in profiles.budgets(named)] == [7, 7, 7, 7]


def test_the_envelope_of_fixed_sizes_follows_the_law():
    n = np.repeat(np.geomspace(1e7, 1e10, 16), 12)
    d = np.tile(np.geomspace(2e7, 1e12, 12), 16)
    found = envelope.fit(data.runs(n, d, CHINCHILLA.loss(n, d)))
    a, b = law.Cost().exponents(CHINCHILLA)
    assert found.params_law.exponent == pytest.approx(a, abs=0.02)
    assert found.tokens_law.exponent == pytest.approx(b, abs=0.02)
    best, _ = law.Cost().optimum(CHINCHILLA, found.compute)
    # Sizes are a factor of 1.58 apart.
    assert np.abs(np.log(found.params / best)).max() < np.log(1.58)
    few = envelope.fit(data.runs(n, d, CHINCHILLA.loss(n, d)).take(n < 2e7))
    assert few.params_law is None and "edge minima" in few.flags()[0]


def measure(found):
    return np.array([found.alpha, found.beta])


def test_bootstrap_spreads_as_the_jacobian_says():
    runs = isoflop(CHINCHILLA, sizes=12, noise=0.005, seed=1)
    found = varpro.fit(runs)
    errors = varpro.standard_errors(found, runs)[3:]
    samples, failed = doubt.bootstrap(runs, measure, found, resamples=60)
    assert failed == 0 and samples.shape == (60, 2)
    np.testing.assert_allclose(samples.std(0), errors, rtol=0.4)
    low, high = doubt.intervals(samples)
    np.testing.assert_allclose(high - low, 2 * 1.96 * errors, rtol=0.5)
    assert (np.abs(measure(found) - [CHINCHILLA.alpha, CHINCHILLA.beta]) < 4 * errors).all()


def test_resamples_are_the_same_on_any_machine():
    assert doubt.resample(28, 3, 0)[:12].tolist() == [21, 3, 12, 0, 17, 27, 9, 1, 12, 23, 19, 27]
    many = np.concatenate([doubt.resample(10, k, 7) for k in range(2000)])
    counts = np.bincount(many, minlength=10)
    # Twenty thousand draws of ten: a standard deviation is 42.
    assert len(counts) == 10 and abs(counts - 2000).max() < 5 * 43
    assert not np.array_equal(doubt.resample(28, 3, 0), doubt.resample(28, 3, 1))


def test_samples_that_determine_nothing_are_counted():
    few = isoflop(CHINCHILLA, budgets=2, sizes=3, noise=0.01)
    samples, failed = doubt.bootstrap(few, measure, varpro.fit(few), resamples=20)
    assert len(samples) + failed == 20 and failed > 0


def test_held_out_runs_are_predicted_and_a_wrong_one_shows():
    runs = isoflop(CHINCHILLA)
    for held in doubt.largest_held_out(runs, form="surface"):
        assert all(np.abs(errors).max() < 1e-9 for errors in held.errors.values())
    budget, size = doubt.largest_held_out(runs)
    assert len(budget.rows) == 7 and runs.params[size.rows].tolist() == [runs.params.max()]
    wrong = replace(runs, loss=np.where(runs.params == runs.params.max(), 1.05 * runs.loss, runs.loss))
    _, size = doubt.largest_held_out(wrong)
    assert size.errors["varpro"] == pytest.approx([1 / 1.05 - 1], abs=1e-9)
    tied = doubt.largest_held_out(isoflop(EVEN), form="overtraining")
    assert all(set(held.errors) == {"overtraining"} for held in tied)
    assert all(np.abs(held.errors["overtraining"]).max() < 1e-9 for held in tied)


def test_the_run_that_moves_the_fit_is_found():
    runs = isoflop(CHINCHILLA, noise=0.001, seed=2)
    bad = replace(runs, loss=runs.loss * np.where(np.arange(28) == 5, 1.1, 1.0))
    found = varpro.fit(bad)
    assert doubt.outliers(found, bad) == [5] and doubt.outliers(varpro.fit(runs), runs) == []
    fits = doubt.without_each(bad, found)
    alone = {row: abs(fit.alpha - found.alpha) for row, fit in fits.items()}
    assert len(fits) == 28 and max(alone, key=alone.get) == 5
    assert doubt.trimmed(bad, found)[1] == fits[5] or abs(doubt.trimmed(bad, found)[1].E - fits[5].E) < 1e-9
    assert sorted(doubt.without_budgets(bad, found)) == pytest.approx([1e18, 1e19, 1e20, 1e21], rel=1e-9)


def test_noise_between_seeds_is_measured():
    runs = isoflop(CHINCHILLA)
    assert doubt.noise(runs) is None
    rng = np.random.default_rng(0)
    columns = [np.tile(getattr(runs, name), 5) for name in ("params", "tokens", "loss")]
    columns[2] = columns[2] * np.exp(rng.normal(0, 0.01, len(columns[2])))
    sd, freedom = doubt.noise(data.runs(*columns))
    # A standard deviation from 112 degrees of freedom is known to 7 per cent.
    assert freedom == 112 and sd == pytest.approx(0.01, rel=0.25)


def test_published_exponents_are_those_of_the_architecture_or_of_transformers():
    assert {row.architecture for row in published.of("mamba")} == {"Mamba"}
    assert {row.architecture for row in published.of("something new")} == {"Transformer"}
    assert all(row.study and 0.3 < row.a < 0.7 for row in published.EXPONENTS)


def options(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def write(path, truths, extra=(), **shape):
    """A CSV with a group of runs for every truth, then `extra` lines."""
    lines = ["arch,params,tokens,loss"]
    for name, truth in truths.items():
        runs = isoflop(truth, noise=0.003, seed=len(name), **shape)
        rows = zip(runs.params, runs.tokens, runs.loss, strict=True)
        lines += [f"{name},{n!r},{d!r},{loss!r}" for n, d, loss in (map(float, row) for row in rows)]
    path.write_text("\n".join([*lines, *extra]) + "\n")
    return path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep's directory: two architectures, one diverged run, one architecture with too few runs."""
    directory = tmp_path_factory.mktemp("sweep")
    extra = ["mamba,1e8,1e9,nan", "s4,1e8,1e9,3.2", "s4,2e8,1e9,3.1"]
    write(directory / "results.csv", {"attention": CHINCHILLA, "mamba": SKEWED}, extra)
    return directory


@pytest.fixture(scope="module")
def found(sweep):
    """The studies of both, and why the third is refused."""
    return cli.fit(data.read(sweep), study.Settings(resamples=10), "arch")


@pytest.fixture(scope="module")
def written(found, tmp_path_factory):
    """What is written about them."""
    out = tmp_path_factory.mktemp("out")
    cli.write_json(*found, "arch", out / "fits.json")
    cli.write_report(*found, "A sweep", out / "report")
    return out


def test_groups_are_fitted_by_themselves_and_the_refused_one_is_named(written):
    result = json.loads((written / "fits.json").read_text())
    assert set(result["groups"]) == {"attention", "mamba"}
    assert "underdetermined" in result["refused"]["s4"]
    for name, truth in {"attention": CHINCHILLA, "mamba": SKEWED}.items():
        group = result["groups"][name]
        assert group["runs"] == 28 and group["convention"]["C"] == "6 N D"
        for method in ("varpro", "huber"):
            assert group[method]["alpha"] == pytest.approx(truth.alpha, abs=0.05)
        assert group["huber"]["delta"] == 1e-3
        a = law.Cost().exponents(truth)[0]
        assert group["approach3"]["varpro"]["a"] == pytest.approx(a, abs=0.03)
        assert group["approach2"]["a"] == pytest.approx(a, abs=0.06)
        assert group["bootstrap"]["used"] == 10 and len(group["optima"]) == 5
        optimum = law.Cost().optimum(
            law.Law(**{k: group["varpro"][k] for k in ("E", "A", "B", "alpha", "beta")}), 1e18
        )
        outside = [row["beyond"] for row in group["optima"]]
        assert outside[:4] == [""] * 4 and outside[4].startswith("compute")
        assert group["optima"][0]["params"] == pytest.approx(float(optimum[0]), rel=1e-6)
    assert any("loss is not finite: line 58" in flag for flag in result["groups"]["mamba"]["flags"])
    assert not any("not finite" in flag for flag in result["groups"]["attention"]["flags"])


def test_the_report_shows_the_same_numbers_and_its_figures(written):
    text = (written / "report" / "report.md").read_text()
    group = json.loads((written / "fits.json").read_text())["groups"]["mamba"]
    for method in ("varpro", "huber"):
        assert f"{group[method]['alpha']:.6g}" in text
    for name in ("loss", "isoflop", "residuals", "comparison"):
        assert f"({name}.png)" in text
        assert (written / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for phrase in ("δ = 0.001", "6 N D", "known bias", "doi 10.1126/science.ado9336", "s4: underdetermined"):
        assert phrase in text


def test_figures_show_the_runs_and_the_laws(found):
    studies, _ = found
    loss, isoflop_figure, residuals, comparison = figures.figures(studies)
    frontier = next(line for line in loss.axes[0].lines if line.get_label() == "best N for each C")
    compute, best = frontier.get_data()
    n, d = law.Cost().optimum(studies[0].law, compute)
    np.testing.assert_allclose(best, studies[0].law.loss(n, d))
    assert (
        sum(len(c.get_offsets()) for c in loss.axes[0].collections) == 28 + 7
    )  # with rings around held-out runs
    assert len(isoflop_figure.axes) == len(residuals.axes) == 2
    assert [len(axes.lines) for axes in comparison.axes] == [2, 4, 4, 4]
    assert len({figure.get_label() for figure in (loss, isoflop_figure, residuals, comparison)}) == 4


def test_one_law_for_everything_says_so_and_rows_can_be_chosen(capsys, tmp_path):
    shape = {"budgets": 3, "sizes": 4}
    write(tmp_path / "results.csv", {"attention": CHINCHILLA, "mamba": SKEWED}, **shape)
    words = ("--resamples", 0, "--budgets", "1e22", "--json", tmp_path / "a.json")
    assert cli.main(options(tmp_path, *words)) == 0
    out = capsys.readouterr().out
    assert "one law for 2 values of column 'arch': --by arch" in out and "δ = 0.001" in out
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["runs"] == 24 and result["bootstrap"]["intervals"] == {}
    assert [row["compute"] for row in result["optima"]] == [1e22]
    assert cli.main(options(tmp_path, "--where", "arch=mamba", *words, "--report", tmp_path / "report")) == 0
    assert json.loads((tmp_path / "a.json").read_text())["runs"] == 12
    assert "values of column" not in capsys.readouterr().out and (tmp_path / "report" / "report.md").exists()


def test_tokens_per_parameter_choose_the_overtraining_form(tmp_path):
    runs = isoflop(EVEN, budgets=3, sizes=4)
    rows = zip(runs.params, runs.tokens / runs.params, runs.loss, strict=True)
    lines = [f"{n!r},{m!r},{loss!r}" for n, m, loss in (map(float, row) for row in rows)]
    (tmp_path / "m.csv").write_text("\n".join(["params,token_multiplier,loss", *lines]))
    for form, names in ((None, {"varpro", "huber", "overtraining"}), ("overtraining", {"overtraining"})):
        words = ["--form", form] if form else []
        cli.main(options(tmp_path / "m.csv", *words, "--resamples", 2, "--json", tmp_path / "m.json"))
        result = json.loads((tmp_path / "m.json").read_text())
        assert set(result) & {"varpro", "huber", "overtraining"} == names
        assert result["overtraining"]["exponent"] == pytest.approx(-0.34, rel=1e-8)
        assert result["convention"]["D"] == "N times column 'token_multiplier'"


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("params,loss\n1,2\n", (), r"no column 'tokens'; columns there: params, loss"),
        ("params,tokens,loss\n", (), "cannot be read as a CSV of runs: it has no rows"),
        ("", (), "cannot be read as a CSV of runs"),
        (
            "params,tokens,loss\n1e8,1e9,3\n0,1e9,3\n",
            (),
            "line 3: params is 0, it must be positive and finite",
        ),
        ("params,tokens,loss\n1e8,-5,3\n", (), "line 2: tokens is -5"),
        ("params,tokens,loss\n1e8,,3\n", (), "line 2: tokens is nan"),
        ("params,tokens,loss\n1e8,1e9,-3\n", (), "line 2: loss is -3"),
        ("params,tokens,loss\n1e8,ten,3\n", (), "line 2: tokens is 'ten', not a number"),
        ("params,tokens,loss\n1e8,1e9,nan\n1e8,1e9,inf\n", (), "no runs to fit"),
        ("params,tokens,loss\n1e8,1e9,3,4\n", (), "a row has more cells than the header"),
        ("params,tokens,loss\n1e8,1e9,3\n", ("--by", "arch"), "no column 'arch'"),
        ("params,tokens,loss\n1e8,1e9,3\n", ("--where", "params"), "must be COLUMN=VALUE"),
        ("params,tokens,loss\n1e8,1e9,3\n", ("--where", "params=2"), "no row has params='2'; there: 1e8"),
        ("params,tokens,loss\n1e8,1e9,3\n", ("--delta", "0"), "--delta 0.0 must be above 0"),
        ("params,tokens,loss\n1e8,1e9,3\n", ("--budgets", "1e18,x"), "must be positive numbers"),
        ("params,tokens,loss\n1e8,1e9,3\n", ("--form", "cubic"), "choose from surface, overtraining, both"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(tmp_path, text, words, message):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        cli.main(options(tmp_path / "runs.csv", *words))
    assert "\n" not in str(error.value)


def test_results_are_never_overwritten(sweep):
    before = (sweep / "results.csv").read_bytes()
    with pytest.raises(ValueError, match="would overwrite the results"):
        cli.main(options(sweep, "--json", sweep / "results.csv"))
    assert (sweep / "results.csv").read_bytes() == before
    with pytest.raises(FileNotFoundError):
        cli.main(options(sweep / "nowhere"))


def test_flops_are_used_where_all_runs_have_them(tmp_path):
    path = write(tmp_path / "runs.csv", {"mamba": CHINCHILLA})
    header, *rows = path.read_text().splitlines()
    flops = [str(9 * float(n) * float(d)) for _, n, d, _ in (row.split(",") for row in rows)]
    lines = [f"{row},{cell}" for row, cell in zip(rows, flops, strict=True)]
    path.write_text("\n".join([f"{header},flops", *lines]))
    runs, notes = data.read(path).runs()
    cost = law.cost_of(runs)
    assert notes == [] and cost.factor == pytest.approx(9, rel=1e-9)
    path.write_text("\n".join([f"{header},flops", *lines[:-1], f"{rows[-1]},"]))
    runs, notes = data.read(path).runs()
    assert runs.flops is None and "column 'flops' is not used" in notes[0]


def test_numbers_that_are_none_are_dashes():
    assert report.number(None) == report.number(float("nan")) == "–" and report.number(1.0) == "1"
