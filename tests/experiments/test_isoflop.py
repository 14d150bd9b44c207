"""The shared IsoFLOP sweep: its design at each scale, losses at equal compute, and exponents of planted laws."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from planted_isoflop import DESIGN, HOFFMANN, PRINTED, chinchilla, plant, published_points

import experiments.chinchilla_points
from experiments.registry import Job
from experiments.scaling import hoffmann2022, isoflop, porian2024
from jaxgpt import flops
from jaxgpt.config import BadInput
from jaxgpt.launch import plan
from jaxgpt.prefix import families

CORPUS = 9.4e6  # bytes of the default corpus
SMOKE = isoflop.SIZES["smoke"]

# --- the design ----------------------------------------------------------------------------------------------------


def every_config(size):
    configs = [*hoffmann2022.configs(size), *porian2024.fixed_configs(size), *porian2024.long_configs(size)]
    return list(dict.fromkeys(configs))


@pytest.mark.parametrize("size", isoflop.SIZES.values(), ids=isoflop.SIZES)
def test_each_run_costs_its_budget_and_each_budget_is_twice_the_one_before(size):
    assert all(b == 2 * a for a, b in zip(size.budgets, size.budgets[1:], strict=False))
    for width, first, last in size.models:
        for budget in range(first, last + 1):
            config = isoflop.config(size, width, budget, 0, 0.01)
            cost = flops.flops_6nd(flops.parameters(config.model).total, config.tokens)
            per_step = cost / config.train.steps
            assert abs(cost - size.budgets[budget]) <= per_step / 2


@pytest.mark.parametrize("name", ["laptop", "paper"])
def test_four_budgets_have_five_sizes_each_and_no_run_reads_the_corpus_more_than_four_times(name):
    size = isoflop.SIZES[name]
    assert len(size.budgets) >= 4
    for budget in range(len(size.budgets)):
        assert sum(first <= budget <= last for _, first, last in size.models) >= 5
    assert size.seeds >= 2
    assert max(config.tokens for config in every_config(size)) <= 4 * CORPUS


@pytest.mark.parametrize("size", isoflop.SIZES.values(), ids=isoflop.SIZES)
def test_a_warm_up_ends_before_a_trunk_is_first_left_and_a_long_one_before_any_run_does(size):
    for config in every_config(size):
        warmup = config.optimizer.warmup_steps
        if config.optimizer.final_fraction < 1:
            assert warmup == size.warmup < (1 - isoflop.DECAY) * config.train.steps
        else:
            assert warmup == size.long_warmup <= config.train.steps


def test_the_runs_of_a_size_a_seed_and_a_rate_are_trained_as_one_trunk(tmp_path):
    runs = plan(isoflop.grid(SMOKE, seeds=(0, 1)), tmp_path, check=False)
    assert len(families(runs)) == 2 * len(SMOKE.models)


def test_a_trunk_is_validated_where_the_runs_of_its_budgets_leave_it():
    for width, first, last in isoflop.SIZES["laptop"].models:
        for budget in range(first, last + 1):
            config = isoflop.config(isoflop.SIZES["laptop"], width, budget, 0, 0.01)
            left = (1 - isoflop.DECAY) * config.train.steps
            every = config.train.eval_every
            assert every
            assert abs(left / every - round(left / every)) < 0.05


def test_the_scan_holds_the_rules_rate_and_the_varied_ones_so_that_it_costs_two_more_runs_per_size():
    scan, swept = isoflop.scan_configs(SMOKE), isoflop.grid(SMOKE)
    swept += [config for factor in isoflop.VARIED for config in isoflop.grid(SMOKE, factor=factor)]
    assert len(scan) == 10
    assert len([config for config in scan if config not in swept]) == 4


def test_papers_share_one_folder_of_runs_per_scale(tmp_path):
    jobs = [Job("smoke", tmp_path / "raw" / name / "smoke", tmp_path) for name in ("hoffmann2022", "porian2024")]
    assert {isoflop.folder(job) for job in jobs} == {tmp_path / "raw" / "isoflop" / "smoke"}


@pytest.mark.slow  # two dozen CPU seconds: four sizes compile
def test_both_papers_run_at_smoke_scale_and_the_second_trains_what_the_first_has_not(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments.chinchilla_points, "points", lambda: published_points(PRINTED))
    first = command("reproduce", "porian2024", "--scale", "smoke")
    assert first.code == 0, first.err
    second = command("reproduce", "hoffmann2022", "--scale", "smoke", "--json", "out.json")
    assert second.code == 0, second.err
    assert f"{2 * 3 * len(SMOKE.models)} of them are done already" in second.err  # all of the tuned sweep, and no more
    said = json.loads((tmp_path / "out.json").read_text())
    assert [claim["id"] for claim in said["claims"]] == [claim.id for claim in hoffmann2022.CLAIMS]
    for name in ("hoffmann2022", "porian2024"):
        outcome = tmp_path / f"results/raw/{name}/smoke/outcome"
        assert (outcome / "figure.png").is_file()
        assert json.loads((outcome / "claims.json").read_text())


def test_a_diverged_run_is_refused_unless_only_the_scan_asks_for_its_rate():
    runs, _ = plant(hoffmann2022.configs(SMOKE), chinchilla(HOFFMANN))
    factor = runs["optimizer.learning_rate"] / runs["model.d_model"].map(isoflop.rate)
    highest = np.isclose(factor, max(isoflop.SCAN))
    isoflop.refuse_diverged(runs.assign(status=np.where(highest, "diverged", "done")))
    twice = runs.loc[np.isclose(factor, max(isoflop.VARIED)), "run_id"].iloc[0]
    with pytest.raises(BadInput, match=f"1 of {len(runs)} runs diverged.*{twice}"):
        isoflop.refuse_diverged(runs.assign(status=np.where(runs["run_id"] == twice, "diverged", "done")))


# --- scatter and weights -------------------------------------------------------------------------------------------


def test_the_scatter_is_the_standard_deviation_between_seeds_pooled_over_sizes():
    logs = {(1e4, 0): (0.5, 0.54), (2e4, 0): (0.4, 0.46), (1e4, 1): (0.3, 0.31), (2e4, 1): (0.2,)}
    rows = [(n, budget, math.exp(log)) for (n, budget), seeds in logs.items() for log in seeds]
    runs = pd.DataFrame(rows, columns=["N", "budget", "loss"])
    noise = isoflop.scatter(runs)
    # Two values d apart have the variance d^2 / 2, with one degree of freedom each.
    assert noise[0] == pytest.approx(math.sqrt((0.04**2 + 0.06**2) / 4))
    assert noise[1] == pytest.approx(0.01 / math.sqrt(2))
    weight_M = isoflop.weights(runs, noise)
    assert weight_M.mean() == pytest.approx(1)
    assert weight_M[-1] / weight_M[0] == pytest.approx((noise[0] / noise[1]) ** 2)


def test_one_seed_tells_no_scatter_and_all_runs_weigh_the_same():
    runs = pd.DataFrame({"N": [1e4, 2e4], "budget": [0, 0], "loss": [2.0, 1.9]})
    noise = isoflop.scatter(runs)
    assert noise.empty
    assert list(isoflop.weights(runs, noise)) == [1, 1]


# --- equal compute -------------------------------------------------------------------------------------------------


def test_at_equal_compute_a_power_law_is_met_exactly_and_nothing_is_read_beyond_a_curve():
    n_T, reach = {"a": 1e3, "b": 2e3, "c": 4e3}, {"a": 1e5, "b": 1e5, "c": 2e4}
    points = pd.DataFrame([
        {"trunk": trunk, "N": n, "per_token": 6 * n, "D": d, "loss": 3 * n**-0.1 * d**-0.2}
        for trunk, n in n_T.items()
        for d in np.geomspace(1e3, reach[trunk], 7)
    ])  # fmt: skip
    table = isoflop.at_equal_compute(points, budgets=4, smallest=2, largest=2)
    # The two smallest begin by 1.2e7 FLOPs, b's 6 N D; the two largest go on to 4.8e8, c's.
    assert list(table.groupby("budget")["C"].first()) == pytest.approx(list(np.geomspace(1.2e7, 4.8e8, 4)))
    assert list(table["loss"]) == pytest.approx(list(3 * table["N"] ** -0.1 * table["D"] ** -0.2))
    assert list(6 * table["N"] * table["D"]) == pytest.approx(list(table["C"]))
    assert table.groupby("trunk")["budget"].agg(list).to_dict() == {
        "a": [0, 1, 2, 3],
        "b": [0, 1, 2, 3],
        "c": [1, 2, 3],
    }
    late = points[(points["trunk"] == "a") | (points["D"] > 1e4)]
    assert isoflop.at_equal_compute(late[(late["trunk"] != "a") | (late["D"] < 2e3)], budgets=4).empty


# --- exponents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", ["total", "non_embedding"])
def test_the_exponents_of_a_planted_law_come_back_in_the_convention_it_was_planted_in(counted):
    runs, _ = plant(isoflop.grid(DESIGN, seeds=(0, 1)), chinchilla(HOFFMANN, counted), noise=1e-4)
    runs = isoflop.labelled(runs, DESIGN)
    found = isoflop.exponents(runs, DESIGN, isoflop.scatter(runs), f"params_{counted}", DESIGN.bootstraps)
    a = found.table.set_index("approach")["a"]
    assert a["parametric"] == pytest.approx(0.28 / 0.62, abs=0.02)
    assert a["projection"] == pytest.approx(0.28 / 0.62, abs=0.02)
    assert a["akima"] == pytest.approx(0.28 / 0.62, abs=0.05)  # interpolated between few sizes
    assert found.law
    assert found.law.parameters["alpha"].value == pytest.approx(0.34, abs=0.02)
    assert len(found.optima["akima"]) >= 3


def test_where_no_law_can_be_fitted_the_exponents_say_why():
    runs = isoflop.labelled(plant(isoflop.grid(DESIGN), chinchilla(HOFFMANN))[0], DESIGN)
    few = runs[runs["budget"] == 3]
    found = isoflop.exponents(few, DESIGN, isoflop.scatter(few), "params_total", DESIGN.bootstraps)
    assert found.law is None
    assert "5 points are too few" in found.table.set_index("approach").loc["parametric", "remark"]
