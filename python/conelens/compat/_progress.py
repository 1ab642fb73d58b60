"""The bar that the other tools show on request."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext


def bar(title: str, wanted: bool) -> AbstractContextManager[Callable[[int, int], None] | None]:
    """What to call with (done, all), or None where no bar is wanted or the extra 'cli' is missing."""
    if not wanted:
        return nullcontext()
    try:
        from conelens.cli.console import progress
    except ImportError:
        return nullcontext()
    return progress(title)
