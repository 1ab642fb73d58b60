"""Graphs in use: inferred again, saved, resumed after any kind of end, refused clearly where something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import conelens
from conelens.errors import ArgumentError, CheckpointError, DataError, DeadUnitWarning
from conelens.explanatory import ExplanatoryGraph, Features, FitInterrupted, Grid
from conelens.explanatory.fit import LayerFit
from conelens.explanatory.graph import _finish
from tests.kit.planted import LOWER, UPPER, PlantedNet, planted

LAYERS = [LOWER, UPPER]


@pytest.fixture(scope="module")
def net() -> conelens.Network:
    return conelens.trace(PlantedNet().eval(), (4, 96, 96))


@pytest.fixture(scope="module")
def features(net: conelens.Network) -> Features:
    return Features.extract(net, planted(24).images, LAYERS, scale="channel")


@pytest.fixture(scope="module")
def graph(net: conelens.Network, features: Features) -> ExplanatoryGraph:
    return ExplanatoryGraph.fit(net, features, nodes_per_filter=[3, 5], edges=4, iterations=4)


def same(a: ExplanatoryGraph, b: ExplanatoryGraph) -> bool:
    """To the bit, histories included."""
    return list(a.layers) == list(b.layers) and all(
        x == y if not isinstance(x, torch.Tensor) else torch.equal(x, y)
        for layer in a.layers
        for x, y in zip(vars(a[layer]).values(), vars(b[layer]).values(), strict=True)
    )


def test_inference_on_the_training_images_finds_what_training_found(graph: ExplanatoryGraph, features: Features) -> None:
    placement = graph.infer(features)
    fit = LayerFit(graph[UPPER], features[UPPER], graph.rules, 4, None)
    upper = torch.cat([found.positions for found, _ in fit.places()])
    parents = _finish(fit, 4, last=False)
    assert parents is not None and torch.equal(upper, placement[UPPER].positions)
    fit = LayerFit(graph[LOWER], features[LOWER], graph.rules, 4, parents)
    assert torch.equal(torch.cat([found.positions for found, _ in fit.places()]), placement[LOWER].positions)


def test_images_features_and_parts_of_them_are_inferred_alike(
    graph: ExplanatoryGraph, features: Features, net: conelens.Network
) -> None:
    whole = graph.infer(features)
    images = graph.infer(planted(24).images)
    part = graph.infer(features.part(7, 9))
    for layer in LAYERS:
        torch.testing.assert_close(images[layer].scores, whole[layer].scores, rtol=5e-3, atol=1e-6)
        assert torch.equal(part[layer].positions, whole[layer].positions[7:9])
        assert whole[layer].positions.shape == (24, *graph[layer].shape, 2)
        assert bool((whole[layer].activations[whole[layer].scores > 0] > 0).all())
    assert list(graph.infer(features, layers=[UPPER])) == [UPPER]


def test_layers_and_scores_of_a_graph_are_as_documented(graph: ExplanatoryGraph, features: Features) -> None:
    assert list(graph.layers) == LAYERS and graph.complete and "lower 4x3, upper 3x5" in repr(graph)
    assert graph[UPPER].edges is None and graph[LOWER].edges is not None
    assert graph[LOWER].edges.shape == (4, 3, 4) and int(graph[LOWER].edges.max()) < 15
    assert graph[LOWER].mean_score == pytest.approx(float(graph.infer(features)[LOWER].scores.mean()), rel=1e-5)
    with pytest.raises(ArgumentError, match="wanted one of lower, upper"):
        graph["middle"]


def test_saved_and_loaded_it_is_the_same(
    graph: ExplanatoryGraph, features: Features, net: conelens.Network, tmp_path: Path
) -> None:
    graph.save(tmp_path / "g")
    loaded = ExplanatoryGraph.load(tmp_path / "g")
    assert same(graph, loaded) and loaded.settings == graph.settings and loaded.rules == graph.rules
    for layer, placement in loaded.infer(features).items():
        assert torch.equal(placement.positions, graph.infer(features)[layer].positions)
    with pytest.raises(ArgumentError, match="loaded without its network"):
        loaded.infer(planted(2).images)
    assert len(loaded.infer(planted(2).images, net=net)[UPPER].scores) == 2
    about = json.loads((tmp_path / "g" / "graph.json").read_text())
    assert about["settings"]["edges"] == 4 and len(about["layers"][LOWER]["history"]) == 4


def test_tampered_files_are_refused(graph: ExplanatoryGraph, tmp_path: Path) -> None:
    graph.save(tmp_path)
    file = tmp_path / "graph.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    about = json.loads((tmp_path / "graph.json").read_text())

    def refused(reason: str, edited: dict[str, torch.Tensor], meta: dict[str, object] = about) -> None:
        save_file(edited, file, {"graph": json.dumps(meta)})
        with pytest.raises(CheckpointError, match=reason):
            ExplanatoryGraph.load(tmp_path)

    refused("lead to nodes that upper does not have", tensors | {f"edges\n{LOWER}": tensors[f"edges\n{LOWER}"] + 99})
    refused("holds NaN", tensors | {f"sigma\n{UPPER}": tensors[f"sigma\n{UPPER}"] * torch.nan})
    refused("has shape", tensors | {f"mean\n{UPPER}": tensors[f"mean\n{UPPER}"][..., :1].contiguous()})
    refused("mean", {key: value for key, value in tensors.items() if key != f"mean\n{UPPER}"})
    refused(
        "is the top layer but has edges",
        {
            **tensors,
            **{f"{k}\n{UPPER}": torch.zeros(3, 5, 1).to(d) for k, d in (("edges", torch.int64), ("strength", torch.float32))},
        },
    )
    edges, settings = tensors[f"edges\n{LOWER}"], about["settings"]
    refused("edges of lower is torch.int32", tensors | {f"edges\n{LOWER}": edges.int()})
    refused("do not fit their strength", tensors | {f"edges\n{LOWER}": edges[..., :2].contiguous()})
    refused("lower has no edges", {k: v for k, v in tensors.items() if k not in (f"edges\n{LOWER}", f"strength\n{LOWER}")})
    refused("'rules'", tensors, about | {"settings": {k: v for k, v in settings.items() if k != "rules"}})
    refused("'seed'", tensors, about | {"settings": {k: v for k, v in settings.items() if k != "seed"}})
    refused("unexpected keyword", tensors, about | {"settings": settings | {"rules": {"colour": "red"}}})
    refused("weight: got 'none'", tensors, about | {"settings": settings | {"rules": settings["rules"] | {"weight": "none"}}})
    refused("conelens.ExplanatoryGraph 9", tensors, about | {"format": "conelens.ExplanatoryGraph 9"})
    for content in (whole[:-100], b"pickle", b""):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="no explanatory graph"):
            ExplanatoryGraph.load(tmp_path)
    with pytest.raises(CheckpointError, match="no explanatory graph"):
        ExplanatoryGraph.load(tmp_path / "nowhere")


# --- going on after an end ---------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 4, 5, 8])
def test_a_fit_that_ended_anywhere_goes_on_to_the_same_graph(
    graph: ExplanatoryGraph, features: Features, tmp_path: Path, after: int
) -> None:
    seen: list[tuple[str, int, float]] = []

    def watch(layer: str, iteration: int, likelihood: float) -> None:
        seen.append((layer, iteration, likelihood))
        if len(seen) == after:
            raise Stop

    arguments = {"nodes_per_filter": [3, 5], "edges": 4, "iterations": 4, "checkpoint": tmp_path}
    with pytest.raises(Stop):
        ExplanatoryGraph.fit(None, features, **arguments, watch=watch)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="was not finished"):  # not even after 8: no mean score yet
        ExplanatoryGraph.load(tmp_path)
    resumed = ExplanatoryGraph.fit(None, features, **arguments, watch=lambda *x: seen.append(x))  # type: ignore[arg-type]
    assert same(resumed, graph) and same(ExplanatoryGraph.load(tmp_path), graph)
    assert [(layer, iteration) for layer, iteration, _ in seen] == [
        (layer, i) for layer in (UPPER, LOWER) for i in (1, 2, 3, 4)
    ]


_KILLED = """
import sys, time
import conelens
from conelens.explanatory import ExplanatoryGraph
from tests.kit.planted import PlantedNet, planted
net = conelens.trace(PlantedNet().eval(), (4, 96, 96))
def watch(*told):
    print(*told, flush=True)
    time.sleep(float(sys.argv[2]))
ExplanatoryGraph.fit(net, planted(24).images, ["lower", "upper"], [3, 5], edges=4, iterations=4, scale="channel",
                     checkpoint=sys.argv[1], watch=watch)
"""


def start(folder: Path, pause: float) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(folder), str(pause)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_killed_outright_it_resumes_to_the_same_graph(graph: ExplanatoryGraph, tmp_path: Path) -> None:
    for lines in (2, 4):
        process = start(tmp_path, 0.2)
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline()
        time.sleep(0.05 * lines)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(tmp_path, 0).wait() == 0
    assert same(ExplanatoryGraph.load(tmp_path), graph)


def test_ctrl_c_says_where_it_goes_on(features: Features, tmp_path: Path) -> None:
    def interrupt(layer: str, iteration: int, likelihood: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(FitInterrupted, match="goes on from here") as caught:
        ExplanatoryGraph.fit(None, features, nodes_per_filter=3, checkpoint=tmp_path, watch=interrupt)
    assert caught.value.folder == tmp_path and (tmp_path / "graph.safetensors").exists()
    with pytest.raises(FitInterrupted, match="nothing was kept"):
        ExplanatoryGraph.fit(None, features, nodes_per_filter=3, watch=interrupt)


def test_ctrl_c_among_the_features_leaves_nothing_behind(net: conelens.Network, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(FitInterrupted, match="nothing was learned yet"):
        ExplanatoryGraph.fit(net, planted(6).images, LAYERS, 3, memory=0, checkpoint=tmp_path, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_says_so_before_the_work(
    net: conelens.Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def mkdir(path: str, mode: int = 0o777) -> None:
        if Path(path).parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        make(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    told: list[tuple[str, int, int]] = []
    with pytest.raises(PermissionError, match="Permission denied"):
        ExplanatoryGraph.fit(net, planted(6).images, LAYERS, 3, checkpoint=tmp_path, progress=lambda *x: told.append(x))
    assert not told


def test_another_fit_is_not_continued(features: Features, net: conelens.Network, tmp_path: Path) -> None:
    arguments = {"nodes_per_filter": 3, "edges": 4, "iterations": 1, "checkpoint": tmp_path}
    ExplanatoryGraph.fit(None, features, **arguments)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="was begun with edges 4, now 5"):
        ExplanatoryGraph.fit(None, features, **(arguments | {"edges": 5}))  # type: ignore[arg-type]
    others = Features.extract(net, planted(24, seed=9).images * 1.5, LAYERS, scale="channel")
    with pytest.raises(CheckpointError, match="other images or another network"):
        ExplanatoryGraph.fit(None, others, **arguments)  # type: ignore[arg-type]


def test_other_images_are_noticed_where_others_give_the_scale(net: conelens.Network, tmp_path: Path) -> None:
    fit = partial(
        ExplanatoryGraph.fit, net, layers=LAYERS, nodes_per_filter=3, edges=4, iterations=1, checkpoint=tmp_path,
        negatives=planted(12, seed=7).images, scale="channel",
    )  # fmt: skip
    fit(planted(24).images)
    fit(planted(24).images, batch_size=5)
    with pytest.raises(CheckpointError, match="other images or another network"):
        fit(planted(24, seed=9).images)
    with pytest.raises(CheckpointError, match="was begun with images 24, now 20"):
        fit(planted(20).images)


def test_files_of_features_are_gone_after_the_fit(net: conelens.Network, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def watch(layer: str, iteration: int, likelihood: float) -> None:
        seen.append(sorted(path.name for path in (tmp_path / "features").iterdir()))

    arguments = {"nodes_per_filter": 3, "edges": 4, "iterations": 1, "checkpoint": tmp_path, "memory": 0, "scale": "channel"}
    ExplanatoryGraph.fit(net, planted(6).images, LAYERS, **arguments, watch=watch)  # type: ignore[arg-type]
    assert seen == [["0.f16", "1.f16", "features.json"]] * 2 and not (tmp_path / "features").exists()
    kept = Features.extract(net, planted(6).images, LAYERS, memory=0, folder=tmp_path / "features", scale="channel")
    ExplanatoryGraph.fit(net, kept, **arguments)  # type: ignore[arg-type]
    assert (tmp_path / "features" / "0.f16").exists()


def test_a_full_disk_leaves_the_last_checkpoint(
    graph: ExplanatoryGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph.save(tmp_path)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        graph.save(tmp_path)
    monkeypatch.undo()
    assert same(ExplanatoryGraph.load(tmp_path), graph) and sorted(p.name for p in tmp_path.iterdir()) == [
        "graph.json",
        "graph.safetensors",
    ]


# --- images that are hard ----------------------------------------------------------------------------------------------


def made(upper: torch.Tensor, lower: torch.Tensor) -> Features:
    grids = {LOWER: Grid((1.5, 1.5), (4.0, 4.0), (8, 8)), UPPER: Grid((3.5, 3.5), (8.0, 8.0), (4, 4))}
    scale = {LOWER: torch.ones(lower.shape[1], 1, 1), UPPER: torch.ones(upper.shape[1], 1, 1)}
    return Features({LOWER: lower.half(), UPPER: upper.half()}, grids, scale, (32, 32))


def noise(images: int, channels: int, side: int) -> torch.Tensor:
    return torch.rand(images, channels, side, side, generator=torch.Generator().manual_seed(images + channels)).pow(3)


def finite(graph: ExplanatoryGraph) -> bool:
    return all(
        bool(torch.isfinite(x).all())
        for layer in graph.layers.values()
        for x in vars(layer).values()
        if isinstance(x, torch.Tensor)
    )


def test_images_without_activity_and_dead_filters_are_lived_with() -> None:
    upper, lower = noise(9, 3, 4), noise(9, 2, 8)
    upper[4], lower[4] = 0, 0
    upper[:, 1] = 0
    features = made(upper, lower)
    with pytest.warns(DeadUnitWarning, match="upper: 1 of 3 filters never fire") as warned:
        graph = ExplanatoryGraph.fit(None, features, nodes_per_filter=4, edges=5, iterations=5)
    assert warned[0].filename == __file__, "it points to who called fit"
    assert finite(graph) and graph[LOWER].edges is not None
    assert not bool((graph[LOWER].edges // 4 == 1).any())  # nobody's parent is dead
    placement = graph.infer(features)
    assert not placement[LOWER].scores[4].any() and bool(placement[LOWER].scores[5].any())
    assert bool(torch.isfinite(placement[LOWER].positions).all())


@pytest.mark.parametrize("form", ["recommended", "paper", "release"])
def test_one_single_image_is_learned_from(form: str) -> None:
    graph = ExplanatoryGraph.fit(
        None, made(noise(1, 3, 4), noise(1, 2, 8)), nodes_per_filter=2, edges=3, iterations=4, form=form
    )
    assert finite(graph) and graph[LOWER].edges is not None


@pytest.mark.parametrize("form", ["recommended", "paper", "release"])
def test_fewer_upper_nodes_than_edges_means_fewer_edges(form: str) -> None:
    graph = ExplanatoryGraph.fit(
        None, made(noise(6, 2, 4), noise(6, 2, 8)), nodes_per_filter=[3, 2], edges=15, iterations=3, form=form
    )
    assert graph[LOWER].edges is not None
    assert graph[LOWER].edges.sort(-1).values.tolist() == [[[0, 1, 2, 3]] * 3] * 2


def test_features_that_are_nan_or_nothing_are_refused() -> None:
    upper, lower = noise(4, 2, 4), noise(4, 2, 8)
    bad = lower.clone()
    bad[2, 1, 3, 3] = torch.nan
    with pytest.raises(DataError, match="layer lower: its features hold NaN"):
        ExplanatoryGraph.fit(None, made(upper, bad), nodes_per_filter=2, iterations=2)
    with pytest.raises(DataError, match="no unit fires in any of the 4 images"):
        ExplanatoryGraph.fit(None, made(upper, torch.zeros_like(lower)), nodes_per_filter=2)


def test_features_that_do_not_fit_are_refused(graph: ExplanatoryGraph, features: Features, net: conelens.Network) -> None:
    with pytest.raises(ArgumentError, match="trace the network at the size it was learned at"):
        graph.infer(made(noise(2, 3, 4), noise(2, 4, 8)))
    for scale in ("unit", "channel"):
        with pytest.raises(ArgumentError, match=r"scale=graph\.scale"):
            graph.infer(Features.extract(net, planted(4).images, LAYERS, scale=scale))
    with pytest.raises(ArgumentError, match="got 2 and 0, wanted at least one of each"):
        graph.infer(features.part(3, 3))
    with pytest.raises(ArgumentError, match="got 0 and 24"):
        graph.infer(features, layers=[])
    bad = Features({name: features[name].clone() for name in LAYERS}, features.grids, features.scale, features.image_size)
    bad[LOWER][3, 1, 4, 4] = torch.nan
    with pytest.raises(DataError, match="layer lower: its features hold NaN or infinity, in images 0 to 23"):
        graph.infer(bad)
    assert list(graph.infer(bad, layers=[UPPER])) == [UPPER]
