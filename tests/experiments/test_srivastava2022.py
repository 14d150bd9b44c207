"""Srivastava et al. 2022: whether its verdicts can come out in each way, and the command on the published table."""

import json
import os
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.claims import verdict
from experiments.emergence import srivastava2022 as paper

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
FILE = Path(os.environ.get("JAXGPT_DATA") or SHARED) / paper.FILE
published = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is absent (set JAXGPT_DATA to the data folder)")
SIZES = np.geomspace(1e6, 1e12, 12)
SIZE = paper.Size(resamples=20, over_tasks=100)


def rising(place, sharp=3.0, top=0.9, questions=1000, chance=0.25, seed=0):
    """A task whose curve rises at `place`, under the noise of its questions."""
    curve = chance + (top - chance) / (1 + np.exp(-sharp * np.log(SIZES / place)))
    score = np.random.default_rng(seed).binomial(questions, curve) / questions
    return paper.scores_of(f"at {place:g}, {seed}", SIZES.tolist(), score.tolist(), questions, chance)


def verdicts(tasks, cited):
    measured, table = paper.measure(tasks, np.asarray(cited), SIZE)
    return {claim.id: verdict(claim, measured[claim.id]) for claim in paper.CLAIMS}, measured, table


def test_tasks_that_all_set_in_at_one_size_say_so():
    said, measured, table = verdicts(
        [rising(1e11, seed=s, top=0.6 + 0.03 * s) for s in range(6)], [True] * 3 + [False] * 3
    )
    assert (said["place"], said["one"]) == ("reproduced", "reproduced")
    assert measured["place"].value == pytest.approx(11, abs=0.15)
    assert (said["cited_able"], said["lucky"]) == ("reproduced", "reproduced")
    assert table["survives"].all()
    assert table["can_survive"].all()
    assert table["flagged"].tolist() == [True] * 6


def test_tasks_that_set_in_far_apart_contradict_one_threshold():
    said, measured, _ = verdicts([rising(10.0 ** (7.5 + 0.5 * s), seed=s) for s in range(7)], [True] * 3 + [False] * 4)
    assert said["one"] == "contradicted"
    assert measured["place"].value == pytest.approx(9, abs=0.3)


def test_guessing_survives_nothing_and_a_model_with_one_answer_is_found_below_chance():
    rng = np.random.default_rng(0)
    guesses = [
        paper.scores_of(f"guess {t}", SIZES.tolist(), (rng.binomial(50, 0.5, 12) / 50).tolist(), 50, 0.5)
        for t in range(20)
    ]
    said, measured, table = verdicts(guesses, [True] * 10 + [False] * 10)
    assert not table["survives"].any()
    assert "reproduced" not in (said["cited_able"], said["lucky"])
    assert table["above"].tolist().count(True) > 8  # uncorrected, many look able
    assert measured["below"].value == 0
    assert said["place"] == said["one"] == "inconclusive"  # no threshold to speak of
    stubborn = paper.scores_of("one answer", SIZES.tolist(), [0.5] * 11 + [0.1], 50, 0.5)
    _, measured, _ = verdicts([*guesses, stubborn], [True] * 10 + [False] * 11)
    assert measured["below"].value == pytest.approx(1 / 21)


def test_a_b_that_goes_with_being_cited_is_told_and_one_that_does_not_is_not():
    b, cited = np.arange(20.0), np.arange(20) >= 14
    assert paper._tells(b, cited, 100).value == 1
    assert paper._tells(b[::-1], cited, 100).value == 0
    assert paper._tells(np.ones(20), cited, 100).value == 0.5
    assert paper._tells(np.where(cited, np.nan, b), cited, 100).value == 0  # a flat score does not jump


def test_fewer_than_three_tasks_leave_a_share_open():
    assert verdict(paper.CLAIMS[0], paper.share(np.ones(2, bool))) == "inconclusive"
    assert paper.share(np.arange(10) < 3).value == 0.3


def test_on_the_luck_of_the_published_table_claims_come_out_either_way():
    luck_T = np.full(89, 0.2)  # 17.8 of 89, 3.6 of 18
    claims = {claim.id: claim for claim in paper.CLAIMS}
    assert [verdict(claims["lucky"], paper.able(luck_T, seen)[1]) for seen in (80, 20)] == [
        "reproduced",
        "contradicted",
    ]
    few = [verdict(claims["cited_able"], paper.able(luck_T[:18], seen)[0]) for seen in (18, 4)]
    assert few == ["reproduced", "not seen at this scale"]
    # half of them able, and a fifth of the others lifted
    half, rest = paper.able(np.full(100, 0.2), 60)
    assert (half.value, rest.value) == pytest.approx((0.5, 10 / 60))


def test_the_interval_of_the_able_holds_the_truth_as_often_as_it_says():
    rng, luck_T, held = np.random.default_rng(0), np.full(89, 0.2), []
    for _ in range(400):
        seen = 35 + rng.binomial(54, 0.2)
        share, _ = paper.able(luck_T, int(seen))
        held.append(share.low <= 35 / 89 <= share.high)
    assert np.mean(held) == pytest.approx(0.92, abs=0.05)  # counts are whole: a little more than the level


def test_questions_are_those_that_the_published_digits_are_shares_of():
    right = np.array([12, 20, 31, 53])
    assert paper.asked(np.round(right / 53, 4), 54) == 53
    assert paper.asked(np.round(right / 54, 4), 54) == 54
    assert paper.asked(np.round((right + 0.5) / 54, 4), 54) is None  # answers that count in part


def test_thresholds_beyond_the_table_count_as_above_all_others():
    within = {"threshold": [1e7, 1e8, 1e9, 1e10, 1e11], "threshold_remark": [None] * 5}
    beyond = {"threshold": [np.nan] * 6, "threshold_remark": [paper.BEYOND + ": ..."] * 4 + ["not resolved"] * 2}
    frames = [pd.DataFrame(each).assign(threshold_interval=[(1e6, 1e12)] * len(each["threshold"]))
              for each in (within, beyond)]  # fmt: skip
    assert paper._thresholds(frames[0], 50)["place"].value == 9
    assert paper._thresholds(pd.concat(frames), 50)["place"].value == 11
    early = frames[1].assign(threshold_remark=[paper.BEFORE + " is done"] * 6)
    assert paper._thresholds(pd.concat([*frames, early]), 50)["place"].value == 8


def test_luck_above_and_below_is_the_same_where_chance_is_one_half():
    table = paper.luck([rising(1e9, chance=0.5, questions=40)])
    assert table["above_by_luck"].to_numpy() == pytest.approx(table["below_by_luck"].to_numpy())
    assert table["above"].tolist() == [1, 1, 1]


@published
def test_the_published_table_has_the_audits_own_numbers(monkeypatch):
    monkeypatch.setenv("JAXGPT_DATA", str(FILE.parent))
    tasks, cited = paper.scores()
    assert (len(tasks), int(cited.sum())) == (89, 18)
    assert max(task.rows["n"].max() for task in tasks) == 1024
    by_luck = paper.luck(tasks)["above_by_luck"].tolist()
    assert by_luck == pytest.approx(
        [44.971, 17.727, 1.499], rel=0.02
    )  # the audit's, of as many questions as tasks have


@pytest.mark.slow
@published
def test_the_command_says_what_is_left_of_the_published_tasks(command, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXGPT_DATA", str(FILE.parent))
    monkeypatch.chdir(tmp_path)
    said = command("reproduce", "srivastava2022", "--scale", "smoke", "--json", "out.json")
    assert said.code == 0, said.err
    outcome = tmp_path / "results/raw/srivastava2022/smoke/outcome"
    assert xml.etree.ElementTree.parse(outcome / "figure.svg").getroot().tag.endswith("svg")
    found = {c["id"]: c for c in json.loads((outcome / "claims.json").read_text())}
    assert set(found) == {claim.id for claim in paper.CLAIMS}
    assert found["one"]["verdict"] == "contradicted"
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["flagged"] == 40  # as in the audit
    assert numbers["below_survive"] > 0
    assert len(pd.read_csv(outcome / "summary.csv")) == 89
    assert "figure of speech detection" in said.out
