"""Two mid-level detectors on the same features: clusters of unit feature vectors, of all units or of each image's strongest.

Both match a cluster's mean direction with the feature vectors of an image, so that they know what a filter alone does not
(the other channels) and nothing of where other patterns are (what a graph adds).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conelens.errors import ArgumentError, ConelensError
from conelens.explanatory.evaluate.detectors import Detector
from conelens.explanatory.evaluate.units import check_features, unit_blocks

if TYPE_CHECKING:
    from conelens.explanatory.features import Grid


def kmeans_patterns(
    features: Tensor, grid: Grid, clusters: int, *, train: Tensor | None = None, sample: int = 20_000, seed: int = 0
) -> Detector:
    """Clusters of the directions of all units' feature vectors.

    A unit is a cell of the map, its vector F[:, y, x]. At most ``sample`` units with a vector other than zero, drawn without
    replacement from the ``train`` images, are brought to length 1 and clustered by mini-batch k-means (Sculley 2010).
    In an image, a cluster stands at the unit whose vector has the largest cosine with its centroid (the first of equals) and
    scores cosine x length of that vector.

    Args:
        features: [N,D,H,W], not negative, any float type; may be memory-mapped.
        grid: the cells in pixels.
        clusters: how many detectors to make.
        train: int [n], the images to cluster (default: all); patterns of the others are only inferred.
        sample: units that are clustered at most; they are held in float32 (4 D bytes each).
        seed: for the sample and k-means.

    Returns:
        Detector of positions [N, clusters, 2] pixels and scores [N, clusters]; an image without activation scores 0.

    Raises:
        ArgumentError: shapes, NaN, or fewer units than clusters.
        ConelensError: scikit-learn is not installed.
    """
    check_features(features)
    generator = torch.Generator().manual_seed(seed)
    cells = features.shape[2] * features.shape[3]
    rows = _rows(features, train)
    kept = torch.randperm(len(rows) * cells, generator=generator)[: max(sample, clusters)].sort().values
    image, cell = kept // cells, kept % cells
    units = [
        block.gather(2, cell[image == i][None, None].expand(1, block.shape[1], -1))[0].T
        for i, block in enumerate(unit_blocks(features, rows, at_once=1))
    ]
    centroids = _cluster(torch.cat(units), clusters, seed, mini_batch=True)
    return Detector("k-means of unit features", *_match(features, grid, centroids))


def strongest_unit_patterns(
    features: Tensor, grid: Grid, clusters: int, *, train: Tensor | None = None, per_image: int = 10, seed: int = 0
) -> Detector:
    """Clusters of the directions of each image's strongest units.

    The strongest units of an image are the ``per_image`` cells whose feature vectors are longest (Euclidean norm over the
    channels, the first of equals). Those of all ``train`` images are brought to length 1 and clustered by k-means (Lloyd).
    In an image, a cluster stands at the one *of its strongest units* with the largest cosine and scores cosine x length.
    Arguments, result and errors as :func:`kmeans_patterns`.
    """
    check_features(features)
    if not 1 <= per_image <= features.shape[2] * features.shape[3]:
        raise ArgumentError(f"per_image: got {per_image}, wanted 1..{features.shape[2] * features.shape[3]} (cells of the map)")
    units = []
    for block in unit_blocks(features, _rows(features, train)):
        strongest = _strongest(block.norm(dim=1), per_image)
        units.append(block.gather(2, strongest[:, None].expand(-1, block.shape[1], -1)).transpose(1, 2).flatten(0, 1))
    centroids = _cluster(torch.cat(units), clusters, seed, mini_batch=False)
    return Detector("strongest-unit clusters", *_match(features, grid, centroids, per_image))


def _match(features: Tensor, grid: Grid, centroids: Tensor, among: int | None = None) -> tuple[Tensor, Tensor]:
    """Place [N,K,2] and score [N,K] of each centroid's best unit, of all or ``among`` the image's longest."""
    cells, scores = [], []
    for block in unit_blocks(features):
        length = block.norm(dim=1)
        cosine = centroids @ (block / length[:, None].clamp_min(1e-12))
        if among is not None:
            barred = torch.ones_like(length, dtype=torch.bool).scatter_(1, _strongest(length, among), False)
            cosine.masked_fill_(barred[:, None], -torch.inf)
        best = cosine.max(dim=2)
        cells.append(best.indices)
        scores.append(best.values * length.gather(1, best.indices))
    return grid.pixels(torch.cat(cells)), torch.cat(scores)


def _cluster(units: Tensor, clusters: int, seed: int, mini_batch: bool) -> Tensor:
    """Unit-length centroids [K,D] of vectors [U,D], which are brought to length 1; those of length 0 are left out."""
    cluster = _scikit_learn()
    length = units.norm(dim=1)
    directions = (units / length[:, None].clamp_min(1e-12))[length > 0]
    if not 1 <= clusters <= len(directions):
        raise ArgumentError(f"clusters: got {clusters}, wanted 1..{len(directions)} (the active units there are to cluster)")
    # from random units: to spread hundreds of first centroids (k-means++) takes forty times as long for the same inertia
    options: dict[str, Any] = {"n_clusters": clusters, "random_state": seed, "n_init": 1, "init": "random"}
    means = cluster.MiniBatchKMeans(batch_size=4096, **options) if mini_batch else cluster.KMeans(**options)
    # means of what is not negative; scikit-learn shifts to the middle and back, which rounds zeros to below zero
    centroids = torch.from_numpy(means.fit(directions.numpy()).cluster_centers_).float().clamp_min(0)
    return torch.nn.functional.normalize(centroids, dim=1)


def _strongest(length: Tensor, count: int) -> Tensor:
    """Cells [N,count] of the largest lengths [N,cells], the first of equals."""
    return length.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _rows(features: Tensor, train: Tensor | None) -> Tensor:
    rows = torch.arange(len(features)) if train is None else torch.as_tensor(train, dtype=torch.int64)
    if rows.ndim != 1 or not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= len(features):
        raise ArgumentError(f"train: got {rows.tolist()}, wanted image numbers 0..{len(features) - 1}, at least one")
    return rows


def _scikit_learn() -> Any:
    try:
        import sklearn.cluster
    except ImportError as error:
        raise ConelensError("clusters of units need scikit-learn: pip install 'conelens[evaluate]'") from error
    return sklearn.cluster
