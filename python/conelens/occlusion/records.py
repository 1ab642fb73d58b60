"""Which layers and channels a sweep records the activity of."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conelens.errors import ArgumentError, LayerError
from conelens.network import Network
from conelens.occlusion.windows import whole_number


@dataclass(frozen=True)
class Record:
    """One recorded layer: what was asked for and, once the clean images have run, its channels [N, K] and their activity."""

    name: str
    node: int
    wanted: Any  # "all", "strongest", "strongest_max", or channel numbers
    channels: Tensor | None = None
    sums: Tensor | None = None
    maxima: Tensor | None = None

    def on_clean(self, maps: Tensor) -> Record:
        """With the channels settled and their clean activity, from clean maps [N, C, H, W]."""
        sums, maxima = activity(maps)
        count, channels = sums.shape
        if self.wanted in ("strongest", "strongest_max"):
            index = (sums if self.wanted == "strongest" else maxima).argmax(1, keepdim=True)
        elif self.wanted == "all":
            index = torch.arange(channels, device=maps.device).expand(count, channels)
        else:
            index = torch.tensor(self.wanted, device=maps.device).expand(count, len(self.wanted))
        return replace(self, channels=index.contiguous(), sums=sums.gather(1, index), maxima=maxima.gather(1, index))

    def joined(self, other: Record) -> Record:
        """The same record of these images and then of others."""
        channels, sums, maxima = (
            torch.cat([getattr(self, key), getattr(other, key)]) for key in ("channels", "sums", "maxima")
        )
        return replace(self, channels=channels, sums=sums, maxima=maxima)

    def pick(self, maps: Tensor, images: Tensor) -> Tensor:
        """The recorded channels [U, K, H, W] of maps [U, C, H, W] that belong to ``images`` [U]."""
        assert self.channels is not None
        if self.wanted == "all":
            return maps
        index = self.channels[images]
        return maps.gather(1, index[:, :, None, None].expand(*index.shape, *maps.shape[2:]))


def activity(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and maxima [U, C] of max(0, x) over the cells of maps [U, C, H, W]; sums are accumulated in float64."""
    live = maps.clamp_min(0).flatten(2)
    kept = maps.dtype if maps.dtype in (torch.float32, torch.float64) else torch.float32
    return live.sum(2, dtype=torch.float64).to(kept), live.amax(2).to(kept)


def run_clean(
    records: list[Record], parts: Iterable[tuple[Tensor, Mapping[int, Tensor]]]
) -> tuple[Tensor, list[Record]]:  # fmt: skip
    """Outputs [N, ...] and ``records`` of the images as they are, from ``parts``: (output, {node: maps}) of some of them."""
    outputs, found = [], []
    for output, maps in parts:
        outputs.append(output)
        found.append([record.on_clean(maps[record.node]) for record in records])
    return torch.cat(outputs), [functools.reduce(Record.joined, same) for same in zip(*found, strict=True)]


def read_records(network: Network | None, record: str | Sequence[str] | Mapping[str, Any] | None) -> list[Record]:
    """The layers of ``record`` as nodes; LayerError and ArgumentError by name."""
    if record is None:
        return []
    if network is None:
        raise ArgumentError("record: layers are known only of a network that can be traced, this one runs as a plain function")
    wanted: Any = {record: "all"} if isinstance(record, str) else record
    if not isinstance(wanted, Mapping):
        try:
            wanted = dict.fromkeys(wanted, "all")
        except TypeError:
            raise ArgumentError(f"record: got {record!r}, wanted a layer's name, several, or {{layer: channels}}") from None
    return [Record(name, network.node(name).index, _channels(network, name, asked)) for name, asked in wanted.items()]


def _channels(network: Network, name: str, asked: Any) -> Any:
    if isinstance(asked, str) and asked in ("all", "strongest", "strongest_max"):
        return asked
    try:
        several = asked if isinstance(asked, Iterable) and getattr(asked, "ndim", 1) != 0 else [asked]
        numbers = [whole_number(k) for k in several]
    except TypeError:
        wanted = "channel numbers, 'all', 'strongest' or 'strongest_max'"
        raise ArgumentError(f"record: got {asked!r} for {name}, wanted {wanted}") from None
    limit = network.node(name).shape[0]
    outside = [k for k in numbers if not 0 <= k < limit]
    if outside or not numbers:
        raise LayerError(f"record: {name} has channels 0 to {limit - 1}, got {outside or 'none'}")
    return numbers
