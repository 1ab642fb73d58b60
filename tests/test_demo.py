"""The demonstration writes one self-contained page with everything it promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conelens import demo
from conelens.assets import photographs
from conelens.data import TiledFolder
from conelens.models import load_model
from conelens.peaks import PeakTable


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The whole demonstration, once."""
    pytest.importorskip("jinja2")
    said: list[str] = []
    path = demo.run_demo(tmp_path_factory.mktemp("demo"), said.append)
    return path, said


def test_there_are_enough_tiles_layers_and_channels() -> None:
    tiles = TiledFolder(photographs(), load_model("squeezenet1_1").preprocess, demo.SCALES, smallest=100)
    assert len(tiles) >= 100
    assert len({t.side for t in tiles.tiles}) > 2
    assert len(demo.SHOWN) >= 4
    assert all(len(chosen) >= 4 for chosen in demo.SHOWN.values())


def test_the_page_holds_all_parts_and_loads_nothing(made: tuple[Path, list[str]]) -> None:
    text = made[0].read_text(encoding="utf-8")
    for part in (
        "Predictions",
        "Feature maps per stage",
        "Occlusion",
        "Cone against whole image",
        "What runs here",
        "Photographs",
    ):
        assert part in text
    for layer, chosen in demo.SHOWN.items():
        assert f"Strongest units of {layer}" in text
        for channel in chosen:
            assert (made[0].parent / "figures" / f"top_{layer}_{channel}.png").is_file()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert text.count("creativecommons.org") >= 60, "credits of the photographs"


def test_covering_what_the_picture_is_of_costs_its_class(made: tuple[Path, list[str]]) -> None:
    text = made[0].read_text(encoding="utf-8")
    for name, label in (("duck", "goose"), ("komodo_dragon", "Komodo dragon"), ("sheep", "ram")):
        cells = re.search(rf"<td>{name}.jpg</td><td>{label}</td><td>(\d+)%</td><td>(\d+)% at", text)
        assert cells, name
        assert int(cells[1]) > 70
        assert int(cells[2]) < 15
        assert (made[0].parent / "figures" / f"overlay_{name}.png").is_file()
    assert (made[0].parent / "figures" / "occlusion.png").is_file()


def test_each_shown_channel_has_nine_winners_from_nine_photographs(made: tuple[Path, list[str]]) -> None:
    table = PeakTable.load(made[0].parent / "peaks.safetensors")
    tiles = TiledFolder(photographs(), load_model("squeezenet1_1").preprocess, demo.SCALES, smallest=100)
    for layer, chosen in demo.SHOWN.items():
        for channel in chosen:
            sources = {tiles.source(p.image) for p in table.top(layer, channel)}
            assert len(sources) >= 9, (layer, channel)


def test_the_eye_channel_still_finds_eyes(made: tuple[Path, list[str]]) -> None:
    """Guards the weights, the recipe and the search at once: fire5 channel 217 was read off the pictures."""
    table = PeakTable.load(made[0].parent / "peaks.safetensors")
    tiles = TiledFolder(photographs(), load_model("squeezenet1_1").preprocess, demo.SCALES, smallest=100)
    order: list[str] = []
    for peak in table.top("fire5", 217):
        name = tiles.source(peak.image).stem
        if name not in order:
            order.append(name)
    assert set(order[:6]) == {"lemur", "angelfish", "clownfish", "multimeter", "kitten", "goldfish"}


def test_it_says_what_it_does(made: tuple[Path, list[str]]) -> None:
    assert made[0].name == "report.html"
    assert any("tiles" in line for line in made[1])
    assert any("in all" in line for line in made[1])
