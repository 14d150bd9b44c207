"""One bad number: theory names exactly the positions it takes, clipping spreads it, float16 loses what is small."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from experiments.anatomy import family, health, heaviest, injection, nonfinite
from experiments.claims import verdict
from jaxgpt import blockwise, build
from jaxgpt.config import ModelConfig

CLAIMS = {claim.id: claim for claim in health.CLAIMS}
MODEL = ModelConfig(d_model=8, n_layers=2, n_heads=2, context=128, vocab_size=40, bias=True, positions="learned",
                    mlp="relu")  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 5, 128)
TOKENS[90], TOKENS[120] = 35, 35


def state(seed=0):
    """Random parameters, biases too: a zero bias has no sign."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(p + 0.1 * draw.standard_normal(p.shape, np.float32)),
                        build.init_params(MODEL, seed))  # fmt: skip


# --- injection -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines():
    return pd.DataFrame(injection.matrix(state(), MODEL, TOKENS, 0, ("relu",)))


def lost(lines, kind, value, way="whole"):
    return lines[(lines["kind"] == kind) & (lines["value"] == value) & (lines["way"] == way)]


def test_exactly_the_positions_are_lost_that_arithmetic_names(lines):
    assert set(lines["way"]) == {"whole", "in blocks"}
    assert lines["agrees"].all()
    assert 0 < lines["lost"].mean() < 1


def test_a_nan_reaches_positions_before_its_token_all_of_them_or_those_of_its_block(lines):
    assert lost(lines, "row of a token", "NaN")[["lost", "earlier"]].to_numpy().tolist() == [[1, 1]]
    half = lost(lines, "row of a token", "NaN", "in blocks")
    assert half["lost"].tolist() == [0.5]
    assert half["earlier"].tolist() == [(90 - 64) / 90]
    assert blockwise.blocks(128) == 2


def test_what_is_not_read_and_a_silent_unit_harm_nothing_and_a_forbidden_token_is_no_loss(lines):
    for value in ("NaN", "+inf", "-inf"):
        assert lost(lines, "row of a token not there", value)["lost"].max() == 0
    assert lost(lines, "mlp.up.bias", "-inf")["lost"].max() == 0
    assert lost(lines, "mlp.up.bias", "+inf")["lost"].min() == 1
    forbidden = lost(lines, "unembed.bias", "-inf")
    assert forbidden["lost"].tolist() == [0]
    assert forbidden["logits"].tolist() == pytest.approx([1 / 40])


def test_theory_of_relu_does_not_hold_for_gelu():
    relu = dataclasses.replace(MODEL, n_layers=1, context=8)
    gelu = dataclasses.replace(relu, mlp="gelu")
    params = jax.tree.map(jnp.asarray, build.init_params(gelu, 0))
    site = injection.Site("mlp.up.bias", "layers.0.mlp.up.bias", (3,), 0)
    bad = injection.poisoned(params, family.arrays_of(params), site, -math.inf)
    measured_t = injection.no_numbers(np.asarray(injection.outputs(gelu)(bad, TOKENS[:8])))
    clean = injection.undisturbed(params, relu, TOKENS[:8])
    assert (measured_t == injection.lost(site, -math.inf, clean, gelu, 8)).all()
    assert (measured_t != injection.lost(site, -math.inf, clean, relu, 8)).all()


def test_a_new_token_is_near_three_quarters_and_was_not_there_before():
    assert injection.new_token(TOKENS) == 90
    assert injection.new_token(np.array([5, 5, 5, 6])) == 3


# --- steps -----------------------------------------------------------------------------------------------------------


def nested(values):
    return {"layers": {"0": {"mlp": {"up": {"kernel": jnp.asarray(values, jnp.float32)}}}}}


def test_clipping_makes_one_inf_a_nan_and_all_else_0_and_one_nan_all_nan():
    gradient, params = nested([9.0, 1.0, 2.0, 3.0]), nested([0.0, 0.0, 0.0, 0.0])
    told, new = nonfinite.clipped(gradient, params, math.inf)
    assert told == {"nan": 1, "nan share": 0.25, "others not 0": 0.0, "parameters nan": 0.25}
    assert np.isnan(new["layers"]["0"]["mlp"]["up"]["kernel"]).tolist() == [True, False, False, False]
    told, _ = nonfinite.clipped(gradient, params, math.nan)
    assert told["nan share"] == told["parameters nan"] == 1
    fine, _ = nonfinite.clipped(gradient, params, 5.0)
    assert (fine["nan"], fine["others not 0"]) == (0, 1)


def test_apply_if_finite_lets_the_next_one_in():
    assert nonfinite.gives_up(np.ones(3, np.float32)) == nonfinite.LIMIT + 1


def test_float16_loses_small_gradients_and_a_scale_brings_them_back():
    gradient = np.array([1e-9, 1e-3, 0.0, 1e5, 2e-7], np.float32)
    assert nonfinite.lost_in_half(gradient, 0) == (0.25, 0.25)
    assert nonfinite.lost_in_half(gradient, 8) == (0, 0.25)
    assert nonfinite.lost_in_half(gradient[:3], 24) == (0, 0)


def test_updates_below_half_a_unit_in_the_last_place_are_lost():
    before, after = np.ones(4, np.float32), np.array([1 + 2e-4, 1 + 2e-3, 1 + 2e-2, 1], np.float32)
    assert nonfinite.lost_updates(before, after, "float16") == pytest.approx(1 / 3)
    assert nonfinite.lost_updates(before, after, "bfloat16") == pytest.approx(2 / 3)
    assert nonfinite.lost_updates(before, after, "float32") == 0


# --- single weights --------------------------------------------------------------------------------------------------


def test_weights_are_ranked_by_what_they_carry_or_by_size():
    arrays = {f"layers.0.{name}.kernel": np.full((2, 2), 0.1) for name in heaviest.READS}
    arrays["layers.0.mlp.up.kernel"][1, 0] = 3.0
    arrays["layers.0.attention.out.kernel"][0, 1] = -1.0
    inputs = {f"0.{what}": np.ones(2) for what in ("reads", "thinks", "heads", "hidden")}
    inputs["0.heads"] = np.array([7.0, 1.0])
    first = heaviest.ranked(arrays, inputs, 2)
    up, out = ("layers.0.mlp.up.kernel", 2), ("layers.0.attention.out.kernel", 1)
    assert first == {"carries": [out, up], "size": [up, out]}
    same = heaviest.like(first["size"] * 2, arrays, np.random.default_rng(0))
    assert sorted(name for name, _ in same) == sorted([up[0], out[0]] * 2)
    assert len(set(same)) == 4


def test_largest_inputs_are_those_of_the_matrices_and_what_is_taken_out_is_0():
    windows = TOKENS[None, :65].astype(np.int32)
    inputs = heaviest.largest_inputs(MODEL)(state(), windows)
    # Causal: the first half of the window that is compiled already.
    clean = injection.undisturbed(state(), injection.ways(MODEL)["whole"][0], TOKENS)
    for name, reads in (("reads", clean.reads), ("thinks", clean.thinks)):
        for block in range(2):
            assert np.asarray(inputs[f"{block}.{name}"]) == pytest.approx(abs(reads[block][:64]).max(axis=0), abs=1e-5)
    arrays = family.arrays_of(state())
    name = "layers.1.mlp.down.kernel"
    left = family.arrays_of(heaviest.without(state(), arrays, [(name, 5), (name, 9)]))
    assert np.flatnonzero(left[name] != arrays[name]).tolist() == [5, 9]
    assert left[name].reshape(-1)[[5, 9]].tolist() == [0, 0]
    assert all((left[other] == arrays[other]).all() for other in arrays if other != name)


# --- from lines to verdicts ------------------------------------------------------------------------------------------


def planted(lines, seeds=4, agree=True, kept=1.0, underflow=0.3, top=7.0, largest=1e10):
    noise = np.random.default_rng(0).normal(1, 0.01, seeds)
    audit = pd.DataFrame({"seed": range(seeds), "largest": largest * noise})
    both = pd.concat([lines, lines.assign(activation="gelu", lost=lines["lost"].where(
        (lines["kind"] != "mlp.up.bias") | (lines["value"] == "0"), 1.0))])  # fmt: skip
    every = pd.concat([both.assign(seed=seed, agrees=agree) for seed in range(seeds)])
    one = {"nan": 1, "others not 0": 0.0}
    guards = pd.DataFrame([{"one": one, "every": {"nan share": 1.0}, "lost": 1.0, "gives up": 6,
                            "spikes": {"NaN": {"identical": kept}}}] * seeds)  # fmt: skip
    halves = pd.DataFrame({("activations", 0): [(underflow * n, 0.0) for n in noise],
                           ("activations", 16): [(0.0, 0.0)] * seeds, "bfloat16": 0.7 * noise})  # fmt: skip
    rise = {("carries", 1): top, ("carries", 100): top, ("size", 100): 0.2 * top, ("random", 100): 0.01 * top}
    weights = pd.DataFrame(
        {"seed": seed, "width": width, "ranking": way, "count": count, "rise": value * noise[seed]}
        for seed in range(seeds)
        for width in (32, 64)
        for (way, count), value in rise.items()
    )
    return audit, every, guards, halves, weights


def verdicts(*tables):
    found = health.measure(*tables)
    return {name: verdict(CLAIMS[name], found[name]) for name in CLAIMS}


def test_where_all_is_as_said_all_is_reproduced(lines):
    assert verdicts(*planted(lines)) == dict.fromkeys(CLAIMS, "reproduced")


def test_what_is_otherwise_is_told(lines):
    said = verdicts(*planted(lines, largest=5.0, agree=False, kept=0.5, underflow=0.001, top=0.001))
    assert said["theory"] == said["guard"] == "contradicted"
    assert said["largest"] == said["underflow"] == said["super"] == "not seen at this scale"
    assert said["random_share"] == "reproduced"


def test_shares_of_a_rise_that_is_none_are_open(lines):
    found = health.measure(*planted(lines, top=-0.1))
    assert verdict(CLAIMS["random_share"], found["random_share"]) == "inconclusive"
    assert "does not raise the loss" in found["magnitude_share"].remark


def test_a_seed_without_one_of_its_widths_leaves_the_claims_on_weights_open(lines):
    *others, weights = planted(lines)
    found = health.measure(*others, weights[(weights["seed"] != 2) | (weights["width"] != 32)])
    for name in ("super", "random_share", "magnitude_share"):
        assert verdict(CLAIMS[name], found[name]) == "inconclusive"
        assert found[name].remark.startswith("1 of 4 seeds")
    assert verdict(CLAIMS["guard"], found["guard"]) == "reproduced"


# --- from the command to the figure ----------------------------------------------------------------------------------


@pytest.mark.slow  # it trains the smallest family and compiles what it injects into
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "health", "--scale", "smoke")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/health/smoke/outcome"
    assert sorted(path.name for path in outcome.iterdir()) == [
        "claims.json", "figure.png", "figure.svg", "run.json", "summary.csv"]  # fmt: skip
    told = {c["id"]: c["verdict"] for c in json.loads((outcome / "claims.json").read_text())}
    assert set(told) == set(CLAIMS)
    # Arithmetic and the guard hold at any scale.
    assert {told[name] for name, claim in CLAIMS.items() if claim.scope == "same_regime"} == {"reproduced"}
    assert len(pd.read_csv(outcome / "summary.csv")) == len(family.configs(family.SIZES["smoke"]))
