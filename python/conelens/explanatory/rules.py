"""The choices on which paper and release differ, switched together; and which layers of a known network make a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from conelens.errors import ArgumentError
from conelens.network import Network


@dataclass(frozen=True)
class Rules:
    """How a graph is learned (Zhang et al., AAAI 2018 and TPAMI 2021; their MATLAB release).

    parents: where a parent is in an image: "posterior", the middle of the activity it owns, which clutter moves less;
        or "unit", the one unit it is inferred at, as the papers have it.
    anchor: what a parent's displacement is measured from: "learned" prior position, or "empirical" mean of its inferred ones.
    edges: "likelihood" takes the parents under which a node's own displacement is most likely; "kernel" those with the largest
        sum of exp(-squared relative displacement / 2b), as the release.
    edges_first: parents are chosen for displacements from the means as they were in the last inference, instead of as they are
        after they moved. Positions, which the kernel criterion compares, know no means: it makes no difference there.
    pool: candidate parents kept by score, without those at the border; None: all nodes.
    still: share of candidates left out because they move least. The release leaves out half; the likelihood does not need it,
        as a parent that tells nothing loses to one that does, and what moves most is often clutter.
    domain: "grid", every unit of the map; "lattice", 6 x 6 points in a window round the node, over smoothed activity.
    weight: of a node in a channel's mixture, per image: "agreement", a normalised Gaussian times how well its parents agree;
        "geometric", the geometric mean of its parents' Gaussians; "release", agreement times sigma over the product of sigmas.
    top_sigma: spread of nodes without parents: "fixed", 0.15 of the map, or "estimated" like that of parents.
    noise, noise_scale: density of the noise component: "relative", ``noise`` times the mean over the image's nodes of their
        densities' sum over the domain, or "absolute", ``noise`` per cell.
    damped: means move by the release's normalised step sigma_min^2 / sigma^2 / sqrt(t) instead of all the way.
    patch: side of the patches to show, in pixels.

    ArgumentError for a word or number that is none of these.
    """

    parents: str = "posterior"
    anchor: str = "learned"
    edges: str = "likelihood"
    edges_first: bool = False
    pool: int | None = 600
    still: float = 0.0
    domain: str = "grid"
    weight: str = "agreement"
    top_sigma: str = "fixed"
    noise: float = 0.1
    noise_scale: str = "relative"
    damped: bool = False
    patch: int = 70

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ArgumentError(f"{name}: got {getattr(self, name)!r}, wanted {' or '.join(map(repr, words))}")
        if not (self.noise >= 0 and math.isfinite(self.noise)):
            raise ArgumentError(f"noise: got {self.noise}, wanted 0 or more (the papers have 0.1)")
        if not 0 <= self.still < 1 or (self.pool is not None and self.pool < 1):
            raise ArgumentError(f"still, pool: got {self.still}, {self.pool}, wanted 0 <= still < 1, pool 1 or more or None")


_WORDS = {
    "parents": ("posterior", "unit"),
    "anchor": ("learned", "empirical"),
    "edges": ("likelihood", "kernel"),
    "domain": ("grid", "lattice"),
    "weight": ("agreement", "geometric", "release"),
    "top_sigma": ("fixed", "estimated"),
    "noise_scale": ("relative", "absolute"),
}
FORMS = {
    "recommended": Rules(),
    "paper": Rules(parents="unit", pool=None, weight="geometric", top_sigma="estimated", noise_scale="absolute"),
    "release": Rules(
        parents="unit", anchor="empirical", edges="kernel", edges_first=True, still=0.5, domain="lattice", weight="release",
        damped=True, patch=60,
    ),
}  # fmt: skip


def rules_of(form: str | Rules, noise: float | None) -> Rules:
    """The rules of a form by name, with another noise level if one is given."""
    if isinstance(form, Rules):
        rules = form
    elif form in FORMS:
        rules = FORMS[form]
    else:
        raise ArgumentError(f"form: got {form!r}, wanted one of {', '.join(FORMS)}, or Rules of your own")
    return rules if noise is None else replace(rules, noise=noise)


def nodes_for(size: tuple[int, int]) -> int:
    """Nodes per filter of a map [H, W], as the papers have them: 40 at 28 x 28, 20 at 14 x 14, 10 at 7 x 7."""
    return min(math.ceil(1.4 * math.sqrt(size[0] * size[1])), size[0] * size[1])


# layers, bottom first, and their channels
_KNOWN = {
    ("conv4_2", "conv4_3", "conv5_2", "conv5_3"): (512, 512, 512, 512),  # VGG-16
    ("conv3", "conv4", "conv5"): (384, 256, 256),  # AlexNet
    ("fire5", "fire7", "fire8"): (256, 384, 512),  # SqueezeNet 1.1; with fire9 on top, parts are found less well
}
_RESNET = [(128, 28, 28), (256, 14, 14), (512, 7, 7)]


def preset_layers(net: Network) -> list[str]:
    """The layers the papers take, bottom first: of VGG-16 four, of a ResNet the last convolutions at 28, 14 and 7 cells; and
    their like in AlexNet and in SqueezeNet 1.1. Where a batch norm follows, it decides what fires: it is taken instead.

    ArgumentError for other networks: name the layers then.
    """
    normed = {node.inputs[0]: node.name for node in net.graph.nodes if node.op.kind == "batch_norm"}
    names = {alias for layer in net.layers() for alias in (layer.name, *layer.aliases)}
    for layers, channels in _KNOWN.items():
        if set(layers) <= names and "conv5_4" not in names and tuple(net[name].shape[0] for name in layers) == channels:
            return [normed.get(net.node(name).index, name) for name in layers]
    last: dict[tuple[int, int, int], str] = {}
    for layer in net.layers():
        if "conv" in layer.kind.lower():
            last[layer.shape] = normed.get(layer.index, layer.name)
    if all(shape in last for shape in _RESNET):
        return [last[shape] for shape in _RESNET]
    raise ArgumentError(
        "layers: this network is no VGG-16, AlexNet, SqueezeNet 1.1 or ResNet at 224 pixels, for which layers are known; give "
        "layers=[...], bottom first (net.layers() lists them)"
    )


def check_order(net: Network, layers: Sequence[str]) -> None:
    """Layers of a graph run from bottom to top: each computed from the one before."""
    indices = [net.node(name).index for name in layers]
    if len(set(indices)) != len(layers):
        raise ArgumentError(f"layers: got {', '.join(layers)}, wanted each layer once")
    pairs = list(zip(layers, indices, strict=True))
    for (lower, low), (upper, high) in pairwise(pairs):
        if low not in net.graph.ancestors((high,)):
            raise ArgumentError(f"layers: {upper!r} is not computed from {lower!r}; give the layers bottom first")
