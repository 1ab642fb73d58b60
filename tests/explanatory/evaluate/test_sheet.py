"""The rating page: what it shows, that it is blind, and that ratings come back as purity."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conelens.errors import ArgumentError, DataError
from conelens.explanatory.evaluate import Detector
from conelens.explanatory.evaluate.sheet import SheetFiles, read_ratings, write_sheet

IMAGES, SIDE = 12, 64
CHROMIUM = shutil.which("chromium")


class Greys:
    """Photographs: image i has the grey 10 + 20 i, with a white dot at (20, 30)."""

    def __len__(self) -> int:
        return IMAGES

    def frame(self, index: int) -> np.ndarray:
        picture = np.full((SIDE, SIDE, 3), 10 + 20 * index, np.uint8)
        picture[18:23, 28:33] = 255
        return picture


def detectors() -> tuple[Detector, Detector]:
    """18 nodes of 6 filters; nodes stand at the dot, filters 20 pixels below."""
    generator = torch.Generator().manual_seed(0)
    here = torch.tensor([20.0, 30.0])
    nodes = Detector("nodes", here.expand(IMAGES, 18, 2), torch.rand(IMAGES, 18, generator=generator) + 0.1)
    filters = Detector("filters", (here + 20).expand(IMAGES, 6, 2), torch.rand(IMAGES, 6, generator=generator) + 0.1)
    return nodes, filters


def sheet_at(folder: Path, **options: Any) -> SheetFiles:
    return write_sheet(folder / "rate.html", Greys(), *detectors(), **({"count": 4, "top": 3, "radius": 6.0} | options))


def content_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    content: dict[str, Any] = json.loads(found[1])
    return content


def checksum(sheet: str, rows: list[dict[str, Any]]) -> int:
    """FNV-1a once more."""
    text = "\n".join([sheet, *(f"{row['row']}:{','.join(map(str, row['same']))}:{row['part']}" for row in rows)])
    value = 2166136261
    for byte in text.encode():
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    return value


def rate(files: SheetFiles, marks: dict[str, int], name: str = "ratings.json") -> Path:
    """A rater who marks so many pictures of each row of nodes and filters."""
    key = json.loads(files.key.read_text())
    rows = [
        {"row": n, "same": list(range(1, marks[row["kind"]] + 1)), "part": f"Auge {row['kind']} é"}
        for n, row in enumerate(key["rows"])
    ]
    ratings = {"format": "conelens.ratings 1", "sheet": key["sheet"], "rater": "me", "rows": rows}
    path = files.page.with_name(name)
    path.write_text(json.dumps(ratings | {"checksum": checksum(key["sheet"], rows)}))
    return path


def test_rows_hold_the_top_images_of_nodes_and_filters(tmp_path: Path) -> None:
    files = sheet_at(tmp_path)
    nodes, filters = detectors()
    rows, key = content_of(files.page)["rows"], json.loads(files.key.read_text())["rows"]
    assert len(rows) == len(key) == 8 and {row["pair"] for row in key} == {0, 1, 2, 3}
    chosen = {
        kind: [row["index"] for row in sorted(key, key=lambda r: r["pair"]) if row["kind"] == kind]
        for kind in ("node", "filter")
    }
    assert [node // 3 for node in chosen["node"]] == chosen["filter"] and len(set(chosen["filter"])) == 4
    for row, about in zip(rows, key, strict=True):
        detector = nodes if about["kind"] == "node" else filters
        expected = np.argsort(-detector.scores[:, about["index"]].numpy())[:3].tolist()
        assert about["images"] == expected
        for source, image in zip(row, expected, strict=True):
            picture = np.asarray(
                Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))).convert("RGB")
            )
            assert picture.shape == (150, 150, 3)
            inside = int(picture[75 + 40, 75].mean())  # in the circle (radius 50 on the page), away from the dot
            assert abs(inside - (10 + 20 * image)) < 12
            assert (picture[70:80, 70:80].min() > 230) == (about["kind"] == "node")  # the middle is the position
            outside = 10 + 20 * image if about["kind"] == "filter" else None
            if outside is not None:
                assert abs(int(picture[5, 75].mean()) - (0.35 * outside + 0.65 * 128)) < 12  # dimmed


def test_the_page_is_blind_self_contained_and_seeded(tmp_path: Path) -> None:
    files = sheet_at(tmp_path / "a", parts=["head", "</script><b>"])
    text = files.page.read_text()
    kinds = [row["kind"] for row in json.loads(files.key.read_text())["rows"]]
    assert sorted(kinds) == ["filter"] * 4 + ["node"] * 4 and kinds not in (
        ["filter"] * 4 + ["node"] * 4,
        ["node", "filter"] * 4,
    )
    assert not re.search(r"https?://|src=\"(?!data:)|(?<!\.)\bfilters?\b|\bnodes?\b", text)
    content = content_of(files.page)
    assert content["parts"] == ["head", "</script><b>"] and text.count("</script>") == 2
    assert set(content) == {"format", "sheet", "parts", "rows"}
    again, other = sheet_at(tmp_path / "b", parts=["head", "</script><b>"]), sheet_at(tmp_path / "c", seed=1)
    assert again.page.read_bytes() == files.page.read_bytes() and again.key.read_bytes() == files.key.read_bytes()
    assert other.key.read_bytes() != files.key.read_bytes()


def test_ratings_come_back_as_purity(tmp_path: Path) -> None:
    files = sheet_at(tmp_path)
    found = read_ratings(rate(files, {"node": 3, "filter": 1}), files.key)
    assert found.nodes == (1.0, 1.0, 1.0)
    assert found.filters.estimate == pytest.approx(1 / 3) and found.difference.estimate == pytest.approx(2 / 3)
    assert found.difference.excludes_zero and found.shares.shape == (4, 2)
    assert found.parts == [(["Auge node é"], ["Auge filter é"])] * 4
    second = rate(files, {"node": 1, "filter": 1}, "second.json")
    both = read_ratings([files.page.with_name("ratings.json"), second], files.key)
    assert both.nodes.estimate == pytest.approx((1 + 1 / 3) / 2) and len(both.parts[0][0]) == 2


def test_the_interval_is_over_pairs(tmp_path: Path) -> None:
    files = sheet_at(tmp_path)
    path = rate(files, {"node": 2, "filter": 1})
    ratings, key = json.loads(path.read_text()), json.loads(files.key.read_text())
    for row, about in zip(ratings["rows"], key["rows"], strict=True):
        if about["pair"] == 0:  # one pair where the filter is better
            row["same"] = [1, 2, 3] if about["kind"] == "filter" else []
    path.write_text(json.dumps(ratings | {"checksum": checksum(key["sheet"], ratings["rows"])}))
    found = read_ratings(path, files.key)
    assert found.shares[0].tolist() == [0.0, 1.0] and found.difference.estimate == pytest.approx((3 * (1 / 3) - 1) / 4)
    assert found.difference.low < 0 < found.difference.high


def test_tampered_and_incomplete_ratings_are_refused(tmp_path: Path) -> None:
    files = sheet_at(tmp_path)
    path = rate(files, {"node": 3, "filter": 1})
    good = json.loads(path.read_text())

    def refused(told: str, seal: bool = True, **changes: Any) -> None:
        ratings = good | changes
        if seal and "checksum" not in changes:
            ratings["checksum"] = checksum(ratings["sheet"], ratings["rows"])
        path.write_text(json.dumps(ratings))
        with pytest.raises(DataError, match=told):
            read_ratings(path, files.key)

    rows = good["rows"]
    refused("changed after", seal=False, rows=[rows[0] | {"same": [1]}, *rows[1:]])
    refused("changed after", seal=False, rows=[rows[0] | {"part": "x"}, *rows[1:]])
    refused("changed after", rows=[rows[0] | {"same": [1, 2, 4]}, *rows[1:]])
    refused("changed after", rows=[rows[0] | {"same": [2, 2]}, *rows[1:]])
    refused("changed after", rows=[*rows, rows[0] | {"row": 8}])
    refused("changed after", rows=[*rows, rows[0]])
    refused("changed after", checksum=None)
    refused("damaged", seal=False, rows=[{"row": 0}])
    refused("damaged", seal=False, rows=7)
    refused(r"2 of 8 rows are not rated \(the first is 4\)", rows=[*rows[:3], *rows[5:]])
    refused("give the key of the same page", sheet="0123456789abcdef")
    refused("not a file of the format", format="other")
    path.write_text("no json")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_ratings(path, files.key)
    with pytest.raises(DataError, match="cannot be read"):
        read_ratings(tmp_path / "none.json", files.key)
    with pytest.raises(ArgumentError, match="at least one rater"):
        read_ratings([], files.key)
    key = json.loads(files.key.read_text())
    for wrong in (key | {"rows": key["rows"][1:]}, key | {"rows": 3}, {**key, "top": None}):
        files.key.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="the key of the sheet is damaged"):
            read_ratings(path, files.key)


def test_refusals(tmp_path: Path) -> None:
    nodes, filters = detectors()

    def refused(told: str, *given: Any, **options: Any) -> None:
        with pytest.raises(ArgumentError, match=told):
            write_sheet(tmp_path / "x.html", Greys(), *given, **({"count": 4, "top": 3} | options))
        assert not list(tmp_path.iterdir())

    refused("wanted at most 6", nodes, filters, count=7)
    refused("wanted at most 6", nodes, filters, count=7, top=9)
    refused("top, count, radius", nodes, filters, top=10)
    refused("top, count, radius", nodes, filters, radius=0.0)
    refused("dataset: got 12 images", nodes.images(torch.arange(5)), filters)
    refused("filter_of: got none for 18 nodes and 5 filters", nodes, filters.nodes(torch.arange(5)))
    refused("wanted a filter 0..5", nodes, filters, torch.full((18,), 6))
    unseen = Detector("unseen", nodes.positions, torch.where(torch.arange(12)[:, None] < 2, nodes.scores, 0.0))
    refused("wanted at most 0", unseen, filters)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to press keys on the page")
def test_keys_pressed_on_the_page(tmp_path: Path) -> None:
    files = sheet_at(tmp_path)
    presses = ["1", "2", "Enter", "0", "ArrowRight", "3", "2", "1", "2", "Enter", *["1", "Enter"] * 5]
    harness = f"""<script>
      for (const key of {json.dumps(presses)})
        document.body.dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true }}));
      state.parts[2] = "œil: é";
      const told = document.createElement("pre");
      told.id = "told-ratings";
      told.textContent = JSON.stringify(ratings());
      document.body.replaceChildren(told);
    </script>"""
    driven = tmp_path / "driven.html"
    driven.write_text(files.page.read_text().replace("</body>", harness + "</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--dump-dom", driven.as_uri()], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    found = re.search(r'<pre id="told-ratings">(.*?)</pre>', shown, re.S)
    assert found is not None
    path = tmp_path / "ratings.json"
    path.write_text(found[1])
    rows = json.loads(found[1])["rows"]
    assert [row["same"] for row in rows] == [[1, 2], [], [1, 3], *[[1]] * 5]
    ratings = read_ratings(path, files.key)  # the page's checksum is the one that is wanted
    assert sum(ratings.shares.flatten().tolist()) == pytest.approx((2 + 0 + 2 + 5) / 3)
    assert "œil: é" in [part for pair in ratings.parts for names in pair for part in names]
