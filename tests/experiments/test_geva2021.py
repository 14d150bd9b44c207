"""Memories of the family's models: planted tables to verdicts, planted memories found, edits that do what they say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from experiments.anatomy.family import Member
from experiments.architecture import geva2021 as paper
from experiments.claims import verdict
from jaxgpt import RunConfig, build, override

CLAIMS = {claim.id: claim for claim in paper.CLAIMS}


def member(tmp_path):
    config = override(RunConfig(), {"model.d_model": 8, "model.n_heads": 1, "model.n_layers": 1, "model.mlp": "relu",
                                    "model.d_mlp": 4, "model.context": 12, "model.bias": True})  # fmt: skip
    return Member("planted", config, tmp_path, (0, 5))


def planted_state(model):
    """Unit i opens where the byte 10 + i was read just now, and says that 20 + i comes."""
    state = jax.tree.map(jnp.asarray, build.init_params(model, 0))
    filled = nnx.merge(build.graphdef(model), state)
    table, up, down, unembed = np.zeros((256, 8)), np.zeros((8, 4)), np.zeros((4, 8)), np.zeros((8, 256))
    for i in range(4):
        table[10 + i, i], up[i, i], down[i, 4 + i], unembed[4 + i, 20 + i] = 9.0, 1.0, 1.0, 1.0
    filled.embed.embedding[...] = jnp.asarray(table, jnp.float32)
    filled.layers[0].attention.out.kernel[...] *= 0
    filled.layers[0].mlp.up.kernel[...] = jnp.asarray(up, jnp.float32)
    filled.layers[0].mlp.down.kernel[...] = jnp.asarray(down, jnp.float32)
    filled.unembed.kernel[...] = jnp.asarray(unembed, jnp.float32)
    return nnx.split(filled)[1]


def windows(followed):
    """Bytes 10 to 13, each followed by what the function says."""
    first = np.random.default_rng(0).integers(10, 14, (6, 6))
    return np.stack([first, followed(first)], axis=-1).reshape(6, 12).astype(np.int32)


@pytest.mark.parametrize(("followed", "agrees"), [(lambda byte: byte + 10, 1.0), (lambda byte: 0 * byte, 0.0)])
def test_planted_memories_are_found_and_agree_where_the_text_follows_them(tmp_path, monkeypatch, followed, agrees):
    who = member(tmp_path)
    monkeypatch.setattr("experiments.anatomy.family.params", lambda *_: planted_state(who.model))
    (row,) = paper.memories(who, 5, windows(followed), paper.opener(who, 3))
    assert row["coherence_1"] == 1.0
    assert row["agrees"] == agrees
    assert row["random_1"] < 1.0
    assert row["model"] == paper.TRAINED


def test_a_removed_layer_adds_nothing(tmp_path):
    who = member(tmp_path)
    state = planted_state(who.model)
    token = windows(lambda byte: byte + 10)
    removed = paper._edited(state, "layers.0.mlp.down.", lambda leaf: 0 * leaf)
    graphdef = build.graphdef(who.model)
    expected, _ = nnx.merge(graphdef, state).inspect(token, replace={"layers.0.mlp.out": lambda x: 0 * x})
    np.testing.assert_array_equal(nnx.merge(graphdef, removed)(token), expected)
    assert float(jnp.abs(nnx.merge(graphdef, state)(token) - expected).max()) > 0.1


# --- from tables to verdicts -----------------------------------------------------------------------------------------


def planted(scatter=0.0, seeds=4, **changes):
    rng = np.random.default_rng(0)
    rows = []
    for width in (4, 8):
        for seed in range(seeds):
            for layer in (1, 2):
                for model in (paper.UNTRAINED, paper.TRAINED):
                    trained = model == paper.TRAINED
                    row = {"coherence_1": 0.9 - 0.3 * (layer - 1), "random_1": 0.2, "coherence_3": 0.5, "luck": 0.01,
                           "agrees": 0.02 + 0.3 * (layer - 1), "removed": 1.0, "dealt": 2.0}  # fmt: skip
                    if not trained:
                        row |= {"coherence_1": 0.4, "coherence_3": 0.15, "agrees": 0.01}
                    row |= {name: value[layer - 1] for name, value in changes.items() if trained}
                    row = {name: value * np.exp(scatter * rng.standard_normal()) for name, value in row.items()}
                    rows.append({"width": width, "seed": seed, "layer": layer, "model": model, **row})
    return pd.DataFrame(rows)


def verdicts(table):
    return {name: verdict(CLAIMS[name], found) for name, found in paper.measure(table, 4).items()}


def test_where_the_paper_is_right_all_is_reproduced():
    assert verdicts(planted(scatter=0.02)) == dict.fromkeys(CLAIMS, "reproduced")


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"coherence_1": (0.4, 0.4)}, "coherent"),
        ({"coherence_3": (0.15, 0.15)}, "learnt"),
        ({"coherence_1": (0.5, 0.8)}, "shallow"),
        ({"agrees": (0.01, 0.01)}, "agrees"),
        ({"agrees": (0.4, 0.3)}, "rises"),
        ({"removed": (1.0, 0.0)}, "needed"),
        ({"dealt": (0.5, 0.5)}, "paired"),
    ],
)
def test_each_claim_can_fail(changes, claim):
    assert verdicts(planted(**changes))[claim] == "not seen at this scale"


def test_coherence_is_held_against_the_untrained_model_of_the_same_seed_whatever_random_places_have():
    table = planted(scatter=0.02)
    wide = table[table["width"] == 8].set_index(["model", "seed", "layer"])["coherence_1"]
    expected = (wide[paper.TRAINED] - wide[paper.UNTRAINED]).groupby("seed").mean()
    assert paper.measure(table.assign(random_1=0.9), 4)["coherent"].value == pytest.approx(expected.mean())


def test_a_seed_without_units_leaves_its_claims_open():
    table = planted(scatter=0.02)
    table.loc[(table["seed"] == 0) & (table["layer"] == 2), "agrees"] = np.nan
    assert verdicts(table)["agrees"] == "inconclusive"
    assert verdicts(table)["needed"] == "reproduced"


@pytest.mark.slow  # it trains the family at smoke scale
def test_the_command_leaves_claims_summary_and_figure(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "geva2021", "--scale", "smoke")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/geva2021/smoke/outcome"
    assert [c["id"] for c in json.loads((outcome / "claims.json").read_text())] == list(CLAIMS)
    table = pd.read_csv(outcome / "summary.csv")
    assert set(table["model"]) == {paper.TRAINED, paper.UNTRAINED}
    assert (table["removed"].notna() == (table["model"] == paper.TRAINED)).all()
