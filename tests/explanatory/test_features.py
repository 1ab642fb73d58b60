"""Features of a data set: normalised, placed in pixels, in memory or in files, whatever the images hold."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import conelens
from conelens.errors import ArgumentError, DataError, LayerError
from conelens.explanatory import Features, Grid, grid_of
from tests.kit.planted import LOWER, UPPER, PlantedNet, planted


@pytest.fixture(scope="module")
def net() -> conelens.Network:
    return conelens.trace(PlantedNet().eval(), (4, 96, 96))


def test_cells_lie_at_the_centres_of_receptive_fields(net: conelens.Network) -> None:
    grid, (y, x) = grid_of(net, LOWER), (10, 20)
    image = torch.zeros(1, 4, 96, 96, requires_grad=True)
    PlantedNet().lower(image)[0, :, y, x].sum().backward()
    assert image.grad is not None
    seen = image.grad.abs().sum((0, 1)).nonzero().double().mean(0)
    assert grid.pixels(torch.tensor(y * grid.size[1] + x)).tolist() == seen.tolist()
    assert grid_of(net, UPPER) == Grid((1.0, 1.0), (4.0, 4.0), (24, 24))  # a 2x2 window's middle lies between its cells


def test_pixels_and_cells_are_inverse() -> None:
    grid = Grid((3.5, 7.5), (8.0, 16.0), (5, 7))
    cells = torch.arange(35)
    assert torch.equal(grid.cells(grid.pixels(cells)), cells)
    assert grid.cells(torch.tensor([[-90.0, 900.0]])).tolist() == [6]


@pytest.mark.parametrize("kind", ["unit", "channel"])
def test_activity_is_divided_by_the_deviation_of_the_raw_output(net: conelens.Network, kind: str) -> None:
    images = planted(40).images
    features = Features.extract(net, images, [LOWER, UPPER], scale=kind, batch_size=7)
    for layer, raw in net.forward(images, [LOWER, UPPER]).items():
        values = raw.double().numpy()
        sigma = values.std(0) if kind == "unit" else values.std((0, 2, 3))[:, None, None]
        sigma = np.maximum(sigma, 1e-3 * sigma.mean())
        expected = np.maximum(values, 0) / sigma
        assert features.scale[layer].shape == sigma.shape
        np.testing.assert_allclose(features.scale[layer].numpy(), sigma, rtol=1e-5)
        np.testing.assert_allclose(features[layer].double().numpy(), expected, rtol=2e-3, atol=2e-4)


def test_auto_is_per_unit_only_with_many_images(net: conelens.Network) -> None:
    images = planted(8).images
    assert Features.extract(net, images, [UPPER]).scale[UPPER].shape == (3, 1, 1)
    many = images.repeat(25, 1, 1, 1)
    assert Features.extract(net, many, [UPPER]).scale[UPPER].shape == (3, 24, 24)


def test_negatives_give_the_scale(net: conelens.Network) -> None:
    images, others = planted(8).images, planted(12, seed=5).images * 3
    features = Features.extract(net, images, [UPPER], scale="channel", negatives=others)
    expected = net.forward(others, [UPPER])[UPPER].double().numpy().std((0, 2, 3))
    np.testing.assert_allclose(features.scale[UPPER][:, 0, 0].numpy(), expected, rtol=1e-5)


def test_a_given_scale_makes_new_images_comparable(net: conelens.Network) -> None:
    images = planted(12).images
    whole = Features.extract(net, images, [LOWER], scale="channel")
    part = Features.extract(net, images[5:9], [LOWER], scale=whole.scale)
    torch.testing.assert_close(part[LOWER].float(), whole[LOWER][5:9].float(), rtol=2e-3, atol=1e-3)
    shared = whole.part(5, 9)
    assert len(shared) == 4 and shared[LOWER].data_ptr() == whole[LOWER][5:9].data_ptr()


def test_files_hold_what_memory_holds(net: conelens.Network, tmp_path) -> None:
    images = planted(10).images
    memory = Features.extract(net, images, [LOWER, UPPER])
    for folder in (None, tmp_path):
        files = Features.extract(net, images, [LOWER, UPPER], memory=0, folder=folder)
        assert all(torch.equal(files[layer], memory[layer]) for layer in memory.layers)
    assert (tmp_path / "0.f16").stat().st_size == memory[LOWER].numel() * 2


def test_progress_counts_images_and_negatives(net: conelens.Network) -> None:
    told: list[tuple[int, int]] = []
    Features.extract(
        net, planted(5).images, [UPPER], negatives=planted(3).images, batch_size=2, progress=lambda *x: told.append(x)
    )
    assert told == [(2, 8), (3, 8), (5, 8), (7, 8), (8, 8)]


def test_an_image_with_nan_is_named_and_has_no_activity(net: conelens.Network) -> None:
    images = planted(4).images
    images[2, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="image 2 holds NaN"):
        features = Features.extract(net, images, [UPPER])
    assert features.skipped == [2] and not features[UPPER][2].any() and features[UPPER][3].any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="no image could be read"):
            Features.extract(net, images[2:3], [UPPER])


def test_huge_activity_is_scaled_before_it_is_halved(net: conelens.Network) -> None:
    images = planted(6).images
    small = Features.extract(net, images, [UPPER], scale="channel")
    model = PlantedNet().eval()
    with torch.no_grad():
        model.upper.weight *= 1e7
        model.upper.bias *= 1e7
    large = Features.extract(conelens.trace(model, (4, 96, 96)), images, [UPPER], scale="channel")
    torch.testing.assert_close(large[UPPER].float(), small[UPPER].float(), rtol=2e-3, atol=1e-3)


def silent_without_input() -> conelens.Network:
    model = PlantedNet().eval()
    with torch.no_grad():
        model.lower.bias.zero_()
        model.upper.bias.zero_()
    return conelens.trace(model, (4, 96, 96))


@pytest.mark.parametrize("first", [0.0, 1e-6])
def test_dark_images_may_come_first(first: float) -> None:
    net, images = silent_without_input(), planted(8).images
    images[:4] *= first
    dark = Features.extract(net, images, [UPPER], scale="channel", batch_size=2)
    bright = Features.extract(net, images.flip(0), [UPPER], scale="channel", batch_size=2)
    assert bool(dark[UPPER][4:].any())
    torch.testing.assert_close(dark[UPPER].flip(0).float(), bright[UPPER].float(), rtol=2e-3, atol=1e-3)


def test_deviations_that_there_are_none_of_are_not_divided_by(net: conelens.Network) -> None:
    image = planted(1).images
    for images in (image, image.repeat(3, 1, 1, 1)):
        with pytest.raises(DataError, match="each unit of layer upper is the same everywhere"):
            Features.extract(net, images, [UPPER], scale="unit")
        assert float(Features.extract(net, images, [UPPER]).maps[UPPER].max()) < 1000


def test_a_full_disk_is_an_error_before_the_work(
    net: conelens.Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, start: int, length: int) -> None:
        assert (start, length) == (0, 2 * 2 * 4 * 48 * 48)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device \(0.0 GB of features\): .*0.f16"):
        Features.extract(net, planted(2).images, [LOWER], memory=0, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["features.json"]


def test_what_a_killed_run_left_is_written_anew(net: conelens.Network, tmp_path: Path) -> None:
    images = planted(4).images
    (tmp_path / "0.f16").write_bytes(b"\xff" * 10_000_000)
    files = Features.extract(net, images, [UPPER], memory=0, folder=tmp_path)
    assert torch.equal(files[UPPER], Features.extract(net, images, [UPPER])[UPPER])
    before = files[UPPER].clone()
    Features.extract(net, images.flip(0), [UPPER], memory=0, folder=tmp_path)
    assert torch.equal(files[UPPER], before)  # somebody else's files by now


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_any_precision(net: conelens.Network, dtype: torch.dtype) -> None:
    images = planted(4).images
    other = conelens.trace(PlantedNet().to(dtype).eval(), (4, 96, 96))
    found, single = (Features.extract(*each, [UPPER]) for each in ((other, images.to(dtype)), (net, images)))
    assert found[UPPER].dtype == torch.float16 and found.scale[UPPER].dtype == torch.float32
    tolerance = 1e-3 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(found[UPPER].float(), single[UPPER].float(), rtol=tolerance, atol=tolerance)


def test_bad_arguments_are_named(net: conelens.Network) -> None:
    images = planted(2).images
    with pytest.raises(ArgumentError, match="layers: got none"):
        Features.extract(net, images, [])
    with pytest.raises(ArgumentError, match="images: got none"):
        Features.extract(net, images[:0], [UPPER])
    with pytest.raises(ArgumentError, match="batch_size: got 0"):
        Features.extract(net, images, [UPPER], batch_size=0)
    with pytest.raises(ArgumentError, match="scale: got 'both'"):
        Features.extract(net, images, [UPPER], scale="both")
    with pytest.raises(ArgumentError, match=r"scale\['upper'\]: got shape \(2, 1, 1\)"):
        Features.extract(net, images, [UPPER], scale={UPPER: torch.ones(2, 1, 1)})
    with pytest.raises(LayerError, match="did you mean upper"):
        Features.extract(net, images, ["uper"])
    with pytest.raises(LayerError, match="wanted one of upper"):
        Features.extract(net, images, [UPPER])["lower"]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1)).eval()
    with pytest.raises(LayerError, match="no map of places"):
        grid_of(conelens.trace(model, (3, 8, 8)), "1")
