"""`jaxgpt anatomy`: rows for every layer and checkpoint, planted faults found, and what is no run said in a line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from rich.console import Console

from experiments import inside_measures, inside_page
from experiments.inside import Found, Subject, look
from jaxgpt import build, checkpoint, huggingface, store
from jaxgpt.config import DataConfig, ModelConfig, RunConfig
from jaxgpt.tokenizer import BYTES

SMALL = ModelConfig(d_model=8, n_layers=2, n_heads=2, context=8, mlp="relu", bias=True, positions="learned")
WINDOWS = np.random.default_rng(0).integers(0, 256, (4, 9)).astype(np.int32)
WORDS = ["model.d_model=8", "model.n_layers=2", "model.n_heads=2", "model.context=8", "model.mlp=relu",
         "model.positions=learned", "model.bias=true", "train.batch_size=2", "train.steps=4", "train.keep_every=2",
         "train.eval_windows=4"]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def raw(command, tmp_path_factory):
    """`s`: one run with checkpoints at steps 2 and 4; not to be written to."""
    raw = tmp_path_factory.mktemp("raw")
    (raw / "text.txt").write_text("".join(f"the quick brown fox {i} jumps over the lazy dog\n" for i in range(400)))
    assert command("train", *WORDS, f"data.corpus={raw / 'text.txt'}", "--out", raw / "s").code == 0
    return raw


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def seen(c, state):
    """The rows of a model as the command has them."""
    params = inside_measures.parameters(state)
    found = inside_measures.measure(c, state, WINDOWS, None)
    return inside_measures.tidy("x", 4, inside_measures.table(c, 0, params, params, found, 32))


def told(c, rows, notes=()):
    return Found(Subject("x", "x", RunConfig(model=c), BYTES, (0,), ""), rows, (), tuple(notes), None)


def initial(c, seed=0):
    return jax.tree.map(jnp.asarray, build.init_params(c, seed))


def edited(c, edit):
    """The initial parameters of a model that `edit` has changed."""
    model = nnx.merge(build.graphdef(c), initial(c))
    edit(model)
    return nnx.split(model)[1]


def put(param, where, value):
    changed = np.array(param[...])
    changed[where] = value
    param[...] = jnp.asarray(changed)


# --- the command ---------------------------------------------------------------------------------------------------


def test_there_is_a_row_for_every_part_of_every_checkpoint_and_the_initial_parameters(command, raw, here):
    (run,) = store.load_runs(raw / "s")["run_id"]
    said = command("anatomy", run[:6], "--results", raw, "--csv", "t.csv", "--json", "t.json", "--windows", 4)
    assert said.code == 0, said.err
    table = pd.read_csv(here / "t.csv")
    assert table.columns.tolist() == list(inside_measures.COLUMNS)
    parts = ["embedding", "layer", "layer", "output", "model"]
    assert list(zip(table["step"], table["part"], strict=True)) == [(step, p) for step in (0, 2, 4) for p in parts]
    assert table["layer"].dropna().tolist() == [0, 1] * 3
    assert set(table["tokens"]) == {8 * table["windows"][0]}
    whole = table[table["part"] == "model"]
    by_part = table[table["part"] != "model"].groupby("step")["parameters"].sum()
    assert whole["parameters"].tolist() == by_part.tolist() == [store.load_runs(raw / "s")["params_total"][0]] * 3
    assert whole["moved"].tolist()[0] == 0
    assert 0 < whole["moved"].tolist()[1] < whole["moved"].tolist()[2]
    written = read(here / "t.json")
    assert len(written["rows"]) == 15
    assert written["audit"] == []
    assert set(written["columns"]) == set(written["rows"][0])
    assert "every parameter of every checkpoint is finite" in said.out
    assert "checkpoint 3/3  step 4  loss" in said.err


def test_the_loss_is_that_of_the_runs_own_validation(command, raw, here):
    (row,) = store.load_runs(raw / "s").to_dict("records")
    said = command("anatomy", row["run_id"], "--results", raw, "--steps", "last", "--windows", 4, "--csv", "t.csv")
    assert said.code == 0, said.err
    loss = pd.read_csv(here / "t.csv")["loss"].dropna()
    assert loss.to_numpy() == pytest.approx([row["final_loss"]], rel=1e-5)


def test_a_planted_nan_a_dead_unit_and_a_damaged_checkpoint_are_told(command, raw, here):
    shutil.copytree(raw / "s", here / "s")
    (run,) = store.load_runs(here / "s")["run_id"]
    kept = here / "s/checkpoints" / run
    state, meta = checkpoint.restore(kept, None, 4)
    mlp = state["params"]["layers"]["0"]["mlp"]
    mlp["up"]["bias"]["value"][3] = -1e6
    mlp["down"]["kernel"]["value"][2, 5] = np.nan
    checkpoint.save(kept, 4, {"params": state["params"]}, meta)
    (kept / "step_00000002/manifest.json").write_text("{}")
    said = command("anatomy", run, "--results", here, "--windows", 4, "--csv", "t.csv", "--json", "t.json")
    assert said.code == 0, said.err
    assert "step 4: layers.0.mlp.down.kernel: 1 of 256 values are not finite" in said.out
    assert "note: checkpoint step_00000002" in said.out
    table = pd.read_csv(here / "t.csv").set_index(["step", "part"])
    assert set(table.index.get_level_values("step")) == {0, 4}
    assert table.loc[(4, "layer"), "non_finite"].tolist() == [1, 0]
    assert table.loc[(4, "model"), "non_finite"].item() == 1
    assert command("anatomy", run, "--results", raw, "--windows", 4, "--steps", "4", "--csv", "whole.csv").code == 0
    before = pd.read_csv(here / "whole.csv").set_index("part").loc["layer", "never_active"].to_numpy()
    assert table.loc[(4, "layer"), "never_active"].to_numpy()[0] == pytest.approx(before[0] + 1 / 32, abs=1e-9)
    assert read(here / "t.json")["audit"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nonsense"], "run=nonsense is not there below"),
        (["RUN", "--steps", "3"], "--steps 3 of run=RUN was not kept; there are 0 (the initial parameters), 2, 4"),
        (["RUN", "--steps", "first"], "--steps first is not allowed; it must be all, last, or steps such as 0,4"),
        (["RUN", "--windows", "0"], "--windows 0 is not allowed; it must be at least 1"),
        (["RUN", "--windows", "99999"], "--windows 99999 is more than the held-out text of"),
        (["RUN", "--csv", "t.txt"], "--csv=t.txt is not allowed; its name must end in .csv"),
        (["RUN", "--csv", "no/t.csv"], "--csv=no/t.csv is not allowed; there is no folder"),
        (["RUN", "--figure", "."], "--figure=. is a folder; it must be a file"),
        (["RUN", "--figure", "/proc/x"], "--figure=/proc/x "),  # a folder that nothing can be written to
        (["RUN", "--corpus", "missing.txt"], "--corpus missing.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(command, raw, here, words, line):
    (run,) = store.load_runs(raw / "s")["run_id"]
    said = command("anatomy", *[run if word == "RUN" else word for word in words], "--results", raw)
    assert (said.code, said.out) == (2, "")
    assert line.replace("RUN", run) in said.err.replace("\n", " ")
    assert said.err.count("\n") == 1
    assert list(here.iterdir()) == []


# --- what is measured ----------------------------------------------------------------------------------------------


def test_a_unit_that_a_bias_has_shut_is_dead_and_its_layer_alone_says_so():
    def shut(model):
        put(model.layers[1].mlp.up.bias, slice(8), -1e6)

    before, after = seen(SMALL, initial(SMALL)), seen(SMALL, edited(SMALL, shut))
    grown = (after["never_active"] - before["never_active"]).to_numpy(float)
    assert grown[[1, 2]] == pytest.approx([0, 8 / 32])
    assert grown[4] == pytest.approx(4 / 32)  # the mean of both layers
    assert after["active"][2] < before["active"][2]


@pytest.mark.parametrize("mask", [False, True])
def test_attention_spread_evenly_is_drawn_only_where_all_positions_are_seen(mask, here):
    (here / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(100)))
    data = DataConfig(corpus=str(here / "text.txt"), document_mask=mask)
    subject = Subject("x", "x", RunConfig(model=SMALL, data=data), BYTES, (0,), "")
    found = look(subject, 4, None, Console(quiet=True))
    assert (found.even is None) == mask
    assert any("document_mask" in note for note in found.notes) == mask


def test_a_large_dimension_is_found_behind_the_embedding_and_counts_as_massive():
    def lift(model):
        put(model.position.embedding, (0, 3), 5e4)

    rows = seen(SMALL, edited(SMALL, lift))
    assert rows["massive"].dropna().tolist() == [4, 4, 4]  # one position of each window, behind each part
    assert rows["largest"][0] == pytest.approx(5e4, rel=0.01)
    assert rows["kurtosis"][0] > seen(SMALL, initial(SMALL))["kurtosis"][0]


def test_outlier_dimensions_are_those_that_attention_reads():
    def scale(model):
        put(model.layers[0].attention_norm.scale, 2, 1e4)

    rows = seen(SMALL, edited(SMALL, scale))
    assert rows["outlier_dims"].dropna().tolist() == [1, 0, 1]  # layer 0, layer 1, and the model: half of its layers
    assert rows["top_weight"][1].startswith(("attention.query[2", "attention.key[2", "attention.value[2"))


def test_what_a_block_adds_to_the_loss_is_that_of_a_model_without_its_weights():
    def cut(model):
        for out in (model.layers[0].attention.out, model.layers[0].mlp.down):
            put(out.kernel, slice(None), 0)
            put(out.bias, slice(None), 0)

    def loss(state):
        return seen(SMALL, state)["loss"].dropna().item()

    whole = initial(SMALL)
    rows = seen(SMALL, whole)
    assert rows["loss_added"][1] == pytest.approx(loss(edited(SMALL, cut)) - loss(whole), abs=1e-5)
    cut_already = seen(SMALL, edited(SMALL, cut))
    assert cut_already["loss_added"][1] == 0
    assert cut_already["growth"][1] == 0
    assert cut_already["cosine"][1] == pytest.approx(1)


@pytest.mark.slow
def test_a_scanned_model_has_the_rows_of_an_unrolled_one():
    plain, scanned = (ModelConfig(**{**vars(SMALL), "scan_layers": scan}) for scan in (False, True))
    a, b = seen(plain, initial(plain)), seen(scanned, initial(scanned))
    words = a["top_weight"].dropna()
    assert words.tolist() == b["top_weight"].dropna().tolist()
    numbers = a.columns.difference(["part", "top_weight", "run_id"])
    np.testing.assert_allclose(a[numbers].astype(float), b[numbers].astype(float), rtol=1e-4, atol=1e-5)


OTHERS = {
    "linear attention, no MLP": {"attention": "linear", "mlp": "none", "norm": "none"},
    "post-norm, swiglu, grouped queries": {"norm_placement": "post", "mlp": "swiglu", "n_kv_heads": 1},
    "parallel, experts": {"norm_placement": "parallel", "n_experts": 4},
}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"architecture": "lstm"}, id="lstm"),
        *(pytest.param(one, id=name, marks=pytest.mark.slow) for name, one in OTHERS.items()),  # slow to compile
    ],
)
def test_other_models_have_the_columns_that_apply_and_a_line_for_the_others(change, here):
    c = ModelConfig(**{**vars(SMALL), "n_layers": 1, **change})
    rows = seen(c, initial(c))
    given = set(rows.columns[rows.notna().any()])
    always = {"non_finite", "moved", "stream_norm", "growth", "cosine", "kurtosis", "loss_added", "top_weight", "loss"}
    assert always <= given
    units, sink = "never_active" in given, "sink" in given
    assert units == (c.architecture == "transformer" and c.mlp != "none" and c.n_experts is None)
    assert sink == (c.architecture == "transformer" and c.attention == "softmax")
    lines = inside_measures.missing(c, False)
    assert all("model." in line for line in lines)
    assert any("empty" in line for line in lines) == (not (units and sink))
    with open("out.txt", "w") as out:
        inside_page.show(told(c, rows, lines), Console(file=out, width=160))
    said = (here / "out.txt").read_text()
    assert "nan" not in said
    assert ("never active" in said.split("moved: ")[0]) == units


@pytest.mark.parametrize("steps", [1, 2])
def test_one_checkpoint_is_drawn_over_layers_and_more_over_steps(here, steps):
    c = ModelConfig(**{**vars(SMALL), "n_layers": 1, "architecture": "lstm"})
    rows = seen(c, initial(c))
    drawn = pd.concat([rows.assign(step=step) for step in range(steps)])
    paths = inside_page.draw(told(c, drawn), here / "page.png")
    assert [path.name for path in paths] == ["page.png", "page.svg"]
    words = paths[1].read_text()
    assert words.count("does not apply to this model") == 4
    assert ("training step" in words) == (steps > 1)


@pytest.mark.slow
def test_a_folder_of_weights_is_looked_at_without_steps_and_without_a_beginning(command, raw, here):
    pytest.importorskip("safetensors")
    c = ModelConfig(**{**vars(SMALL), "output_bias": False})
    huggingface.save(c, initial(c), here / "hf", tokenizer=BYTES)
    words = ("anatomy", here / "hf", "--windows", 4, "--corpus", raw / "text.txt", "--csv", "t.csv")
    said = command(*words)
    assert said.code == 0, said.err
    table = pd.read_csv(here / "t.csv")
    assert table["part"].tolist() == ["embedding", "layer", "layer", "output", "model"]
    assert table["step"].isna().all()
    assert table["moved"].isna().all()
    assert "the initial parameters of a folder of weights are not known" in said.out
    refused = command(*words, "--steps", "2")
    assert refused.code == 2
    assert "a folder of weights has no steps" in refused.err
