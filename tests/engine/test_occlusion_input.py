"""What a sweep is given: grids, images, fills and settings of every spelling, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import conelens
from conelens.network import Network
from conelens.occlusion import Windows, make_windows

# --- grids -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (([20], [25], [0], [4]), "tops, bottoms: got a window from 20 to 25"),
        (([0], [4], [0, 18], [4, 21]), "lefts, rights: got a window from 18 to 21"),
        (([-1], [4], [0], [4]), "from -1 to 4"),
        (([4], [4], [0], [4]), "from 4 to 4"),
        (([0, 1], [4], [0], [4]), "bottoms: got 1 of them for 2 tops"),
        (([], [], [0], [4]), "tops: got"),
        (([0], [4], [0.5], [4]), "lefts: got"),
        (([[0]], [[4]], [0], [4]), "tops: got"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(grid: tuple[list[int], ...], message: str) -> None:
    with pytest.raises(conelens.ArgumentError, match=message):
        Windows(*map(np.array, grid), (24, 20))
    with pytest.raises(conelens.ArgumentError, match="image_size: got 0"):
        Windows([0], [4], [0], [4], 0)  # type: ignore[arg-type]


def test_a_grid_of_lists_in_any_order(net: Network, images: Tensor) -> None:
    """The same windows, sorted and not, one of them twice: the same numbers and the same pictures."""
    order = [2, 0, 1]
    lefts = np.array([0, 3, 11])
    sweep = conelens.occlude(net, images, Windows(np.array([0, 7, 15]), np.array([6, 13, 24]), lefts, lefts + 9, (24, 20)))
    mixed = Windows([15, 0, 7], [24, 6, 13], [11, 0, 3], [20, 9, 12], (24, 20))  # type: ignore[arg-type]
    for form in ("gather", "delta", "rerun"):
        other = conelens.occlude(net, images, mixed, form=form)
        assert torch.allclose(other.outputs, sweep.outputs[:, order][:, :, order], rtol=1e-12, atol=1e-12)
        assert torch.allclose(other.heatmap(1), sweep.heatmap(1), rtol=1e-10, atol=1e-12)
        covered = [one.pixel_map(one.drop(1)) for one in (other, sweep)]
        assert torch.allclose(*covered, rtol=1e-10, atol=1e-12, equal_nan=True)
    twice = Windows([0, 7, 7, 15], [6, 13, 13, 24], lefts, lefts + 9, (24, 20))  # type: ignore[arg-type]
    assert torch.allclose(conelens.occlude(net, images, twice).heatmap(1), sweep.heatmap(1), rtol=1e-10, atol=1e-12)


def test_a_grid_keeps_its_own_numbers() -> None:
    tops = np.array([0, 8])
    windows = Windows(tops, tops + 8, tops, tops + 8, (24, 20))
    tops[1] = 100
    assert windows.box(1, 1) == (8, 8, 16, 16)
    assert windows == windows
    assert len({windows, Windows(windows.tops, windows.bottoms, windows.lefts, windows.rights, (24, 20))}) == 2


def test_a_sweep_prints_in_a_line(net: Network, images: Tensor) -> None:
    sweep = conelens.occlude(net, images, 8, 8, record="0")
    assert repr(sweep) == "Sweep(2 images, 3x3 windows, 18 of 18 positions done, logits [4], recorded 0)"
    assert sweep == sweep
    assert sweep != conelens.occlude(net, images, 8, 8, record="0")


@pytest.mark.parametrize("cells", [24, 25])
def test_a_stride_longer_than_the_window_leaves_no_empty_window(cells: int) -> None:
    windows = make_windows((cells, 20), 2, 12, "clip")
    assert windows.tops.tolist() == [0, 12, 24][: cells - 22]
    assert (windows.bottoms - windows.tops).tolist() == [2, 2, 1][: cells - 22]


@pytest.mark.parametrize("window", [np.int64(8), (np.int32(8), torch.tensor(8)), [8, 8]])
def test_whole_numbers_of_every_type(window: object) -> None:
    windows = make_windows((24, 20), window, np.int16(4))  # type: ignore[arg-type]
    assert windows.largest == (8, 8)
    assert windows.tops.tolist() == [0, 4, 8, 12, 16]
    for wrong in (True, (8, True), 8.0, "88", np.array([8, 8]), None, np.int64(0)):
        with pytest.raises(conelens.ArgumentError, match="window: got"):
            make_windows((24, 20), wrong, 4)  # type: ignore[arg-type]


# --- what an interrupted sweep shows ---------------------------------------------------------------------------------------


def interrupted(net: Network, images: Tensor, after: int, **settings: Any) -> conelens.Sweep:
    """A sweep that was stopped after ``after`` portions."""
    portions = []

    def stop(done: int, total: int) -> None:
        portions.append(done)
        if len(portions) == after:
            raise KeyboardInterrupt

    with pytest.raises(conelens.SweepInterrupted) as stopped:
        conelens.occlude(net, images, progress=stop, **settings)
    return stopped.value.sweep


def test_pictures_of_an_interrupted_sweep(net: Network, images: Tensor) -> None:
    part = interrupted(net, images, 1, window=6, stride=3, border="clip", memory=2**24, form="rerun")
    assert 0 < int(part.done.sum()) < part.done.numel()
    drop = part.drop(0)
    total, count = torch.zeros(2, 24, 20, dtype=torch.float64), torch.zeros(2, 24, 20)
    for n, r, c in part.done.nonzero().tolist():
        top, left, bottom, right = part.windows.box(r, c)
        total[n, top:bottom, left:right] += drop[n, r, c]
        count[n, top:bottom, left:right] += 1
    assert count.min() == 0 < count.max()
    assert torch.allclose(part.pixel_map(drop), total / count, rtol=1e-12, atol=1e-12, equal_nan=True)
    with pytest.raises(conelens.ArgumentError, match="values: got"):
        part.pixel_map(drop[:1])
    for picture in (part.heatmap, lambda: part.upsample(drop)):
        with pytest.raises(conelens.ArgumentError, match=r"positions are done; go on with occlude\(\.\.\., resume=sweep\)"):
            picture()


def test_a_sweep_moves_between_devices(net: Network, images: Tensor) -> None:
    sweep = conelens.occlude(net, images, 8, 8, record="0")
    moved = sweep.to("meta")
    tensors = (moved.outputs, moved.clean, moved.done, *vars(moved.recorded("0")).values())
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.about == sweep.about
    assert sweep.to("cpu").outputs.data_ptr() == sweep.outputs.data_ptr()


def test_a_crash_between_the_two_files_leaves_a_whole_sweep(
    net: Network, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = conelens.occlude(net, images, 8, 8)
    old.save(tmp_path)
    replace, replaced = Path.replace, []

    def second_fails(self: Path, target: Path) -> Path:
        replaced.append(target.name)
        if len(replaced) == 2:
            raise OSError("power is gone")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(OSError, match="power"):
        conelens.occlude(net, images, 8, 8, "mean").save(tmp_path)
    held = conelens.Sweep.load(tmp_path)
    assert torch.equal(held.outputs, old.outputs)
    assert held.about == old.about, "numbers and settings are of the same sweep"


# --- fills, records, functions ---------------------------------------------------------------------------------------------


def test_arrays_as_fills(net: Network, images: Tensor) -> None:
    for fill in (images[0], images, images[:1, :, :1, :1]):
        expected = conelens.occlude(net, images, 8, 8, fill)
        for array in (fill.numpy(), fill.flip(-1).numpy()[..., ::-1]):
            assert torch.equal(conelens.occlude(net, images, 8, 8, array).outputs, expected.outputs)
    per_channel = conelens.occlude(net, images, 8, 8, np.array([1, 2, 3]))
    assert torch.equal(per_channel.outputs, conelens.occlude(net, images, 8, 8, [1, 2, 3]).outputs)


@pytest.mark.parametrize("fill", [None, [None, 1, 2], object(), [[1, 2], [3]], lambda x: None, np.array(["a"])])
def test_what_is_no_fill_is_refused(fill: object, net: Network, images: Tensor) -> None:
    with pytest.raises(conelens.ArgumentError, match="fill: got"):
        conelens.occlude(net, images, 8, 8, fill)


def test_channels_of_every_integer_type(net: Network, images: Tensor) -> None:
    for asked in (np.int64(3), 3, torch.tensor(3), [np.uint8(3)], np.array([3]), {3}):
        assert conelens.occlude(net, images, 8, 8, record={"0": asked}).recorded("0").channels.tolist() == [[3], [3]]
    for wrong in (True, [True], 1.5, [1.5], None, np.array([1.5])):
        with pytest.raises(conelens.ArgumentError, match=r"record: got .* for 0, wanted channel numbers"):
            conelens.occlude(net, images, 8, 8, record={"0": wrong})
    for wrong in (7, True, [["0"]]):
        with pytest.raises(conelens.ArgumentError, match=r"record: got .* wanted a layer's name"):
            conelens.occlude(net, images, 8, 8, record=wrong)  # type: ignore[arg-type]


def test_functions_that_work_in_place_leave_the_images_alone(model: nn.Module, images: Tensor) -> None:
    kept = images.clone()

    def in_place(x: Tensor) -> Tensor:
        return model(x.mul_(2))

    sweep = conelens.occlude(in_place, images, 8, 8, lambda x: x.neg_(), form="rerun")
    assert torch.equal(images, kept)
    expected = conelens.occlude(model, 2 * images, 8, 8, -2 * images, form="rerun")
    assert torch.allclose(sweep.outputs, expected.outputs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.flatten(1).argmax(1), r"net: returned torch.int64, wanted floating point; return output.float\(\)"),
        (lambda x: x.sum(), r"net: returned \(\) for 2 images"),
        (lambda x: x[:1].flatten(1), r"net: returned \(1, 1440\) for 2 images"),
        (lambda x: [x], "net: returned list for 2 images"),
    ],
)
def test_what_a_function_must_return(function: Callable[[Tensor], Tensor], message: str, images: Tensor) -> None:
    with pytest.raises(conelens.ArgumentError, match=message):
        conelens.occlude(function, images, 8, 8, form="rerun")


# --- images and settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["2G", 2**23, float("nan"), float("inf"), None])
def test_memory_is_a_number_of_bytes(memory: Any, net: Network, images: Tensor) -> None:
    with pytest.raises(conelens.ArgumentError, match="memory: got"):
        conelens.occlude(net, images, 8, 8, memory=memory)
    assert conelens.occlude(net, images, 8, 8, memory=2e9).complete  # type: ignore[arg-type]


def test_refusals_of_images_speak_of_images(model: nn.Module, net: Network, images: Tensor) -> None:
    for run in (model, lambda x: model(x)):
        for wrong in (images[:0], images[0], images.numpy(), None):
            with pytest.raises(conelens.ArgumentError, match=r"^images: got .*wanted"):
                conelens.occlude(run, wrong, 8, 8, form="rerun")
    for wrong in (images.float(), images.to("meta")):
        with pytest.raises(conelens.ArgumentError, match=r"^images: "):
            conelens.occlude(model, wrong, 8, 8)
    with pytest.raises(conelens.ArgumentError, match="fill: 'mean' needs floating-point images"):
        conelens.occlude(lambda x: x.double().flatten(1), images.byte(), 8, 8, "mean", form="rerun")


def test_images_and_fills_that_want_gradients(net: Network, images: Tensor) -> None:
    plain = conelens.occlude(net, images, 8, 8, images.flip(3))
    sweep = conelens.occlude(net, images.requires_grad_(), 8, 8, images.flip(3))
    assert torch.equal(sweep.outputs, plain.outputs)
    assert sweep.about == plain.about
