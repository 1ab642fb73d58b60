"""What a sweep will cost, before it runs: per layer the changed region, how it is computed, and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conelens.changed import LayerMacs, sweep_macs
from conelens.errors import ArgumentError
from conelens.network import Network
from conelens.occlusion.forms import form_for
from conelens.occlusion.regions import SweepRegions, sweep_regions
from conelens.occlusion.windows import Windows, make_windows
from conelens.operators import Conv2d, Pair


@dataclass(frozen=True)
class LayerPlan:
    """One convolution or fully connected layer. ``region``: mean changed (height, width); ``macs``: of one position, mean.

    ``scheme``: "delta" or "gather" on changed regions, "dense" on whole maps.
    """

    name: str
    map_size: Pair
    region: tuple[float, float]
    scheme: str
    macs: LayerMacs

    @property
    def planned(self) -> float:
        """Multiply-accumulates of one position under the scheme, mean."""
        return self.macs.full if self.scheme == "dense" else getattr(self.macs, self.scheme)


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a sweep; prints as a table."""

    layers: list[LayerPlan]
    windows: Windows
    form: str
    classes: Pair

    @property
    def positions(self) -> int:
        """Windows of the grid."""
        return self.windows.shape[0] * self.windows.shape[1]

    @property
    def factors(self) -> dict[str, float]:
        """How many times less work than running everything: under Krypton's rule, in either exact form, and as planned."""
        full = sum(layer.macs.full for layer in self.layers)
        schemes = {name: sum(getattr(layer.macs, name) for layer in self.layers) for name in ("krypton", "gather", "delta")} | {
            "planned": sum(layer.planned for layer in self.layers)
        }
        return {name: full / work if work else 1.0 for name, work in schemes.items()}

    def __str__(self) -> str:
        rows = [["layer", "map", "changed", "scheme", "MMAC full", "MMAC planned", "factor"]]
        for layer in self.layers:
            sizes = "x".join(map(str, layer.map_size)), "x".join(f"{cells:.1f}" for cells in layer.region)
            work = layer.macs.full, layer.planned
            factor = work[0] / max(work[1], 1.0)
            rows.append([layer.name, *sizes, layer.scheme, *(f"{macs / 1e6:.1f}" for macs in work), f"{factor:.1f}"])
        full, planned = (sum(work) / 1e6 for work in ([p.macs.full for p in self.layers], [p.planned for p in self.layers]))
        rows.append(["sum", "", "", "", f"{full:.1f}", f"{planned:.1f}", f"{full / max(planned, 1e-6):.2f}"])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        left = (0, 3)  # words; the rest are numbers
        table = [
            "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        factors = self.factors
        return "\n".join([
            *(line.rstrip() for line in table),
            f"{self.positions} positions per image, in {self.classes[0]} x {self.classes[1]} groups that share calls",
            f"running everything is {factors['planned']:.2f} times the planned work",
            f"({factors['krypton']:.2f} if all regions were as large as the largest, {factors['gather']:.2f} by exact regions, "
            f"{factors['delta']:.2f} by changed inputs alone)",
        ])  # fmt: skip


def plan_occlusion(
    net: Network,
    window: int | Sequence[int] | Windows = 16,
    stride: int | Sequence[int] = 4,
    border: str = "flush",
    *,
    form: str = "auto",
) -> SweepPlan:
    """What :func:`conelens.occlude` will do with these settings for the network's output; nothing is run.

    "auto" may still turn to "gather" when the images are there, where single cells outshine all others.

    Raises ArgumentError for a window that does not fit the network's images, or an unknown form.
    """
    if not isinstance(net, Network):
        raise ArgumentError(f"net: got {type(net).__name__}, wanted a network from conelens.trace")
    size = (net.input_shape[1], net.input_shape[2])
    windows = window if isinstance(window, Windows) else make_windows(size, window, stride, border)
    name = form_for(form, net.device.type, net.dtype).name
    regions = sweep_regions(net.graph, (net.graph.outputs[0],), windows, net.device.type, name == "delta")
    macs = sweep_macs(net.graph, regions.order, regions.rows, regions.columns, windows.largest)
    layers = [_layer(regions, one, name) for one in macs]
    return SweepPlan(layers, windows, name, (len(regions.row_classes), len(regions.column_classes)))


def _layer(regions: SweepRegions, macs: LayerMacs, form: str) -> LayerPlan:
    node = regions.graph[macs.node]
    whole = any(turn.node == macs.node for turn in regions.tail)
    dense = whole and (isinstance(node.op, Conv2d) or form == "gather" or macs.delta == macs.full)
    region = (float(regions.rows.widths(macs.node).mean()), float(regions.columns.widths(macs.node).mean()))
    return LayerPlan(node.name, node.size, region, "dense" if dense else form, macs)
