"""Which units are kept, what is painted of them, and how what stays is measured: against loops over nodes and pixels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conelens.errors import ArgumentError, LayerError
from conelens.explanatory import decoder as module
from conelens.explanatory.decoder import Decoder
from conelens.explanatory.features import Features, Grid
from conelens.explanatory.layer import Placement
from conelens.explanatory.painting import Recipe
from conelens.explanatory.synthesis import Synthesis, highest_units, kept_units, survival, synthesis_sheet, synthesise

GRID = Grid((3.5, 7.5), (8.0, 16.0), (4, 3))  # of pictures of 32 x 48 pixels
FILTERS, NODES = 5, 4


def scene(images: int = 6, seed: int = 0) -> tuple[Features, dict[str, Placement]]:
    """Sparse maps [N, 5, 4, 3], and nodes at random active units with random scores, a third of which are not found."""
    random = np.random.default_rng(seed)
    maps = random.uniform(0.5, 2, (images, FILTERS, *GRID.size)) * (random.random((images, FILTERS, *GRID.size)) < 0.6)
    maps[:, :, 0, 0] = 1.0
    positions = np.zeros((images, FILTERS, NODES, 2), np.float32)
    scores = np.zeros((images, FILTERS, NODES), np.float32)
    for n, d, k in np.ndindex(images, FILTERS, NODES):
        y, x = random.permutation(np.argwhere(maps[n, d] > 0))[0]
        positions[n, d, k] = 3.5 + 8 * y, 7.5 + 16 * x
        scores[n, d, k] = random.uniform(0.1, 1) if random.random() < 0.7 else 0
    placement = Placement(torch.from_numpy(positions), torch.from_numpy(scores), torch.from_numpy(scores))
    features = torch.from_numpy(maps).half()
    return Features({"top": features}, {"top": GRID}, {"top": torch.ones(FILTERS, 1, 1)}, (32, 48)), {"top": placement}


@pytest.fixture
def decoder() -> Decoder:
    recipe = Recipe(size=16, width=6, widest=8)
    shape = (FILTERS, *GRID.size)
    return Decoder("top", shape, recipe, module._begin(shape, recipe, torch.tensor([0.5, 0.4, 0.6])).weights, 0)


class Frames:
    """Flat pictures, darker from one to the next."""

    def __len__(self) -> int:
        return 6

    def frame(self, index: int) -> np.ndarray:
        return np.full((32, 48, 3), 200 - 20 * index, np.uint8)


def by_hand(placement: Placement, keep: float) -> np.ndarray:
    """The definition, node by node."""
    scores = placement.scores.numpy()
    units = np.zeros((len(scores), FILTERS, *GRID.size), bool)
    for n in range(len(scores)):
        nodes = sorted(np.ndindex(FILTERS, NODES), key=lambda node: -scores[n][node])  # stable: of equals the first
        for d, k in nodes[: math.ceil(keep * FILTERS * NODES)]:
            if scores[n, d, k] > 0:
                y, x = placement.positions[n, d, k].tolist()
                units[n, d, round((y - 3.5) / 8), round((x - 7.5) / 16)] = True
    return units


# ------------------------------------------------------------------------------------------------------------- units
@pytest.mark.parametrize("keep", [0.01, 0.1, 0.33, 0.5, 1.0])
def test_units_of_the_best_nodes(keep: float) -> None:
    placement = scene()[1]["top"]
    wanted = by_hand(placement, keep)
    assert np.array_equal(kept_units(placement, GRID, keep).numpy(), wanted)
    assert wanted.any()


def test_equal_scores_and_nodes_that_share_a_unit() -> None:
    placement = scene()[1]["top"]
    same = placement._replace(scores=torch.ones_like(placement.scores))
    assert np.array_equal(kept_units(same, GRID, 0.3).numpy(), by_hand(same, 0.3))
    shared = same._replace(positions=torch.full_like(same.positions, 7.5))  # nearest to cell (0 or 1, 0)
    assert (kept_units(shared, GRID, 1.0).flatten(1).sum(1) == FILTERS).all()


def test_highest_units() -> None:
    values = torch.from_numpy(np.random.default_rng(3).normal(size=(4, 3, 5, 6)))
    counts = torch.tensor([0, 7, 30, 90])
    taken = highest_units(values, counts).numpy()
    for n, count in enumerate(counts.tolist()):
        flat = values[n].numpy().ravel()
        wanted = [i for i in np.argsort(-flat)[:count] if flat[i] > 0]
        assert sorted(np.flatnonzero(taken[n])) == sorted(wanted)
    assert taken[3].sum() == (values[3] > 0).sum() < 90


# ------------------------------------------------------------------------------------------------------------ painting
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the decoder is given from now on."""
    given: list[Tensor] = []
    paint = Decoder.__call__

    def record(self: Decoder, maps: Tensor, batch_size: int = 32) -> Tensor:
        given.append(maps.clone())
        return paint(self, maps, batch_size)

    monkeypatch.setattr(Decoder, "__call__", record)
    return given


def test_what_the_decoder_is_given(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    features, placements = scene()
    maps = features["top"].float()
    given = recorded(monkeypatch)
    made = synthesise(features, placements, decoder, keep=0.3)
    whole, kept, random, strongest, blank = given
    assert torch.equal(whole, maps)
    units = torch.from_numpy(by_hand(placements["top"], 0.3))
    assert torch.equal(kept, maps * units)
    counts = units.flatten(1).sum(1)
    assert torch.equal(made.units, counts)
    assert torch.equal(made.active, (maps > 0).flatten(1).sum(1))
    for control in (random, strongest):
        assert torch.equal((control > 0).flatten(1).sum(1), counts)
        assert torch.equal(control[control > 0], maps[control > 0])
    for n in range(len(maps)):
        least = strongest[n][strongest[n] > 0].min()
        assert maps[n][strongest[n] == 0].max() <= least
    assert not torch.equal(random, strongest)
    assert not blank.any()
    assert torch.equal(made.painted["kept"], decoder(kept))
    assert made.painted["random"].shape == (6, 3, 16, 12)


def test_random_units_are_anywhere_and_seeded(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    features, placements = scene(500)
    given = recorded(monkeypatch)
    first = synthesise(features, placements, decoder, keep=0.2)
    calls = [given[number : number + 4] for number in range(0, len(given) - 1, 4)]
    random, maps = (torch.cat([call[which] for call in calls]) for which in (2, 0))
    drawn = (random > 0).sum((0, 1)) / (maps > 0).sum((0, 1))  # of the active units of each cell
    assert drawn.max() - drawn.min() < 0.06 < drawn.max()
    again = synthesise(features, placements, decoder, keep=0.2)
    other = synthesise(features, placements, decoder, keep=0.2, seed=1)
    assert torch.equal(first.painted["random"], again.painted["random"])
    assert not torch.equal(first.painted["random"], other.painted["random"])
    assert torch.equal(first.painted["kept"], other.painted["kept"])


def test_some_images(decoder: Decoder) -> None:
    features, placements = scene()
    every, some = (synthesise(features, placements, decoder, images=images) for images in (None, [4, 1]))
    assert some.images == [4, 1]
    for kind in ("whole", "kept", "strongest"):
        assert torch.allclose(some.painted[kind], every.painted[kind][[4, 1]], atol=1e-6)
    assert torch.equal(some.units, every.units[[4, 1]])


def test_where_nothing_was_found_nothing_is_painted(decoder: Decoder) -> None:
    features, placements = scene()
    nowhere = {"top": placements["top"]._replace(scores=torch.zeros(6, FILTERS, NODES))}
    made = synthesise(features, nowhere, decoder)
    assert not made.units.any()
    for kind in ("kept", "random", "strongest"):
        assert torch.allclose(made.painted[kind], made.blank.expand(6, 3, 16, 12), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- measure
def painted_by_hand(inside: float, outside: float, boxes: Tensor) -> tuple[Synthesis, np.ndarray]:
    """Pictures whose contrast is ``inside`` times the whole one's in the boxes, ``outside`` times elsewhere; and the region."""
    rows, columns = (np.arange(16) + 0.5) * 2 - 0.5, (np.arange(12) + 0.5) * 4 - 0.5
    region = np.zeros((len(boxes), 16, 12), bool)
    for n, i, j in np.ndindex(*region.shape):
        for top, left, bottom, right in boxes[n].tolist():
            region[n, i, j] |= top <= rows[i] <= bottom and left <= columns[j] <= right
    contrast = torch.from_numpy(np.random.default_rng(5).uniform(-0.4, 0.4, (len(boxes), 3, 16, 12)))
    blank = torch.full((3, 16, 12), 0.5)
    kept = blank + contrast * torch.from_numpy(np.where(region[:, None], inside, outside))
    painted = {"whole": blank + contrast, "kept": kept, "random": blank - contrast, "strongest": blank + 0 * contrast}
    none = torch.zeros(len(boxes), dtype=torch.int64)
    return Synthesis(list(range(len(boxes))), painted, blank, none, none, 0.1, (32, 48), none), region


def test_survival_is_the_share_of_contrast_that_is_left() -> None:
    nan = math.nan
    boxes = torch.tensor(
        [
            [[2.0, 3, 20, 30], [nan] * 4],
            [[0.0, 0, 9.2, 9.3], [15.0, 20, 31, 47]],
            [[nan] * 4, [nan] * 4],
            [[-1.0, -1, 40, 50], [nan] * 4],
        ]
    )
    synthesis, region = painted_by_hand(0.8, 0.25, boxes)
    assert region[:2].any((1, 2)).all() and not region[2].any() and region[3].all()
    found = survival(synthesis, boxes)
    assert found["kept"].images == 2, "the third has no box, the fourth no outside"
    assert found["kept"][:4] == pytest.approx((0.8, 0.25, 0.55, 0.0), abs=1e-6)
    assert found["random"][:4] == pytest.approx((-1, -1, 0, 0), abs=1e-6)
    assert found["strongest"][:4] == pytest.approx((0, 0, 0, 0), abs=1e-6)
    assert str(found["kept"]) == "inside 0.80, outside 0.25, difference +0.550 ± 0.000"


def test_the_standard_error_is_over_images() -> None:
    boxes = torch.tensor([[[2.0, 3, 20, 30]]]).repeat(4, 1, 1)
    synthesis, _ = painted_by_hand(1.0, 0.0, boxes)
    scale = torch.tensor([0.1, 0.2, 0.4, 0.9])
    faded = synthesis.blank + (synthesis.painted["kept"] - synthesis.blank) * scale[:, None, None, None]
    synthesis.painted["kept"] = faded
    found = survival(synthesis, boxes)["kept"]
    assert found.inside == found.difference == pytest.approx(0.4)
    assert found.error == pytest.approx(np.std([0.1, 0.2, 0.4, 0.9], ddof=1) / 2)


def test_boxes_belong_to_the_images_that_were_chosen() -> None:
    boxes = torch.full((5, 1, 4), math.nan)
    boxes[3] = torch.tensor([2.0, 3, 20, 30])
    synthesis, _ = painted_by_hand(0.7, 0.1, boxes[3:4])
    moved = replace(synthesis, images=[3])
    assert survival(moved, boxes)["kept"].inside == pytest.approx(0.7)
    with pytest.raises(ArgumentError, match="no image has a box"):
        survival(synthesis, boxes)


# ------------------------------------------------------------------------------------------------------------- picture
def test_the_sheet_has_a_line_per_image(decoder: Decoder) -> None:
    features, placements = scene()
    made = synthesise(features, placements, decoder, images=[0, 5, 2])
    sheet = synthesis_sheet(Frames(), made, side=60)
    pixels = np.asarray(sheet)
    assert sheet.size == (6 * 64 - 4, 3 * (60 + 13 + 4) - 4)
    for line, image in enumerate((0, 5, 2)):
        middle = line * 77 + 30
        assert pixels[middle, 30].tolist() == [200 - 20 * image] * 3
        through = 128 + np.sqrt(float(made.where[line, 8, 6])) * (200 - 20 * image - 128)
        assert abs(float(pixels[middle + 1, 64 + 31, 0]) - through) < 6, "the photograph where the kept units are"
        wanted = 255 * made.painted["kept"][line, :, 8, 6]
        assert np.abs(pixels[middle + 1, 3 * 64 + 31].astype(float) - wanted.numpy()).max() < 40, "of the kept units"


# ------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize("keep", [0, -0.1, 1.01, math.nan, "0.1", None])
def test_keep_is_a_share(decoder: Decoder, keep: Any) -> None:
    with pytest.raises(ArgumentError, match="keep: got"):
        synthesise(*scene(), decoder, keep=keep)


def test_mistakes_are_named(decoder: Decoder) -> None:
    features, placements = scene()
    placement = placements["top"]
    empty = Placement(torch.zeros(6, FILTERS, 0, 2), torch.zeros(6, FILTERS, 0), torch.zeros(6, FILTERS, 0))
    for wrong, words in (
        (empty, "5 filters of 0 nodes"),
        (Placement(*(tensor[:4] for tensor in placement)), r"\[4, 5\] images and filters of top"),
        (Placement(*(tensor[:, :2] for tensor in placement)), r"\[6, 2\] images and filters of top"),
        (placement._replace(scores=placement.scores * math.nan), "got NaN"),
        (placement._replace(scores=-placement.scores - 1), "scores below 0"),
        (placement._replace(positions=placement.positions * math.nan), "got NaN"),
        (placement._replace(positions=placement.positions[..., 0]), "positions"),
    ):
        with pytest.raises(ArgumentError, match=words):
            synthesise(features, {"top": wrong}, decoder)
    with pytest.raises(ArgumentError, match="layer: got 'top'"):
        synthesise(features, {"other": placement}, decoder)
    with pytest.raises(LayerError, match="layer: got 'top'"):
        synthesise(
            Features({"other": features["top"]}, {"other": GRID}, {"other": torch.ones(FILTERS, 1, 1)}, (32, 48)),
            placements,
            decoder,
        )
    for images in ([], [6], [-1]):
        with pytest.raises(ArgumentError, match="images: got"):
            synthesise(features, placements, decoder, images=images)
    features["top"][0, 0, 0, 0] = math.nan
    with pytest.raises(ArgumentError, match="NaN"):
        synthesise(features, placements, decoder)


def test_what_does_not_belong_to_the_images(decoder: Decoder) -> None:
    made = synthesise(*scene(8), decoder)
    with pytest.raises(ArgumentError, match="dataset: got 6 images, wanted"):
        synthesis_sheet(Frames(), made)
    for boxes in (torch.zeros(8, 4), torch.zeros(8, 1, 2), torch.zeros(7, 1, 4)):
        with pytest.raises(ArgumentError, match="boxes: got shape"):
            survival(made, boxes)
