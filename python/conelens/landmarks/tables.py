"""Text tables of data sets, read line by line, so that an error can say where it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from conelens.errors import DataError


def rows(path: Path, fields: int, separator: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """("file:line", fields) of every line that is not empty; the last field takes the rest of a line.

    Raises:
        DataError: the file is missing or no UTF-8 text, or a line has another number of fields.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; it belongs to the data set's annotations") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            found = [field.strip() for field in line.split(separator, fields - 1)]
            if len(found) != fields:
                raise DataError(f"{path}:{number}: got {len(found)} fields ({line.strip()!r}), wanted {fields}")
            yield f"{path}:{number}", found


def number(where: str, text: str, what: str, least: float = -math.inf, most: float = math.inf) -> float:
    """The finite number in a field, within least..most; DataError says where it is not."""
    try:
        value = float(text)
    except ValueError as error:
        raise DataError(f"{where}: {what} is {text!r}, wanted a number") from error
    if not (math.isfinite(value) and least <= value <= most):
        raise DataError(f"{where}: {what} is {text}, wanted a number from {least:g} to {most:g}")
    return value


def file_below(folder: Path, where: str, name: str) -> Path:
    """The file that a table names, which must not lead out of its folder."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.name:
        raise DataError(f"{where}: {name!r} leads out of the folder {folder}; wanted the path of an image in it")
    return folder / parts
