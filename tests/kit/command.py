"""Running the command line in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from conelens.cli.app import app


def run(*arguments: str | Path) -> Result:
    """The command in this process; streams apart."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def one_line_error(result: Result, code: int, *parts: str) -> None:
    """Exit code, one error line with these parts, no traceback."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    for part in parts:
        assert part in lines[0]
