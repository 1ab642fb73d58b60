"""Exact changed-region inference."""

from conelens.occlusion.rerun import Rerun


class Incremental(Rerun):
    def __init__(self, net, images, filled, windows, records, form, memory):  # type: ignore[no-untyped-def]
        super().__init__(net, images, filled, windows, records, memory)
