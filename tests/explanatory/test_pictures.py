"""Patches sit where the nodes are, ranks and heat maps are those of a computation by hand, wrong input is named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conelens.errors import ArgumentError
from conelens.explanatory.layer import Placement
from conelens.explanatory.pictures import (
    Node,
    heat_grey,
    heat_map,
    heat_overlay,
    heat_sheet,
    marked,
    patch_box,
    patch_sheet,
    rank_nodes,
    top_patches,
)
from tests.explanatory.scene import SIZE, Coordinates, place, small


def one(position: tuple[float, float]) -> dict[str, Placement]:
    """One node in one image."""
    return {"conv": Placement(torch.tensor(position).view(1, 1, 1, 2), torch.ones(1, 1, 1), torch.ones(1, 1, 1))}


# ------------------------------------------------------------------------------------------------------ patches
@pytest.mark.parametrize(("position", "side"), [((55.5, 63.5), 70), ((60.0, 41.0), 31), ((87.5, 39.5), 60), ((50.0, 50.0), 1)])
def test_a_patch_has_its_node_in_the_middle(position: tuple[float, float], side: int) -> None:
    (row,) = top_patches(Coordinates(1), one(position), [Node("conv", 0, 0)], side=side)
    assert row.patches.shape == (1, side, side, 3)
    assert row.patches[0, ..., 0].mean() == position[0]
    assert row.patches[0, ..., 1].mean() == position[1]
    assert (np.diff(row.patches[0, :, 0, 0].astype(int)) == 1).all()
    assert (np.diff(row.patches[0, 0, :, 1].astype(int)) == 1).all()


def test_the_middle_is_never_more_than_half_a_pixel_away() -> None:
    for y, x, side in np.random.default_rng(0).uniform((-20, -20, 1), (140, 140, 90), (500, 3)):
        top, left, bottom, right = patch_box((y, x), int(side))
        assert bottom - top == right - left == int(side)
        assert abs((top + bottom - 1) / 2 - y) <= 0.5
        assert abs((left + right - 1) / 2 - x) <= 0.5


def test_beyond_the_border_a_patch_is_grey_and_inside_it_stays_in_place() -> None:
    (row,) = top_patches(Coordinates(1), one((7.5, 110.5)), [Node("conv", 0, 0)], side=70)
    patch = row.patches[0]
    outside = (np.arange(70)[:, None] - 27 < 0) | (np.arange(70)[None] + 76 >= SIZE)
    assert (patch[outside] == 128).all()
    y, x = np.nonzero(~outside)
    assert (patch[y, x] == np.stack([y - 27, x + 76, 0 * y], -1)).all()


def test_patches_are_the_best_images_in_order_and_each_photograph_is_read_once() -> None:
    scores = np.zeros((6, 2, 1), np.float32)
    scores[:, 0, 0] = [1, 5, 0, 3, 5, 2]
    scores[:, 1, 0] = [0, 0, 0, 7, 0, 1]
    dataset = Coordinates(6)
    first, second = top_patches(dataset, {"conv": place(scores)}, [Node("conv", 0, 0), Node("conv", 1, 0)], count=4, side=8)
    assert first.images == [1, 4, 3, 5]
    assert first.scores == [5, 5, 3, 2]
    assert (first.seen, second.seen) == (5, 2)
    assert second.images == [3, 5]
    assert [int(np.median(patch[..., 2])) for patch in second.patches] == [3, 5]
    assert dataset.read == [1, 3, 4, 5]
    (some,) = top_patches(dataset, {"conv": place(scores)}, [Node("conv", 0, 0)], images=[5, 0, 2], side=8)
    assert some.images == [5, 0]
    (none,) = top_patches(dataset, {"conv": place(scores)}, [Node("conv", 1, 0)], images=[0, 2], side=8)
    assert none.images == [] and none.patches.shape == (0, 8, 8, 3)


def test_nodes_are_ranked_by_the_sum_of_their_best_scores() -> None:
    scores = torch.rand(80, 7, 3, generator=torch.Generator().manual_seed(1))
    scores[:, 2] = 0
    sums = np.sort(scores.double().numpy(), 0)[::-1][:50].sum(0)
    expected = sorted((-sums[d, k], d, k) for d in range(7) for k in range(3) if d != 2)
    ranked = rank_nodes({"conv": place(scores)}, "conv", 100)
    assert ranked == [Node("conv", d, k) for _, d, k in expected]
    assert rank_nodes({"conv": place(scores)}, "conv", 4) == ranked[:4]
    single = rank_nodes({"conv": place(scores)}, "conv", 100, per_filter=1)
    assert single == [node for i, node in enumerate(ranked) if node.filter not in {n.filter for n in ranked[:i]}]
    assert len(single) == 6
    equal = rank_nodes({"conv": place(torch.ones(3, 2, 2))}, "conv")
    assert [tuple(node[1:]) for node in equal] == [(0, 0), (0, 1), (1, 0), (1, 1)]


# -------------------------------------------------------------------------------------------------------- sheets
def test_a_sheet_shows_each_patch_in_its_cell_with_a_ring_at_the_node() -> None:
    scores = np.zeros((3, 2, 1), np.float32)
    scores[:, 0, 0], scores[1, 1, 0] = [3, 2, 1], 4
    nodes = [Node("conv", 0, 0), Node("conv", 1, 0)]
    rows = top_patches(Coordinates(3), {"conv": place(scores)}, nodes, side=28)
    sheet = np.asarray(patch_sheet(rows, side=56))
    for line, row in enumerate(rows):
        high = (sheet.shape[0] - 8) // 2
        for column, patch in enumerate(row.patches):
            y, x = 8 + line * high, 132 + column * 60
            assert (sheet[y : y + 56, x : x + 56] == np.asarray(marked(patch, 56))).all()
    ring = (np.asarray(marked(np.zeros((28, 28, 3), np.uint8), 56)) == (255, 224, 0)).all(-1)
    y, x = np.nonzero(ring)
    assert len(y) > 8
    assert y.mean() == pytest.approx(27.5) and x.mean() == pytest.approx(27.5)
    again = top_patches(Coordinates(3), {"conv": place(scores)}, nodes, side=28)
    assert patch_sheet(again, side=56).tobytes() == sheet.tobytes()
    with pytest.raises(ArgumentError, match="at least one node"):
        patch_sheet([])


# ----------------------------------------------------------------------------------------------------- heat maps
@pytest.mark.parametrize("share", [0.5, 0.3, 1.0])
def test_heat_is_the_sum_of_gaussians_of_the_strongest_nodes(share: float) -> None:
    generator = torch.Generator().manual_seed(2)
    placement = place(torch.rand(2, 5, 3, generator=generator), 3)
    sigma = torch.rand(5, 3, generator=generator) * 10 + 2
    heat = heat_map(placement, sigma, 1, (40, 55), share)
    scores = placement.scores[1].flatten().double().numpy()
    strongest = np.argsort(-scores)[: math.ceil(share * 15)]
    expected = np.zeros((40, 55))
    for v in strongest:
        (y, x), variance = placement.positions[1].flatten(0, 1)[v].tolist(), float(sigma.flatten()[v]) ** 2
        squares = (np.arange(40)[:, None] - y) ** 2 + (np.arange(55) - x) ** 2
        expected += scores[v] * np.exp(-squares / (2 * variance)) / (2 * np.pi * variance)
    assert heat == pytest.approx(expected, rel=1e-6)


def test_heat_keeps_the_scores_of_nodes_inside_the_image() -> None:
    placement = Placement(torch.tensor([[[[60.0, 50.0]], [[55.0, 70.0]]]]), torch.tensor([[[3.0], [0.5]]]), torch.ones(1, 2, 1))
    assert heat_map(placement, torch.full((2, 1), 5.0), 0, (SIZE, SIZE), 1.0).sum() == pytest.approx(3.5, rel=1e-6)
    dark = Placement(placement.positions, torch.zeros(1, 2, 1), torch.zeros(1, 2, 1))
    assert not heat_map(dark, torch.full((2, 1), 5.0), 0, (SIZE, SIZE)).any()


def test_heat_is_shown_in_grey_and_over_the_photograph() -> None:
    heat = np.zeros((30, 40))
    heat[10, 20], heat[5, 5] = 2.0, 1.0
    grey = heat_grey(heat)
    assert (grey[10, 20], grey[5, 5], grey[0, 0]) == (255, 128, 0)
    assert not heat_grey(np.zeros((4, 4))).any()
    frame = np.full((30, 40, 3), (30, 160, 90), np.uint8)
    over = heat_overlay(frame, heat).astype(int)
    assert np.ptp(over[0, 0]) == 0
    assert over[10, 20, 0] > 170 and over[10, 20, 2] < 80  # yellow
    with pytest.raises(ArgumentError, match="one size"):
        heat_overlay(frame, heat[1:])


def test_a_heat_sheet_has_a_line_per_image_and_the_top_layer_first() -> None:
    graph, placements = small()
    sheet = np.asarray(heat_sheet(Coordinates(2), graph, placements, [1, 0], side=SIZE))
    pitch, line = SIZE + 4, SIZE + 13 + 4
    for row, image in enumerate((1, 0)):
        assert (sheet[row * line : row * line + SIZE, :SIZE] == Coordinates(2).frame(image)).all()
        for number, name in enumerate(("top", "middle", "low")):
            heat = heat_map(placements[name], graph.layers[name].sigma, image, (SIZE, SIZE))
            tile = sheet[row * line : row * line + SIZE, (1 + 2 * number) * pitch :][:, :SIZE]
            assert (tile == heat_grey(heat)[..., None]).all()


# ---------------------------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"nodes": [Node("conv9", 0, 0)]}, "'conv9'.*low, middle, top"),
        ({"nodes": [Node("top", 2, 0)]}, "filter 2.*filter 0..1"),
        ({"nodes": [Node("top", 0, -1)]}, "node -1.*node 0..1"),
        ({"dataset": Coordinates(1)}, "got 1 images, but 2 were placed"),
        ({"images": [0, 2]}, r"got 0\.\.2, wanted 0\.\.1"),
        ({"images": [-1]}, r"got -1"),
        ({"count": 0}, "at least 1"),
        ({"side": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_of_patches_are_named(change: dict[str, object], text: str) -> None:
    _, placements = small()
    arguments = {"dataset": Coordinates(2), "placements": placements, "nodes": [Node("top", 0, 0)], **change}
    with pytest.raises(ArgumentError, match=text):
        top_patches(**arguments)  # type: ignore[arg-type]


def test_wrong_arguments_of_ranks_and_heat_are_named() -> None:
    graph, placements = small()
    for change in ({"count": 0}, {"per_filter": 0}, {"best": 0}):
        with pytest.raises(ArgumentError, match="at least 1"):
            rank_nodes(placements, "top", **change)
    with pytest.raises(ArgumentError, match="'conv9'"):
        rank_nodes(placements, "conv9")
    sigma = graph.layers["top"].sigma
    with pytest.raises(ArgumentError, match=r"image: got 2"):
        heat_map(placements["top"], sigma, 2, (9, 9))
    with pytest.raises(ArgumentError, match="share"):
        heat_map(placements["top"], sigma, 0, (9, 9), 0.0)
    with pytest.raises(ArgumentError, match=r"sigma: got shape \(3, 2\)"):
        heat_map(placements["top"], graph.layers["low"].sigma, 0, (9, 9))
    with pytest.raises(ArgumentError, match="but 2 were placed"):
        heat_sheet(Coordinates(1), graph, placements, [0])
    with pytest.raises(ArgumentError, match="at least one image"):
        heat_sheet(Coordinates(2), graph, placements, [])
