"""Porian et al.'s corrections on planted losses: whether each is found where it is there, and only there."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from planted_isoflop import DESIGN, HOFFMANN, chinchilla, plant

from experiments.claims import Measured, verdict
from experiments.scaling import isoflop, porian2024
from jaxgpt import flops

EVEN = HOFFMANN | {"alpha": 0.31, "beta": 0.31, "A": 10.0, "B": 22.5}  # a = .5 in the counting it is planted in


def with_head(config):
    """Parameters without the embedding table."""
    counts = flops.parameters(config.model)
    return counts.non_embedding + config.model.vocab_size * config.model.d_model


def law(config, tokens, *, warmed=0.0, rated=0.0):
    """A law of the parameters with the last layer. warmed: tokens lost for each of a long warm-up. rated: what a rate
    that is not the rule's costs, in the log loss per squared factor of 2.
    """
    c, p = config, EVEN
    lost = warmed * c.optimizer.warmup_steps * c.train.batch_size * c.model.context
    late = lost if c.optimizer.warmup_steps == DESIGN.long_warmup else 0.0
    seen = tokens / (1 + late / tokens)
    off = math.log2(c.optimizer.learning_rate / isoflop.rate(c.model.d_model))
    return (p["E"] + p["A"] * with_head(c) ** -p["alpha"] + p["B"] * seen ** -p["beta"]) * math.exp(rated * off**2)


def measure(loss, noise=0.0, size=DESIGN):
    configs = [*isoflop.grid(size, seeds=range(size.seeds)), *porian2024.fixed_configs(size)]
    runs, curves = plant([*configs, *porian2024.long_configs(size)], loss, noise=noise)
    runs = isoflop.labelled(runs, size)
    return porian2024.measure(porian2024.sweeps(runs, size), curves, size)


# --- what is counted -----------------------------------------------------------------------------------------------


def test_n_counts_no_embedding_and_the_last_layer_only_where_it_should():
    config = isoflop.config(DESIGN, 32, 0, 0, 0.01)
    runs = plant([config], chinchilla(HOFFMANN))[0]
    counts = flops.parameters(config.model)
    kaplan, head, exact = (porian2024.counts(runs, how) for how in ("kaplan", "head", "exact"))
    assert kaplan[0][0] == counts.non_embedding
    assert head[0][0] == exact[0][0] == counts.total - 256 * 32  # without the table, with the last layer
    assert (kaplan[1][0], head[1][0]) == (6 * kaplan[0][0], 6 * head[0][0])
    assert exact[1][0] * config.tokens == flops.flops_exact(config.model, config.tokens, attention="causal")


def test_the_runs_of_a_step_differ_from_those_of_the_one_before_in_what_its_name_says():
    configs = [*isoflop.grid(DESIGN, seeds=range(4)), *porian2024.fixed_configs(DESIGN)]
    runs = isoflop.labelled(plant([*configs, *porian2024.long_configs(DESIGN)], chinchilla(HOFFMANN))[0], DESIGN)
    of = porian2024.sweeps(runs, DESIGN)
    cells = sum(last - first + 1 for _, first, last in DESIGN.models)
    assert {name: len(table) for name, table in of.items()} == {
        "long": 2 * len(DESIGN.models), "fixed": 2 * cells, "tuned": 4 * cells}  # fmt: skip
    assert set(of["long"]["optimizer.warmup_steps"]) == {DESIGN.long_warmup}
    assert set(of["fixed"]["optimizer.warmup_steps"]) == {DESIGN.warmup}
    assert of["long"]["optimizer.learning_rate"].nunique() == of["fixed"]["optimizer.learning_rate"].nunique() == 1
    assert of["tuned"]["optimizer.learning_rate"].nunique() == len(DESIGN.models)


def test_without_a_decay_losses_are_those_of_the_trunk_before_any_decay_begins():
    runs, curves = plant(isoflop.grid(DESIGN), chinchilla(HOFFMANN))
    runs = isoflop.labelled(runs, DESIGN)
    ends = porian2024.points(runs, curves, porian2024.STEPS["both"])
    before = porian2024.points(runs, curves, porian2024.STEPS["tuned"])
    assert len(ends) == len(runs)
    for trunk, mine in before.groupby("trunk"):
        assert mine["D"].max() <= (1 - isoflop.DECAY) * runs.loc[runs["trunk"] == trunk, "D"].max()
        assert len(mine) >= 3


# --- the exponents -------------------------------------------------------------------------------------------------


def test_where_nothing_but_the_counting_matters_only_the_counting_changes_the_exponent():
    found = measure(law)
    for name in ("head", "warmup", "decay", "tuned", "both"):
        assert found[name].a == pytest.approx(0.5, abs=0.05), name
    assert found["kaplan"].a > 0.55
    for name in ("warmup", "tuned"):
        before = porian2024.CHANGES[name]
        assert found[name].a - found[before].a == pytest.approx(0, abs=0.01)


def test_a_long_warm_up_and_one_rate_for_all_move_the_steps_that_have_them_and_no_other():
    plain = measure(law)
    warmed = measure(lambda config, tokens: law(config, tokens, warmed=0.3))
    rated = measure(lambda config, tokens: law(config, tokens, rated=0.01))
    for name, step in porian2024.STEPS.items():
        assert (abs(warmed[name].a - plain[name].a) > 0.02) == (step.runs == "long"), name
        assert (abs(rated[name].a - plain[name].a) > 0.02) == (step.runs != "tuned"), name
    assert warmed["head"].a > plain["head"].a


def test_the_bootstrap_of_a_difference_is_narrower_where_both_steps_look_at_the_same_runs():
    found = measure(law, noise=0.002, size=replace(DESIGN, bootstraps=60))
    claims = porian2024.claims_of(found, DESIGN.seeds)
    same = claims["change_head"].high - claims["change_head"].low
    other = claims["change_warmup"].high - claims["change_warmup"].low
    assert 0 < same < other
    for claim in porian2024.CLAIMS:
        assert claims[claim.id].low < claims[claim.id].high


def test_residuals_have_the_scatter_of_single_runs_and_belong_to_trunks():
    rows = [
        {"N": n, "trunk": f"{n}/{seed}", "budget": k, "loss": math.exp(0.1 * k + (0.01 if seed else -0.01))}
        for n in (1e3, 2e3)
        for seed in (0, 1)
        for k in (1, 2)
    ]
    residual_RxK = porian2024.residuals(pd.DataFrame(rows), 4)
    # Two values .02 apart have a standard deviation of .02 / sqrt 2; outside its budgets a trunk keeps its nearest.
    assert np.abs(residual_RxK) == pytest.approx(np.full((4, 4), 0.02 / math.sqrt(2)))
    assert residual_RxK.sum() == pytest.approx(0)


def test_one_seed_or_a_minimum_at_the_end_of_the_sizes_leaves_the_claims_open():
    alone = porian2024.claims_of(measure(law, size=replace(DESIGN, seeds=1, other_seeds=1)), 1)
    assert {m.remark for m in alone.values()} == {"one seed tells no scatter"}
    beyond = measure(lambda config, tokens: chinchilla(HOFFMANN | {"A": 500.0})(config, tokens))
    claims = porian2024.claims_of(beyond, 2)
    assert "inside the range of sizes" in claims["a_tuned"].remark
    for claim in porian2024.CLAIMS:
        assert verdict(claim, claims[claim.id]) == "inconclusive"


# --- the claims ----------------------------------------------------------------------------------------------------


def test_the_claims_expect_the_papers_changes_with_their_sign():
    expected = {claim.id: (claim.expected, claim.margin) for claim in porian2024.CLAIMS}
    assert expected["change_head"] == (pytest.approx((0.706 - 0.835 + 0.699 - 0.864) / 2, abs=1e-3), 0.073)
    assert expected["change_tuned"][0] == pytest.approx((0.497 - 0.602 + 0.518 - 0.603) / 2, abs=1e-3)
    for name in ("head", "warmup", "tuned"):
        assert expected[f"change_{name}"][0] + expected[f"change_{name}"][1] < 0  # no change at all would contradict
    decay = next(claim for claim in porian2024.CLAIMS if claim.id == "change_decay")
    assert verdict(decay, Measured(0.0, -0.01, 0.01, 2)) == "reproduced"
    assert verdict(decay, Measured(-0.2, -0.25, -0.15, 2)) == "not seen at this scale"


def test_the_figure_and_the_table_show_every_step(tmp_path):
    found = measure(law, noise=0.002)
    assert all(path.is_file() for path in porian2024.draw(found, tmp_path / "figure"))
    table = porian2024.step_table(found)
    assert list(table["step"]) == [step.label for step in porian2024.STEPS.values()]
    assert f"{found['head'].a:.3f}" in table["a"][1]
