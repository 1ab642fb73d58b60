"""What `conelens graph evaluate` does: the papers' experiments as tables, the rating page, ratings read back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from conelens.cli import console
from conelens.cli.graph_work import Fitted, readable
from conelens.cli.work import write_report
from conelens.data import Preprocess
from conelens.errors import ArgumentError, DeadUnitWarning
from conelens.explanatory.evaluate import Detector, Interval, raw_filters
from conelens.explanatory.evaluate.sheet import SheetFiles, read_ratings, write_sheet
from conelens.explanatory.evaluate.study import Study, Table, evaluate
from conelens.landmarks import PartSet, animal_part, cub200, pascal_part
from conelens.network import Network
from conelens.report import Page, Section, open_workbench
from conelens.report import Table as PageTable

FORMATS = ("animal-part", "cub", "pascal-part")
_INTRO = (
    "How well the nodes of the graph are parts of the object: whether they keep their distance to parts that people marked, "
    "whether their regions match parts, and whether three marked images are enough to find a part in the others. Lower is "
    "better for instability and distance, higher for purity and rate; in brackets 95 % intervals."
)


def open_parts(folder: Path, form: str, category: str | None, recipe: Preprocess) -> PartSet:
    """The images of a data set and their parts; those that cannot be read are named in warnings.

    Raises:
        ArgumentError: unknown format or category. DataError: files that are missing or broken.
    """
    if form not in FORMATS:
        raise ArgumentError(f"--format is {form!r}, wanted one of {', '.join(FORMATS)}")
    if form == "animal-part":
        parts = animal_part(folder if category is None else folder / category, recipe)
    elif form == "cub":
        if category is not None:
            raise ArgumentError(f"--category is {category!r}, but CUB-200-2011 counts as one category; leave it out")
        parts = cub200(folder, preprocess=recipe)
    else:
        if category is None:
            raise ArgumentError("--category is not given, wanted one for pascal-part: bird, cat, cow, dog, horse or sheep")
        parts = pascal_part(folder / "Annotations_Part", folder / "JPEGImages", category, recipe)
    return parts.take(readable(parts))


def random_network(fitted: Fitted, seed: int) -> Network:
    """The same network with weights as they are before training."""
    module = copy.deepcopy(fitted.bench.model.module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in module.modules():
            begin = getattr(part, "reset_parameters", None)
            if isinstance(part, nn.Module) and callable(begin):
                begin()
    return open_workbench(replace(fitted.bench.model, module=module), str(fitted.bench.net.device)).net


@dataclass(frozen=True)
class StudyJob:
    """Experiments on one data set."""

    fitted: Fitted
    parts: PartSet
    seed: int
    resamples: int

    def run(self) -> Study:
        """Experiments 2 and 3: instability, purity, localisation, each with its controls."""
        with console.stages() as report, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeadUnitWarning)  # of the controls, which are learned here
            return evaluate(
                self.fitted.bench.net, self.fitted.graph, self.parts, random_net=random_network(self.fitted, self.seed),
                seed=self.seed, resamples=self.resamples, progress=report,
            )  # fmt: skip

    def write(self, study: Study, out: Path) -> Path:
        """Write the tables as JSON and, where Jinja2 is there, as a page."""
        with console.writing(out):
            study.save(out)
        page = Page(f"conelens: parts in the graph of {self.fitted.bench.model.name}", f"{len(self.parts)} images. {_INTRO}")
        for table in study.tables:
            page.sections.append(Section(table.title, table.note, tables=[PageTable(table.header, table.rows)]))
        return write_report(page, out)

    def sheet(self, out: Path, rows: int, batch_size: int) -> SheetFiles:
        """Write the blind rating page of the top layer's nodes and filters."""
        top = list(self.fitted.graph.layers)[-1]
        features, placements = self.fitted.place(self.parts, batch_size, [top])
        positions, scores = placements[top].positions.flatten(1, 2), placements[top].scores.flatten(1)
        with console.writing(out):
            return write_sheet(
                out / "sheet.html", self.parts, Detector(f"nodes of {top}", positions, scores),
                raw_filters(features[top], features.grids[top]), count=rows, parts=self.parts.names, seed=self.seed,
            )  # fmt: skip


def rated(ratings: Sequence[Path], key: Path) -> Study:
    """Purity by people, from the files that the rating page saved, as a table."""
    found = read_ratings(ratings, key)
    means = {"nodes": found.nodes, "filters": found.filters, "nodes minus filters": found.difference}
    rows = [[name, f"{m.estimate:+.3f}" if "minus" in name else f"{m.estimate:.3f}", _bounds(m)] for name, m in means.items()]
    note = f"{len(found.shares)} pairs of a node and its filter: share of a row's regions that show one part, mean over rows."
    table = Table("Purity, as people see it", ["detector", "purity", "95 %"], rows, note)
    return Study([table], {"ratings": [str(path) for path in ratings], "key": str(key)})


def _bounds(value: Interval) -> str:
    return f"[{value.low:.3f}, {value.high:.3f}]"
