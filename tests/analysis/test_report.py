"""The results page as text: complete, escaped, self-contained, and whole where parts are missing or broken."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from analysis.report import MOST_ROWS, VERDICTS, ClaimRow, Result, page

CLAIM = ClaimRow(
    row=3, statement="size grows as C^a", source="Someone 2022, table 2", expected=0.5, margin=0.1, measured=0.52,
    low=0.45, high=0.56, level=0.9, unit="1", seeds=4, scope="toy_analogue", verdict="reproduced",
)  # fmt: skip
POINTS = '{"axes":[{"title":"A &lt; B","x":"","y":"","box":[1,1,8,8],"series":[]}]}'
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><metadata><description>'
    f'{POINTS}</description></metadata><path id="curve" d="M 0 0 L 1 1"/></svg>'
)
RUN = {"command": "jaxgpt reproduce demo", "scale": "laptop", "seconds_training": 329.4, "seconds_this_call": 12.25,
       "device": "cpu", "corpus_sha256": "b0f17b", "versions": {"jax": ["0.10.2"], "grain": ["None"]},
       "code_versions": ["57aef7"], "analysis_code_version": "57aef8",
       "analysis_versions": {"jax": "0.10.3"}}  # fmt: skip
SUMMARY = (("run_id", "N", "loss", "code"), ("a", "10", "2.123456789", "x"), ("b", "20", "1.5", "x"))
RESULT = Result("demo", "A demo", "after Someone 2022", "laptop", (CLAIM,), RUN, SUMMARY, SVG, None, "4 minutes")
HOSTILE = "</script><script>alert('x')</script> <b> & \" < \u2028"


VOID = {"meta", "link", "input"}  # elements that are never closed


class Tags(HTMLParser):
    """Every element with its attributes, and what is open at the end."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_every_element_is_closed_and_every_id_is_there_once():
    tags = Tags(page([RESULT, replace(RESULT, scale="paper"), replace(RESULT, name="other")], {"more": "More"}))
    assert tags.open == []
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in tags.all("a")}
    assert {"demo", "demo-paper", "other", "all-claims"} <= targets <= set(ids)


def test_the_page_loads_nothing():
    text = page([RESULT])
    tags = Tags(text)
    loads = [a.get(name) for _, a in tags.found for name in ("src", "href", "srcset", "action", "data") if a.get(name)]
    assert all(address.startswith(("#", "data:")) for address in loads)
    assert not re.search(r"@import|url\((?!#)", text)
    (policy,) = [a["content"] for a in tags.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


def test_the_same_records_give_the_same_bytes():
    assert page([RESULT]) == page([RESULT])


def test_a_claim_is_told_whole():
    words = " ".join(Tags(page([RESULT])).words)
    for part in (CLAIM.statement, CLAIM.source, "0.5 ± 0.1", "0.52", "0.45 to 0.56", "90", "4", "toy analogue"):
        assert part in words
    assert "✓\xa0reproduced" in words


def test_how_it_was_made_and_how_to_repeat_it_is_told():
    words = " ".join(Tags(page([RESULT])).words)
    for part in ("jaxgpt reproduce demo", "5 min 29 s", "12.2 s", "cpu", "b0f17b", "jax 0.10.2", "jax 0.10.3", "57aef7",
                 "57aef8", "4 minutes"):  # fmt: skip
        assert part in words
    assert "grain" not in words  # it was not there


def test_what_all_runs_share_stands_once_and_the_table_holds_the_rest():
    text = page([RESULT])
    assert "code = x" in text
    assert '<th scope="col">code</th>' not in text
    assert '<td class="w">a</td><td>10</td><td>2.12346</td>' in text


def test_a_long_summary_is_cut_and_says_so():
    rows = tuple((str(i), str(i)) for i in range(MOST_ROWS + 5))
    text = page([replace(RESULT, summary=(("run_id", "N"), *rows))])
    assert f"{MOST_ROWS + 5} rows, the first {MOST_ROWS}" in text
    assert text.count(f">{MOST_ROWS - 1}</td>") == 2
    assert f">{MOST_ROWS}</td>" not in text


def test_verdicts_are_counted():
    verdicts = ["reproduced", "reproduced", "contradicted", "strange"]
    text = page([replace(RESULT, claims=tuple(replace(CLAIM, verdict=verdict) for verdict in verdicts))])
    tiles = {a["data-verdict"]: a for a in Tags(text).all("button") if "data-verdict" in a}
    assert list(tiles) == [*VERDICTS, "strange"]
    counts = dict(re.findall(r'data-verdict="([^"]+)" aria-pressed="false"[^>]*><b>(\d+)</b>', text))
    assert counts == {
        "reproduced": "2", "contradicted": "1", "not seen at this scale": "0", "inconclusive": "0", "strange": "1",
    }  # fmt: skip
    assert "at most 0.4 verdicts are false by chance" in text


def test_every_text_is_escaped():
    claim = replace(CLAIM, statement=HOSTILE, source=HOSTILE, unit=HOSTILE, scope=HOSTILE, verdict=HOSTILE)
    points = json.dumps({"axes": [{"title": HOSTILE, "box": [0, 0, 1, 1], "series": []}]})
    svg = f'<svg xmlns="" viewBox="0 0 10 10"><description><![CDATA[{points}]]></description></svg>'
    hostile = Result(
        HOSTILE, HOSTILE, HOSTILE, "laptop", (replace(claim, remark=HOSTILE),),
        {"command": HOSTILE, "versions": HOSTILE},
        ((HOSTILE, "b"), (HOSTILE, "1"), ("x", "2")), svg, None, HOSTILE, (HOSTILE,),
    )  # fmt: skip
    tags = Tags(page([hostile], {HOSTILE: HOSTILE}))
    assert tags.open == []
    assert not tags.all("b")[1 + len(VERDICTS) + 1 :]  # of the tiles and of the paper not run
    assert [a.get("type") for a in tags.all("script")] == ["application/json", None]
    (told,) = [word for word in tags.words if word.startswith('{"axes"')]
    assert json.loads(told) == json.loads(points)


def bar(claim):
    """What the bar of a claim says and the numbers of its line; None where there is none."""
    text = page([replace(RESULT, claims=(claim,))])
    found = re.search(r'<svg class="bar[^"]*"[^>]*aria-label="([^"]+)".*?class="reach" d="([^"]+)"', text)
    return found and (found[1], found[2])


def test_a_bar_shows_the_interval_in_margins():
    said, line = bar(CLAIM)
    assert said == "measured 0.52, interval 0.45 to 0.56; stated 0.4 to 0.6"
    start, stop = map(float, re.match(r"M([\d.]+) 12H([\d.]+)", line).groups())
    # 152 pixels show 3 margins to either side, on 96 % of them.
    per_margin = 152 * 0.96 / 6
    assert (start, stop) == pytest.approx((76 - 0.5 * per_margin, 76 + 0.6 * per_margin), abs=0.051)


@pytest.mark.parametrize(("low", "high"), [(0.5, 5.0), (-5.0, 0.5), (4.0, 5.0), (-5.0, -4.0), (-9.0, 9.0)])
def test_a_bar_never_leaves_its_frame_and_points_to_where_it_goes_on(low, high):
    _, line = bar(replace(CLAIM, low=low, high=high))
    places = [float(x) for x in re.findall(r"[MLH]([\d.-]+)", line)]
    assert all(0 <= x <= 152 for x in places)
    arrows = [float(x) for x in re.findall(r"8L([\d.]+) 12L", line)]
    beyond = {76 + 72.96 * (1 if end > 0.5 else -1) for end in (low, high) if abs(end - 0.5) > 0.3}
    assert set(arrows) == {round(x, 1) for x in beyond}
    start, stop = map(float, re.match(r"M([\d.]+) 12H([\d.]+)", line).groups())
    assert start != stop


def test_a_claim_without_an_interval_says_so():
    for gone in ({"low": None}, {"high": None}, {"measured": None, "low": None, "high": None}):
        claim = replace(CLAIM, verdict="inconclusive", **gone)
        assert bar(claim) is None
        assert "no interval" in page([replace(RESULT, claims=(claim,))])


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (-0.0117, "−0.0117"), (12345.6, "12300"), (999.7, "1000"), (0.6799, "0.68"),
     (4.12e-5, "4.12 × 10<sup>−5</sup>"), (3e12, "3 × 10<sup>12</sup>")],
)  # fmt: skip
def test_numbers_are_short(number, text):
    assert f">{text}<small>" in page([replace(RESULT, claims=(replace(CLAIM, measured=number),))])


def test_what_is_stated_is_not_rounded():
    assert "0.3478 ± 0.0025" in page([replace(RESULT, claims=(replace(CLAIM, expected=0.3478, margin=0.0025),))])


def test_missing_parts_say_so_and_the_rest_stands():
    text = page([Result("bare", "Bare", "", "laptop", problems=("results/bare/claims.json is missing",))])
    for said in (
        "There is no figure",
        "There is no summary table",
        "no run.json",
        "No claims",
        "claims.json is missing",
    ):
        assert said.lower() in text.lower()
    assert Tags(text).open == []


def test_a_broken_figure_says_so_and_the_rest_stands():
    text = page([replace(RESULT, svg="<svg")])
    assert "not a readable SVG" in text
    assert CLAIM.statement in text


def test_a_drawing_that_is_too_large_is_shown_as_its_png(monkeypatch):
    png = b"\x89PNG\r\n\x1a\n" + bytes(8) + (20).to_bytes(4, "big") + (10).to_bytes(4, "big")
    small = replace(RESULT, png=png)
    assert "data:image/png" not in page([small])
    monkeypatch.setattr("analysis.report.LARGEST_SVG", 10)
    assert "data:image/png;base64,iVBOR" in page([small])
    assert "data:image/png;base64,iVBOR" in page([replace(small, svg=None)])


def test_papers_that_have_not_run_are_named_with_their_command():
    text = page([RESULT], {"other2024": "Another"})
    assert "jaxgpt reproduce other2024" in text
    assert 'href="#other2024"' not in text
