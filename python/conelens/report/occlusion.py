"""Occlusion sweeps as pictures: a row of Zeiler & Fergus' figure per image, and what covering each place costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from conelens.data import Preprocess
from conelens.heatmaps import LABEL_COLOURS, Heat, Labels, OcclusionRow, occlusion_figure, overlay, tell
from conelens.occlusion import ZeilerFergus
from conelens.report.page import Figure, Page, Section, Table

Names = Sequence[str]
KEPT, SMALLEST = 0.98, 16  # share of the projections that stays in view; pixels that stay at least


GUIDE = (
    "A window was moved over each image and the network run for every place of it. (a) The image with the window where its "
    "class suffers most; the outline in the other panels is that window. (b) Activity of the map that answers most to the "
    "image, summed over its cells, by the window's centre. (c) The peak of that map projected back to the pixels by the "
    "deconvnet, framed for this image, then for others where the map is strongest. (d) Probability of the class and (e) the "
    "most probable class, by the window's centre."
)


def class_name(label: int, classes: Names) -> str:
    """The class's name, or its number where there are no names; -1 is what the network gave NaN for."""
    if label < 0:
        return "not a number"
    return classes[label] if label < len(classes) else f"class {label}"


def figure_row(name: str, panels: ZeilerFergus, recipe: Preprocess, classes: Names = ()) -> OcclusionRow:
    """One image's panels as a row for :func:`conelens.heatmaps.occlusion_figure`; ``name`` is written under the image."""
    box = panels.box()
    size = f"window {box[2] - box[0]} x {box[3] - box[1]} pixels"
    followed = f"sum over map {panels.channel} of {panels.layer}"
    activity = Heat(_smooth(panels, panels.activity), float(panels.activity.min()), panels.clean_activity, followed)
    shown, patches = _close_up(panels.projections.float().cpu().numpy(), [recipe.pixels(patch) for patch in panels.patches])
    image = recipe.pixels(panels.occluded)
    if panels.label is None or panels.probability is None or panels.clean_probability is None:
        return OcclusionRow(image, box, [name, size], activity, shown, patches)
    called = class_name(panels.label, classes)
    lowest = float(panels.probability.min())
    probability = Heat(_smooth(panels, panels.probability), lowest, panels.clean_probability, called, percent=True)
    caption = [name, called, f"{tell(panels.clean_probability, True)}, under this window {tell(lowest, True)}", size]
    return OcclusionRow(image, box, caption, activity, shown, patches, probability, label_panel(panels, classes))


def summary(names: Names, figures: Sequence[ZeilerFergus], classes: Names = ()) -> Table:
    """A line per image: class, how probable as it is and at worst, where that is, what else it is then taken for."""
    if not all(panels.label is not None for panels in figures):
        header = ("image", "map", "clean", "lowest, at y,x")
        lines = [
            (name, f"{p.layer} {p.channel}", tell(p.clean_activity), _lowest(p, p.activity, False))
            for name, p in zip(names, figures, strict=True)
        ]
        return Table(header, lines)
    rows = []
    for name, panels in zip(names, figures, strict=True):
        assert panels.label is not None and panels.clean_probability is not None and panels.probability is not None
        others = [class_name(label, classes) for label, _ in label_shares(panels) if label != panels.label]
        told = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        shares = tell(panels.clean_probability, True), _lowest(panels, panels.probability, True)
        rows.append((name, class_name(panels.label, classes), *shares, told or "none"))
    return Table(("image", "class", "clean", "lowest, at y,x", "other labels"), rows)


def occlusion_page(title: str, names: Names, figures: Sequence[ZeilerFergus], recipe: Preprocess, classes: Names = ()) -> Page:
    """The page of a sweep: the summary, then per image its row of the figure and its overlay. Names may repeat."""
    about = figures[0].sweep.about
    stride = about["stride"]  # None: a grid of one's own
    step = "" if not stride else f"{stride[0]}" if stride[0] == stride[1] else f"{stride[0]} (down) and {stride[1]} (across)"
    grid = f", every {step} pixels, border {about['border']!r}" if stride else " at most"
    places = figures[0].sweep.done[0].numel()
    settings = (
        f"Windows of {about['window'][0]} x {about['window'][1]} pixels{grid}: {places} places per image, "
        f"filled with {about.get('fill', 'nothing told')} in the network's input space. Layer {figures[0].layer}. "
        "Shares in the legend of (e) are shares of the places."
    )
    page = Page(title, f"{GUIDE}\n{settings}", [Section("Summary", tables=[summary(names, figures, classes)])])
    for number, (name, panels) in enumerate(zip(names, figures, strict=True)):
        picture = occlusion_figure([figure_row(name, panels, recipe, classes)])
        over = drop_overlay(name, panels, recipe, classes)
        stem = f"{number:03d}_{name}"
        page.sections.append(Section(stem, figures=[Figure(f"occlusion_{stem}", picture), Figure(f"overlay_{stem}", over)]))
    return page


def _lowest(panels: ZeilerFergus, values: Tensor, percent: bool) -> str:
    """The lowest value and the top left corner of its window."""
    top, left = panels.box()[:2]
    return f"{tell(float(values.min()), percent)} at {top},{left}"


def label_panel(panels: ZeilerFergus, classes: Names = ()) -> Labels:
    """Panel (e): the correct class first, then the others by their share of positions; what has no colour left is counted."""
    assert panels.labels is not None
    shares = label_shares(panels)
    known = [(label, share) for label, share in shares if label >= 0]
    shown, rest = known[: len(LABEL_COLOURS)], known[len(LABEL_COLOURS) :]
    legend = [(label, f"{class_name(label, classes)} {tell(share, True)}") for label, share in shown]
    told = [f"{len(rest)} more {tell(sum(share for _, share in rest), True)}"] if rest else []
    told += [f"{class_name(label, classes)} {tell(share, True)}" for label, share in shares if label < 0]
    return Labels(panels.label_map().cpu().numpy(), legend, ", ".join(told))


def label_shares(panels: ZeilerFergus) -> list[tuple[int, float]]:
    """(class, share of positions where it is the most probable one): the correct class first, the others falling."""
    assert panels.labels is not None
    labels, counts = panels.labels.unique(return_counts=True)
    found = zip(labels.tolist(), (counts / counts.sum()).tolist(), strict=True)
    return sorted(found, key=lambda pair: (pair[0] != panels.label, -pair[1], pair[0]))


def drop_overlay(name: str, panels: ZeilerFergus, recipe: Preprocess, classes: Names = ()) -> Image.Image:
    """The image under what covering each place costs its class (without a classifier: the strongest map)."""
    frame = recipe.pixels(panels.image)
    if panels.label is None or panels.probability is None or panels.clean_probability is None:
        drop = panels.clean_activity - _smooth(panels, panels.activity)
        return overlay(frame, drop, f"{name}: activity that map {panels.channel} of {panels.layer} loses")
    drop = panels.clean_probability - _smooth(panels, panels.probability)
    return overlay(frame, drop, f"{name}: probability that “{class_name(panels.label, classes)}” loses", percent=True)


def _close_up(projections: np.ndarray, patches: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Both cut to the middle square that holds nearly all of the projections: a receptive field is mostly empty at its rim."""
    energy = (projections.astype(np.float64) ** 2).sum((0, 1))
    least = KEPT * energy.sum()
    rim = 0
    limit = (min(energy.shape) - SMALLEST) // 2
    while rim < limit and energy[rim + 1 : -rim - 1, rim + 1 : -rim - 1].sum() > least:
        rim += 1
    high, wide = energy.shape
    inside = slice(rim, high - rim), slice(rim, wide - rim)
    return projections[:, :, *inside], [patch[inside] for patch in patches]


def _smooth(panels: ZeilerFergus, values: Tensor) -> np.ndarray:
    picture: np.ndarray = panels.smooth(values).float().cpu().numpy()
    return picture
