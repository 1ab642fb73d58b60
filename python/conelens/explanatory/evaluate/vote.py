"""Votes of a detector's patterns for the centre of a part, learned from a few annotated images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import threshold

from conelens.errors import ArgumentError
from conelens.explanatory.evaluate.detectors import Detector
from conelens.explanatory.evaluate.localisation import Annotation

BLOCK = 1 << 22  # kernel values held at a time (16 MiB)
SHIFTS, STILL = 20, 0.05  # steps of the mean shift at most; pixels that count as no step
OTHERS = 4  # images whose places tell what agreement is worth that needs no look at the image


@dataclass(frozen=True)
class Vote:
    """Votes of a detector's patterns, a template per annotated image (part = best template, template = sum of votes).

    The template of annotated image a holds, for each of its patterns V, the displacement delta_V = p_part - p_V(a). In another
    image each pattern votes for p_V + delta_V with a Gaussian of its score as height and ``sigma`` pixels as deviation, cut to
    zero beyond 2 sigma in y or in x. The template answers where the sum of votes is largest: on a lattice of ``step`` pixels
    over the image, then by mean shift to the maximum itself.

    * Scores are divided by the pattern's root mean square score over all images, so that a pattern counts by how exceptional
      its answer is and not by the scale of its filter or density; detectors of several layers can be joined.
    * Selection: of the ``candidates`` patterns with the highest score on the annotated image, those ``patterns`` with the
      largest score x stability. Stability looks at all images that are not annotated, without labels: how near (by the same
      Gaussian) the pattern votes to the place that all candidates agree on, less how near it votes to the places agreed on in
      other images (the next four), averaged with the scores as weights. A pattern that never moves has none.
    * Between templates: a template's largest sum divided by the one on its own annotated image (the sum of its scores there),
      so that 1 means "as much evidence as where it was annotated". The largest quotient gives the position.
    * An image where no pattern scores gets the mean annotated centre.

    The detector may have been learned on the same images; it has seen no annotation of them.

    Args:
        detector: positions and scores on the N images of the experiment.
        size: height and width of the images, pixels.
        patterns, candidates, sigma, step: as above.
    """

    detector: Detector
    size: tuple[int, int]
    patterns: int = 100
    candidates: int = 1000
    sigma: float = 35.0
    step: float = 8.0

    def __post_init__(self) -> None:
        if not 1 <= self.patterns <= self.candidates:
            raise ArgumentError(f"patterns: got {self.patterns} of {self.candidates} candidates, wanted 1 up to their number")
        if min(self.sigma, self.step, *self.size) <= 0:
            raise ArgumentError(f"sigma, step, size: got {self.sigma}, {self.step}, {self.size}, wanted positive numbers")

    @property
    def name(self) -> str:
        return self.detector.name

    def locate(self, part: Annotation) -> Tensor:
        """Centre of the part in every image, [N,2] pixels; an annotated image where no pattern scores gives no template.

        ArgumentError where that is so in all of them.
        """
        lit = (self.detector.scores[part.images] > 0).any(1).tolist()
        if not any(lit):
            raise ArgumentError(
                f"detector {self.name!r}: no pattern scores on annotated images {part.images.tolist()}; annotate others, or "
                "use a detector with more patterns"
            )
        annotated = [pair for pair, seen in zip(zip(part.images, part.points, strict=True), lit, strict=True) if seen]
        templates = [self._template(int(image), point, part.images) for image, point in annotated]
        best = torch.stack([share for _, share in templates]).max(0)
        places = torch.stack([place for place, _ in templates])
        chosen = places[best.indices, torch.arange(places.shape[1])]
        return torch.where(best.values[:, None] > 0, chosen, part.points.mean(0).float())

    def _template(self, image: int, point: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
        """Where one template puts the part in every image [N,2], and its share of the evidence it was made from [N]."""
        score = self.detector.scores[image] / self._usual
        order = score.sort(descending=True, stable=True).indices[: self.candidates]
        order = order[score[order] > 0]
        positions = self.detector.positions[:, order].float()
        votes = positions + (point.float() - positions[image])
        heights = self.detector.scores[:, order].float() / self._usual[order]
        others = torch.ones(len(votes), dtype=torch.bool)
        others[annotated] = False
        stability = self._stability(votes[others], heights[others])
        kept = (score[order] * stability).sort(descending=True, stable=True).indices[: self.patterns]
        place, total = self._agree(votes[:, kept], heights[:, kept])
        return place, total / total[image]

    def _stability(self, votes: Tensor, heights: Tensor) -> Tensor:
        """How much nearer [V] votes [N,V,2] are to where all agree in their own image than to where they do in other images."""
        agreed, _ = self._agree(votes, heights)
        shifts = range(1, min(OTHERS, len(votes) - 1) + 1)
        by_chance = sum((self._near(votes, agreed.roll(shift, 0)) for shift in shifts), torch.zeros_like(heights))
        gain = self._near(votes, agreed) - by_chance / max(1, len(shifts))
        return (heights * gain).sum(0) / heights.sum(0).clamp_min(1e-12)

    def _near(self, votes: Tensor, place: Tensor) -> Tensor:
        """The Gaussian, uncut, between votes [N,V,2] and a place [N,2] of each image."""
        return (votes - place[:, None]).square_().sum(2).mul_(-0.5 / self.sigma**2).exp_()

    @cached_property
    def _usual(self) -> Tensor:
        """Root mean square score of each pattern [F]."""
        return self.detector.scores.float().square().mean(0).sqrt().clamp_min(1e-12)

    def _agree(self, votes: Tensor, heights: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum [N,2] of the sum of votes [N,V,2] with heights [N,V], and its value [N]."""
        lattice = [torch.arange(0, length, self.step, dtype=torch.float32) for length in self.size]
        at_once = max(1, BLOCK // (votes.shape[1] * sum(map(len, lattice))))
        found = [self._climb(*block, lattice) for block in zip(votes.split(at_once), heights.split(at_once))]
        places, totals = zip(*found)
        return torch.cat(places), torch.cat(totals)

    def _climb(self, votes: Tensor, heights: Tensor, lattice: list[Tensor]) -> tuple[Tensor, Tensor]:
        # the Gaussian and its square support are separable: one matrix product per image
        down, across = (self._exponent(line - votes[..., axis, None]).exp_() for axis, line in enumerate(lattice))
        total = (down * heights[..., None]).transpose(1, 2) @ across
        best = total.flatten(1).argmax(1)
        place = torch.stack((lattice[0][best // total.shape[2]], lattice[1][best % total.shape[2]]), 1)
        corner = torch.tensor(self.size, dtype=torch.float32) - 1
        for _ in range(SHIFTS):
            given, mass = self._given(place, votes, heights)
            moved = (given[:, None] @ votes)[:, 0] / mass.clamp_min(1e-30)[:, None]
            moved = torch.where(mass[:, None] > 0, moved.clamp_min(0).minimum(corner), place)
            step, place = (moved - place).abs().max(), moved
            if step < STILL:
                break
        return place, self._given(place, votes, heights)[1]

    def _given(self, place: Tensor, votes: Tensor, heights: Tensor) -> tuple[Tensor, Tensor]:
        """What each vote gives to a place [N,2] of its image, [N,V], and their sum [N]."""
        given = heights * self._exponent(votes - place[:, None]).sum(2).exp_()
        return given, given.sum(1)

    def _exponent(self, offset: Tensor) -> Tensor:
        """Of the Gaussian along one axis; minus infinity beyond 2 sigma. Overwrites ``offset``."""
        return threshold(offset.square_().mul_(-0.5 / self.sigma**2), -2.0, -torch.inf)
