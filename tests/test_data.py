"""Images from folders: every kind of file a folder may hold, and the geometry of frames and tiles."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conelens.data import (
    ImageFolder,
    Preprocess,
    TiledFolder,
    find_images,
    image_size,
    iter_batches,
    load_image,
)
from conelens.errors import ArgumentError, DataError

PLAIN = Preprocess(size=(32, 32))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth colour ramp with a seed-dependent tint: survives JPEG, differs between images."""
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 / width, y * 255 / height, np.full_like(x, 40 * seed % 256)], -1)
    return Image.fromarray(values.astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size it does not hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 64)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good images, one of them nested, between files of every bad kind."""
    (tmp_path / "b").mkdir()
    picture(40, 60, 1).save(tmp_path / "a.jpg", quality=95)
    picture(60, 40, 2).save(tmp_path / "b" / "c.png")
    picture(50, 50, 3).save(tmp_path / "z_no_suffix", format="PNG")
    (tmp_path / "not_an_image.jpg").write_text("just words")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg", quality=95)
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bomb.png").write_bytes(png_header(30000, 30000))
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / ".hidden.jpg").write_text("not looked at")
    return tmp_path


def test_a_folder_is_searched_deeply_in_sorted_order_and_by_content(folder: Path) -> None:
    names = [p.relative_to(folder).as_posix() for p in find_images(folder)]
    assert names == ["a.jpg", "b/c.png", "bomb.png", "cut.jpg", "not_an_image.jpg", "z_no_suffix"]


@pytest.mark.parametrize("threads", [0, 3])
def test_broken_files_are_named_and_the_rest_goes_on(folder: Path, threads: int) -> None:
    dataset = ImageFolder(folder, PLAIN)
    problems: dict[str, str] = {}
    batches = list(iter_batches(dataset, 2, threads, lambda i, e: problems.__setitem__(dataset.label(i), str(e))))
    assert [b.indices for b in batches] == [[0, 1], [5]]
    assert set(problems) == {"bomb.png", "cut.jpg", "not_an_image.jpg"}
    assert "decompression bomb" in problems["bomb.png"]
    assert "scale it down" in problems["bomb.png"], "what a user of the command can do, too"
    assert "broken" in problems["cut.jpg"]
    assert "not an image" in problems["not_an_image.jpg"]
    assert all(name in text for name, text in problems.items())
    expected = torch.stack([dataset[0], dataset[1]])
    assert torch.equal(batches[0].images, expected)


def test_without_a_callback_a_broken_file_stops_the_job(folder: Path) -> None:
    with pytest.raises(DataError, match=r"bomb\.png"):
        list(iter_batches(ImageFolder(folder, PLAIN), 2))


def test_a_picture_that_pillow_only_warns_about_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(40, 40).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="more than 1000 pixels"):
        load_image(tmp_path / "big.png")


@pytest.mark.parametrize(("path", "message"), [("absent.png", "no such file"), (".", "cannot be opened")])
def test_missing_files_are_named(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_image(tmp_path / path)


def test_a_folder_without_images_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image files"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        find_images(tmp_path / "absent")


def test_a_link_back_up_does_not_loop(tmp_path: Path) -> None:
    picture(20, 20).save(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(find_images(tmp_path)) == 1


def test_orientation_is_honoured(tmp_path: Path) -> None:
    image = picture(20, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    image.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert image_size(tmp_path / "turned.png") == (40, 20)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


def test_alpha_is_laid_on_white_and_palettes_keep_their_transparency(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (4, 4), (0, 255)).save(tmp_path / "grey.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (0, 0, 0)
    assert load_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="agreed range"):
        load_image(tmp_path / "float.tif")


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    red, green, blue = load_image(tmp_path / "print.jpg").getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    assert load_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def test_crop_takes_the_centre_of_the_scaled_image() -> None:
    image = Image.new("RGB", (90, 30), "black")
    image.paste("white", (30, 0, 60, 30))
    frame = Preprocess(size=(30, 30), short_side=30).frame(image)
    assert frame.shape == (30, 30, 3)
    assert (frame == 255).all()


def test_crop_reaches_a_frame_wider_than_the_image() -> None:
    assert Preprocess(size=(20, 80)).frame(picture(40, 30)).shape == (20, 80, 3)


def test_letterbox_pads_with_zeros_of_the_network() -> None:
    recipe = Preprocess(size=(40, 40), scale=1.0, mean=(100.0, 110.0, 120.0), fit="letterbox")
    x = recipe(picture(20, 40))
    assert torch.equal(x[:, :10], torch.zeros(3, 10, 40))
    assert torch.equal(x[:, 30:], torch.zeros(3, 10, 40))
    assert x[:, 10:30].abs().max() > 50


def test_pixels_inverts_tensor() -> None:
    recipe = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    frame = np.asarray(picture(64, 48, 5))
    assert np.array_equal(recipe.pixels(recipe.tensor(frame)), frame)


@pytest.mark.parametrize(
    "wrong",
    [{"fit": "zoom"}, {"size": (0, 3)}, {"mean": (1.0,)}, {"std": (1.0, 0.0, 1.0)}],
)
def test_a_wrong_recipe_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        Preprocess(**wrong)  # type: ignore[arg-type]


def test_tiles_cover_the_image_at_each_scale(tmp_path: Path) -> None:
    picture(100, 230).save(tmp_path / "wide.png")
    tiles = TiledFolder(tmp_path, PLAIN, scales=(1.0, 0.4), smallest=20)
    for side in (100, 40):
        covered = np.zeros((100, 230), bool)
        chosen = [t for t in tiles.tiles if t.side == side]
        for t in chosen:
            assert t.top >= 0
            assert t.left >= 0
            assert t.top + side <= 100
            assert t.left + side <= 230
            covered[t.top : t.top + side, t.left : t.left + side] = True
        assert covered.all()
    assert tiles[0].shape == (3, 32, 32)


def test_a_tile_shows_its_part_of_the_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (32, 0, 64, 32))
    image.save(tmp_path / "quarter.png")
    tiles = TiledFolder(tmp_path, PLAIN, scales=(0.5,), smallest=8)
    means = {(t.top, t.left): tiles.frame(i).mean() for i, t in enumerate(tiles.tiles)}
    assert means[(0, 32)] == 255
    assert means[(32, 0)] == 0


def test_tiles_name_broken_files_and_go_on(folder: Path) -> None:
    tiles = TiledFolder(folder, PLAIN, scales=(1.0,))
    assert {t.path.name for t in tiles.tiles} == {
        "a.jpg",
        "c.png",
        "z_no_suffix",
        "cut.jpg",
    }  # its header is whole
    assert any("bomb.png" in p for p in tiles.problems)
    assert any("not_an_image.jpg" in p for p in tiles.problems)


def test_scales_and_batch_sizes_are_checked(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="scales"):
        TiledFolder(folder, PLAIN, scales=(2.0,))
    with pytest.raises(ArgumentError, match="batch_size"):
        list(iter_batches(ImageFolder(folder, PLAIN), 0))
