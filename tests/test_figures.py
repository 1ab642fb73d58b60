"""Pictures: zero is mid-grey, sizes agree, borders are padded, drawings show branches."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from conelens.diagram import DiagramNode, draw_image, draw_svg
from conelens.errors import ArgumentError
from conelens.figures import (
    UnitPanel,
    cut,
    data_uri,
    enlarge,
    feature_maps,
    grid,
    montage,
    save_png,
    signed,
    unit_panel,
)

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("scale", ["tile", "percentile", "shared"])
def test_zero_is_mid_grey_whatever_the_range(scale: str) -> None:
    x = RNG.normal(size=(4, 3, 9, 9)) * np.array([1.0, 1e-6, 1e6, 3.0])[:, None, None, None] + 0.0
    x[:, :, 4, 4] = 0.0
    x[0] = np.abs(x[0])  # a min-max stretch would turn its zero black
    x[0, :, 4, 4] = 0.0
    assert (signed(x, scale)[:, :, 4, 4] == 128).all()


def test_sign_and_symmetry() -> None:
    x = np.array([[[[-2.0, -1.0, 0.0, 1.0, 2.0]]]])
    assert signed(x).ravel().tolist() == [0, 64, 128, 192, 255]
    assert signed(x, limit=4.0).ravel().tolist() == [64, 96, 128, 160, 192]


def test_scales_differ_as_described() -> None:
    x = np.zeros((2, 1, 10, 10))
    x[0, 0, 0, 0], x[1, 0, 0, 0] = 1.0, 10.0
    assert signed(x, "tile")[:, 0, 0, 0].tolist() == [255, 255]
    assert signed(x, "shared")[:, 0, 0, 0].tolist() == [141, 255]
    x[1, 0] = 1.0
    x[1, 0, 0, 0] = 100.0
    assert signed(x, "tile")[1, 0, 5, 5] == 129
    assert signed(x, "percentile", percentile=95.0)[1, 0, 5, 5] == 255


def test_a_tile_of_zeros_and_bad_numbers() -> None:
    assert (signed(np.zeros((1, 3, 4, 4))) == 128).all()
    odd = signed(np.array([[[[np.nan, np.inf, -np.inf, 1.0]]]])).ravel().tolist()
    assert odd == [128, 255, 0, 255]
    with pytest.raises(ArgumentError, match="scale"):
        signed(np.zeros((1, 3, 4, 4)), "minmax")
    with pytest.raises(ArgumentError, match="limit"):
        signed(np.zeros((1, 3, 4, 4)), limit=0.0)


def test_a_box_over_the_border_is_padded_with_grey() -> None:
    image = RNG.integers(0, 100, (6, 8, 3), dtype=np.uint8)
    patch = cut(image, (-2, 5, 3, 10))
    assert patch.shape == (5, 5, 3)
    assert np.array_equal(patch[2:, :3], image[0:3, 5:8])
    assert (patch[:2] == 128).all()
    assert (patch[:, 3:] == 128).all()
    assert (cut(image, (20, 20, 24, 24)) == 128).all()
    larger = cut(image, (1, 1, 3, 3), (4, 4))
    assert np.array_equal(larger[:2, :2], image[1:3, 1:3])
    assert (larger[2:] == 128).all()


def test_small_tiles_keep_their_pixels_and_all_have_one_size() -> None:
    tile = RNG.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    large = np.asarray(enlarge(tile, 30))
    assert np.array_equal(large[5::10, 5::10], tile)
    assert enlarge(np.zeros((10, 40, 3), np.uint8), 50).size == (50, 50)


def test_a_panel_holds_patches_left_and_projections_right() -> None:
    red, green = np.zeros((9, 9, 3), np.uint8), np.zeros((1, 3, 9, 9))
    red[..., 0] = 200
    green[:, 1] = 1.0
    picture = np.asarray(unit_panel(UnitPanel("t", [red], green), side=20))
    half = picture.shape[1] // 2
    left = (picture[:, :half] == (200, 0, 0)).all(-1).sum()
    right = (picture[:, half:] == (128, 255, 128)).all(-1).sum()
    assert left == right == 400
    assert not (picture[:, half:] == (200, 0, 0)).all(-1).any()


def test_a_dead_panel_and_a_full_one_have_one_size() -> None:
    dead = UnitPanel("dead", [], np.zeros((0, 3, 1, 1)))
    full = UnitPanel("full", [np.zeros((5, 5, 3), np.uint8)] * 9, np.ones((9, 3, 5, 5)))
    assert unit_panel(dead).size == unit_panel(full).size
    both = montage([dead, full], side=32, across=2)
    assert both.width == 2 * unit_panel(full, 32).width
    with pytest.raises(ArgumentError):
        montage([])


def test_grids_and_maps() -> None:
    maps = RNG.normal(size=(5, 7, 7))
    picture = feature_maps(maps, columns=3, side=14, labels=[str(i) for i in range(5)])
    assert picture.width == 3 * 16 - 2
    plain = grid([np.full((4, 4), 7, np.uint8)], columns=1, side=8)
    assert np.asarray(plain)[4, 4].tolist() == [7, 7, 7]


def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    one, two = save_png(image, tmp_path / "new" / "a.png"), save_png(image, tmp_path / "b.png")
    assert one.read_bytes() == two.read_bytes()
    assert np.array_equal(np.asarray(Image.open(one)), np.asarray(image))


def test_a_data_uri_holds_the_picture() -> None:
    image = Image.fromarray(RNG.integers(0, 256, (8, 16, 3), dtype=np.uint8))
    for address, form, exact in ((data_uri(image), "PNG", True), (data_uri(image, "JPEG", quality=5), "JPEG", False)):
        with urlopen(address) as response:
            content = response.read()
        held = Image.open(BytesIO(content))
        assert address.startswith(f"data:image/{form.lower()};base64,") and held.format == form
        assert held.size == image.size and (np.asarray(held) == np.asarray(image)).all() == exact
    assert len(data_uri(image, "JPEG", quality=95)) > len(address)


NODES = [
    DiagramNode("input", "input", (3, 8, 8), (1, 1), ()),
    DiagramNode("a<&>", "conv", (4, 8, 8), (3, 3), (0,)),
    DiagramNode("a.relu", "relu", (4, 8, 8), (3, 3), (1,)),
    DiagramNode("left", "conv", (4, 8, 8), (3, 3), (2,)),
    DiagramNode("right", "conv", (4, 8, 8), (5, 5), (2,)),
    DiagramNode("join", "concat", (8, 8, 8), (5, 5), (3, 4)),
    DiagramNode("sum", "add", (8, 8, 8), (5, 5), (5, 2)),
]


def test_the_drawing_has_a_box_per_layer_and_shows_branches() -> None:
    root = ET.fromstring(draw_svg(NODES, "net <1>"))
    space = "{http://www.w3.org/2000/svg}"
    boxes = root.findall(f"{space}rect")[1:]
    texts = [t.text or "" for t in root.findall(f"{space}text")]
    edges = root.findall(f"{space}path")
    assert len(boxes) == 6  # the ReLU stands in the box of its convolution
    assert "a<&>" in texts
    assert any(t.startswith("conv + relu") for t in texts)
    assert len(edges) == 7
    places = {texts[2 * i]: (float(b.get("x", "")), float(b.get("y", ""))) for i, b in enumerate(boxes)}
    assert places["left"][1] == places["right"][1]
    assert abs(places["left"][0] - places["right"][0]) >= 196
    assert places["join"][1] > places["left"][1] > places["a<&>"][1]


def test_the_picture_of_the_drawing_has_its_size() -> None:
    root = ET.fromstring(draw_svg(NODES, "net"))
    picture = draw_image(NODES)
    assert picture.size == (int(root.get("width", "")), int(root.get("height", "")))
    assert len(picture.getcolors(1 << 16) or []) > 5
