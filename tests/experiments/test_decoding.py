"""Exact facts on outputs, sizes, loss, causality and sampling: the checks themselves are checked, and can fail."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from experiments import drawing
from experiments.anatomy.family import Member
from experiments.architecture import decoding
from experiments.claims import verdict
from jaxgpt import RunConfig, build, sample
from jaxgpt.known_models import KNOWN_MODELS

CLAIMS = {claim.id: claim for claim in decoding.CLAIMS}
SMALL = replace(decoding.SMALL, context=4, n_layers=1)
TINY = replace(decoding.SIZES["smoke"], small=SMALL)


def test_expected_numbers_are_those_of_the_arithmetic():
    assert CLAIMS["softmax"].expected == pytest.approx(math.exp(-11) / (1 + math.exp(-11)), rel=1e-9)
    assert CLAIMS["sharper"].expected == pytest.approx(49 / 52)


def test_the_slope_of_the_entropy_is_the_variance_over_the_cubed_temperature():
    logits, t, step = np.asarray([0.3, -1.0, 2.0, 0.0]), 1.3, 1e-5

    def height(temperature):
        weight = np.exp(logits / temperature)
        return drawing.entropy(weight / weight.sum())

    found, exact = drawing.slopes(logits, t)
    assert exact == pytest.approx((height(t + step) - height(t - step)) / (2 * step), rel=1e-6)
    assert found == pytest.approx(exact, rel=1e-2)


def test_top_k_then_top_p_keep_what_they_should():
    logits = np.log([0.4, 0.1, 0.3, 0.2])
    assert drawing.kept(logits, None, 0.6) == {0, 2}
    assert drawing.kept(logits, 2, None) == {0, 2}
    assert drawing.kept(logits, 2, 0.5) == {0}
    assert drawing.kept(logits, None, 0.05) == {0}
    assert drawing.kept(np.zeros(3), 2, None) == {0, 1}


def test_a_sampler_that_cuts_elsewhere_is_found(monkeypatch):
    assert drawing.supports_right(0, 12, 8) == 1.0
    wrong = jax.jit(lambda z, t, k, p: sample.distribution(z, t, k + 1, p))
    monkeypatch.setattr(drawing, "_distribution", wrong)
    assert drawing.supports_right(0, 12, 8) < 1.0


def test_draws_from_another_distribution_are_found(monkeypatch):
    assert 0.2 < drawing.chi_squared(0, 12, 2000) < 2.5
    right = drawing._draws
    monkeypatch.setattr(drawing, "_draws", lambda z, seed, place, t, k, p: right(z, seed, place, 2 * t, k, p))
    assert drawing.chi_squared(0, 12, 2000) > 5


def test_draws_are_those_of_the_places_one_by_one_whatever_are_drawn_at_once():
    logits = np.linspace(-1, 1, 5).astype(np.float32)
    places = np.arange(drawing.AT_ONCE + 3)
    together = np.asarray(drawing._draws(logits, 7, places, 0.8, 4, 0.9))
    alone = [int(sample.draw(logits, 7, int(place), 0.8, 4, 0.9)) for place in (0, 1, *places[-4:])]
    assert [together[0], together[1], *together[-4:]] == alone


@pytest.mark.parametrize(("together", "expected"), [(False, 1.0), (True, 3.0)])
def test_the_positions_whose_logits_move_are_counted(together, expected, monkeypatch):
    model, token = build.create(replace(SMALL, context=5), 0), np.arange(10).reshape(2, 5) % SMALL.vocab_size
    if together:  # outputs made from the sum over all positions so far: all from the middle one on move
        right = model.final_norm
        monkeypatch.setattr(model, "final_norm", lambda x_BxTxD: right(jnp.cumsum(x_BxTxD, axis=1)))
    assert decoding.moved(model, token.astype(np.int32), 0) == expected


def test_the_loss_by_hand_is_that_of_float32_where_the_model_computes_in_less(tmp_path, monkeypatch):
    small = replace(SMALL, compute_dtype="bfloat16", n_layers=1)
    member = Member("x", RunConfig(model=small), tmp_path, (0, 1))
    monkeypatch.setattr("experiments.anatomy.family.params", lambda *_: jax.tree.map(jnp.asarray, params))
    params = build.init_params(small, 0)
    window = np.random.default_rng(0).integers(0, small.vocab_size, (3, small.context + 1)).astype(np.int32)
    found = decoding.of_member(member, window)
    assert found["by_hand"] < 1e-5
    logits = np.asarray(build.create(replace(small, compute_dtype="float32"), 0)(window[:, :-1]), float)
    nats = np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, window[:, 1:, None], axis=-1)[..., 0]
    assert found["loss"] == pytest.approx(nats.mean(), abs=1e-5)
    assert found["start"] == pytest.approx(found["loss"] - math.log(small.vocab_size), abs=1e-5)


def test_influence_is_the_gradient_by_finite_differences():
    c = replace(SMALL, causal=False)
    random = np.random.default_rng(0)
    token = random.integers(0, c.vocab_size, c.context).astype(np.int32)
    direction = random.standard_normal(c.output_width).astype(np.float32)
    model, step = build.create(c, 0), 1e-2

    third_1xTx1 = (np.arange(c.context) == 3)[None, :, None]

    @jax.jit
    def along(change_D):  # the logits at position 1, by the input at position 3
        changed = {"embedding": lambda x_1xTxD: x_1xTxD + third_1xTx1 * change_D}
        return model.inspect(token[None], replace=changed)[0][0, 1] @ direction

    slopes = [float(along(step * unit) - along(-step * unit)) / (2 * step) for unit in np.eye(c.d_model)]
    assert decoding.influence(c, 0)[1, 3] == pytest.approx(np.linalg.norm(slopes), rel=1e-2)


def test_causal_models_alone_are_blind_to_what_comes_later():
    later, _ = decoding.later_by_earlier(decoding.influence(SMALL, 1))
    assert later == 0.0
    largest, mean_square = decoding.later_by_earlier(np.asarray([[9.0, 2, 2], [1, 9, 2], [1, 1, 9]]))
    assert (largest, mean_square) == (2.0, 2.0)


@pytest.mark.parametrize(("name", "parameters"), [("gpt2", 124_439_808), ("gpt3", 174_604_259_328)])
def test_models_are_counted_leaf_by_leaf(name, parameters):
    assert decoding.counted(KNOWN_MODELS[name].config) == parameters


# --- from tables to verdicts -----------------------------------------------------------------------------------------

MEMBER = {"outputs": 1.0, "summed": 2.0, "by_hand": 1e-6, "start": 0.01, "embeddings": 0.2}
BELIEFS = {"summed", "gpt3_context", "softmax_printed", "embeddings"}


@pytest.fixture(scope="module")
def known():
    rows = [{"published": KNOWN_MODELS[name].published, "rounding": KNOWN_MODELS[name].rounding,
             "counted": decoding.counted(KNOWN_MODELS[name].config)} for name in ("gpt2", "gpt3")]  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(known, causal=0.0, open_=1.0, **member):
    members = pd.DataFrame([MEMBER | member] * 4)
    rows = [{"causal": kind, "seed": seed, "largest": causal, "mean_square": open_}
            for kind in (True, False) for seed in range(4)]  # fmt: skip
    found = decoding.measure(replace(TINY, seeds=4, draws=2000), members, known, pd.DataFrame(rows))
    return {name: verdict(CLAIMS[name], measured) for name, measured in found.items()}


def test_beliefs_are_contradicted_and_all_else_is_reproduced(known):
    said = verdicts(known)
    assert {name for name, what in said.items() if what == "contradicted"} == BELIEFS
    assert {name for name, what in said.items() if what != "reproduced"} <= BELIEFS | {"drawn"}
    wrong = verdicts(
        known.assign(counted=known["counted"] + 1), causal=0.1, open_=0.0, by_hand=1.0, start=1.0, summed=0.0
    )
    for name in ("recount", "causal", "encoder", "by_hand", "at_start"):
        assert wrong[name] == "contradicted"
    assert wrong["summed"] == "reproduced"


@pytest.mark.slow  # it trains the family at smoke scale
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "decoding", "--scale", "smoke")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/decoding/smoke/outcome"
    claims = {c["id"]: c for c in json.loads((outcome / "claims.json").read_text())}
    assert list(claims) == list(CLAIMS)
    assert claims["causal"]["verdict"] == claims["recount"]["verdict"] == claims["softmax"]["verdict"] == "reproduced"
