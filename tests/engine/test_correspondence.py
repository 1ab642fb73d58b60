"""Correspondence analysis: the paper's distance, spelled out, and what must not move it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import conelens
from conelens.errors import ArgumentError, LayerError
from conelens.occlusion import correspondence as correspondences
from conelens.occlusion.correspondence import _Changes

IMAGES = torch.randn(4, 3, 40, 44, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
EYE = [[3, 4, 9, 12], [20, 30, 26, 38], [0, 0, 6, 8], [34, 36, 40, 44]]
NOSE = torch.tensor([[10, 10, 21, 15], [2, 2, 9, 13], [30, 1, 35, 9], [5, 20, 6, 21]])
LAYERS = ["0", "4", "7"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(5 * 18 * 20, 7),
    ).double().eval()  # fmt: skip


@pytest.fixture(scope="module")
def net() -> conelens.Network:
    return conelens.trace(model(), IMAGES)


def by_hand(layer: str, boxes: Any, fill: float, sign: str, raw: bool) -> tuple[Tensor, Tensor]:
    """Distances and unions [N, N] of the paper's formula, image by image, entry by entry."""
    covered = IMAGES.clone()
    for image, (top, left, bottom, right) in zip(covered, np.asarray(boxes).tolist()):
        image[:, top:bottom, left:right] = fill
    upto = model()[: int(layer) + 1]
    with torch.no_grad():
        x, masked = (upto(batch).flatten(1) for batch in (IMAGES, covered))
    if not raw:
        x, masked = x.clamp(min=0), masked.clamp(min=0)
    difference = x - masked
    signs = difference.sign() if sign == "three" else difference > 0
    pairs = [[(int((a != b).sum()), int(((c != 0) | (d != 0)).sum())) for b, d in zip(signs, difference)]
             for a, c in zip(signs, difference)]  # fmt: skip
    return torch.tensor(pairs)[..., 0], torch.tensor(pairs)[..., 1]


@pytest.mark.parametrize("sign", ["three", "two"])
@pytest.mark.parametrize("raw", [False, True])
def test_the_formula(net: conelens.Network, sign: str, raw: bool) -> None:
    got = conelens.correspondence(net, IMAGES, {"eye": EYE, "nose": NOSE}, LAYERS, fill=0.25, random=2, sign=sign, raw=raw)
    for part, boxes in {"eye": EYE, "nose": NOSE}.items():
        for layer in LAYERS:
            distances, unions = by_hand(layer, boxes, 0.25, sign, raw)
            assert torch.equal(got.distances[part][layer][0], distances)
            assert torch.equal(got.unions[part][layer][0], unions)
            others = ~torch.eye(4, dtype=torch.bool)
            length = got.lengths[layer]
            means = [(row / length).double()[keep].mean() for row, keep in zip(distances, others)]
            assert got.delta(part, layer).mean == pytest.approx(float(sum(means)) / 4)
            assert got.delta(part, layer).deviation == pytest.approx(float(np.std(means, ddof=1)))
            assert got.unlike(part, layer).mean == pytest.approx(float((distances / unions)[others].mean()))
            assert got.total(part, layer) == int(distances.sum())
            assert got.total(part, layer) == pytest.approx(got.delta(part, layer).mean * length * 12)
            assert got.changed(part, layer)[0] == pytest.approx(float(unions.diagonal().double().mean()) / length)
    assert got.lengths == {"0": 6 * 40 * 44, "4": 5 * 18 * 20, "7": 7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_box_cannot_reach_is_exactly_zero(dtype: torch.dtype) -> None:
    """Also without the mask of the region: equal cells, equal bits."""
    images = IMAGES.to(dtype)
    net = conelens.trace(model().to(dtype), images)
    changes = _Changes(net, images, [net.node(name).index for name in ("0", "4")], raw=True)
    places = np.array(EYE)
    masked = changes(torch.zeros_like(images), places)
    changes._regions = lambda places: [torch.ones(1, dtype=torch.bool)] * 2  # type: ignore[method-assign]
    for with_region, without in zip(masked, changes(torch.zeros_like(images), places), strict=True):
        assert torch.equal(with_region, without)
    first = masked[0].reshape(4, 6, 40, 44)
    for signs, (top, left, bottom, right) in zip(first, EYE):
        reached = torch.zeros(40, 44, dtype=torch.bool)
        reached[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = True
        assert not signs[:, ~reached].any()
        assert (signs[:, reached] != 0).float().mean() > 0.9


def test_covering_with_the_image_itself_changes_nothing(net: conelens.Network) -> None:
    got = conelens.correspondence(net, IMAGES, {"eye": EYE}, LAYERS, fill=IMAGES, random=3)
    for layer in LAYERS:
        assert got.total("eye", layer) == 0
        assert got.delta("eye", layer) == (0, 0)
        assert got.random_delta("eye", layer) == (0, 0)
        assert got.unlike("eye", layer).mean == 0
        assert got.changed("eye", layer) == (0, 0)


def test_one_image_many_times_corresponds_to_itself(net: conelens.Network) -> None:
    images = IMAGES[:1].expand(3, -1, -1, -1).contiguous()
    got = conelens.correspondence(net, images, {"eye": EYE[:1] * 3}, "7", random=5, placement="together")
    assert got.delta("eye", "7") == (0, 0)
    assert got.random_delta("eye", "7") == (0, 0)
    apart = conelens.correspondence(net, images, {"eye": EYE[:1] * 3}, "7", random=5)
    assert apart.random_delta("eye", "7").mean > 0


def test_random_boxes_keep_their_sizes_and_stay_inside(net: conelens.Network, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    real = _Changes.__call__
    monkeypatch.setattr(_Changes, "__call__", lambda self, filled, where: seen.append(where) or real(self, filled, where))
    for placement in ("independent", "together"):
        seen.clear()
        conelens.correspondence(net, IMAGES, {"nose": NOSE}, "0", random=40, placement=placement)
        part, *draws = seen
        assert len(draws) == 40
        moves = np.stack(draws) - part
        assert np.array_equal(moves[..., :2], moves[..., 2:])
        assert np.min(draws) == 0
        assert np.max(np.stack(draws)[..., 2]) == 40
        assert np.max(np.stack(draws)[..., 3]) <= 44
        assert (moves.std(1).max() == 0) == (placement == "together")


def test_the_same_seed_gives_the_same_result(net: conelens.Network) -> None:
    one, again, other = (conelens.correspondence(net, IMAGES, {"eye": EYE}, LAYERS, random=3, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(one.distances["eye"][layer], again.distances["eye"][layer]) for layer in LAYERS)
    assert not torch.equal(one.distances["eye"]["7"][1:], other.distances["eye"]["7"][1:])
    assert torch.equal(one.distances["eye"]["7"][0], other.distances["eye"]["7"][0])


def test_many_images_run_in_batches(net: conelens.Network, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = conelens.correspondence(net, IMAGES, {"eye": EYE}, ["0", "4"], random=2)
    monkeypatch.setattr("conelens.occlusion.correspondence.BATCH", 3)
    parts = conelens.correspondence(net, IMAGES, {"eye": EYE}, ["0", "4"], random=2)
    for layer in ("0", "4"):
        assert torch.equal(whole.distances["eye"][layer], parts.distances["eye"][layer])


def test_prints_a_table_with_and_without_random_boxes() -> None:
    calls: list[tuple[int, int]] = []
    got = conelens.correspondence(
        model(), IMAGES, {"left eye": EYE, "nose": NOSE}, LAYERS, random=2, fill="mean", progress=lambda *c: calls.append(c)
    )
    lines = str(got).splitlines()
    assert lines[0].split() == ["covered", *(word for layer in LAYERS for word in (layer, "unlike", "changed"))]
    assert [line[:9] for line in lines[1:]] == ["left eye ", "random, s", "nose     ", "random, s"]
    assert str(got.delta("nose", "4")) in lines[3]
    assert str(got.random_unlike("nose", "4")) in lines[4]
    assert calls == [(n, 6) for n in range(1, 7)]
    bare = conelens.correspondence(model(), IMAGES, {"left eye": EYE}, "4", random=0)
    assert len(str(bare).splitlines()) == 2
    assert math.isnan(bare.random_delta("left eye", "4").mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES[:1], "boxes": {"eye": EYE[:1]}}, "images: got 1, wanted at least 2"),
        ({"images": IMAGES[..., :30]}, "images: got shape"),
        ({"images": torch.full_like(IMAGES, torch.nan)}, "images: hold NaN"),
        ({"images": IMAGES[0]}, "images: got .*40, 44.*wanted a tensor"),
        ({"images": [1, 2]}, "images: got list"),
        ({"boxes": {}}, "boxes: got none"),
        ({"boxes": EYE}, "boxes: got list, wanted the boxes of each part by its name"),
        ({"layers": []}, "layers: got none"),
        ({"boxes": {"eye": EYE[:3]}}, r"boxes: 'eye' has shape \(3, 4\), wanted \(4, 4\)"),
        ({"boxes": {"eye": np.array(EYE) + 0.5}}, "boxes: 'eye' has fractions of pixels"),
        ({"boxes": {"eye": [[3, 4, 3, 12], *EYE[1:]]}}, r"boxes: 'eye' of image 0 is \(3, 4, 3, 12\)"),
        ({"boxes": {"eye": [*EYE[:3], [34, 36, 41, 44]]}}, r"boxes: 'eye' of image 3 .*inside 40x44"),
        ({"boxes": {"eye": [[-1, 4, 3, 12], *EYE[1:]]}}, "boxes: 'eye' of image 0"),
        ({"sign": "one"}, "sign: got 'one'"),
        ({"random": -1}, "random: got -1"),
        ({"placement": "apart"}, "placement: got 'apart'"),
        ({"fill": "grey"}, "fill: got 'grey'"),
    ],
)
def test_what_does_not_fit_is_refused(net: conelens.Network, change: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"images": IMAGES, "boxes": {"eye": EYE}, "layers": ["4"]} | change
    with pytest.raises(ArgumentError, match=message):
        conelens.correspondence(net, **call)


def test_one_image_is_enough_to_trace_by(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = []
    real = correspondences.trace
    monkeypatch.setattr(correspondences, "trace", lambda m, x, **k: examples.append(x.shape) or real(m, x, **k))
    conelens.correspondence(model(), IMAGES, {"eye": EYE}, "4", random=0)
    assert examples == [IMAGES[:1].shape]


def test_unknown_layers_and_parts_are_refused(net: conelens.Network) -> None:
    with pytest.raises(LayerError, match="layer: got 'conv9'"):
        conelens.correspondence(net, IMAGES, {"eye": EYE}, "conv9")
    got = conelens.correspondence(net, IMAGES, {"eye": EYE}, "4", random=0)
    with pytest.raises(LayerError, match="not asked for"):
        got.delta("eye", "7")
    with pytest.raises(ArgumentError, match="part: got 'ear', wanted one of eye"):
        got.delta("ear", "4")
