"""What the README says works: its tour runs as it stands, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import conelens

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tour_runs_and_gives_the_shapes_it_names() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert isinstance(names["images"], torch.Tensor)
    told = re.findall(r"^([ps]\.\w+(?:\((?:images)?\))?) +# (\[[\d, ]+\])", code, re.MULTILINE)
    assert len(told) == 6
    for attribute, comment in told:
        value = eval(attribute, names)
        assert list(value.shape) == [int(n) for n in re.findall(r"\d+", comment)], attribute


def test_what_it_names_is_there() -> None:
    named = set(re.findall(r"`(?:print\()?conelens\.(\w+)", README))
    assert {"make_windows", "Windows", "Activity"} <= named
    for name in named - {"compat"}:
        assert name in conelens.__all__
        assert getattr(conelens, name) is not None


def test_links_and_pictures_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), f"{name} points to {target}"
