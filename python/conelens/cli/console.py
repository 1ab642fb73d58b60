"""How the commands speak: one-line errors with exit codes, warnings as they come, a progress bar."""

from __future__ import annotations

import errno
import functools
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from conelens.errors import ArgumentError, ConelensError, LayerError
from conelens.files import replacing

OUT = Console(soft_wrap=True, highlight=False)
ERR = Console(stderr=True, soft_wrap=True, highlight=False)

RUNTIME, USAGE, INTERRUPTED = 1, 2, 130
Command = TypeVar("Command", bound=Callable[..., Any])


def guarded(command: Command) -> Command:
    """Turn what goes wrong into one line and an exit code: 2 wrong arguments, 1 anything else, 130 Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with _warnings_as_lines(), _no_empty_folders():
            try:
                command(*args, **kwargs)
            except (ArgumentError, LayerError) as error:
                _fail(error, USAGE)
            except (ConelensError, OSError, MemoryError) as error:
                _fail(error, RUNTIME)
            except KeyboardInterrupt as error:
                say(f"[yellow]interrupted[/]: {escape(str(error) or 'nothing was kept')}")
                raise typer.Exit(INTERRUPTED) from None
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:
                if os.environ.get("CONELENS_DEBUG"):
                    raise
                _fail(error, RUNTIME, f" ({type(error).__name__}; CONELENS_DEBUG=1 shows where)")

    return run  # type: ignore[return-value]


def say(markup: str) -> None:
    """A line for people, on the error stream."""
    ERR.print(markup)


# what messages say for Python -> what to add for the command line
_SPELLINGS = (
    (r"policy=\{'(\w+)': '(\w+)'", r"here: --policy \1=\2"),
    (r"^policy: got", r"here: --policy clamp, or --policy relu6=clamp,gate=hold"),
    (r"net\.layers\(\) lists", r"here: conelens layers MODEL"),
    (r"go on with ExplanatoryGraph\.fit", r"here: the same conelens graph fit again"),
    (r"give layers=\[", r"here: --layers A,B,C"),
)


def _fail(error: BaseException, code: int, more: str = "") -> None:
    reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    text = " ".join(reason.split()) or type(error).__name__
    for pattern, spelling in _SPELLINGS:
        if found := re.search(pattern, text):
            text += f" ({found.expand(spelling)})"
    say(f"[red]error[/]: {escape(text + more)}")
    raise typer.Exit(code) from None


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"[yellow]warning[/]: {escape(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


class Report(Protocol):
    """Moves a bar of :func:`stages`."""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None: ...


@contextmanager
def stages() -> Iterator[Report]:
    """A bar for each stage that is reported, with a note behind its name; lines printed meanwhile appear above them.

    Where the error stream is no terminal, a line as each stage begins instead.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR, disable=not ERR.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int | None, note: str = "") -> None:
            if stage not in tasks:
                if not ERR.is_terminal:
                    say(f"begins: {escape(stage)}")
                tasks[stage] = bars.add_task(escape(stage), total=total)
            bars.update(tasks[stage], description=escape(stage + note), completed=done, total=total)

        yield report


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar fed with (done, all); lines printed meanwhile appear above it."""
    with stages() as report:
        report(title, 0, None)
        yield lambda done, total: report(title, done, total)


# ----------------------------------------------------------------------------------------------------- output
@contextmanager
def writing(target: Path, option: str = "--out") -> Iterator[None]:
    """Turn what the disk refuses into one line with path, reason and what to do."""
    try:
        yield
    except OSError as error:
        room = "make room there, or " if error.errno == errno.ENOSPC else ""
        raise ConelensError(
            f"cannot write {error.filename or target}: {error.strerror or error}; {room}choose another place with {option}"
        ) from error


def write_whole(path: Path, content: bytes, option: str = "--out") -> None:
    """Write a file; the old one stays until the new one is complete."""
    with writing(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as (part,):
            part.write_bytes(content)


_made: list[Path] = []  # folders that the running command made before it had anything to write, the innermost first


@contextmanager
def _no_empty_folders() -> Iterator[None]:
    """Remove what :func:`writable` made and nothing was written to."""
    _made.clear()
    try:
        yield
    finally:
        for folder in _made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def writable(folder: Path, option: str = "--out") -> None:
    """Make an output folder and try a file in it, before long work begins; it goes again if the command leaves it empty."""
    with writing(folder, option):
        try:
            _made.extend(path for path in (folder, *folder.parents) if not path.exists())
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(folder)) from None
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:  # its message names a file that nobody knows
            raise OSError(error.errno, error.strerror, str(folder)) from error


# -------------------------------------------------------------------------------------------- argument values
@contextmanager
def of_option(option: str) -> Iterator[None]:
    """Begin what is wrong with an argument of Python by the name of the option that it came from."""
    try:
        yield
    except (ArgumentError, LayerError) as error:
        raise type(error)(f"{option}: {re.sub(r'^layers?: ', '', str(error))}") from error


def numbers(text: str, name: str) -> tuple[float, ...]:
    """ "0.5" or "0.485,0.456,0.406" as three numbers."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise ArgumentError(f"{name} is {text!r}, wanted one number or three with commas (R,G,B)")
    return values


def counts(text: str, option: str) -> list[int]:
    """ "40,20" as whole numbers of at least 1."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentError(f"{option} is {text!r}, wanted whole numbers with commas, such as 40,20")
    return [int(part) for part in parts]


def size(text: str, option: str = "--input-size") -> tuple[int, int]:
    """ "224" or "240x320" (height x width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ArgumentError(f"{option} is {text!r}, wanted N or HxW in pixels, at least 1")
    return int(parts[0]), int(parts[-1])


def memory(text: str) -> int:
    """ "2G", "512M" or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ArgumentError(f"--memory is {text!r}, wanted such as 512M or 2G")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def place(text: str | None) -> tuple[int, int] | str:
    """ "y,x" or nothing for the peak."""
    if text is None or text == "peak":
        return "peak"
    parts = text.split(",")
    if len(parts) != 2 or not all(p.strip().isdecimal() for p in parts):
        raise ArgumentError(f"--position is {text!r}, wanted y,x or peak")
    return int(parts[0]), int(parts[1])


def policy(text: str | None) -> dict[str, str] | str | None:
    """ "clamp", or "relu6=clamp,gate=hold" by operator."""
    if text is None or "=" not in text:
        return text
    pairs = [part.strip().partition("=") for part in text.split(",")]
    if not all(name and rule for name, _, rule in pairs):
        raise ArgumentError(
            f"--policy is {text!r}, wanted one rule (clamp) or operator=rule with commas (relu6=clamp,gate=hold)"
        )
    return {name.strip(): rule.strip() for name, _, rule in pairs}


def channels(text: str | None, count: int, layer: str, default: int = 8) -> list[int]:
    """ "3,17,20-25" or "all"; nothing gives `default` channels spread evenly."""
    if text is None:
        return sorted({round(i * (count - 1) / max(1, default - 1)) for i in range(default)})
    if text.strip() == "all":
        return list(range(count))
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ArgumentError(f"--channels has {part.strip()!r}, wanted numbers and ranges such as 3,17,20-25, or all")
        if int(last or first) < int(first):
            raise ArgumentError(f"--channels has the empty range {part.strip()!r}, wanted {last}-{first}")
        chosen += range(int(first), int(last or first) + 1)
    wrong = [c for c in chosen if c >= count]
    if wrong:
        raise ArgumentError(f"channel {wrong[0]} of {layer} is out of range, wanted 0..{count - 1}")
    return list(dict.fromkeys(chosen))
