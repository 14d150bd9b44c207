"""`jaxgpt fit` and `jaxgpt plan` as a stranger and a script meet them: tables, conditions, JSON, bad input."""

import json
import os
import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.laws import CHINCHILLA, LAWS, SATURATING, exponents, frontier
from experiments import flags
from experiments.keep import kept
from jaxgpt.config import BadInput

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
POINTS = Path(os.environ.get("JAXGPT_DATA") or SHARED) / "svg_extracted_data.csv"
TRUTH = {"E": 1.7, "A": 400.0, "B": 900.0, "alpha": 0.35, "beta": 0.3}
COLUMNS = {"N": "params_total", "D": "tokens", "C": "flops_6nd", "loss": "final_loss"}
QUICK = ("--starts", 10, "--bootstraps", 20)


def planted(noise=0.004, seeds=2):
    """A grid of runs under the Chinchilla law, with jaxgpt's own column names."""
    rng = np.random.default_rng(0)
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e8, 1e11, 5)))
    table = pd.DataFrame({"N": np.repeat(n, seeds), "D": np.repeat(d, seeds)})
    table["C"] = 6 * table["N"] * table["D"]
    table["loss"] = CHINCHILLA.predict(TRUTH, table) * np.exp(noise * rng.standard_normal(len(table)))
    return table.rename(columns=COLUMNS).assign(**{"train.seed": np.tile(np.arange(seeds), len(n)), "sem": 0.01})


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planted().to_csv(tmp_path / "runs.csv", index=False)
    return tmp_path


def read(path):
    """A JSON file; NaN, which is no JSON, fails."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def made(command, tmp_path_factory):
    """A fit of runs.csv, made once: what was said, and its JSON."""
    home = tmp_path_factory.mktemp("fit")
    planted().to_csv(home / "runs.csv", index=False)
    words = ("--starts", 20, "--bootstraps", 60, "--json", home / "fit.json")
    said = command("fit", "chinchilla", home / "runs.csv", *words)
    assert said.code == 0, said.err
    return said, (home / "fit.json").read_text()


@pytest.fixture
def fitted(made, here):
    """The content of fit.json, which lies here."""
    (here / "fit.json").write_text(made[1])
    return read(here / "fit.json")


# --- fit -----------------------------------------------------------------------------------------------------------


def test_a_fit_reports_what_a_script_looks_for(fitted):
    assert fitted["law"] == "chinchilla"
    for name, value in TRUTH.items():
        one = fitted["parameters"][name]
        assert {"value", "standard_error", "interval", "identified", "remark"} <= set(one)
        assert one["value"] == pytest.approx(value, rel=0.35)
        assert one["interval"][0] < one["value"] < one["interval"][1]
    true_a, true_b = exponents(TRUTH)
    assert fitted["a"]["value"] == pytest.approx(float(true_a), abs=0.03)
    assert fitted["b"]["value"] == pytest.approx(float(true_b), abs=0.03)
    assert fitted["share_at_optimum"] == 1
    assert fitted["objective"] > 0
    assert fitted["points"] == 50
    assert fitted["convention"]["n"] == "total"
    assert {name: len(draws) for name, draws in fitted["draws"].items()} == dict.fromkeys(TRUTH, 60)
    assert fitted["range"]["N"] == pytest.approx([1e6, 1e9])


def test_a_fit_says_for_people_what_the_json_holds(made, fitted):
    said, _ = made
    assert said.err == ""
    assert "L(N, D) = E + A / N^alpha + B / D^beta" in said.out
    assert "100.0% of 20 starts end at the optimum" in said.out
    assert f"{fitted['parameters']['alpha']['value']:.4g}" in said.out
    assert "N counts all parameters" in said.out
    assert "tokens per parameter" in said.out
    for word in ("standard error", "90% interval", "identified", "condition number", "gradient"):
        assert word in said.out


def test_where_only_c_is_given_d_follows_and_the_report_says_so(command, here, fitted):
    table = (
        planted().drop(columns="tokens").rename(columns={"flops_6nd": "Training FLOP", "params_total": "Model Size"})
    )
    table.to_parquet(here / "other.parquet")
    said = command("fit", "chinchilla", "other.parquet", "--n", "Model Size", "--c", "Training FLOP", *QUICK,
                   "--json", "other.json")  # fmt: skip
    assert said.code == 0, said.err
    assert "D = C / (6 N): tokens follow from Training FLOP and Model Size" in said.out
    assert read(here / "other.json")["parameters"]["E"]["value"] == pytest.approx(fitted["parameters"]["E"]["value"])


@pytest.mark.skipif(not POINTS.exists(), reason=f"{POINTS} is absent (set JAXGPT_DATA to the data folder)")
def test_the_published_points_are_fitted_from_their_own_file(command, here):
    said = command("fit", "chinchilla", POINTS, "--n", "Model Size", "--c", "Training FLOP", "--loss", "loss",
                   "--keep", "loss < 3.44699", "--delta", 1e-3, *QUICK, "--json", "fit.json")  # fmt: skip
    assert said.code == 0, said.err
    found = read(here / "fit.json")
    assert found["points"] == 240
    assert found["objective"] <= 1.0182741e-3
    assert found["share_at_optimum"] > 0.9


def test_keep_leaves_the_rows_that_fulfil_it(command, here):
    said = command(
        "fit", "chinchilla", "runs.csv", "--keep", "final_loss < 4 and train.seed == 0", *QUICK, "--json", "k"
    )
    assert said.code == 0, said.err
    left = planted().query("final_loss < 4 and `train.seed` == 0")
    assert read(here / "k")["points"] == len(left) < 25
    assert f"--keep left {len(left)} of 50 rows" in said.out


def test_the_range_that_a_plan_is_held_against_is_of_6nd_also_where_c_is_counted_exactly(command, here):
    table = planted(seeds=1)
    table.assign(flops_exact=3 * table["flops_6nd"]).to_csv(here / "exact.csv", index=False)
    words = ("--d", "tokens", "--c", "flops_exact", *QUICK, "--json", "exact.json")
    said = command("fit", "chinchilla", "exact.csv", *words)
    assert (said.code, said.err) == (0, "")
    found = read(here / "exact.json")
    assert found["convention"]["c"] == "exact"
    assert found["range"]["C"] == pytest.approx([table["flops_6nd"].min(), table["flops_6nd"].max()])


def test_groups_weights_and_the_objective_reach_the_fit(command, here):
    said = command("fit", "chinchilla", "runs.csv", *QUICK, "--group", "params_total", "--sem", "sem", "--objective",
                   "squared_log", "--level", 0.8, "--json", "g")  # fmt: skip
    assert said.code == 0, said.err
    found = read(here / "g")
    assert (found["objective_name"], found["level"], found["resampled"]) == ("squared_log", 0.8, "5 groups")
    assert "points weigh as (loss / sem)^2" in said.out


def test_several_columns_name_a_group_and_a_plan_keeps_the_fits_caution(command, here):
    said = command("fit", "chinchilla", "runs.csv", *QUICK, "--group", "params_total,params_total", "--json", "g")
    assert said.code == 0, said.err
    found = read(here / "g")
    assert found["resampled"] == "5 groups"
    assert "5 groups leave" in found["caution"]
    planned = " ".join(command("plan", "--fit", "g", "--flops", "1e18").out.split())
    assert " ".join(found["caution"].split()) in planned


@pytest.mark.parametrize("law", ["kaplan_c", "overtraining", "saturating", "chinchilla_equal"])
def test_laws_of_other_variables_take_their_columns(command, here, law):
    x = np.geomspace(1, 1e4, 12)
    loss = SATURATING.predict({"E": 1.5, "A": 2.0, "alpha": 0.4}, {"x": x})
    pd.DataFrame({"x": x, "flops_6nd": x * 1e15, "final_loss": loss}).to_csv(here / "one.csv", index=False)
    words = {"kaplan_c": ("one.csv",), "saturating": ("one.csv", "--x", "x")}.get(law, ("runs.csv",))
    said = command("fit", law, *words, *QUICK, "--json", "law.json")
    assert said.code == 0, said.err
    assert read(here / "law.json")["law"] == law


def test_a_sweep_folder_is_a_table_of_its_finished_runs(command, here, smoke):
    folder = smoke.home / "results/raw/demo/smoke"
    said = command("fit", "chinchilla", folder, "--starts", 5, "--bootstraps", 0, "--json", "smoke.json")
    assert said.code == 0, said.err
    assert read(here / "smoke.json")["points"] == 12


def test_a_figure_is_drawn_where_it_is_asked_for(command, here):
    said = command("fit", "chinchilla", "runs.csv", "--starts", 5, "--bootstraps", 20, "--figure", "law.png")
    assert said.code == 0, said.err
    assert (here / "law.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert xml.etree.ElementTree.parse(here / "law.svg").getroot().tag.endswith("svg")


def test_a_figure_of_more_sizes_than_it_can_tell_apart_is_refused(command, here):
    table = planted(seeds=1)
    table["params_total"] *= 1 + 0.001 * np.arange(len(table))
    table.drop(columns="flops_6nd").to_csv(here / "many.csv", index=False)
    said = command("fit", "chinchilla", "many.csv", *QUICK, "--figure", "law.png")
    assert said.code == 2
    assert "would have to tell 25 sizes apart; it shows at most 12" in said.err
    assert not (here / "law.png").exists()


def test_help_names_every_law(command):
    said = command("fit", "--help")
    assert said.code == 0
    assert set(re.findall(r"\w+", flags.Fit.__doc__.partition("Laws:")[2])) == set(LAWS)
    for flag in ("LAW", "TABLE", "--keep", "--group", "--bootstraps", "--json"):
        assert flag in said.out


def write(**change):
    table = planted(seeds=1)
    for name, (row, value) in change.items():
        table[name] = table[name].astype(object)
        table.loc[row, name] = value
    table.to_csv("bad.csv", index=False)


BAD = {
    "unknown law": (("chinchila", "runs.csv"), "'chinchila' is not a law; did you mean chinchilla?"),
    "no such file": (("chinchilla", "nowhere.csv"), "nowhere.csv does not exist"),
    "no table": (("chinchilla", "runs.txt"), "a table is a .csv or .parquet file"),
    "empty file": (("chinchilla", "empty.csv"), "empty.csv cannot be read as a .csv table"),
    "missing column": (("chinchilla", "runs.csv", "--n", "params"), "--n params: the table has no such column"),
    "words": (("chinchilla", "runs.csv", "--keep", "tokens < 'many'"), "compares words with numbers"),
    "code": (("chinchilla", "runs.csv", "--keep", "open('x')"), "is not allowed; it may hold"),
    "nothing left": (("chinchilla", "runs.csv", "--keep", "tokens < 1"), "leaves none of the 50 rows"),
    "too few": (("chinchilla", "runs.csv", "--keep", "tokens < 2e8 and train.seed < 1"), "needs at least 7"),
    "mixed": (("chinchilla", "runs.csv", "--n", "sem", "--c", "flops_exact"), "flops_exact: the table has no such"),
    "not for this law": (("saturating", "runs.csv", "--x", "tokens", "--n", "params_total"), "is not for saturating"),
    "x is missing": (("bnsl_1", "runs.csv"), "--x COL is missing"),
    "figure": (("kaplan_n", "runs.csv", "--figure", "a.png"), "--figure is for the chinchilla law"),
    "no starts": (("chinchilla", "runs.csv", "--starts", 0), "--starts 0 is not allowed"),
    "few resamples": (("chinchilla", "runs.csv", "--bootstraps", 19), "a 90% interval needs at least 20, and 0 makes"),
    "level": (("chinchilla", "runs.csv", "--level", 1.0), "level=1 is not allowed; it must be between 0 and 1"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_written(command, here, words, message):
    (here / "runs.txt").write_text("no table")
    (here / "empty.csv").write_text("")
    before = sorted(path.name for path in here.iterdir())
    said = command("fit", *words, "--json", "out.json")
    assert (said.code, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1
    assert message in said.err
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (3, -5.0)}, "--d tokens: row 3 holds -5"),
        ({"params_total": (2, "big")}, "--n params_total: row 2 holds big"),
        ({"final_loss": (7, 0.0)}, "--loss final_loss: row 7 holds 0"),
        ({"final_loss": (7, None)}, "--loss final_loss: row 7 holds nan"),
        ({"train.seed": (9, None)}, "--group train.seed: row 9 is empty"),
    ],
)
def test_a_value_that_cannot_be_fitted_is_named_with_its_row(command, change, message):
    write(**change)
    said = command("fit", "chinchilla", "bad.csv", "--group", "train.seed")
    assert said.code == 2
    assert message in said.err


def test_the_same_point_twice_and_mixed_conventions_are_refused(command, here):
    table = planted(seeds=1)
    pd.concat([table, table[:1]]).to_csv(here / "twice.csv", index=False)
    said = command("fit", "chinchilla", "twice.csv")
    assert said.code == 2
    assert "rows 0 and 25 are the same point" in said.err
    table.assign(flops_exact=table["flops_6nd"] * 1.1).to_csv(here / "exact.csv", index=False)
    said = command("fit", "chinchilla", "exact.csv", "--c", "flops_exact")
    assert said.code == 2
    assert "mixed conventions: D = C / (6 N) needs C = 6 N D" in said.err
    table["flops_6nd"] *= np.where(np.arange(25) < 5, 1.2, 1)
    table.rename(columns={"flops_6nd": "C"}).to_csv(here / "mixed.csv", index=False)
    said = command("fit", "chinchilla", "mixed.csv", "--d", "tokens", "--c", "C")
    assert said.code == 2
    assert "mixed conventions: C is 6 N D in 20 rows and not in 5 others" in said.err


# --- keep ----------------------------------------------------------------------------------------------------------

ROWS = pd.DataFrame({"loss": [1.0, 2.0, 3.0], "Training FLOP": [1e18, 1e19, 1e20], "a.b": [1, 2, 3], "w": list("xyx")})


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("loss < 3", [1, 1, 0]),
        ("1 < loss <= 3", [0, 1, 1]),
        ("`Training FLOP` > 1e18 and loss != 3", [0, 1, 0]),
        ("a.b == 1 or not loss < 3", [1, 0, 1]),
        ("w == 'x' and (loss > 2 or loss < 0)", [0, 0, 1]),
        ("a.b >= loss", [1, 1, 1]),
        ("loss > -1", [1, 1, 1]),
    ],
)
def test_conditions_are_what_they_say(condition, rows):
    assert kept(ROWS, condition).tolist() == [bool(row) for row in rows]


@pytest.mark.parametrize(
    "condition",
    ["loss", "loss + 1 < 3", "loss.__class__", "loss < 3 if 1 else 2", "[x for x in loss]", "f(loss) < 1", "loss <", "",
     "lambda: 1", "loss in (1, 2)", "loss[0] < 1", "`Training FLOP < 1", "@loss < 1"],
)  # fmt: skip
def test_anything_else_than_comparisons_is_refused(condition):
    with pytest.raises(BadInput, match="--keep"):
        kept(ROWS, condition)


@pytest.mark.parametrize(
    ("condition", "right"),
    [
        ("w == x", "w == 'x'"),
        ("loss < 3 and w != addition-3", "loss < 3 and w != 'addition-3'"),
        ('w == "é" or `Training FLOP` > 1 and x.y == w', "w == 'é' or `Training FLOP` > 1 and 'x.y' == w"),
    ],
)
def test_a_word_without_quotes_is_told_with_the_condition_that_was_meant(condition, right):
    with pytest.raises(BadInput, match="is no column; words stand in quotes of their own") as refused:
        kept(ROWS, condition)
    assert str(refused.value).endswith(f'--keep "{right}"')
    kept(ROWS, right.replace("'x.y' ==", "'x' =="))


def test_a_condition_that_is_nested_too_deeply_is_refused():
    with pytest.raises(BadInput, match=r"--keep 'not not .* cannot be read"):
        kept(ROWS, 10_000 * "not " + "loss < 3")


# --- plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fitted")
@pytest.mark.parametrize(("flag", "of"), [("--flops", "C"), ("--params", "N"), ("--loss", "loss")])
def test_a_plan_answers_each_target_with_intervals(command, here, flag, of):
    n, d, loss = (float(v) for v in frontier(TRUTH, 1e20))
    true = {"C": 1e20, "N": n, "D": d, "loss": loss, "tokens_per_parameter": d / n}
    said = command("plan", "--fit", "fit.json", flag, true[of], "--json", "plan.json")
    assert said.code == 0, said.err
    found = read(here / "plan.json")
    assert found["optimum"][of]["value"] == pytest.approx(true[of], rel=1e-4)
    for name, value in true.items():
        low, high = found["optimum"][name]["interval"]
        assert low <= found["optimum"][name]["value"] <= high
        assert found["optimum"][name]["value"] == pytest.approx(value, rel=0.5)
    assert [one["factor"] for one in found["off"]] == [0.5, 2.0]
    assert found["overtrained"][0]["compute"]["value"] > 1
    for words in ("The best run for", "with the wrong size", "trained for longer", "N counts all parameters"):
        assert words in said.out


@pytest.mark.usefixtures("fitted")
def test_a_plan_far_beyond_the_points_says_so_and_one_inside_does_not(command):
    assert "extrapolation: C is" in command("plan", "--fit", "fit.json", "--flops", 1e25).out
    assert "extrapolation" not in command("plan", "--fit", "fit.json", "--flops", 1e19).out


@pytest.mark.usefixtures("fitted")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fit", "fit.json", "--loss", 1.0), "loss=1 is not above the fitted floor E = "),
        (("--fit", "fit.json"), "none given"),
        (("--fit", "fit.json", "--loss", 3, "--flops", 1e20), "--flops and --loss given"),
        (("--fit", "none.json", "--loss", 3), "none.json does not exist"),
        (("--fit", "runs.csv", "--loss", 3), "runs.csv cannot be read"),
        (("--fit", "other.json", "--loss", 3), "is not what `jaxgpt fit --json` writes: it lacks law"),
        (("--fit", "fit.json", "--flops", -2), "flops=-2 is not allowed"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_in_one_line(command, here, words, message):
    (here / "other.json").write_text("{}")
    said = command("plan", *words, "--json", "plan.json")
    assert (said.code, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1
    assert message in said.err
    assert not (here / "plan.json").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("parameters",), []),
        (("parameters", "A"), {}),
        (("draws", "A"), ["many"]),
        (("draws", "A"), [1.0]),
        (("law",), "kaplan_nd"),
        (("level",), 3),
        (("range", "N"), None),
        (("convention",), None),
    ],
)
def test_a_fit_file_whose_parts_do_not_fit_is_refused_in_one_line(command, here, fitted, path, value):
    part = fitted
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    (here / "odd.json").write_text(json.dumps(fitted))
    said = command("plan", "--fit", "odd.json", "--flops", 1e20, "--json", "plan.json")
    assert (said.code, said.out) == (2, "")
    assert len(said.err.splitlines()) == 1
    assert "--fit odd.json is not what `jaxgpt fit --json` writes: its entries do not fit each other" in said.err
    assert not (here / "plan.json").exists()


def test_a_parameter_beyond_any_number_leaves_no_plan_and_is_not_identified(command, here):
    table = planted(seeds=1)  # where exponents end at their bound 0.001: of a loss of 30 the constants are e^3000
    table["final_loss"] = 30 * table["final_loss"] ** 1e-4
    table.to_csv("flat.csv", index=False)
    said = command("fit", "kaplan_nd", "flat.csv", *QUICK, "--json", "flat.json")
    assert (said.code, said.err) == (0, "")
    assert "there is no plan: " in said.out
    assert "degrees of freedom" not in said.out
    found = read(here / "flat.json")["parameters"]
    beyond = [one for one in found.values() if one["value"] is None or one["interval"][1] is None]
    assert beyond
    assert not any(one["identified"] for one in beyond)
    said = command("plan", "--fit", "flat.json", "--flops", 1e20)
    assert (said.code, said.out) == (2, "")
    assert re.fullmatch(r"jaxgpt: there is no plan: .* of the kaplan_nd law may be beyond any number\n", said.err)


def test_a_law_that_is_not_of_n_and_d_has_no_plan(command):
    assert command("fit", "kaplan_n", "runs.csv", *QUICK, "--json", "k.json").code == 0
    said = command("plan", "--fit", "k.json", "--flops", 1e20)
    assert said.code == 2
    assert "a plan needs a law of N and D" in said.err
