"""A self-contained HTML page: text, tables and pictures, the pictures embedded and also written beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from conelens.errors import ArgumentError, ConelensError
from conelens.figures import save_png


@dataclass(frozen=True)
class Figure:
    """A picture with its caption; `name` is its file name without suffix. The page shows `svg` instead, where there is one."""

    name: str
    image: Image.Image
    caption: str = ""
    svg: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of the page; `preformatted` is shown as it is, in fixed pitch."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    preformatted: str = ""


@dataclass
class Page:
    """What `write_page` writes."""

    title: str
    intro: str = ""
    sections: list[Section] = field(default_factory=list)


def write_page(page: Page, folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` below a folder; returns the page's path.

    Raises:
        ConelensError: Jinja2 is not installed.
        ArgumentError: two figures share a name.
    """
    environment = _environment()
    files = write_figures(page, folder)
    embedded = {
        name: "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii") for name, file in files.items()
    }
    text = environment.get_template("page.html").render(page=page, embedded=embedded)
    path = Path(folder) / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def write_figures(page: Page, folder: str | Path) -> dict[str, Path]:
    """Write `figures/*.png` below a folder, after removing those that its old `report.html` lists; returns them by name.

    Raises:
        ArgumentError: two figures share a name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    for figure in (figure for section in page.sections for figure in section.figures):
        if figure.name in files:
            raise ArgumentError(f"two figures of the page are called {figure.name!r}")
        files[figure.name] = folder / "figures" / f"{safe_name(figure.name)}.png"
    report = folder / "report.html"
    if report.is_file():
        for stale in re.findall(r'data-file="([\w.-]+\.png)"', report.read_text(encoding="utf-8", errors="replace")):
            (folder / "figures" / stale).unlink(missing_ok=True)
        report.unlink()  # it would list figures that are gone
    for section in page.sections:
        for figure in section.figures:
            save_png(figure.image, files[figure.name])
    return files


def safe_name(name: str) -> str:
    """A layer or file name as a file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "figure"


def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ConelensError("the report needs Jinja2: pip install 'conelens[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["anchor"] = safe_name
    return environment
