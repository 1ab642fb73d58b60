"""Files that ship with conelens: SqueezeNet 1.1, the ImageNet class names, and freely licensed photographs.

Licences: `squeezenet1_1/LICENSE` (BSD 2-clause) and `photographs/NOTICE.md` (source, author and licence of
    each picture).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

_ROOT = Path(__file__).parent


def squeezenet_weights() -> Path:
    """The complete SqueezeNet 1.1 classifier as safetensors."""
    return _ROOT / "squeezenet1_1" / "squeezenet1_1.safetensors"


def photographs() -> Path:
    """The folder of example photographs."""
    return _ROOT / "photographs"


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1000 ImageNet class names in the order of a classifier's outputs, first synonym only."""
    lines = (_ROOT / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.split(" ", 1)[1].split(",")[0].strip() for line in lines)
