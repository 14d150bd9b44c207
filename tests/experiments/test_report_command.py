"""`jaxgpt report` finds what reproductions left, writes one file, and names what is missing or broken in one line."""

import json
import shutil
from pathlib import Path

import pytest

from experiments.reporting import collect

RESULTS = Path(__file__).resolve().parent.parent.parent / "results"


@pytest.fixture
def results(tmp_path):
    """The committed results of the demo, alone."""
    shutil.copytree(RESULTS / "demo", tmp_path / "results/demo")
    return tmp_path / "results"


def test_the_committed_results_make_a_page(command, results):
    said = command("report", "--results", results)
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[-1] == str(results / "index.html")
    page = (results / "index.html").read_text()
    for claim in json.loads((results / "demo/claims.json").read_text()):
        assert claim["statement"] in page
    assert "jaxgpt reproduce mup" in page  # not run here
    assert len(page) < 2 * (results / "demo/figure.svg").stat().st_size


def test_the_page_goes_where_one_says(command, results, tmp_path):
    assert command("report", "--results", results, "--out", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").exists()
    assert not (results / "index.html").exists()


def test_both_scales_are_found_and_raw_runs_are_not(results):
    shutil.copytree(results / "demo", results / "demo/paper")
    shutil.copytree(results / "demo", results / "raw/demo/smoke/outcome")
    shutil.copytree(results / "demo", results / "raw/paper")
    found = [(result.name, result.scale) for result in collect(results)]
    assert found == [("demo", "laptop"), ("demo", "paper")]


def test_a_result_of_a_paper_that_is_gone_is_shown_under_its_name(results):
    (results / "demo").rename(results / "old2020")
    (found,) = collect(results)
    assert (found.title, len(found.claims)) == ("old2020", 4)


def changed(results, **fields):
    """The claims file of the demo, with these fields in its first claim."""
    path = results / "demo/claims.json"
    claims = json.loads(path.read_text())
    path.write_text(json.dumps([claims[0] | fields, *claims[1:]]))


@pytest.mark.parametrize(
    ("break_it", "line"),
    [
        (lambda r: (r / "demo/claims.json").write_text("[{"), "demo/claims.json is not a JSON file: "),
        (lambda r: (r / "demo/claims.json").write_text("{}"), "demo/claims.json is not allowed; it must hold a list"),
        (lambda r: (r / "demo/claims.json").write_text("[3]"), "demo/claims.json: claim 1 is not an object"),
        (lambda r: changed(r, margin=0), "demo/claims.json: claim 1 has margin=0; it must be above 0"),
        (lambda r: changed(r, expected="many"), "claim 1 has expected='many'; it must be a number"),
        (lambda r: changed(r, verdict=None), "claim 1 has verdict=None; it must be text"),
        (lambda r: (r / "demo/claims.json").unlink(), "demo/claims.json is missing"),
        (lambda r: (r / "demo/run.json").write_text("[]"), "demo/run.json is not allowed; it must hold an object"),
        (lambda r: (r / "demo/summary.csv").write_text("a,b\n1\n"), "demo/summary.csv: line 2 has 1 cells; the header"),
        (lambda r: (r / "demo/summary.csv").write_bytes(b"\xff\xfe"), "demo/summary.csv cannot be read: "),
    ],
)
def test_a_broken_file_is_named_in_one_line_and_the_rest_stands(command, results, break_it, line):
    break_it(results)
    said = command("report", "--results", results)
    assert said.code == 0
    (told,) = said.err.splitlines()
    assert line in told
    page = (results / "index.html").read_text()
    assert 'class="problem"' in page
    assert "b0f17b2d0b3f" in page or "run.json" in line


@pytest.mark.parametrize("interval", [None, [None, None], [None, 1.0], [1.0], "wide"])
def test_an_interval_that_is_not_there_is_no_error(command, results, interval):
    changed(results, interval=interval, measured=None)
    said = command("report", "--results", results)
    assert (said.code, said.err) == (0, "")
    assert "no interval" in (results / "index.html").read_text()


def test_figures_that_are_not_there_are_no_error(command, results):
    for path in (results / "demo").glob("figure.*"):
        path.unlink()
    assert command("report", "--results", results).code == 0
    assert "There is no figure" in (results / "index.html").read_text()


def test_bad_input_is_one_line_and_writes_nothing(command, results, tmp_path):
    empty = command("report", "--results", tmp_path / "nothing")
    assert (empty.code, empty.out) == (2, "")
    assert "holds no reproduction" in empty.err
    for out in (tmp_path, tmp_path / "no/folder/page.html"):
        said = command("report", "--results", results, "--out", out)
        assert said.code == 2
        assert said.err.startswith(f"jaxgpt: --out={out} is ")
        assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.html"))
