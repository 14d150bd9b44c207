"""Placements of norms: the library's where they are its own, else the printed formula; claims that can fail."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx

from experiments import placements
from experiments.architecture import xiong2020 as paper
from experiments.claims import verdict
from jaxgpt import ModelConfig, build

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}
SMALL = ModelConfig(d_model=8, n_layers=2, n_heads=2, context=6, vocab_size=11, mlp="relu")
TOKEN = np.random.default_rng(0).integers(0, 11, (2, 6)).astype(np.int32)


def model_of(placement):
    c = placements.config_of(SMALL, placement)
    return c, placements.init_params(c, 0)


@pytest.mark.parametrize("placement", ["post", "pre", "parallel"])
def test_right_placements_are_the_librarys_own(placement):
    c, params = model_of(placement)
    expected = nnx.merge(build.graphdef(c), params)(TOKEN)
    np.testing.assert_allclose(placements.outputs(c, placement, params, TOKEN, 2), expected, rtol=1e-5, atol=1e-6)


def by_formula(placement, c, params):
    """The printed formulas in NumPy, in float64."""
    leaf = lambda *path: np.asarray(_at(params, path), float)  # noqa: E731

    def norm(x, scale):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c.norm_epsilon) * scale

    def rotated(x):
        angle = np.arange(6)[:, None] / 1e4 ** (np.arange(0, 4, 2) / 4)
        a, b = x[..., :2], x[..., 2:]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = leaf("embed", "embedding")[TOKEN]
    for i in range(c.n_layers):
        q, k, v = (
            (x @ leaf("layers", "attention", name, "kernel")[i]).reshape(2, 6, 2, 4)
            for name in ("query", "key", "value")
        )
        scores = np.einsum("bthk,bshk->bhts", rotated(q), rotated(k)) / 2
        scores = np.where(np.tri(6, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attention = (
            np.einsum("bhts,bshk->bthk", weights, v).reshape(2, 6, 8) @ leaf("layers", "attention", "out", "kernel")[i]
        )
        mlp = np.maximum(x @ leaf("layers", "mlp", "up", "kernel")[i], 0) @ leaf("layers", "mlp", "down", "kernel")[i]
        scale = leaf("layers", "attention_norm", "scale")[i]
        x = norm(x + attention + mlp, scale) if placement == "sum" else x + norm(attention + mlp, scale)
    if placement == "branch":
        x = norm(x, leaf("final_norm", "scale"))
    return x @ leaf("unembed", "kernel")


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree[...]


@pytest.mark.parametrize("placement", ["sum", "branch"])
def test_printed_formulas_are_computed_as_they_are_printed(placement):
    c, params = model_of(placement)
    found = placements.outputs(c, placement, params, TOKEN, 2)
    np.testing.assert_allclose(found, by_formula(placement, c, params), rtol=1e-4, atol=1e-5)


def test_gradient_norms_are_those_of_a_model_of_that_depth():
    c, params = model_of("pre")
    window = np.concatenate([TOKEN, TOKEN[:, :1]], axis=1)
    norms, _ = jax.jit(placements.gradient_norms, static_argnums=(0, 1))(c, "pre", params, window, 1, 0.5)
    shallow = ModelConfig(d_model=8, n_layers=1, n_heads=2, context=6, vocab_size=11, mlp="relu")
    scaled = jax.tree.map(jnp.asarray, placements.write_scaled(placements.init_params(shallow, 0), 0.5))

    def loss(params):
        logits = nnx.merge(build.graphdef(shallow), params)(TOKEN)
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()

    expected = jax.jit(jax.grad(loss))(scaled)["layers"][0]["mlp"]["down"]["kernel"][...]
    assert float(norms[0]) == pytest.approx(float(jnp.linalg.norm(expected)), rel=1e-4)
    assert float(norms[1]) == 0.0


def test_initial_weights_keep_their_size_at_any_depth():
    deep, shallow = (
        placements.init_params(ModelConfig(d_model=8, n_layers=layers, n_heads=2, mlp="relu"), 0) for layers in (8, 1)
    )
    for state in (deep, shallow):
        assert float(np.std(_at(state, ["layers", 0, "mlp", "down", "kernel"]))) == pytest.approx(32**-0.5, rel=0.15)


def test_the_unigram_loss_is_the_entropy_where_both_texts_have_the_same_shares():
    train = np.repeat([0, 1, 2], [2000, 1000, 1000]).astype(np.uint8)
    window = np.asarray([[9, 0, 0, 1, 2]])
    assert placements.unigram_loss(train, window) == pytest.approx(1.5 * np.log(2), rel=1e-3)


def test_the_largest_stable_rate_is_where_the_loss_crosses_the_limit_above_the_best():
    rates, worst = np.asarray([-4.0, -3, -2, -1]), 5.0
    assert paper.stable_rate(rates, np.asarray([3.5, 2.0, 2.0, 4.0]), 3.0, worst) == pytest.approx(-1.5)
    assert paper.stable_rate(rates, np.asarray([2.0, 2.5, 9.0, 2.0]), 3.0, worst) == pytest.approx(-2.8)
    assert paper.stable_rate(rates, np.asarray([2.0, np.nan, np.nan, np.nan]), 3.0, worst) == pytest.approx(-4 + 1 / 3)
    assert paper.stable_rate(rates, np.asarray([3.0, 2.0, 2.0, 2.0]), 3.0, worst) == np.inf
    assert np.isnan(paper.stable_rate(rates, np.full(4, 4.0), 3.0, worst))


# --- from tables to verdicts -----------------------------------------------------------------------------------------


def planted(power=None, rates=None, losses=None, slopes=None, difference=0.5, scatter=0.01, seeds=4):
    """What theory and the paper say, unless told otherwise: gradients, then largest stable rates and best losses."""
    rng = np.random.default_rng(0)
    power, slopes = {("pre", "plain"): -0.5, **(power or {})}, {"post": 2.0, **(slopes or {})}
    rates = {("post", "without"): -8.0, ("post", "with"): -6.0, **(rates or {})}
    start, ends = [], []
    for placement in paper.PLACEMENTS:
        for seed in range(seeds):
            for weights in ("plain", "gpt2"):
                for depth in (6, 48):
                    for layer in range(1, depth + 1):
                        # As large as told over the layers of the shallow model alone.
                        octaves = slopes.get(placement, 0.0) if depth == 6 else -5.0
                        slope = 2.0 ** (octaves * (layer - depth) / (depth - 1))
                        norm = (
                            slope
                            * depth ** power.get((placement, weights), 0.0)
                            * np.exp(scatter * rng.standard_normal())
                        )
                        far = difference if placement in paper.TAKEN_FOR else np.nan
                        start.append({"placement": placement, "weights": weights, "depth": depth, "seed": seed,
                                      "layer": layer, "norm": norm, "difference": far})  # fmt: skip
            for warmup in ("without", "with"):
                rate = rates.get((placement, warmup), -5.0) + scatter * rng.standard_normal()
                loss = (losses or {}).get(placement, 2.5) + scatter * rng.standard_normal()
                ends.append({"placement": placement, "warmup": warmup, "seed": seed, "rate": rate, "loss": loss})
    return pd.DataFrame(start), pd.DataFrame(ends)


def verdicts(*tables):
    return {name: verdict(CLAIMS[name], found) for name, found in paper.measure(*tables, 4).items()}


def test_where_paper_and_theory_are_right_all_is_reproduced_but_that_other_formulas_are_the_same():
    expected = dict.fromkeys(CLAIMS, "reproduced") | {"sum_same": "contradicted", "branch_same": "contradicted"}
    assert verdicts(*planted()) == expected


@pytest.mark.parametrize(
    ("changes", "claim", "said"),
    [
        ({"power": {("post", "plain"): -0.5}}, "post_depth", "contradicted"),
        ({"power": {("pre", "plain"): 0.0}}, "pre_depth", "contradicted"),
        ({"power": {("pre", "gpt2"): -0.5}}, "gpt2_depth", "contradicted"),
        ({"rates": {("post", "with"): -8.0}}, "post_warmup", "not seen at this scale"),
        ({"slopes": {"post": 0.0}}, "post_layers", "not seen at this scale"),
        ({"slopes": {"pre": -2.0}}, "pre_layers", "not seen at this scale"),
        ({"rates": {("pre", "with"): -3.0}}, "pre_warmup", "not seen at this scale"),
        ({"rates": {("pre", "with"): -3.0}}, "warmup_contrast", "not seen at this scale"),
        ({"rates": {("pre", "without"): -8.0}}, "pre_rate", "not seen at this scale"),
        ({"losses": {"sum": 3.0}}, "sum_loss", "not seen at this scale"),
        ({"losses": {"branch": 3.0}}, "branch_loss", "not seen at this scale"),
        ({"difference": 0.0}, "sum_same", "reproduced"),
    ],
)
def test_each_claim_can_come_out_the_other_way(changes, claim, said):
    assert verdicts(*planted(**changes))[claim] == said


@pytest.mark.parametrize("rate", [np.nan, np.inf])
def test_a_rate_that_was_not_found_leaves_its_claims_open(rate):
    start, ends = planted()
    ends.loc[(ends["placement"] == "pre") & (ends["warmup"] == "without") & (ends["seed"] == 0), "rate"] = rate
    said = verdicts(start, ends)
    assert {name for name, what in said.items() if what == "inconclusive"} == {
        "pre_warmup",
        "warmup_contrast",
        "pre_rate",
    }


def test_the_contrast_is_the_difference_of_what_warm_up_does():
    rates = {("post", "with"): -6.0, ("post", "without"): -7.5, ("pre", "with"): -4.0, ("pre", "without"): -4.75}
    found = paper.measure(*planted(rates=rates, scatter=0.0), 4)
    assert found["warmup_contrast"].value == pytest.approx(1.5 - 0.75)


def test_a_best_loss_at_the_edge_of_the_rates_is_told():
    losses = {4: [2.0, 3.0, np.nan], 5: [3.0, 2.5, 9.0], 6: [3.0, np.inf, 2.9], 7: [np.nan] * 3}
    rows = [{"placement": "post", "optimizer.warmup_steps": 0, "train.seed": seed, "model.vocab_size": 256,
             "optimizer.learning_rate": 2.0**rate, "final_loss": loss}
            for seed, three in losses.items() for rate, loss in zip((-3, -2, -1), three, strict=True)]  # fmt: skip
    ends = paper.by_run(pd.DataFrame(rows), 3.0).set_index("seed")
    assert ends["edge"].to_dict() == {4: "lowest", 5: "", 6: "highest", 7: ""}
    assert ends["loss"].to_dict() == pytest.approx({4: 2.0, 5: 2.5, 6: 2.9, 7: np.nan}, nan_ok=True)
    told = paper._edges(ends["edge"])
    assert told == "; at the lowest rate tried in 1 of 4 seeds, the highest rate tried in 1 of 4 seeds"
    assert paper._edges(pd.Series(["", ""])) == ""


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ([-2.0, -2.0, -2.0], "-2.0 (-2.0 to -2.0)"),
        ([np.inf, -1.5, -1.8], "> -1 in 1 of 3 seeds, else -1.8 and -1.5"),
        ([np.inf, np.nan, -3.0], "> -1 in 1 of 3 seeds, none in 1 of 3 seeds, else -3.0"),
        ([np.nan, np.nan, np.nan], "none in 3 of 3 seeds"),
    ],
)
def test_rates_have_a_mean_only_where_every_seed_has_one(rates, told):
    assert paper._rates(pd.Series(rates), -1) == told


@pytest.mark.slow  # it compiles ten programs
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "xiong2020", "--scale", "smoke")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/xiong2020/smoke/outcome"
    assert [c["id"] for c in json.loads((outcome / "claims.json").read_text())] == list(CLAIMS)
    table = pd.read_csv(outcome / "summary.csv")
    assert list(table["placement"].unique()) == list(paper.PLACEMENTS)
    assert table["run_id"].nunique() == len(table) == 5 * len(paper.configs(paper.SIZES["smoke"]))
