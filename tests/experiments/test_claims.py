"""Claims and the registry: a verdict follows from numbers alone, and a paper is one file that is found."""

import dataclasses
import math
import sys

import pytest
from scipy import integrate, stats

import experiments
from experiments import registry
from experiments.claims import (
    Claim,
    Measured,
    false_verdicts_by_chance,
    from_0,
    of_those_that_have,
    over_seeds,
    record,
    share_of,
    spoken,
    verdict,
)
from jaxgpt import BadInput

# Binary fractions, so that touching ends touch: the claim states 0.5 +- 0.25, that is 0.25 to 0.75.
LOW, HIGH = 0.25, 0.75


def claim(**changes):
    return Claim(**{"id": "c", "statement": "it grows", "source": "Somebody et al. 1999, table 1", "expected": 0.5,
                    "margin": 0.25, "unit": "1", "scope": "same_regime"} | changes)  # fmt: skip


def measured(low, high, **changes):
    return Measured(**{"value": (low + high) / 2, "low": low, "high": high, "seeds": 1} | changes)


def test_seeds_without_a_value_are_left_out_and_remarked():
    some = of_those_that_have([1.0, math.nan, 2.0, math.inf], 5, "it broke", 0.5)
    assert some == over_seeds([1.0, 2.0], 0.5, "3 of 5 seeds have no value: it broke")
    assert of_those_that_have([1.0, 2.0], 2, "it broke") == over_seeds([1.0, 2.0])
    none = of_those_that_have([math.nan], 1, "it broke")
    assert (none.seeds, none.remark) == (0, "1 of 1 seeds have no value: it broke")
    assert verdict(claim(), none) == "inconclusive"


RELATIONS = {
    "well inside": (0.4, 0.6, "reproduced"),
    "as wide as the margin": (LOW, HIGH, "reproduced"),
    "inside, touching the lower end": (LOW, 0.5, "reproduced"),
    "inside, touching the upper end": (0.5, HIGH, "reproduced"),
    "a point inside": (0.5, 0.5, "reproduced"),
    "a point on the lower end": (LOW, LOW, "reproduced"),
    "disjoint, below": (0.0, 0.2, "contradicted"),
    "disjoint, above": (0.8, 9.0, "contradicted"),
    "outside, touching the lower end": (0.0, LOW, "inconclusive"),
    "outside, touching the upper end": (HIGH, 0.9, "inconclusive"),
    "overlapping the lower end": (0.1, 0.4, "inconclusive"),
    "overlapping the upper end": (0.6, 0.9, "inconclusive"),
    "wider than the margin": (0.0, 1.0, "inconclusive"),
    "just too wide below": (math.nextafter(LOW, 0), 0.5, "inconclusive"),
    "just too wide above": (0.5, math.nextafter(HIGH, 1), "inconclusive"),
    "no number": (math.nan, math.nan, "inconclusive"),
    "no lower end": (math.nan, 0.5, "inconclusive"),
    "no upper end": (0.5, math.nan, "inconclusive"),
    "infinite": (-math.inf, math.inf, "inconclusive"),
    "open above, disjoint": (0.8, math.inf, "inconclusive"),
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_verdict_follows_from_how_the_interval_lies_to_the_margin(relation):
    low, high, expected = RELATIONS[relation]
    assert verdict(claim(), measured(low, high)) == expected


@pytest.mark.parametrize("relation", RELATIONS)
def test_far_from_the_sources_scale_nothing_is_contradicted(relation):
    low, high, expected = RELATIONS[relation]
    toy = verdict(claim(scope="toy_analogue"), measured(low, high))
    assert toy == {"contradicted": "not seen at this scale"}.get(expected, expected)


@pytest.mark.parametrize("scope", ["same_regime", "toy_analogue"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_a_remark_that_the_data_cannot_decide_makes_any_interval_inconclusive(relation, scope):
    low, high, _ = RELATIONS[relation]
    assert verdict(claim(scope=scope), measured(low, high, remark="not identified")) == "inconclusive"


def test_only_the_interval_decides_and_not_the_value():
    assert verdict(claim(), measured(0.4, 0.6, value=99.0)) == "reproduced"
    assert verdict(claim(), measured(8.0, 9.0, value=0.5)) == "contradicted"


@pytest.mark.parametrize(
    "changes",
    [
        *({"margin": margin} for margin in (0.0, -0.1, math.nan, math.inf)),  # an infinite one is always met
        *({"level": level} for level in (0.0, 1.0, -0.5, 90.0, math.nan)),
        *({"expected": expected} for expected in (math.nan, math.inf)),
    ],
)
def test_a_claim_without_a_real_margin_or_level_is_refused(changes):
    with pytest.raises(ValueError, match="claim c: expected="):
        claim(**changes)


def test_a_record_has_the_keys_of_the_design_and_the_remark():
    entry = record(claim(row=7, level=0.8), measured(0.1, 0.2, seeds=3, remark="too few points"), "laptop")
    assert entry == {
        "id": "c", "row": 7, "statement": "it grows", "source": "Somebody et al. 1999, table 1", "expected": 0.5,
        "margin": 0.25, "measured": pytest.approx(0.15), "interval": [0.1, 0.2], "level": 0.8, "unit": "1", "seeds": 3,
        "scale": "laptop", "scope": "same_regime", "verdict": "inconclusive", "remark": "too few points",
    }  # fmt: skip
    assert record(claim(), measured(0.8, 0.9), "smoke")["verdict"] == "contradicted"


def test_an_interval_ends_where_the_quantity_does():
    share = claim(possible=(0.0, 1.0), expected=0.9, margin=0.1)
    entry = record(share, measured(0.85, 1.2), "laptop")
    assert (entry["interval"], entry["verdict"]) == ([0.85, 1.0], "reproduced")
    assert record(share, measured(-0.2, 0.3), "laptop")["interval"] == [0.0, 0.3]
    endless = record(share, measured(-math.inf, math.inf, value=0.9), "laptop")
    assert (endless["interval"], endless["verdict"]) == ([-math.inf, math.inf], "inconclusive")


def test_one_number_per_seed_is_its_mean_with_students_interval():
    values = [0.1, 0.4, 0.7]
    half = stats.t.ppf(0.9, 2) * 0.3 / math.sqrt(3)
    found = over_seeds(values, 0.8, "why")
    assert (found.seeds, found.remark) == (3, "why")
    assert [found.value, found.low, found.high] == pytest.approx([0.4, 0.4 - half, 0.4 + half])
    assert spoken(values, 0.8, ".2f") == f"0.40 ({0.4 - half:.2f} to {0.4 + half:.2f})"


def test_false_verdicts_by_chance_add_up_what_each_level_misses():
    assert false_verdicts_by_chance([]) == 0
    assert false_verdicts_by_chance([claim(level=0.9), claim(level=0.95), claim(level=0.5)]) == pytest.approx(0.65)


# --- the registry --------------------------------------------------------------------------------------------------

PAPER_FILE = """
from experiments.claims import Claim
from experiments.registry import Paper

PAPER = Paper(name={name!r}, title="", source="", claims=(), takes={{"smoke": "1 s"}}, run=lambda job: None)
"""


@pytest.fixture
def add_paper(tmp_path, monkeypatch):
    """Adds a file to a group of papers that lies in a folder of its own; `experiments` is as before afterwards."""
    group = tmp_path / "extra_group"
    group.mkdir()
    (group / "__init__.py").write_text('"""Extra papers."""')
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path)])
    registry.papers.cache_clear()

    def add(module, name):
        (group / f"{module}.py").write_text(PAPER_FILE.format(name=name))

    yield add
    registry.papers.cache_clear()
    for name in [name for name in sys.modules if name.startswith("experiments.extra_group")]:
        del sys.modules[name]
    vars(experiments).pop("extra_group", None)


def test_the_demo_is_found_and_says_how_long_each_scale_takes():
    demo = registry.papers()["demo"]
    assert demo is registry.find("demo")
    assert set(demo.takes) == set(registry.SCALES)
    assert len({claim.id for claim in demo.claims}) == len(demo.claims) > 0


def test_a_new_paper_is_one_new_file(add_paper, command):
    before = list(registry.papers())
    registry.papers.cache_clear()
    add_paper("a_paper", "somebody1999")
    assert registry.find("somebody1999").takes == {"smoke": "1 s"}
    assert registry.find("somebody1999").group == "Extra papers"
    assert set(registry.papers()) == {*before, "somebody1999"}
    assert "somebody1999" in command("list").out


@pytest.mark.parametrize(("count", "total"), [(2, 4), (1, 5), (37, 60)])
def test_a_share_has_the_interval_that_leaves_equal_tails_of_its_posterior(count, total):
    found = share_of(count, total, 0.8)
    assert (found.value, found.seeds) == (count / total, total)

    def below(x):  # of the posterior, count - 1/2 and total - count - 1/2 being the exponents of its density
        density = lambda p: p ** (count - 0.5) * (1 - p) ** (total - count - 0.5)  # noqa: E731
        return integrate.quad(density, 0, x)[0] / integrate.quad(density, 0, 1)[0]

    assert below(found.low) == pytest.approx(0.1, abs=1e-6)
    assert below(found.high) == pytest.approx(0.9, abs=1e-6)


def test_a_share_on_which_all_agree_ends_at_0_or_1_and_still_has_a_width():
    none, every = share_of(0, 4), share_of(4, 4)
    assert (none.value, none.low, every.value, every.high) == (0, 0, 1, 1)
    assert none.high == pytest.approx(1 - every.low)
    assert 0.6 < every.low < share_of(40, 40).low < 1
    for count, total in ((-1, 4), (5, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"count={count}"):
            share_of(count, total)


def test_papers_stand_by_group_and_each_group_says_what_it_is_about():
    groups = [paper.group for paper in registry.papers().values()]
    assert groups == sorted(groups)
    assert all(groups)
    assert registry.find("demo").group == "Scaling laws"


def test_two_papers_of_one_name_are_refused(add_paper):
    add_paper("a_paper", "demo")
    with pytest.raises(ValueError, match="two papers are called demo"):
        registry.papers()


@pytest.mark.parametrize(("name", "said"), [("dmo", "did you mean demo?"), ("Demo", "did you mean demo?"),
                                            ("chinchilla", "shows all: ahn2023, ")])  # fmt: skip
def test_an_unknown_paper_is_refused_with_the_nearest_name(name, said):
    with pytest.raises(BadInput) as error:
        registry.find(name)
    assert repr(name) in str(error.value)
    assert said in str(error.value)
    assert ("did you mean" in said) == ("did you mean" in str(error.value))


def test_every_claim_stays_fixed_once_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        registry.find("demo").claims[0].expected = 1.0


def test_an_excess_is_cut_at_0_and_what_is_not_known_stays_so():
    assert from_0(Measured(-1.0, -2.0, -0.5, 4)) == Measured(0.0, 0.0, 0.0, 4)
    assert from_0(Measured(0.1, -0.1, 0.3, 4)) == Measured(0.1, 0.0, 0.3, 4)
    unknown = from_0(Measured(math.nan, math.nan, math.nan, 0, "why"))
    assert math.isnan(unknown.value)
    assert math.isnan(unknown.low)
    assert unknown.remark == "why"
