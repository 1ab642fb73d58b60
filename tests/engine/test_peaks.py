"""PeakTable: equal to brute force, mergeable in any order, resumable, and honest about what it skipped."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import conelens
from conelens.errors import ArgumentError, CheckpointError, DataError
from conelens.peaks import Interrupted, LayerPeaks, Peak, PeakTable


@pytest.fixture(scope="module")
def net() -> conelens.Network:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2)).eval()
    return conelens.trace(model, (2, 11, 9))


@pytest.fixture(scope="module")
def images() -> Tensor:
    x = torch.randn(23, 2, 11, 9, generator=torch.Generator().manual_seed(2))
    x[7] = x[3]  # an exact duplicate: ties are ordered by image
    return x


def brute_force(net: conelens.Network, images: Tensor, layer: str, channel: int, k: int, distinct: str) -> list[tuple]:
    maps = net.forward(images, [layer])[layer][:, channel]
    records = [
        (-float(maps[n, y, x]), n, y, x)
        for n, y, x in itertools.product(*(range(s) for s in maps.shape))
        if float(maps[n, y, x]) > 0
    ]
    chosen, seen = [], set()
    for record in sorted(records):
        if distinct == "none" or record[1] not in seen:
            chosen.append(record)
            seen.add(record[1])
    return [(n, y, x) for _, n, y, x in chosen[:k]]


@pytest.mark.parametrize("distinct", ["image", "none"])
@pytest.mark.parametrize("layer", ["0", "3"])
def test_equals_brute_force(net: conelens.Network, images: Tensor, layer: str, distinct: str) -> None:
    table = conelens.top_peaks(net, images, [layer], k=6, distinct=distinct, batch_size=23)
    for channel in range(net[layer].shape[0]):
        wanted = brute_force(net, images, layer, channel, 6, distinct)
        assert [(p.image, p.y, p.x) for p in table.top(layer, channel)] == wanted
    assert table.seen == 23


@pytest.mark.parametrize("distinct", ["image", "none"])
def test_any_batch_size_and_any_merge_order_give_the_same(net: conelens.Network, images: Tensor, distinct: str) -> None:
    class Slice:
        def __init__(self, start: int, stop: int) -> None:
            self.range = range(start, stop)

        def __len__(self) -> int:
            return self.range.stop

        def __getitem__(self, index: int) -> Tensor:
            if index not in self.range:
                raise DataError("belongs to another part")
            return images[index]

    whole = conelens.top_peaks(net, images, ["3"], k=4, distinct=distinct, batch_size=1)
    with pytest.warns(UserWarning, match="another part"):
        parts = [
            conelens.top_peaks(net, Slice(a, b), ["3"], k=4, distinct=distinct, batch_size=5)
            for a, b in ((0, 9), (9, 10), (10, 23))
        ]
    for order in itertools.permutations(parts):
        merged = order[0] + order[1] + order[2]
        other = order[0] + (order[1] + order[2])
        for channel in range(5):
            wanted = [(p.image, p.y, p.x) for p in whole.top("3", channel)]
            assert [(p.image, p.y, p.x) for p in merged.top("3", channel)] == wanted
            assert other.top("3", channel) == merged.top("3", channel)


def test_fewer_images_than_k_and_channels_that_never_fire(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3)).eval()
    model[0].bias.data = torch.tensor([-1e3, 0.0, 1e3])
    table = conelens.top_peaks(conelens.trace(model, (2, 11, 9)), images[:2], ["0"], k=9)
    assert [len(table.top("0", c)) for c in range(3)] == [0, 2, 2]


def test_broken_and_infinite_items_are_named_and_skipped(net: conelens.Network, images: Tensor) -> None:
    class Faulty:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Tensor:
            if index == 1:
                raise DataError("image 1 is truncated")
            return images[index] * (float("inf") if index == 4 else 1)

    with pytest.warns(UserWarning) as caught:
        table = conelens.top_peaks(net, Faulty(), ["3"], k=9, batch_size=2)
    told = " ".join(str(w.message) for w in caught)
    assert "image 1 is truncated" in told and "image 4 holds NaN or infinity" in told
    used = {p.image for c in range(5) for p in table.top("3", c)}
    assert used <= {0, 2, 3, 5} and table.seen == 6


def test_interrupt_keeps_what_is_done_and_resumes(net: conelens.Network, images: Tensor) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        conelens.top_peaks(net, images, ["3"], k=4, batch_size=5, progress=stop)
    partial = caught.value.table
    assert partial.seen == 10
    steps: list[tuple[int, int]] = []
    resumed = conelens.top_peaks(net, images, ["3"], k=4, batch_size=5, resume=partial, progress=lambda *s: steps.append(s))
    assert steps[0] == (15, 23) and steps[-1] == (23, 23)
    whole = conelens.top_peaks(net, images, ["3"], k=4, batch_size=5)
    assert all(resumed.top("3", c) == whole.top("3", c) for c in range(5))


def test_saves_and_loads_and_refuses_other_files(net: conelens.Network, images: Tensor, tmp_path: Path) -> None:
    table = conelens.top_peaks(net, images, ["0", "3"], k=3)
    table.save(tmp_path / "peaks.safetensors")
    again = PeakTable.load(tmp_path / "peaks.safetensors")
    assert (again.k, again.distinct, again.seen) == (3, "image", 23)
    assert all(again.top("3", c) == table.top("3", c) for c in range(5))
    assert isinstance(again.top("3", 0)[0], Peak)
    assert not list(tmp_path.glob("*.part"))
    for content in (b"", b"not a table", (tmp_path / "peaks.safetensors").read_bytes()[:100]):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(CheckpointError, match="no peak table"):
            PeakTable.load(tmp_path / "other")


def test_bad_arguments_are_named(net: conelens.Network, images: Tensor) -> None:
    table = conelens.top_peaks(net, images[:3], ["3"], k=2)
    for call, message in (
        (lambda: conelens.top_peaks(net, images, ["3"], distinct="class"), "distinct: got 'class'"),
        (lambda: conelens.top_peaks(net, images, ["3"], k=0), "k and batch_size: got 0"),
        (lambda: conelens.top_peaks(net, images, []), "layers: got none"),
        (lambda: conelens.top_peaks(net, images, ["0"], resume=table), r"resume: that table has .*\['3'\]\), wanted .*\['0'\]"),
        (lambda: conelens.top_peaks(net, images.double(), ["3"]), "images: got torch.float64"),
        (lambda: table.top("0", 0), "layer: got '0'"),
        (lambda: table.top("3", 5), "channel: got 5, wanted 0..4"),
        (lambda: table.top("3", 0, k=3), "k: got 3, wanted 1..2"),
        (lambda: table + conelens.top_peaks(net, images[:3], ["3"], k=3), "tables differ"),
    ):
        with pytest.raises(conelens.ArgumentError, match=message):
            call()


def test_peaks_of_many_places_need_little_memory() -> None:
    """Merging sorts; comparing all pairs of 3000 peaks in 64 channels would take half a gigabyte."""
    rng = np.random.default_rng(0)
    shape = (64, 3000)
    place = (rng.integers(0, 40, shape) for _ in range(3))
    many = LayerPeaks(rng.random(shape, np.float32) + 1, *place)
    tracemalloc.start()
    best = many.best(50, "none")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20
    cells = zip(many.image[5], many.y[5], many.x[5], strict=True)
    strongest: dict[tuple[int, ...], float] = {}
    for cell, value in zip(cells, many.value[5], strict=True):
        strongest[cell] = max(value, strongest.get(cell, 0))
    assert best.value[5].tolist() == sorted(strongest.values(), reverse=True)[:50]


@pytest.mark.parametrize("distinct", ["image", "none"])
def test_a_network_that_gives_nan_is_named(distinct: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1)).eval()
    nn.init.constant_(model[0].bias, float("nan"))
    net = conelens.trace(model, (2, 4, 4))
    with pytest.raises(ArgumentError, match="gives NaN for finite images"):
        conelens.top_peaks(net, torch.zeros(2, 2, 4, 4), ["0"], distinct=distinct)


def test_datasets_that_do_not_fit_are_named(net: conelens.Network, images: Tensor) -> None:
    table = conelens.top_peaks(net, images, ["3"])
    with pytest.raises(ArgumentError, match="has seen 23 images, but the data set holds 5"):
        conelens.top_peaks(net, images[:5], ["3"], resume=table)
    with pytest.raises(ArgumentError, match="item 0 is a tuple, wanted a tensor"):
        conelens.top_peaks(net, [(image, 0) for image in images], ["3"])  # type: ignore[arg-type]


def test_a_table_of_other_data_is_refused(net: conelens.Network, images: Tensor, tmp_path: Path) -> None:
    ours = conelens.top_peaks(net, images[:9], ["3"], source="weights:1 images:2")
    ours.save(tmp_path / "peaks.safetensors")
    kept = PeakTable.load(tmp_path / "peaks.safetensors")
    assert kept.source == "weights:1 images:2"
    assert conelens.top_peaks(net, images, ["3"], resume=kept, source=kept.source).source == kept.source
    assert (kept + ours).source == kept.source
    for source in ("weights:9 images:2", ""):
        with pytest.raises(ArgumentError, match=rf"is 'weights:1 images:2', wanted '{source}'; go on with"):
            conelens.top_peaks(net, images, ["3"], resume=kept, source=source)
        with pytest.raises(ArgumentError, match="tables differ in source"):
            kept + conelens.top_peaks(net, images[:9], ["3"], source=source)


def test_a_table_is_shown_short_and_saved_as_other_files_are(net: conelens.Network, images: Tensor, tmp_path: Path) -> None:
    table = conelens.top_peaks(net, images[:3], ["0", "3"], k=2)
    assert repr(table) == "PeakTable(0, 3; k=2, distinct='image', 3 images seen)"
    (tmp_path / "plain").touch()
    table.save(tmp_path / "peaks")
    assert (tmp_path / "peaks").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(OSError, match="directory"):
        table.save(tmp_path / "plain" / "peaks")


def test_public_names() -> None:
    assert conelens.Interrupted is Interrupted
    assert issubclass(conelens.TraceError, conelens.ConelensError)
