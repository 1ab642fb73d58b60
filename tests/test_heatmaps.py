"""Colour maps keep order, overlays colour what is lost, the figure shows every panel where it belongs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from conelens.data import Preprocess
from conelens.errors import ArgumentError
from conelens.heatmaps import LABEL_COLOURS, Heat, Labels, OcclusionRow, label_colours, occlusion_figure, overlay, tell, viridis
from conelens.occlusion import Sweep, ZeilerFergus, make_windows
from conelens.report.occlusion import drop_overlay, figure_row, label_panel, occlusion_page, summary

RECIPE = Preprocess((12, 12))
NAMES = ("ant", "bee", "cat", "dog", "emu", "fox", "gnu", "hen", "ibis")


def test_lightness_rises_with_the_value_and_limits_hold() -> None:
    colours = viridis(np.linspace(2.0, 5.0, 200), 2.0, 5.0).astype(int)
    luminance = colours @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > -0.5).all()  # rounding to whole levels
    assert luminance[-1] - luminance[0] > 150
    assert viridis(np.array([2.0, 5.0, -9.0, 99.0]), 2.0, 5.0).tolist() == [
        [68, 1, 84], [253, 231, 37], [68, 1, 84], [253, 231, 37],
    ]  # fmt: skip
    unknown = viridis(np.array([np.nan]), 0.0, 1.0)[0]
    assert unknown.min() > 200
    with pytest.raises(ArgumentError, match="low < high"):
        viridis(np.zeros(3), 1.0, 1.0)


def test_labels_take_colours_in_their_order_and_the_rest_is_grey() -> None:
    labels = np.array([[7, 3], [9, 3]])
    painted = label_colours(labels, [3, 7])
    assert painted[0, 1].tolist() == painted[1, 1].tolist() == list(LABEL_COLOURS[0])
    assert painted[0, 0].tolist() == list(LABEL_COLOURS[1])
    assert len(set(painted[1, 0].tolist())) == 1
    assert len(set(LABEL_COLOURS)) == len(LABEL_COLOURS)


def test_an_overlay_is_red_where_much_is_lost_blue_where_gained_and_plain_elsewhere() -> None:
    drop = np.zeros((40, 40))
    drop[:20, :20], drop[20:, 20:], drop[:20, 20:] = 0.8, -0.4, 0.1
    picture = np.asarray(overlay(np.full((40, 40, 3), 90, np.uint8), drop, "title", percent=True, side=40)).astype(int)
    left, top = 8, 28
    loss, gain, little, plain = (picture[top + y, left + x] for y, x in ((8, 8), (32, 32), (8, 32), (32, 8)))
    assert loss[0] > loss[2] + 120
    assert gain[2] > gain[0] + 30
    assert 0 < little[0] - little[2] < loss[0] - loss[2]
    assert plain[0] == plain[1] == plain[2]
    untouched = np.asarray(overlay(np.full((40, 40, 3), 90, np.uint8), np.zeros((40, 40)), side=40))
    assert (untouched[top : top + 40, left : left + 40] == plain).all()
    with pytest.raises(ArgumentError, match="one size"):
        overlay(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 8)))


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (0.5, True, "50%"),
        (0.004, True, "<1%"),
        (0.0, True, "0%"),
        (1234.5, False, "1234"),
        (0.0432, False, "0.043"),
        (math.nan, True, "not a number"),
        (math.nan, False, "not a number"),
    ],
)
def test_values_are_told_in_few_figures(value: float, percent: bool, text: str) -> None:
    assert tell(value, percent) == text


def row(classes: bool = True, projections: int = 9) -> OcclusionRow:
    """A row of flat panels."""
    values = np.full((12, 12), 0.9)
    values[:6] = 0.1
    return OcclusionRow(
        np.full((12, 12, 3), (10, 200, 30), np.uint8), (0, 0, 6, 6), ["name"], Heat(values * 50, 5.0, 45.0, "map"),
        np.ones((projections, 3, 8, 8)), [np.full((8, 8, 3), (200, 0, 0), np.uint8)] * projections,
        Heat(values, 0.1, 0.9, "class", percent=True) if classes else None,
        Labels((values > 0.5).astype(int), [(1, "one"), (0, "none")]) if classes else None,
    )  # fmt: skip


def test_the_figure_has_a_row_per_image_and_six_columns_or_four() -> None:
    one, two = occlusion_figure([row()], 60), occlusion_figure([row(), row()], 60)
    assert two.width == one.width
    assert two.height - one.height == 60 + 112
    assert occlusion_figure([row(classes=False)], 60).width == one.width - 2 * 74
    with pytest.raises(ArgumentError, match="rows"):
        occlusion_figure([])


def test_each_panel_stands_in_its_place() -> None:
    picture = np.asarray(occlusion_figure([row()], 60))
    lefts = [10 + 74 * k for k in range(6)]

    def at(column: int, y: int, x: int) -> list[int]:
        return picture[24 + y, lefts[column] + x].tolist()

    assert at(0, 50, 50) == [10, 200, 30]
    assert at(0, 0, 15) == [255, 64, 32], "the window is outlined"
    for heat in (1, 4):
        assert at(heat, 50, 45) == viridis(np.array([1.0]), 0, 1)[0].tolist()
        assert at(heat, 15, 45) == viridis(np.array([0.1 / 0.9]), 0, 1)[0].tolist()
        assert at(heat, 0, 15) == [255, 255, 255]
    assert at(2, 30, 30) == [255, 255, 255]
    assert at(3, 30, 30) == [200, 0, 0]
    assert at(3, -1, 10) == at(2, -1, 10) == [0, 0, 0], "the first tile is framed"
    assert at(3, 61, 50) != [0, 0, 0]
    assert at(5, 50, 45) == list(LABEL_COLOURS[0])
    assert at(5, 15, 45) == list(LABEL_COLOURS[1])
    assert at(5, 60 + 6 + 7, 5) == list(LABEL_COLOURS[0]), "the legend"


def panels(labels: torch.Tensor, label: int | None = 1) -> ZeilerFergus:
    """Panels of a 3 x 3 sweep of one image of 12 x 12 pixels with these labels."""
    windows = make_windows((12, 12), 6, 3)
    done = torch.ones(1, 3, 3, dtype=torch.bool)
    about = {"window": [6, 6], "stride": [3, 3], "border": "flush"}
    sweep = Sweep(torch.zeros(1, 3, 3, 9), torch.zeros(1, 9), windows, "logits", done, {}, about)
    values = torch.linspace(0.2, 0.9, 9).reshape(3, 3)
    values[1, 2] = 0.05
    image = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    classes = {} if label is None else {
        "label": label, "probability": values, "clean_probability": 0.95, "labels": labels
    }  # fmt: skip
    return ZeilerFergus(
        image, sweep, image, (1, 2), "conv9", 4, 100 * values, 90.0, torch.ones(1, 3, 12, 12), image[None], [], **classes
    )


def test_the_legend_begins_with_the_class_and_counts_what_has_no_colour() -> None:
    many = label_panel(panels(torch.tensor([[8, 2, 1], [3, 2, 4], [5, 6, 7]])), NAMES)
    assert [label for label, _ in many.legend] == [1, 2, 3, 4, 5, 6]
    assert many.legend[0] == (1, "bee 11%")
    assert many.legend[1] == (2, "cat 22%")
    assert many.rest == "2 more 22%"
    few = label_panel(panels(torch.full((3, 3), 2)))
    assert few.legend == [(2, "class 2 100%")]
    assert few.rest == ""


def test_the_summary_tells_class_drop_place_and_other_labels() -> None:
    (line,) = summary(["a.jpg"], [panels(torch.tensor([[1, 1, 1], [3, 3, 2], [5, 6, 1]]))], NAMES).rows
    assert line == ("a.jpg", "bee", "95%", "5% at 3,6", "dog, cat, fox and 1 more")
    (line,) = summary(["a.jpg"], [panels(torch.ones(3, 3, dtype=torch.int64))], NAMES).rows
    assert line[-1] == "none"
    (line,) = summary(["a.jpg"], [panels(torch.ones(3, 3), None)], NAMES).rows
    assert line == ("a.jpg", "conv9 4", "90", "5 at 3,6")


def test_a_row_is_cut_to_where_the_projections_are() -> None:
    whole = panels(torch.ones(3, 3, dtype=torch.int64))
    crops = torch.zeros(2, 3, 60, 60)
    crops[:, :, 20:40, 25:30] = 1.0
    patches = torch.zeros(2, 3, 60, 60)
    patches[:, 0, 20:40, 25:30] = 1.0
    near = figure_row("n", ZeilerFergus(**{**vars(whole), "projections": crops, "patches": patches, "others": [3]}), RECIPE)
    assert near.projections.shape[2:] == near.patches[0].shape[:2]
    assert near.projections.shape[2] < 30
    assert (near.projections**2).sum() >= 0.98 * float((crops**2).sum())
    assert np.array_equal(near.projections[0, 0] > 0, near.patches[0][..., 0] > 0)


def test_the_page_has_a_section_with_both_pictures_per_image() -> None:
    same = panels(torch.tensor([[1, 1, 1], [3, 3, 2], [5, 6, 1]]))
    page = occlusion_page("t", ["a", "a"], [same, same], RECIPE, NAMES)
    assert "6 x 6 pixels, every 3 pixels" in page.intro
    assert "9 places" in page.intro
    names = [figure.name for section in page.sections for figure in section.figures]
    assert names == ["occlusion_000_a", "overlay_000_a", "occlusion_001_a", "overlay_001_a"]
    assert all(isinstance(figure.image, Image.Image) for section in page.sections for figure in section.figures)


def test_the_page_of_a_grid_of_ones_own_tells_the_largest_window() -> None:
    own = panels(torch.ones(3, 3, dtype=torch.int64))
    own.sweep.about["stride"] = None
    page = occlusion_page("t", ["a"], [own], RECIPE, NAMES)
    assert "Windows of 6 x 6 pixels at most: 9 places" in page.intro


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_is_no_number_is_said_and_grey(everywhere: bool, recwarn: pytest.WarningsRecorder) -> None:
    labels = torch.tensor([[1, 1, 1], [2, 1, 1], [1, 1, -1]])
    some = panels(torch.full((3, 3), -1) if everywhere else labels)
    assert some.probability is not None
    some.probability[2, 2] = some.activity[2, 2] = math.nan
    if everywhere:
        some = replace(some, probability=some.probability * math.nan, clean_probability=math.nan, activity=some.activity / 0)
    (line,) = summary(["a.jpg"], [some], NAMES).rows
    assert line == ("a.jpg", "bee", "not a number" if everywhere else "95%", "not a number at 3,6", line[-1])
    assert "not a number" in line[-1]
    assert -1 not in [label for label, _ in label_panel(some, NAMES).legend]
    assert label_panel(some, NAMES).rest == f"not a number {'100%' if everywhere else '11%'}"
    picture = some.smooth(some.probability)
    assert picture[11, 11].isnan()
    assert bool(picture[0, 0].isnan()) == everywhere, "what is not next to it stays"
    occlusion_figure([figure_row("a", some, RECIPE, NAMES)])
    over = np.asarray(drop_overlay("a", some, RECIPE, NAMES))
    assert over[28 + 440, 8 + 440].tolist() == [226, 228, 232]
    assert (over[28 + 8, 8 + 8].tolist() == [226, 228, 232]) == everywhere
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
