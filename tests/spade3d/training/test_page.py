"""The page: nothing that comes from a name becomes markup, and a picture is the pixels it was made from."""

import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from spade3d.training.charts import Estimate, Series, interval_chart, line_chart, summarise, ticks
from spade3d.training.page import Column, Html, Section, callout, facts, number, page, table, tag, write_page
from spade3d.training.slices import display_shape, enlarge, enlarge_labels, fullest, outline, overlaid, png, slice_of

ATTACK = "<img src=x onerror=alert(1)>\"'&</style><script>"


class Elements(HTMLParser):
    """The names of all elements of a page; a closing tag that closes nothing is an error."""

    def __init__(self, html: str):
        super().__init__()
        self.names, self.open, self.words = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        if name not in {"meta", "img"}:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)


def test_every_string_is_text_wherever_it_enters():
    sections = [
        Section(ATTACK, (callout("warning", ATTACK), facts({ATTACK: ATTACK})), lead=ATTACK),
        Section("Table", (table([Column(ATTACK)], [(ATTACK,)], ATTACK), tag("p", ATTACK, title=ATTACK))),
        Section("Charts", (line_chart([Series(ATTACK, np.arange(3), np.arange(3))], ATTACK),)),
        Section("Intervals", (interval_chart([Estimate(ATTACK, (0.1,), 0.1, 0.0, 0.2)], ATTACK, axis=ATTACK),)),
    ]
    html = page(ATTACK, ATTACK, (tag("p", ATTACK),), sections, footer=ATTACK)
    seen = Elements(html)
    assert not {"img", "script"} & set(seen.names)
    assert seen.names.count("style") == 1
    assert "".join(seen.words).count(ATTACK) >= 12
    assert "<img src=x" not in html


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_comes_back_from_markup(text):
    words = Elements(tag("p", text, title=text)).words
    # A parser reads a carriage return as a line feed; everything else comes back as it was.
    assert "".join(words).replace("\r\n", "\n").replace("\r", "\n") == text.replace("\r\n", "\n").replace("\r", "\n")


def test_the_page_asks_for_nothing_from_outside():
    html = page("Kind", "Title", (), [Section("One", (tag("p", "text"),))])
    assert "default-src &#x27;none&#x27;; style-src &#x27;unsafe-inline&#x27;; img-src data:" in html
    assert not re.search(r"https?:|<script|@import|url\(", html)
    assert 'href="#one"' in html and 'id="one"' in html


def test_a_page_is_written_whole_even_with_a_name_that_is_not_unicode(tmp_path):
    broken = b"scan\xff.nii".decode("utf-8", "surrogateescape")
    path = write_page(tmp_path / "report.html", page("Kind", broken, (), []))
    assert "scan\\udcff.nii" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "value, digits, written",
    [
        (0.87349, 3, "0.873"),
        (-0.0123, 3, "−0.012"),
        (-0.0001, 3, "0.000"),
        (math.nan, 3, "–"),
        (None, None, "–"),
        (np.float32(2.5), 1, "2.5"),
        (12345, None, "12\u202f345"),
        (3e-4, None, "0.0003"),
        (2.5e-7, None, "2.5 · 10⁻⁷"),
        (1e12, None, "1 · 10¹²"),
        (True, None, "True"),
        ("axial", None, "axial"),
    ],
)
def test_numbers_are_written_as_people_read_them(value, digits, written):
    assert number(value, digits) == written


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_span_what_they_measure(low, size, about):
    high = low + size
    found = ticks(low, high, about)
    step = found[1] - found[0]
    slack = 1e-6 * step + 1e-9 * max(abs(low), abs(high))
    assert found[0] <= low + slack and found[-1] >= high - slack
    assert 2 <= len(found) <= 2 * about + 3


def test_a_flat_line_and_a_single_point_can_be_drawn():
    for x, y in (([1, 2, 3], [0.5, 0.5, 0.5]), ([7], [1.0]), ([1, 2], [0.0, 0.0])):
        Elements(line_chart([Series("loss", np.array(x), np.array(y))], "Loss"))
    assert "Nothing was logged" in line_chart([Series("loss", np.array([]), np.array([]))], "Loss")
    assert "Nothing was logged" in line_chart([Series("loss", np.arange(3), np.full(3, np.nan))], "Loss")


def test_a_long_series_keeps_its_extremes_and_its_gaps():
    y = np.zeros(1000)
    y[500], y[800:900] = 9.0, np.nan
    x, mean, low, high = summarise(Series("loss", np.arange(1000), y), 100)
    assert len(x) == 100
    assert high[50] == 9.0 and low[50] == 0.0 and mean[50] == pytest.approx(0.9)
    assert np.isnan(mean[80:90]).all() and np.isfinite(mean[90:]).all()
    drawn = line_chart([Series("loss", np.arange(1000), y)], "Loss")
    assert drawn.count("<polyline") == 2  # one before the gap, one after


def test_a_difference_that_is_not_shown_is_drawn_unclear():
    shown = Estimate("shown", (0.1, 0.2), 0.15, 0.1, 0.2)
    unclear = Estimate("unclear", (-0.1, 0.2), 0.05, -0.1, 0.2, shown=False)
    without = Estimate("one subject", (0.1,), 0.1, math.nan, math.nan, shown=False)
    drawn = interval_chart([shown, unclear, without], "Difference", sides=("a better", "b better"))
    assert drawn.count('class="unclear"') == 2 and drawn.count('class="interval"') == 2
    assert "NaN" not in drawn and "nan" not in drawn


def test_a_png_holds_the_very_pixels():
    rgb = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    read = imread(io.BytesIO(png(rgb)), format="png")
    assert np.array_equal(np.rint(read * 255).astype(np.uint8), rgb)


def test_slices_show_the_patient_from_the_feet_and_upright():
    where = np.stack(np.meshgrid(range(3), range(4), range(5), indexing="ij"), axis=-1)
    right, front, top = (where[..., axis] for axis in range(3))
    for axis, left, above in ((2, right, front), (1, right, top), (0, front, top)):
        across, upward = slice_of(left, axis, 1), slice_of(above, axis, 1)
        assert (np.diff(across, axis=1) == -1).all() and (np.diff(across, axis=0) == 0).all()
        assert (np.diff(upward, axis=0) == -1).all() and (np.diff(upward, axis=1) == 0).all()


def test_a_millimetre_is_as_long_down_as_across():
    assert display_shape((10, 100), (8.0, 1.0), pixels=200) == (160, 200)
    assert display_shape((1, 400), (0.1, 1.0), pixels=100) == (1, 100)


def test_enlarging_keeps_a_ramp_a_ramp_and_shrinking_keeps_the_mean():
    ramp = np.add.outer(np.arange(6.0), 2 * np.arange(8.0))
    large = enlarge(ramp, (60, 80))
    assert np.allclose(np.diff(large[5:55, 40]), 0.1)
    assert np.allclose(np.diff(large[30, 5:75]), 0.2)
    chess = np.indices((64, 64)).sum(axis=0) % 2
    assert np.allclose(enlarge(chess, (16, 16))[1:-1, 1:-1], 0.5, atol=0.05)


def test_enlarged_labels_are_the_voxels_and_their_outline_lies_inside():
    labels = np.zeros((4, 4), int)
    labels[1:3, 1:3] = 5
    large = enlarge_labels(labels, (40, 40))
    assert np.array_equal(large == 5, np.kron(labels == 5, np.ones((10, 10), bool)))
    edge = outline(large, width=2)
    inside = np.zeros((40, 40), bool)
    inside[10:30, 10:30] = True
    core = np.zeros((40, 40), bool)
    core[12:28, 12:28] = True
    assert np.array_equal(edge, inside & ~core)
    painted = overlaid(np.zeros((40, 40)), large)
    assert painted[0, 0].tolist() == [0, 0, 0] and painted[10, 10].any()


def test_the_fullest_slice_and_the_middle_of_nothing():
    labels = np.zeros((5, 6, 7), int)
    assert fullest(labels, 2) == 3
    labels[1, 2:5, 4], labels[1:3, 2, 6] = 1, 2
    assert [fullest(labels, axis) for axis in range(3)] == [1, 2, 4]


def test_html_is_the_only_string_that_is_markup():
    assert tag("p", Html("<b>bold</b>"), "<b>") == "<p><b>bold</b>&lt;b&gt;</p>"
    assert (
        tag("td", 3, class_="right", data_n=None, aria_label="a&b") == '<td class="right" aria-label="a&amp;b">3</td>'
    )
