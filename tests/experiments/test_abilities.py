"""`jaxgpt emergence` as a stranger and a script meet it: tables, JSON, the printed table, bad input."""

import json

import numpy as np
import pandas as pd
import pytest

SIZES = np.geomspace(1e6, 1e10, 9)
COLUMNS = ("--task", "task", "--scale", "params", "--score", "score")


def table(seeds=1):
    """Three tasks: a straight line, a jump at 1e8, and nothing but chance."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        noise = 0.004 * rng.standard_normal((3, len(SIZES)))
        curves = {
            "line": np.linspace(0.2, 0.6, len(SIZES)),
            "jump": 0.25 + 0.6 / (1 + np.exp(-6 * np.log10(SIZES / 1e8))),
            "nothing": np.full(len(SIZES), 0.25),
        }
        for (task, curve), away in zip(curves.items(), noise, strict=True):
            rows += [{"task": task, "params": p, "score": s, "chance": 0.25 if task != "line" else 0.0, "n": 500,
                      "seed": seed} for p, s in zip(SIZES, curve + away * (seeds > 1), strict=True)]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table().to_csv("one.csv", index=False)
    table(seeds=3).to_parquet("seeds.parquet", index=False)
    return tmp_path


def read(path):
    """A JSON file; NaN, which is no JSON, fails."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def by_task(found):
    return {one["task"]: one for one in found["tasks"]}


@pytest.fixture
def asked(command, here):
    def ask(file, *words):
        said = command("emergence", file, *COLUMNS, "--resamples", 60, *words, "--json", "out.json")
        assert said.code == 0, said.err
        return said, read(here / "out.json")

    return ask


def test_the_json_holds_what_a_script_looks_for(asked):
    _, found = asked("one.csv", "--chance", "chance", "--n", "n")
    tasks = by_task(found)
    assert list(tasks) == ["line", "jump", "nothing"]
    line = tasks["line"]
    assert (line["breakthroughness"], line["linearity"]) == pytest.approx((8, 8))
    assert line["linearity_per_step"] == pytest.approx(1)
    assert line["line"] == 8
    low, high = line["breakthroughness_interval"]
    assert low <= 8 <= high
    assert line["intervals_over"] == "questions"
    assert line["smooth_95"] > line["breakthroughness"]
    assert 0 <= line["power"] <= 1
    jump = tasks["jump"]
    assert jump["threshold"] == pytest.approx(1e8, rel=0.15)
    assert jump["threshold_interval"][0] < 1e8 < jump["threshold_interval"][1]
    assert jump["breakthroughness"] > jump["logistic"] > jump["line"]
    sudden = {task: any(flag.startswith("sudden") for flag in one["flags"]) for task, one in tasks.items()}
    assert sudden == {"line": False, "jump": jump["breakthroughness"] > jump["smooth_95"], "nothing": False}
    assert sudden["jump"]


def test_scores_that_never_change_are_flagged_and_have_no_number(asked):
    said, found = asked("one.csv")
    nothing = by_task(found)["nothing"]
    assert nothing["breakthroughness"] is None
    assert nothing["linearity"] is None
    assert nothing["threshold"] is None
    assert any("never changes" in flag for flag in nothing["flags"])
    assert "nan" not in said.out.lower()
    assert "inf " not in said.out
    assert nothing["intervals_over"] is None


def test_seeds_give_intervals_over_seeds(asked):
    _, found = asked("seeds.parquet", "--seed", "seed")
    line = by_task(found)["line"]
    assert (line["seeds"], line["intervals_over"]) == (3, "seeds")
    low, high = line["linearity_interval"]
    assert 0 < high - low < 1.5


def test_two_groups_of_seeds_are_told(asked):
    rng, rows = np.random.default_rng(0), []
    for seed in range(12):
        for p, share in zip(SIZES[:5], (0, 0, 0.5, 1, 1), strict=True):
            learnt = seed < 12 * share
            rows.append({"task": "t", "params": p, "score": 0.1 + 0.8 * learnt + 0.01 * rng.random(), "seed": seed})
    pd.DataFrame(rows).to_json("seeds.jsonl", orient="records", lines=True)
    _, found = asked("seeds.jsonl", "--seed", "seed")
    (task,) = found["tasks"]
    assert [one["scale"] for one in task["modes"]] == [SIZES[2]]
    assert task["modes"][0]["means"] == pytest.approx([0.1, 0.9], abs=0.02)
    assert any("two groups at 10M" in flag for flag in task["flags"])


def test_luck_is_told_with_and_without_correction(asked):
    rng = np.random.default_rng(0)
    rows = [
        {"task": f"guess {task}", "params": p, "score": rng.binomial(20, 0.5) / 20, "chance": 0.5, "n": 20}
        for task in range(12)
        for p in SIZES
    ]
    rows += [{"task": "able", "params": p, "score": s, "chance": 0.5, "n": 20}
             for p, s in zip(SIZES, [0.5] * 6 + [0.9, 1, 1], strict=True)]  # fmt: skip
    pd.DataFrame(rows).to_csv("guess.csv", index=False)
    said, found = asked("guess.csv", "--chance", "chance", "--n", "n")
    luck = found["luck"]
    assert luck["expected_by_luck"] > 10  # nine looks at 20 coins
    assert luck["by_luck_interval"][0] <= luck["flagged"] - 1 <= luck["by_luck_interval"][1]
    assert luck["survive"] == 1
    assert by_task(found)["able"]["p_luck_family"] < 0.01
    assert "guessing alone would lift" in said.out


def test_without_chance_and_questions_there_is_no_word_of_luck(asked):
    said, found = asked("one.csv", "--chance", "chance")
    assert found["luck"] is None
    assert "guessing alone" not in said.out


def test_scores_that_are_no_shares_may_be_anything_finite(asked, here):
    table().assign(score=lambda t: 100 * t["score"] - 70).to_csv(here / "percent.csv", index=False)
    _, found = asked("percent.csv")
    assert by_task(found)["line"]["breakthroughness"] == pytest.approx(8)


def falling(seeds=4, **more):
    rng = np.random.default_rng(0)
    rows = [
        {"task": task, "params": p, "score": s + 0.01 * rng.random(), "seed": seed, **more}
        for task, ends in (("falls", (0.8, 0.2)), ("rises", (0.2, 0.8)))
        for p, s in zip(SIZES[:8], np.linspace(*ends, 8), strict=True)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def test_scores_that_fall_are_told_so_and_do_not_survive_luck(asked):
    falling(n=200, chance=0.1).to_csv("falls.csv", index=False)
    _, found = asked("falls.csv", "--seed", "seed", "--n", "n", "--chance", "chance")
    falls, rises = found["tasks"]
    assert falls["threshold_remark"].startswith("no threshold: scores fall with scale (rank correlation, p = ")
    assert rises["fall_p"] > 0.9
    assert (found["luck"]["flagged"], found["luck"]["survive"]) == (2, 1)


@pytest.mark.parametrize("method", ["logistic", "change_point"])
def test_luck_and_threshold_count_the_questions_that_seeds_share_once(asked, method):
    """3 questions, 2 of them right under all of 4 seeds: 8 of 12 would be no luck of chance .2, 2 of 3 may be."""
    table = falling(n=3, chance=0.2).query("task == 'rises'")
    table.assign(score=np.where(table["params"] > 1e8, 2 / 3, 0.0)).to_csv("few.csv", index=False)
    _, found = asked("few.csv", "--seed", "seed", "--n", "n", "--chance", "chance", "--method", method)
    assert found["luck"]["survive"] == 0
    if method == "logistic":
        assert "not resolved by 3 samples" in found["tasks"][0]["threshold_remark"]


def test_few_seeds_without_questions_may_be_two_groups_and_no_more_is_said(asked):
    table = falling().query("task == 'rises'")
    table["score"] += np.where((table["params"] == SIZES[3]) & (table["seed"] > 1), 0.3, 0)
    table.to_csv("groups.csv", index=False)
    _, found = asked("groups.csv", "--seed", "seed")
    (said,) = [flag for flag in found["tasks"][0]["flags"] if "two groups" in flag]
    assert "may fall into two groups" in said


def test_tasks_without_scores_and_rows_without_scale_are_left_out_and_told(asked):
    empty = table()
    empty.loc[empty["task"] == "jump", "score"] = None
    empty.loc[empty.index[:2], "params"] = None
    empty.to_csv("holes.csv", index=False)
    said, found = asked("holes.csv")
    assert list(by_task(found)) == ["line", "nothing"]
    assert by_task(found)["line"]["sizes"] == 7
    assert "2 of 27 rows are left out: --scale params is empty there" in found["notes"]
    assert "left out, --score score is empty in all their rows: jump" in said.out


@pytest.mark.parametrize(("score", "told"), [("brier", True), ("exact_match", False)])
def test_scores_that_are_better_when_smaller_are_pointed_out(asked, score, told):
    table().rename(columns={"score": score}).to_csv("smaller.csv", index=False)
    said, _ = asked("smaller.csv", "--score", score)
    assert ("smaller is better" in said.out) == told


def test_keep_chooses_rows_and_is_told(asked):
    said, found = asked("one.csv", "--keep", "task == 'line'")
    assert list(by_task(found)) == ["line"]
    assert "--keep left 9 of 27 rows" in said.out


def changed(**columns):
    def write():
        table().assign(**columns).to_csv("bad.csv", index=False)
        return "bad.csv"

    return write


def first(name, value):
    return {name: lambda t: t[name].astype(object).where(t.index != 4, value)}


BAD = {
    "no column": (lambda: "one.csv", ("--score", "accuracy"), "--score accuracy: the table has no such column"),
    "no number": (
        changed(**first("score", "high")),
        (),
        "--score score: line 6 of bad.csv (task=line) holds high; only finite numbers fit",
    ),
    "no score": (changed(**first("score", None)), (), "--score score: line 6 of bad.csv (task=line) holds nothing"),
    "no scores": (changed(score=None), (), "--score score and --scale params: no row holds both"),
    "score outside": (
        changed(**first("score", 1.5)),
        ("--n", "n"),
        "line 6 of bad.csv (task=line) holds 1.5; only shares from 0 to 1",
    ),
    "size zero": (
        changed(**first("params", 0)),
        (),
        "--scale params: line 6 of bad.csv (task=line) holds 0.0; only positive finite numbers",
    ),
    "half a question": (
        changed(n=2.5),
        ("--n", "n"),
        "--n n: line 2 of bad.csv (task=line) holds 2.5; only whole numbers",
    ),
    "sure chance": (changed(chance=1.0), ("--chance", "chance"), "only shares from 0 to below 1"),
    "chances differ": (changed(**first("chance", 0.5)), ("--chance", "chance"), "different chances"),
    "one size": (changed(params=1e6), (), "has 1 size (params); at least 3 are needed"),
    "two rows": (lambda: "seeds.parquet", (), "has two rows with params=1e+06; --seed COL names the column of seeds"),
    "no label": (changed(**first("task", None)), (), "--task task: line 6 of bad.csv (task=nan) holds nothing"),
    "level": (lambda: "one.csv", ("--level", "90"), "--level 90.0 is not allowed"),
    "resamples": (lambda: "one.csv", ("--resamples", "1"), "--resamples 1 is not allowed"),
    "no table": (lambda: "none.csv", (), "none.csv does not exist"),
    "no format": (lambda: "table.txt", (), "a .jsonl file"),
}


@pytest.mark.parametrize(("file", "words", "reason"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_writes_nothing(command, here, file, words, reason):
    said = command("emergence", file(), *COLUMNS, *words, "--json", "out.json")
    assert said.code == 2
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert not (here / "out.json").exists()
