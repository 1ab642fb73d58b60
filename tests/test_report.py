"""Winners become panels, pages are self-contained, and every number on them can be traced back."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import conelens
from conelens.data import ImageFolder, Preprocess, TiledFolder
from conelens.errors import ArgumentError
from conelens.models import load_model
from conelens.models.registry import LoadedModel
from conelens.peaks import top_peaks
from conelens.report import Figure, Page, Section, Table, open_workbench, pick, winners, write_page

RECIPE = Preprocess(size=(24, 24), scale=1 / 255, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0), fit="none")


def spots(folder: Path, count: int = 4) -> Path:
    """Black images with one white spot each, at known places, brighter by number."""
    for i in range(count):
        values = np.zeros((24, 24, 3), np.uint8)
        values[4 * i + 4, 5 * i + 4] = 120 + 40 * i
        Image.fromarray(values).save(folder / f"spot{i}.png")
    return folder


def spot_finder() -> nn.Module:
    """Channel 0 answers to bright pixels, channel 1 never fires."""
    layer = nn.Conv2d(3, 2, 3, padding=1)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, :, 1, 1] = 1.0
        layer.weight[1, :, 1, 1] = -1.0
        layer.bias.copy_(torch.tensor([1.5, -9.0]))
    return nn.Sequential(layer, nn.ReLU()).eval()


def test_winners_show_the_patch_under_the_unit_and_its_projection(tmp_path: Path) -> None:
    dataset = ImageFolder(spots(tmp_path), RECIPE)
    net = conelens.trace(spot_finder(), (3, 24, 24))
    table = top_peaks(net, dataset, ["0"], k=3)
    fired, dead = winners(net, dataset, table, "0", [0, 1], k=3)
    assert [p.image for p in fired.peaks] == [3, 2, 1]
    assert fired.labels == ["spot3.png", "spot2.png", "spot1.png"]
    for peak, patch, projection in zip(fired.peaks, fired.patches, fired.projections):
        assert (peak.y, peak.x) == (4 * peak.image + 4, 5 * peak.image + 4)
        assert patch.shape == (3, 3, 3)
        assert patch[1, 1].tolist() == [120 + 40 * peak.image] * 3
        assert patch.sum() == patch[1, 1].sum()
        assert projection[:, 1, 1] == pytest.approx([peak.value] * 3)
    assert dead.dead
    assert "dead" in dead.panel().title


def test_one_winner_per_photograph(tmp_path: Path) -> None:
    tiles = TiledFolder(spots(tmp_path), RECIPE, scales=(1.0, 0.7), smallest=4)
    assert len(tiles) > 4
    net = conelens.trace(spot_finder(), (3, 24, 24))
    table = top_peaks(net, tiles, ["0"], k=len(tiles))
    several = pick(table, tiles, "0", 0, 9, None)
    single = pick(table, tiles, "0", 0, 9, 1)
    assert len({tiles.source(p.image) for p in several}) < len(several)
    assert len({tiles.source(p.image) for p in single}) == len(single) == 4
    assert single[0] == several[0]


def test_a_page_embeds_its_pictures_and_writes_them_beside(tmp_path: Path) -> None:
    picture = Image.new("RGB", (6, 4), (10, 200, 30))
    page = Page("title <b>", "intro")
    page.sections.append(
        Section("one", "text", [Figure("a/b c", picture, "shows")], [Table(("h",), [("<i>cell</i>",)])], "pre")
    )
    path = write_page(page, tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    beside = tmp_path / "out" / "figures" / "a_b_c.png"
    (embedded,) = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    assert base64.b64decode(embedded) == beside.read_bytes()
    assert "title &lt;b&gt;" in text
    assert "&lt;i&gt;cell&lt;/i&gt;" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text), "a self-contained page loads nothing"


def test_two_figures_of_one_name_are_refused(tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 2))
    page = Page("t", sections=[Section("s", figures=[Figure("same", picture), Figure("same", picture)])])
    with pytest.raises(ArgumentError, match="same"):
        write_page(page, tmp_path)


def test_the_workbench_knows_the_papers_names() -> None:
    bench = open_workbench(load_model("squeezenet1_1"))
    assert bench.net["fire6"].name == "features.9"
    assert bench.net["fire6"].receptive_field == (111, 111)
    assert bench.net["conv10"].shape[0] == 1000


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ArgumentError, match="device"):
        open_workbench(LoadedModel("x", spot_finder(), RECIPE), device)
