"""The results page as a reader uses it, in headless Chromium: sorts, filters, zooms, tells, and asks for nothing."""

import json

import numpy as np
import pytest
from chromium import BINARY, browser
from matplotlib.figure import Figure

from analysis.plots import save

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium here (Debian: apt-get install chromium)")

CLAIM = {"row": 1, "statement": "size grows as C^a", "source": "Someone 2022", "expected": 0.5, "margin": 0.1,
         "measured": 0.5, "interval": [0.45, 0.55], "level": 0.9, "unit": "1", "seeds": 4, "scope": "same_regime",
         "scale": "laptop", "verdict": "reproduced", "remark": ""}  # fmt: skip
PAPERS = {
    "first": [
        CLAIM | {"id": "a", "measured": 9.0, "interval": [8, 10], "verdict": "contradicted"},
        CLAIM | {"id": "b", "measured": 10.0, "statement": "a < b </script> & more", "row": None},
    ],
    "second": [
        CLAIM | {"id": "c", "measured": -2.0, "interval": [-3, 0.45], "verdict": "inconclusive"},
        CLAIM | {"id": "d", "measured": None, "interval": [None, None], "verdict": "inconclusive"},
        CLAIM | {"id": "e", "measured": 0.001},
    ],
}


def figure(path):
    drawn = Figure(figsize=(10, 5), layout="constrained")
    left, right = drawn.subplots(1, 2)
    left.plot([1, 2, 3], [10, 20, 40], "o-", label="sized 8")
    left.set(xlabel="tokens", ylabel="loss", title="Loss")
    right.plot(np.arange(50), np.arange(50) ** 2, label="squares")
    save(drawn, path)


@pytest.fixture(scope="module")
def written(tmp_path_factory, command):
    """The page of two papers, and a page's whole life in one browser."""
    results = tmp_path_factory.mktemp("page") / "results"
    for name, claims in PAPERS.items():
        folder = results / name
        folder.mkdir(parents=True)
        (folder / "claims.json").write_text(json.dumps(claims))
        (folder / "run.json").write_text(json.dumps({"command": f"jaxgpt reproduce {name}"}))
        rows = "".join(f"r{i},{n},a long name that needs room {i}\n" for i, n in enumerate((30, 4, 200)))
        (folder / "summary.csv").write_text(f"run_id,N,{'wide_' * 30}\n{rows}")
        figure(folder / "figure")
    assert command("report", "--results", results).code == 0
    return results / "index.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(chromium, written):
    """The page, freshly opened; nothing that a test does may make it complain or ask for anything."""
    chromium.open(written)
    yield chromium
    assert chromium.said == []
    assert [url for url in chromium.requests if not url.startswith("data:")] == [written.as_uri()]


def column(page, label, table="#claims"):
    cells = f"document.querySelectorAll('{table} tbody tr:not([hidden]) td[data-label=\"{label}\"]')"
    return page.run(f"[...{cells}].map(cell => cell.firstChild.textContent.trim())")


def press(page, selector):
    page.run(f"document.querySelector('{selector}').click()")


def head(label):
    return f"#claims thead th:nth-child({['Row', 'Paper', 'Claim', 'Stated', 'Measured'].index(label) + 1}) button"


def test_claims_sort_by_any_column_in_both_directions_with_gaps_last(page):
    assert column(page, "Measured") == ["9", "10", "−2", "–", "0.001"]
    press(page, head("Measured"))
    assert column(page, "Measured") == ["−2", "0.001", "9", "10", "–"]
    press(page, head("Measured"))
    assert column(page, "Measured") == ["10", "9", "0.001", "−2", "–"]
    assert page.run("document.querySelector('#claims th:nth-child(5)').getAttribute('aria-sort')") == "descending"
    press(page, head("Claim"))
    assert column(page, "Claim")[0] == "a < b </script> & more"
    assert page.run("document.querySelectorAll('#claims [aria-sort]').length") == 1


def test_the_keyboard_sorts_too(page):
    page.run(f"document.querySelector('{head('Measured')}').focus()")
    page.key("Enter")
    assert column(page, "Measured")[0] == "−2"


def test_a_summary_table_sorts_by_number(page):
    press(page, "#first .data th:nth-child(2) button")
    cells = "[...document.querySelectorAll('#first .data td:nth-child(2)')].map(cell => cell.textContent)"
    assert page.run(cells) == ["4", "30", "200"]


def test_claims_are_filtered_by_text_verdict_and_paper_and_all_come_back(page):
    def type_in(name, value, event):
        page.run(f"{name}.value = {json.dumps(value)}; {name}.dispatchEvent(new Event('{event}'))")
        return len(column(page, "Paper")), page.run("told.textContent")

    assert type_in("words", "MORE script", "input") == (1, "1 of 5 claims")
    assert type_in("words", "nowhere", "input") == (0, "No claim matches.")
    type_in("words", "", "input")
    assert type_in("paper", "second", "change") == (3, "3 of 5 claims")
    press(page, 'button[data-verdict="inconclusive"]')
    assert column(page, "Paper") == ["second", "second"]
    press(page, 'button[data-verdict="reproduced"]')
    assert len(column(page, "Paper")) == 3
    press(page, "#filter button[type=reset]")
    page.run("new Promise(done => setTimeout(done, 20))")
    assert column(page, "Paper") == ["first"] * 2 + ["second"] * 3


def place(page, x, y):
    """Where the first figure shows the point of its left panel that is nearest to data x, y, in pixels."""
    return page.run(f"""(() => {{
      const svg = document.querySelector('#first .frame svg');
      svg.scrollIntoView({{block: 'center', behavior: 'instant'}});
      const series = JSON.parse(document.querySelector('#first .frame script').textContent).axes[0].series[0];
      const [left, top] = series.points.find(point => point[2] === {x} && point[3] === {y});
      const at = new DOMPoint(left, top).matrixTransform(svg.getScreenCTM());
      return [at.x, at.y];
    }})()""")


def readout(page):
    return page.run("(r => r.hidden ? null : r.innerText)(document.querySelector('#first .readout'))")


def view(page):
    return page.run("document.querySelector('#first .frame svg').getAttribute('viewBox').split(' ').map(Number)")


def test_the_mouse_over_a_point_tells_its_series_and_its_data(page):
    x, y = place(page, 2, 20)
    page.mouse("mouseMoved", x + 3, y - 4)
    assert readout(page).split() == ["sized", "8", "tokens", "2", "loss", "20"]
    assert page.run("document.querySelectorAll('#first .ring').length") == 1
    page.mouse("mouseMoved", x - 90, y)
    assert readout(page) is None


def test_the_readout_stands_beside_its_point_and_inside_the_figure(page):
    for data in ((1, 10), (2, 20), (3, 40)):
        x, y = place(page, *data)
        page.mouse("mouseMoved", x, y)
        inside, *gaps = page.run(f"""(() => {{
          const frame = document.querySelector('#first .frame').getBoundingClientRect();
          const box = document.querySelector('#first .readout').getBoundingClientRect();
          const fits = box.left >= frame.left && box.right <= frame.right && box.top >= frame.top;
          return [fits && box.bottom <= frame.bottom, Math.max(box.left - {x}, {x} - box.right),
                  Math.max(box.top - {y}, {y} - box.bottom)];
        }})()""")
        assert inside
        assert 0 < max(gaps) < 25


def test_the_mouse_tells_the_same_after_zooming(page):
    page.run("document.querySelector('#first .tools button').click()")
    x, y = place(page, 2, 20)
    page.mouse("mouseMoved", x, y)
    assert readout(page).split()[-1] == "20"


def test_the_arrow_keys_go_from_point_to_point(page):
    page.run("document.querySelector('#first .frame svg').focus()")
    told = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.key(key)
        told.append(readout(page).split()[-1])
    assert told[:4] == ["10", "20", "40", "40"]
    assert "squares" in readout(page)
    page.key("Escape")
    assert readout(page) is None


def test_buttons_and_keys_zoom_and_reset(page):
    home = view(page)
    press(page, "#first .tools button")
    assert view(page)[2] == pytest.approx(home[2] / 1.5, rel=1e-3)
    page.run("document.querySelector('#first .frame svg').focus()")
    page.key("+")
    assert view(page)[2] == pytest.approx(home[2] / 2.25, rel=1e-3)
    page.key("0")
    assert view(page) == home
    press(page, "#first .tools button:last-child")  # the right panel
    assert view(page)[0] > 0.3 * home[2]


def test_a_wheel_zooms_about_the_mouse_once_the_figure_was_clicked_and_a_drag_moves_it(page):
    home = view(page)
    x, y = place(page, 2, 20)
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-1)
    assert view(page) == home
    page.run("document.querySelector('#first .frame svg').focus()")
    x, y = place(page, 2, 20)
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-200)
    zoomed = view(page)
    assert zoomed[2] < 0.9 * home[2]
    assert place(page, 2, 20) == pytest.approx([x, y], abs=1.5)  # of whole pixels
    page.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    page.mouse("mouseMoved", x - 40, y - 10, button="left", buttons=1)
    page.mouse("mouseReleased", x - 40, y - 10, button="left", clickCount=1)
    assert place(page, 2, 20) == pytest.approx([x - 40, y - 10], abs=1.5)
    assert view(page)[2] == zoomed[2]


def test_the_command_is_copied(page):
    x, y = page.run("""(() => {
      const button = document.querySelector('#second .copy');
      button.scrollIntoView({block: 'center', behavior: 'instant'});
      const box = button.getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    })()""")
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.click(x, y)
    said = "new Promise(done => setTimeout(() => done(document.querySelector('#second .copy').textContent), 200))"
    assert page.run(said) == "Copied"
    assert page.run("navigator.clipboard.readText()") == "jaxgpt reproduce second"


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_never_scrolls_sideways(chromium, written, width, dark):
    chromium.open(written, width=width, height=844, dark=dark, touch=width < 500)
    chromium.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert chromium.run("document.documentElement.scrollWidth") <= width
    box = (
        "(e => [e.scrollWidth > e.clientWidth, getComputedStyle(e).overflowX])(document.querySelector('.scroll.long'))"
    )
    assert chromium.run(box) == [True, "auto"]  # the wide table scrolls inside its own box
    assert chromium.said == []


def test_on_a_narrow_screen_claims_are_cards_that_sort(chromium, written):
    chromium.open(written, width=390, height=844, touch=True)
    assert chromium.run("getComputedStyle(document.querySelector('#claims thead')).display") == "none"
    chromium.run("""(() => {
      const select = document.querySelector('.sort-by select');
      select.value = [...select.options].find(option => option.text === 'Measured').value;
      select.dispatchEvent(new Event('change'));
    })()""")
    assert column(chromium, "Measured") == ["−2", "0.001", "9", "10", "–"]


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_has_enough_contrast(chromium, written, dark):
    """Ratios of luminance as WCAG 2.2 defines them, at least 4.5 (success criterion 1.4.3, AA)."""
    chromium.open(written, dark=dark)
    worst = chromium.run("""(() => {
      const light = ([r, g, b]) => [r, g, b].reduce((sum, value, i) => {
        const c = value / 255;
        return sum + [0.2126, 0.7152, 0.0722][i] * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
      }, 0);
      const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
      const ground = element => {
        for (let e = element; e; e = e.parentElement) {
          const colour = numbers(getComputedStyle(e).backgroundColor);
          if (colour.length === 3 || colour[3] > 0) return colour;
        }
      };
      const says = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
      const shown = [...document.querySelectorAll('main :not(svg, svg *)')].filter(e => e.checkVisibility() && says(e));
      const ratios = shown.map(e => {
        const [a, b] = [numbers(getComputedStyle(e).color), ground(e)].map(light);
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)];
      });
      return [ratios.length, ...ratios.sort((a, b) => a[0] - b[0])[0]];
    })()""")
    assert worst[0] > 100
    assert worst[1] >= 4.5, worst
