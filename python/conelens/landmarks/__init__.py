"""Images whose parts people have marked, and readers of the data sets that have them."""

from __future__ import annotations

from conelens.landmarks.animal_part import animal_part
from conelens.landmarks.cub200 import cub200
from conelens.landmarks.parts import Landmarks, Mark, PartImage, PartSet, jittered
from conelens.landmarks.pascal_part import pascal_part

__all__ = [
    "Mark",
    "Landmarks",
    "PartImage",
    "PartSet",
    "animal_part",
    "cub200",
    "jittered",
    "pascal_part",
]
