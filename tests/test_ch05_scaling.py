"""Scaling laws: the fit against known constants, formulas against published numbers, the record against the code."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import ch05_pretrain.scaling_laws as scaling
from ch01_data.how_much_data import BESIROGLU, HOFFMANN, LossLaw, training_flops
from ch04_gpt.gpt import count_parameters
from ch05_pretrain.scaling_laws import (
    GRID,
    GRID_SIZES,
    REPEATED,
    bootstrap_laws,
    fit_loss_law,
    grid_parameters,
    grid_recipe,
    grid_run,
    huber,
    law_errors,
    planned_grid,
    power_law,
    read_grid,
    training_bill,
    valley,
)
from ch05_pretrain.speed_run import build_from_recipe, shakespeare_characters

LARGE_N = np.repeat(np.geomspace(7e7, 1.6e10, 8), 7)
LARGE_D = np.tile(np.geomspace(5e9, 5e11, 7), 8)
SMALL = LossLaw(1.2, 15.0, 60.0, 0.45, 0.40)


@pytest.fixture(scope="module")
def grid():
    return read_grid()


def small_runs():
    recipes = [(grid_parameters(grid_recipe(size, c))[0], grid_recipe(size, c).tokens)
               for c, sizes in GRID.items() for size in sizes]
    return (np.array(column, dtype=float) for column in zip(*recipes, strict=True))


# The fit ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU])
def test_published_constants_are_found_again(law):
    found = fit_loss_law(LARGE_N, LARGE_D, law.loss(LARGE_N, LARGE_D)).best()
    for name, value in asdict(law).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name


def test_constants_are_found_over_the_range_of_our_grid():
    n, d = small_runs()
    found = fit_loss_law(n, d, SMALL.loss(n, d)).best()
    for name, value in asdict(SMALL).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3), name


def test_with_noise_the_curve_is_known_better_than_its_constants():
    n, d = small_runs()
    losses = SMALL.loss(n, d) + np.random.default_rng(0).normal(0, 0.005, len(n))
    found = fit_loss_law(n, d, losses).best()
    assert np.abs(found.loss(n, d) - SMALL.loss(n, d)).max() < 0.015
    assert abs(found.a / SMALL.a - 1) > 0.02


def test_one_spoiled_run_does_not_pull_the_law_to_itself():
    losses = BESIROGLU.loss(LARGE_N, LARGE_D)
    losses[20] *= 1.3
    robust = fit_loss_law(LARGE_N, LARGE_D, losses).best()
    squares = fit_loss_law(LARGE_N, LARGE_D, losses, delta=1e9).best()
    assert robust.beta == pytest.approx(BESIROGLU.beta, abs=0.01)
    assert abs(squares.beta - BESIROGLU.beta) > 5 * abs(robust.beta - BESIROGLU.beta)


def test_the_slopes_are_the_slopes():
    rng = np.random.default_rng(0)
    values = np.array([[0.2, 2.0, 3.0, 0.4, 0.3], [-0.5, 1.0, 5.0, 0.7, 0.5]])
    n, d, log_loss = rng.uniform(1e3, 1e5, 6), rng.uniform(1e4, 1e6, 6), rng.normal(0.5, 0.1, 6)
    errors, slopes = law_errors(values, n, d, log_loss)
    for row, (e, a, b, alpha, beta) in enumerate(values):
        law = LossLaw(math.exp(e), math.exp(a), math.exp(b), alpha, beta)
        assert np.allclose(errors[row], np.log(law.loss(n, d)) - log_loss)
    for j in range(5):
        up, down = values.copy(), values.copy()
        up[:, j] += 1e-6
        down[:, j] -= 1e-6
        difference = (law_errors(up, n, d, log_loss)[0] - law_errors(down, n, d, log_loss)[0]) / 2e-6
        assert np.allclose(slopes[..., j], difference, atol=1e-7)


def test_huber_is_torchs():
    errors = np.linspace(-3, 3, 41)
    zeros = torch.zeros(41).double()
    expected = torch.nn.functional.huber_loss(torch.tensor(errors), zeros, reduction="none", delta=0.7)
    assert np.allclose(huber(errors, 0.7), expected.numpy())


def test_a_weight_of_two_is_the_run_twice():
    losses = SMALL.loss(LARGE_N, LARGE_D) * np.exp(np.random.default_rng(1).normal(0, 0.01, len(LARGE_N)))
    weights = np.ones(len(LARGE_N))
    weights[:9] = 2
    twice = [np.concatenate([x, x[:9]]) for x in (LARGE_N, LARGE_D, losses)]
    start = [(0.2, 2.7, 4.1, 0.45, 0.4)]
    weighted = fit_loss_law(LARGE_N, LARGE_D, losses, start, weights)
    assert weighted.objective == pytest.approx(fit_loss_law(*twice, start).objective, rel=1e-3)


def test_the_bootstrap_scatters_as_the_noise_does():
    n, d = small_runs()
    exact = bootstrap_laws(n, d, SMALL.loss(n, d), SMALL, n_samples=20)
    assert np.allclose(exact.values[:, 3:], (SMALL.alpha, SMALL.beta), atol=1e-3)
    widths = []
    for noise in (0.001, 0.01):
        losses = SMALL.loss(n, d) + np.random.default_rng(2).normal(0, noise, len(n))
        samples = bootstrap_laws(n, d, losses, fit_loss_law(n, d, losses).best(), n_samples=100)
        widths.append(np.ptp(np.percentile(samples.values[:, 4], (10, 90))))
    assert 0 < 2 * widths[0] < widths[1]
    again = bootstrap_laws(n, d, losses, fit_loss_law(n, d, losses).best(), n_samples=100)
    assert np.array_equal(again.values, samples.values)
    other = bootstrap_laws(n, d, losses, fit_loss_law(n, d, losses).best(), n_samples=100, seed=1)
    assert not np.array_equal(other.values, samples.values)


@pytest.mark.parametrize(("n", "loss"), [([1e3] * 4, [2.0] * 4), ([1e3] * 5 + [0.0], [2.0] * 6),
                                         ([1e3] * 6, [2.0] * 5 + [-1.0])])
def test_runs_that_cannot_be_fitted_are_refused(n, loss):
    with pytest.raises(ValueError, match=f"{len(n)} runs.*above 0.*at least five"):
        fit_loss_law(np.array(n), np.full(len(n), 1e5), np.array(loss))


# Valleys ----------------------------------------------------------------------------------------------------

def test_a_valley_has_its_lowest_point_where_the_parabola_has_it():
    n = np.geomspace(1e3, 1e6, 6)
    found = valley(n, 1.9 + 0.03 * (np.log(n) - np.log(2e4)) ** 2, 1e10)
    assert found.n_parameters == pytest.approx(2e4) and found.loss == pytest.approx(1.9)


def test_valleys_of_an_exact_law_give_its_exponent():
    best = []
    for c in (1e18, 1e20, 1e22):
        optimum = BESIROGLU.optimum(c)[0]
        n = optimum * np.geomspace(0.3, 3, 7)
        best.append(valley(n, BESIROGLU.loss(n, c / 6 / n), c).n_parameters)
        assert best[-1] == pytest.approx(optimum, rel=0.05)
    exponent, factor = power_law((1e18, 1e20, 1e22), best)
    assert exponent == pytest.approx(BESIROGLU.beta / (BESIROGLU.alpha + BESIROGLU.beta), abs=0.005)
    assert factor * 1e20**exponent == pytest.approx(best[1], rel=0.01)


def test_what_has_no_lowest_point_is_refused():
    with pytest.raises(ValueError, match="no lowest point"):
        valley([1e3, 2e3, 4e3], [3.0, 2.5, 1.0], 1e10)
    with pytest.raises(ValueError, match="at least 3 sizes, and there are 2"):
        valley([1e3, 2e3, 2e3], [3.0, 2.5, 2.4], 1e10)


# The grid ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", GRID_SIZES)
def test_parameters_are_counted_and_bills_are_spent(size):
    d_model, n_layers = GRID_SIZES[size]
    n, without = grid_parameters(grid_recipe(size))
    assert without == 12 * n_layers * d_model**2 and n == without + 83 * d_model
    assert n == count_parameters(build_from_recipe(grid_recipe(size), 83))
    for flops in (c for c, sizes in GRID.items() if size in sizes):
        recipe = grid_recipe(size, flops)
        assert training_flops(n, recipe.tokens) == pytest.approx(flops, rel=0.01)
        assert recipe.tokens < len(shakespeare_characters().train)


def test_the_plan_holds_every_cell_once():
    plan = planned_grid()
    assert len(plan) == len(set(plan)) == sum(map(len, GRID.values())) + 2 * len(REPEATED)
    assert all(len(sizes) >= 3 for sizes in GRID.values())
    assert all(size in GRID[flops] for size, flops in REPEATED)


def test_the_record_is_the_plan(grid):
    runs = {(run["size"], run["flops"], run["seed"]): run for run in grid}
    assert set(runs) == set(planned_grid()) and len(runs) == len(grid)
    for (size, flops, _), run in runs.items():
        assert (run["parameters"], run["without_table"]) == grid_parameters(grid_recipe(size))
        assert run["tokens"] == grid_recipe(size, flops).tokens
        assert 1.5 < run["loss"] < 3


def test_the_cheapest_recorded_run_comes_out_again(grid):
    (then,) = [run for run in grid if (run["size"], run["flops"], run["seed"]) == ("24x2", 1e10, 0)]
    now = grid_run("24x2", 1e10, shakespeare_characters())
    assert now["loss"] == pytest.approx(then["loss"], abs=0.03)
    assert {k: v for k, v in now.items() if k not in ("loss", "cpu_seconds")} == {
        k: v for k, v in then.items() if k not in ("loss", "cpu_seconds")}


def test_every_bill_of_the_record_has_a_valley(grid):
    best = []
    for c in GRID:
        runs = [run for run in grid if run["flops"] == c and run["seed"] == 0]
        found = valley([run["parameters"] for run in runs], [run["loss"] for run in runs], c)
        assert min(run["parameters"] for run in runs) < found.n_parameters < max(run["parameters"] for run in runs)
        best.append(found)
    assert all(a.loss > b.loss and a.n_parameters < b.n_parameters for a, b in zip(best[:-1], best[1:], strict=True))


def test_the_grid_can_be_stopped_and_started(tmp_path, monkeypatch):
    path, calls = tmp_path / "grid.json", []

    def pretend(size, flops, text, seed=0):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((size, flops, seed))
        return {"size": size, "flops": flops, "seed": seed}

    monkeypatch.setattr(scaling, "GRID_RECORD", path)
    monkeypatch.setattr(scaling, "read_grid", lambda: read_grid(path))
    monkeypatch.setattr(scaling, "shakespeare_characters", lambda: None)
    monkeypatch.setattr(scaling, "grid_run", pretend)
    with pytest.raises(KeyboardInterrupt):
        scaling.complete_grid()
    assert len(json.loads(path.read_text())["runs"]) == 3
    done = list(calls)
    calls.clear()
    monkeypatch.setattr(scaling, "planned_grid", lambda: [*done, ("64x2", 1e11, 7)])
    scaling.complete_grid()
    assert calls == [("64x2", 1e11, 7)]
    assert len(json.loads(path.read_text())["runs"]) == 4


# Bills ------------------------------------------------------------------------------------------------------

def test_gpt3_on_one_v100_is_the_published_sum():
    """Li 2020 (Lambda): 3.14e23 operations at 28e12 a second are 355 years, at $1.50 an hour $4.6 million."""
    bill = training_bill(3.14e23, peak=28e12, utilisation=1.0, n_devices=1, price_per_hour=1.5)
    assert bill.days / 365 == pytest.approx(355, abs=1)
    assert bill.price == pytest.approx(4.6e6, rel=0.02)
    assert training_flops(175e9, 300e9) == pytest.approx(3.14e23, rel=0.005)


def test_devices_share_the_days_and_not_the_price():
    one = training_bill(1e21, peak=1e15, utilisation=0.5, n_devices=1, price_per_hour=2.0)
    many = training_bill(1e21, peak=1e15, utilisation=0.5, n_devices=100, price_per_hour=2.0)
    assert one.device_hours == pytest.approx(2e6 / 3600) and one.price == pytest.approx(4e6 / 3600)
    assert many.days == pytest.approx(one.days / 100) and many.price == one.price


@pytest.mark.parametrize("wrong", [{"utilisation": 40}, {"utilisation": 0}, {"peak": 0}, {"n_devices": 0},
                                   {"price_per_hour": -1}])
def test_a_bill_that_makes_no_sense_is_refused(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name} (is )?{value}"):
        training_bill(1e20, **{"peak": 1e15, "utilisation": 0.4, "n_devices": 8, "price_per_hour": 2.0, **wrong})
