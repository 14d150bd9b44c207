"""A figure in a page: its ids are its own, nothing in it runs or loads, and it says what is wrong with it."""

import re

import pytest
from matplotlib.figure import Figure

from analysis.plots import save
from analysis.svg import SvgError, drawing, picture

OPEN = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 10 20">'


def svg(inside):
    return f"{OPEN}{inside}</svg>"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    figure = Figure(figsize=(5, 3))
    figure.subplots().plot([1, 2, 3], [1, 3, 2], "o-", label="a")
    return save(figure, tmp_path_factory.mktemp("figures") / "figure")


def test_ids_of_two_figures_do_not_collide_and_every_reference_finds_its_own(files):
    text = files[1].read_text()
    ids = [set(re.findall(r' id="([^"]+)"', drawing(text, prefix).markup)) for prefix in ("f1-", "f2-")]
    assert len(ids[0]) > 10
    assert not ids[0] & ids[1]
    markup = drawing(text, "f1-").markup
    used = re.findall(r'href="#([^"]+)"', markup) + re.findall(r"url\(#([^)]+)\)", markup)
    assert used
    assert set(used) <= ids[0]


def test_a_figure_of_matplotlib_gets_smaller_and_keeps_its_size_and_points(files):
    text = files[1].read_text()
    drawn = drawing(text, "f-")
    assert len(drawn.markup) < 0.7 * len(text)
    assert (drawn.width, drawn.height) == (360, 216)
    assert drawn.points["axes"][0]["series"][0]["name"] == "a"


@pytest.mark.parametrize(
    "inside",
    [
        "<script>alert(1)</script>",
        "<style>*{color:red}</style>",
        "<foreignObject><b>x</b></foreignObject>",
        '<a href="x"><path d="M0 0"/></a>',
        "<!-- words -->",
        "<g><metadata>words</metadata></g>",
    ],
)
def test_what_is_not_drawn_is_dropped(inside):
    assert drawing(svg(inside), "f-").markup == ""


@pytest.mark.parametrize(
    ("attribute", "kept"),
    [
        ('onclick="alert(1)"', ""),
        ('ONCLICK="alert(1)"', ""),
        ('HREF="https://example.org/x.svg#a"', ""),
        ('style="fill: URL(https://example.org/#x)"', ""),
        ('style="fill: u\\72l(https://example.org/#x)"', ""),
        ('xlink:href="https://example.org/x.png"', ""),
        ('href="javascript:alert(1)"', ""),
        ('style="fill: url(https://example.org/#x)"', ""),
        ('xlink:href="#m1"', ' href="#f-m1"'),
        ('clip-path="url(#p1)"', ' clip-path="url(#f-p1)"'),
        ('xlink:href="data:image/png;base64,AAAA"', ' href="data:image/png;base64,AAAA"'),
        ('fill="&quot;&gt;&lt;b&gt;"', ' fill="&quot;&gt;&lt;b&gt;"'),
    ],
)
def test_attributes_that_run_or_load_are_dropped_and_references_renamed(attribute, kept):
    assert drawing(svg(f"<use {attribute}/>"), "f-").markup == f"<use{kept}/>"


def test_coordinates_are_rounded_and_scales_are_not():
    inside = '<path d="M 0.123456 1&#10;L -2.9999 3.10000" transform="scale(0.015625)"/>'
    assert drawing(svg(inside), "f-").markup == '<path d="M0.12 1L-3 3.1" transform="scale(0.015625)"/>'


def test_text_stays_text():
    assert drawing(svg("<text>a &lt; b</text>"), "f-").markup == "<text>a &lt; b</text>"


@pytest.mark.parametrize("text", ["", "not an svg", "<svg", "<html/>", '<svg viewBox="0 0 0 1"/>', "<svg/>"])
def test_what_is_no_svg_is_refused_in_one_line(text):
    with pytest.raises(SvgError) as said:
        drawing(text, "f-")
    assert "\n" not in str(said.value)


def test_a_png_stands_in_with_the_size_and_points_of_the_drawing(files):
    data, like = files[0].read_bytes(), drawing(files[1].read_text(), "f-")
    assert (picture(data).width, picture(data).height) == (1000, 600)
    assert (picture(data, like).width, picture(data, like).points) == (360, like.points)
    with pytest.raises(SvgError, match="not a PNG"):
        picture(b"GIF89a")
