"""The data of the occlusion figure, each panel against what it says it is, computed directly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import conelens
from conelens.errors import ArgumentError, LayerError, UnsupportedOperatorError
from conelens.occlusion import Windows, panels_of, record_strongest
from conelens.occlusion.windows import fill_images

WINDOW, STRIDE = 6, 5


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(2)
    trunk = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU())
    model = nn.Sequential(*trunk, nn.Flatten(), nn.Linear(180, 4))
    with torch.no_grad():
        model[3].bias.copy_(torch.tensor([0.15, 0.05, -0.15, 0.0, -0.4]))  # no map is strongest everywhere
        model[6].weight.mul_(20)  # nor is any class
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def net(classifier: nn.Module) -> conelens.Network:
    return conelens.trace(classifier, (3, 16, 16))


def occluded(images: Tensor, value: float) -> dict[tuple[int, int], Tensor]:
    """All images under every window, in the simplest way."""
    starts = [0, 5, 10]
    made = {}
    for row, top in enumerate(starts):
        for column, left in enumerate(starts):
            copy = images.clone()
            copy[:, :, top : top + WINDOW, left : left + WINDOW] = value
            made[row, column] = copy
    return made


def activity(classifier: nn.Module, images: Tensor) -> Tensor:
    """max(0, x) of layer 3, [N, 5, 6, 6]."""
    with torch.no_grad():
        return classifier[:5](images)


@pytest.mark.parametrize("strongest", ["max", "sum"])
def test_every_panel_is_what_direct_computation_gives(
    classifier: nn.Module, net: conelens.Network, images: Tensor, strongest: str
) -> None:
    rows = conelens.zeiler_fergus(net, images, "3", WINDOW, STRIDE, 0.3, strongest=strongest)
    clean = activity(classifier, images)
    ranked = clean.amax((2, 3)) if strongest == "max" else clean.sum((2, 3))
    with torch.no_grad():
        plain = classifier(images).softmax(1)
        under = {place: (activity(classifier, x), classifier(x).softmax(1)) for place, x in occluded(images, 0.3).items()}
    for n, panels in enumerate(rows):
        assert panels.channel == int(ranked[n].argmax())
        assert panels.clean_activity == pytest.approx(float(clean[n, panels.channel].sum()), rel=1e-5)
        assert panels.label == int(plain[n].argmax())
        assert panels.clean_probability == pytest.approx(float(plain[n].max()), rel=1e-5)
        assert panels.activity.shape == panels.probability.shape == panels.labels.shape == (3, 3)
        for place, (maps, shares) in under.items():
            assert float(panels.activity[place]) == pytest.approx(float(maps[n, panels.channel].sum()), rel=1e-4)
            assert float(panels.probability[place]) == pytest.approx(float(shares[n, panels.label]), rel=1e-4)
            assert int(panels.labels[place]) == int(shares[n].argmax())
        assert float(panels.probability[panels.place]) == float(panels.probability.min())
        assert torch.equal(panels.occluded, occluded(images, 0.3)[panels.place][n])


def test_the_two_meanings_of_strongest_differ_here(classifier: nn.Module, images: Tensor) -> None:
    clean = activity(classifier, images)
    assert not torch.equal(clean.amax((2, 3)).argmax(1), clean.sum((2, 3)).argmax(1)), "the test above tells them apart"


@pytest.mark.parametrize("strongest", ["max", "sum"])
def test_one_map_per_image_is_recorded_in_batches_within_memory(
    net: conelens.Network, images: Tensor, classifier: nn.Module, strongest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conelens.Network, "forward", lambda *_: pytest.fail("all images ran at once, beside the sweep"))
    record = record_strongest("3", strongest)
    active = conelens.occlude(net, images, WINDOW, STRIDE, record=record).recorded("3")
    clean = activity(classifier, images)
    ranked = clean.amax((2, 3)) if strongest == "max" else clean.sum((2, 3))
    assert active.channels.tolist() == ranked.argmax(1, keepdim=True).tolist()
    assert torch.allclose(active.clean_maxima, clean.amax((2, 3)).gather(1, active.channels))


def test_projections_are_of_the_map_here_and_where_it_is_strongest(
    classifier: nn.Module, net: conelens.Network, images: Tensor
) -> None:
    crowd = torch.cat([torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(5)), images])
    rows = conelens.zeiler_fergus(net, images, "3", WINDOW, STRIDE, others=crowd, count=4)
    peaks = activity(classifier, crowd).amax((2, 3))
    for n, panels in enumerate(rows):
        order = [i for i in peaks[:, panels.channel].argsort(descending=True).tolist() if i != 7 + n]
        assert panels.others == order[:4]
        shown = conelens.project(net, crowd, "3", panels.channel, image=[7 + n, *order[:4]])
        assert torch.allclose(panels.projections, shown.crops, atol=1e-6)
        assert torch.equal(panels.patches, shown.patches(crowd))
        assert float(panels.projections.abs().amax((1, 2, 3)).min()) > 0


def test_without_others_the_images_show_each_other(net: conelens.Network, images: Tensor) -> None:
    rows = conelens.zeiler_fergus(net, images, "3", WINDOW, STRIDE)
    for n, panels in enumerate(rows):
        assert set(panels.others) <= {0, 1, 2} - {n}
        assert len(panels.projections) == 1 + len(panels.others)
    assert any(panels.others for panels in rows)
    alone = conelens.zeiler_fergus(net, images[:1], "3", WINDOW, STRIDE)
    assert alone[0].others == []
    assert len(conelens.zeiler_fergus(net, images, "3", WINDOW, STRIDE, count=0)[0].projections) == 1


def test_given_labels_count_instead_of_the_most_probable(net: conelens.Network, images: Tensor) -> None:
    free = conelens.zeiler_fergus(net, images, "3", WINDOW, STRIDE)
    wanted = [(p.label + 1) % 4 for p in free if p.label is not None]
    given = conelens.zeiler_fergus(net, images, "3", WINDOW, STRIDE, label=wanted)
    assert [p.label for p in given] == wanted
    for n, panels in enumerate(given):
        assert torch.equal(panels.probability, panels.sweep.probabilities[n, :, :, wanted[n]])
        assert panels.clean_probability != free[n].clean_probability
    assert [p.label for p in conelens.zeiler_fergus(net, images, "3", WINDOW, STRIDE, label=2)] == [2, 2, 2]


def test_pictures_are_aligned_with_the_image(net: conelens.Network, images: Tensor) -> None:
    panels = conelens.zeiler_fergus(net, images[:1], "3", (4, 6), (6, 5), 6.0)[0]
    assert panels.labels is not None
    centres = [1.5, 7.5, 13.5], [2.5, 7.5, 12.5]

    def nearest(axis: list[float], at: int) -> int:
        return min(range(3), key=lambda k: abs(axis[k] - at))

    expected = [[int(panels.labels[nearest(centres[0], y), nearest(centres[1], x)]) for x in range(16)] for y in range(16)]
    assert torch.equal(panels.label_map(), torch.tensor(expected))
    assert len(panels.labels.unique()) > 1
    assert panels.probability is not None
    picture = panels.smooth(panels.probability)
    ends = panels.probability[:2, 0].tolist()
    assert float(picture[4:6, 2].mean()) == pytest.approx(sum(ends) / 2)  # half way between the centres at 1.5 and 7.5
    assert float(picture[0, 0]) == float(picture[1, 2]) == pytest.approx(ends[0])  # constant beyond the outermost


def test_a_network_without_classes_has_the_other_panels(images: Tensor, classifier: nn.Module) -> None:
    trunk = conelens.trace(classifier[:4], (3, 16, 16))
    panels = conelens.zeiler_fergus(trunk, images, "3", WINDOW, STRIDE)[0]
    assert panels.label is panels.probability is panels.clean_probability is panels.labels is None
    assert float(panels.activity[panels.place]) == float(panels.activity.min())
    with pytest.raises(ArgumentError, match="no classifier"):
        panels.label_map()
    with pytest.raises(ArgumentError, match="no classifier"):
        conelens.zeiler_fergus(trunk, images, "3", WINDOW, STRIDE, label=1)


def test_the_window_shown_is_the_one_swept_on_a_grid_of_ones_own(net: conelens.Network, images: Tensor) -> None:
    grid = Windows(np.array([0, 6]), np.array([2, 16]), np.array([0, 4]), np.array([3, 16]), (16, 16))  # grows to the right
    sweep = conelens.occlude(net, images, grid, fill="blur", record=record_strongest("3"))
    blurred = fill_images("blur", images, (10, 12))
    for n, panels in enumerate(panels_of(net, images, sweep, "3", "blur")):
        inside = torch.zeros(16, 16, dtype=torch.bool)
        top, left, bottom, right = panels.box()
        inside[top:bottom, left:right] = True
        assert torch.equal(panels.occluded, torch.where(inside, blurred[n], images[n]))


def test_a_window_under_which_the_network_gives_nan_is_the_worst_and_has_no_label(
    net: conelens.Network, images: Tensor
) -> None:
    sweep = conelens.occlude(net, images, WINDOW, STRIDE, record=record_strongest("3"))
    sweep.outputs[1, 2, 0, 3] = torch.nan
    panels = panels_of(net, images, sweep, "3", 0.0)[1]
    assert panels.place == (2, 0)
    assert panels.labels is not None
    assert (panels.labels == -1).nonzero().tolist() == [[2, 0]]
    assert panels.probability is not None
    picture = panels.smooth(panels.probability)
    assert picture[14, 1].isnan()
    assert float(picture[1, 14]) == pytest.approx(float(panels.probability[0, 2]))


def test_mistakes_are_named_before_the_sweep(
    net: conelens.Network, images: Tensor, classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conelens.occlusion.zeiler.occlude", lambda *_, **__: pytest.fail("swept before it looked"))
    trunk = conelens.trace(classifier[:4], (3, 16, 16))
    crowd = torch.zeros(1, 3, 8, 8)
    cases: list[tuple[conelens.Network, str, dict[str, Any], str]] = [
        (net, "3", {"strongest": "mean"}, "strongest"),
        (classifier, "3", {}, r"conelens\.trace"),
        (net, "conv77", {}, "conv77"),
        (net, "3", {"label": 4}, "classes 0 to 3"),
        (net, "3", {"label": [0, -1, 0]}, "classes 0 to 3"),
        (net, "3", {"label": [0, 1]}, "each of the 3 images"),
        (net, "3", {"label": 1.0}, "each of the 3 images"),
        (net, "3", {"label": "duck"}, "each of the 3 images"),
        (trunk, "3", {"label": 1}, "no classifier"),
        (net, "3", {"count": -1}, "count"),
        (net, "3", {"count": 2.5}, "count"),
        (net, "3", {"others": crowd}, "images: got .*8, 8"),
        (net, "3", {"others": 5}, "others: got int"),
    ]
    for given, layer, options, message in cases:
        with pytest.raises((ArgumentError, LayerError), match=message):
            conelens.zeiler_fergus(given, images, layer, WINDOW, STRIDE, **options)


def test_a_map_that_cannot_be_projected_is_refused_before_the_sweep(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conelens.occlusion.zeiler.occlude", lambda *_, **__: pytest.fail("swept before it looked"))
    net = conelens.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish()).eval(), (3, 16, 16))
    with pytest.raises(UnsupportedOperatorError):
        conelens.zeiler_fergus(net, images, "1", WINDOW, STRIDE)


@pytest.mark.parametrize(("trouble", "raised"), [(KeyboardInterrupt, conelens.SweepInterrupted), (MemoryError, MemoryError)])
def test_trouble_while_projecting_keeps_the_finished_sweep(
    net: conelens.Network, images: Tensor, monkeypatch: pytest.MonkeyPatch, trouble: Any, raised: Any
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise trouble

    with monkeypatch.context() as patch:
        patch.setattr("conelens.occlusion.zeiler.project", stopped)
        with pytest.raises(raised) as caught:
            conelens.zeiler_fergus(net, images, "3", WINDOW, STRIDE, 0.3)
    assert caught.value.sweep.complete
    rows = panels_of(net, images, caught.value.sweep, "3", 0.3)
    whole = conelens.zeiler_fergus(net, images, "3", WINDOW, STRIDE, 0.3)
    assert all(torch.equal(a.activity, b.activity) for a, b in zip(rows, whole, strict=True))


def test_a_sweep_that_does_not_fit_is_named(net: conelens.Network, images: Tensor) -> None:
    sweep = conelens.occlude(net, images, WINDOW, STRIDE, record=record_strongest("3"))
    with pytest.raises(ArgumentError, match="sweep is of 3"):
        panels_of(net, images[:2], sweep, "3", 0.0)
    with pytest.raises(ArgumentError, match="count"):
        panels_of(net, images, sweep, "3", 0.0, count=-1)
    with pytest.raises(LayerError, match="not recorded"):
        panels_of(net, images, sweep, "0", 0.0)
    sweep.done = sweep.done.clone()
    sweep.done[0, 0, 0] = False
    with pytest.raises(ArgumentError, match="26 of 27"):
        panels_of(net, images, sweep, "3", 0.0)
