"""Images from folders: found, opened with care, cut into tiles, and turned into network input.

A file that does not decode is named, skipped and counted; the rest of the job goes on. Order is that of the
sorted paths, with any number of decoding threads.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from conelens.errors import ArgumentError, DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*")
_EXIF_ORIENTATION = 0x0112
_open_lock = threading.Lock()


# -------------------------------------------------------------------------------------------------- one image
def load_image(path: str | Path) -> Image.Image:
    """The image as 8-bit RGB, upright.

    Animations give their first frame; transparent pixels are laid on white; CMYK, palette and grey pictures
    become RGB; 16-bit pictures keep their upper 8 bits; the EXIF orientation is applied; colour profiles
    are not.

    Raises:
        DataError: the file is missing, no image, truncated, or holds more pixels than Pillow allows.
    """
    with _open(path) as image:
        try:
            image.seek(0)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(image if upright is None else upright, path)
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise DataError(f"{path}: the image data is broken ({error})") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the upright image, from the header alone. Raises DataError as `load_image` does."""
    with _open(path) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: the image header is broken ({error})") from error
    return (width, height) if turned else (height, width)


def _open(path: str | Path) -> Image.Image:
    try:
        # Pillow only warns between one and two times its limit; warnings filters are global, hence the lock
        with _open_lock, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path}: refused as a decompression bomb, it has more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down first"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({error})") from error


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{path}: 32-bit pixels outside 0..65535; save it as 8 or 16 bit")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{path}: floating-point pixels have no agreed range; save it as 8 or 16 bit")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------- network input
@dataclass(frozen=True)
class Preprocess:
    """How an RGB image becomes network input: geometry, then `(value * scale - mean) / std` per channel.

    fit "crop" scales the short side to `short_side` (default: size * 256 / 224) and cuts the centre;
    "letterbox" scales the whole image into the frame and pads with the mean colour (zero as network input);
    "stretch" ignores the aspect; "none" keeps the image as it is.
    """

    size: tuple[int, int] = (224, 224)
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    fit: str = "crop"
    short_side: int | None = None

    def __post_init__(self) -> None:
        if self.fit not in ("crop", "letterbox", "stretch", "none"):
            raise ArgumentError(f"fit is {self.fit!r}, wanted crop, letterbox, stretch or none")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ArgumentError(f"size is {self.size}, wanted (height, width), both positive")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ArgumentError(f"{name} has {len(getattr(self, name))} values, wanted 3 (R, G, B)")
        if not all(self.std):
            raise ArgumentError(f"std is {self.std}, wanted no zeros")

    def frame(self, image: Image.Image) -> np.ndarray:
        """RGB image -> uint8 [H,W,3] of the wanted size."""
        height, width = self.size
        if self.fit == "none":
            return np.asarray(image)
        if self.fit == "stretch":
            return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        if self.fit == "letterbox":
            ratio = min(height / image.height, width / image.width)
            inner = image.resize(_scaled(image, ratio), Image.Resampling.BILINEAR)
            # Pillow takes a number per band; zero of the network input is the colour mean / scale
            ground = tuple(round(min(max(m / self.scale, 0.0), 255.0)) for m in self.mean)
            canvas = Image.new("RGB", (width, height), ground)
            canvas.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
            return np.asarray(canvas)
        short = self.short_side or round(min(height, width) * 256 / 224)
        # at least the frame on both axes, also where the frame is wider than the image's aspect
        ratio = max(short / min(image.size), height / image.height, width / image.width)
        scaled = image.resize(_scaled(image, ratio), Image.Resampling.BILINEAR) if ratio != 1 else image
        left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
        return np.asarray(scaled.crop((left, top, left + width, top + height)))

    def tensor(self, frame: np.ndarray) -> Tensor:
        """uint8 [H,W,3] -> float32 [3,H,W] as the network wants it."""
        # NumPy: this runs in decoding threads, where torch would start a thread team per image
        values = (frame.astype(np.float32) * np.float32(self.scale) - self._mean()) / self._std()
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def pixels(self, x: Tensor) -> np.ndarray:
        """Network input [3,H,W] -> uint8 [H,W,3] for display, the inverse of `tensor`."""
        values = (x.detach().float().cpu().numpy().transpose(1, 2, 0) * self._std() + self._mean()) / self.scale
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)

    def _mean(self) -> np.ndarray:
        return np.asarray(self.mean, np.float32)

    def _std(self) -> np.ndarray:
        return np.asarray(self.std, np.float32)

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> float32 [3,H,W]."""
        return self.tensor(self.frame(image))


def _scaled(image: Image.Image, ratio: float) -> tuple[int, int]:
    return max(1, round(image.width * ratio)), max(1, round(image.height * ratio))


# -------------------------------------------------------------------------------------------------- data sets
class ImageDataset(Protocol):
    """Anything with a length whose items are network input [C,H,W]; an unreadable item raises DataError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


class ImageFolder:
    """The images below a folder (or a list of files), decoded when asked for.

    Files are taken by their suffix, others by their first bytes, so that `notes.txt` is passed over silently
    while a `photo.jpg` that is no image is named when it is read. Hidden files and folders are passed over.
    """

    def __init__(self, source: str | Path | Sequence[str | Path], preprocess: Preprocess) -> None:
        self.paths = find_images(source)
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocess(load_image(self.paths[index]))

    def frame(self, index: int) -> np.ndarray:
        """uint8 [H,W,3]: the picture as the network sees it, before normalisation."""
        return self.preprocess.frame(load_image(self.paths[index]))

    def label(self, index: int) -> str:
        """The file name, for pictures and messages."""
        return self.paths[index].name

    def source(self, index: int) -> Path:
        """The file of an item."""
        return self.paths[index]


@dataclass(frozen=True)
class Tile:
    """A square of an upright image: (top, left, side) in its pixels."""

    path: Path
    top: int
    left: int
    side: int


class TiledFolder:
    """Every image of a folder cut into squares at several scales, each brought to network size.

    Args:
        source: folder, or list of files.
        preprocess: input recipe; a tile is always stretched (square to `preprocess.size`).
        scales: sides of the squares as fractions of the short side, each in (0, 1]. Neighbouring squares of
            a scale overlap by less than half and are spread evenly, so that the whole image is covered.
        smallest: squares of fewer pixels a side are left out, except at the first scale.

    `problems` names the files whose header could not be read.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        preprocess: Preprocess,
        scales: Sequence[float] = (1.0, 0.5),
        smallest: int = 96,
    ) -> None:
        if not scales or not all(0 < s <= 1 for s in scales):
            raise ArgumentError(f"scales are {tuple(scales)}, wanted at least one, each in (0, 1]")
        self.preprocess = preprocess
        self.problems: list[str] = []
        self.tiles: list[Tile] = []
        for path in find_images(source):
            try:
                height, width = image_size(path)
            except DataError as error:
                self.problems.append(str(error))
                continue
            for number, scale in enumerate(scales):
                side = max(1, round(min(height, width) * scale))
                if number == 0 or side >= smallest:
                    self.tiles += [
                        Tile(path, top, left, side) for top in _spread(height, side) for left in _spread(width, side)
                    ]
        self._recent: OrderedDict[Path, Image.Image] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocess.tensor(self.frame(index))

    def frame(self, index: int) -> np.ndarray:
        """uint8 [H,W,3]: the tile as the network sees it, before normalisation."""
        tile = self.tiles[index]
        height, width = self.preprocess.size
        box = (tile.left, tile.top, tile.left + tile.side, tile.top + tile.side)
        square = self._image(tile.path).resize((width, height), Image.Resampling.BICUBIC, box=box)
        return np.asarray(square)

    def label(self, index: int) -> str:
        """The file name and the tile's place in it."""
        tile = self.tiles[index]
        return f"{tile.path.name} [{tile.top}, {tile.left}, {tile.side}]"

    def source(self, index: int) -> Path:
        """The file that a tile was cut from."""
        return self.tiles[index].path

    def _image(self, path: Path) -> Image.Image:
        # neighbouring tiles come from one file: a few decoded images are kept
        with self._lock:
            if path in self._recent:
                self._recent.move_to_end(path)
                return self._recent[path]
        image = load_image(path)
        with self._lock:
            self._recent[path] = image
            if len(self._recent) > 8:
                self._recent.popitem(last=False)
        return image


def _spread(length: int, side: int) -> list[int]:
    """Starts of squares that cover `length` evenly, neighbours overlapping by less than half."""
    count = max(1, round((length - side) / (side * 0.75)) + 1) if length > side else 1
    if count == 1:
        return [(length - side) // 2]
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def find_images(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """Image files below a folder, sorted by path; or the given files, in the given order.

    Raises:
        DataError: the folder does not exist, or holds no image.
    """
    if not isinstance(source, (str, Path)):
        return [Path(p) for p in source]
    root = Path(source)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    found: list[Path] = []
    seen: set[str] = set()
    for folder, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up, or a folder linked twice
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(n for n in names if not n.startswith("."))
        found += [Path(folder, f) for f in files if not f.startswith(".") and _looks_like_image(Path(folder, f))]
    if not found:
        raise DataError(f"{root}: no image files ({', '.join(sorted(SUFFIXES))}) below this folder")
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def _looks_like_image(path: Path) -> bool:
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


# ---------------------------------------------------------------------------------------------------- batches
@dataclass(frozen=True)
class Batch:
    """Items of a data set that could be read: `images` [n,C,H,W] float32 and their `indices`, ascending."""

    indices: list[int]
    images: Tensor


def iter_batches(
    dataset: ImageDataset,
    batch_size: int = 16,
    threads: int = 2,
    on_problem: Callable[[int, DataError], None] | None = None,
) -> Iterator[Batch]:
    """The data set in order, decoded ahead by `threads` threads (0: in this one); the result does not depend
    on them.

    An item that raises DataError is reported to `on_problem(index, error)` and left out of its batch;
    without a callback it is raised. Batches that lose all their items are left out.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size}, wanted at least 1")
    indices: list[int] = []
    images: list[Tensor] = []
    for index, item in enumerate(_decoded(dataset, threads, ahead=2 * batch_size)):
        if isinstance(item, DataError):
            if on_problem is None:
                raise item
            on_problem(index, item)
        else:
            indices.append(index)
            images.append(item)
        if images and (len(images) == batch_size or index + 1 == len(dataset)):
            yield Batch(indices, torch.stack(images))
            indices, images = [], []
    if images:
        yield Batch(indices, torch.stack(images))


def _decoded(dataset: ImageDataset, threads: int, ahead: int) -> Iterator[Tensor | DataError]:
    def read(index: int) -> Tensor | DataError:
        try:
            return dataset[index]
        except DataError as error:
            return error

    if threads < 1:
        yield from map(read, range(len(dataset)))
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="conelens-decode") as pool:
        waiting: deque[Future[Tensor | DataError]] = deque()
        try:
            for index in range(len(dataset)):
                waiting.append(pool.submit(read, index))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
