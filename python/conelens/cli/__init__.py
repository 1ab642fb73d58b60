"""The `conelens` command. Its libraries (Typer, Rich) are imported when it runs, not before."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(f"error: the command line needs {error.name}: pip install 'conelens[cli]'", file=sys.stderr)
        raise SystemExit(1) from None
    from conelens.cli.app import app

    app()
