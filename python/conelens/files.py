"""Files that are replaced whole, and tensors in them: safetensors, never a pickle, with JSON that says what they are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conelens.errors import CheckpointError

if TYPE_CHECKING:  # who only writes texts waits for no torch
    from torch import Tensor


@contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Gives a path to write to for each target. At the end they take the targets' places, in turn; after an error none does."""
    parts = [target.with_name(target.name + ".part") for target in targets]
    try:
        yield parts
        for part, target in zip(parts, targets, strict=True):
            part.replace(target)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], *, readable: str | None = None) -> None:
    """Write tensors (of any device and strides, none sharing memory) and what is to know of them; old files stay until then.

    Args:
        path: the safetensors file, in a folder that is there.
        about: entry -> what goes into the file's metadata as JSON; the first has a "format" for :func:`read_tensors`.
        readable: the entry that a file ``.json`` beside ``path`` shows to people; it is replaced before ``path``.

    Raises:
        OSError: says why it cannot be written.
    """
    from safetensors.torch import save

    texts = {entry: json.dumps(value, indent=1 if entry == readable else None) for entry, value in about.items()}
    # not save_file, which makes the file unreadable to others and hides why it cannot be written
    held = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, texts)
    contents = {} if readable is None else {path.with_suffix(".json"): texts[readable].encode()}
    contents[path] = held
    with replacing(*contents) as parts:
        for part, content in zip(parts, contents.values(), strict=True):
            part.write_bytes(content)


@contextmanager
def reading(path: str | Path, kind: str) -> Iterator[None]:
    """Whatever a file does not hold as it should becomes one CheckpointError: at this path is no ``kind``."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, OSError) as error:
        raise CheckpointError(f"{path}: no {kind} that this version can read ({error})") from error


def read_tensors(path: str | Path, form: str, *entries: str) -> tuple[dict[str, Tensor], list[Any]]:
    """(tensors, the named entries) of what :func:`write_tensors` wrote; the first entry's "format" must be ``form``.

    Tensors are views of the file, which may be replaced but not overwritten. To be called under :func:`reading`.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        about = [json.loads(metadata[entry]) for entry in entries]
        if about[0]["format"] != form:
            raise ValueError(f"its format is {about[0]['format']!r}, wanted {form!r}")
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - not iterable itself
