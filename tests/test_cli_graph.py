"""`conelens graph`: what it writes, what it says, what it keeps when it is interrupted, what it refuses."""

from __future__ import annotations

import csv
import errno
import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

pytest.importorskip("typer")
pytest.importorskip("rich")

from conelens.cli import console
from conelens.cli.graph_work import strongest_nodes
from conelens.errors import ArgumentError
from conelens.explanatory import ExplanatoryGraph, GraphLayer, Grid, Placement
from conelens.explanatory.decoder import CHECKPOINT, Recipe
from conelens.explanatory.evaluate.study import Study, Table, evaluate
from tests.explanatory.evaluate.test_sheet import rate
from tests.kit.command import one_line_error, run

NETS = """
import torch
from torch import nn

def net(seed=1):
    torch.manual_seed(seed)
    lower = nn.Conv2d(3, 4, 5, stride=4, padding=2)
    return nn.Sequential(lower, nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())

def other():
    return net(2)

def dead():
    made = net()
    nn.init.constant_(made[2].bias, -1e3)
    return made
"""
MODEL = ("--model", "graph_nets:net", "--input-size", "48", "--layers", "0,2", "--nodes", "3,2", "--edges", "4")
FIT = ("graph", "fit", "photos", *MODEL, "--iterations", "3")
COUNT = 12


def draw_photograph(path: Path, seed: int) -> tuple[float, float]:
    """A red and a green disc side by side, anywhere, on noise; -> (y, x) of the red one as fractions."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(90, 130, (40, 60, 3), dtype=np.uint8))
    y, x = rng.uniform(10, 30), rng.uniform(10, 36)
    pen = ImageDraw.Draw(picture)
    pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=(230, 30, 30))
    pen.ellipse((x + 8, y - 6, x + 20, y + 6), fill=(30, 220, 40))
    picture.save(path)
    return y / 40, x / 60


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model file, drawn photographs, a broken one, their parts, and a finished graph."""
    folder = tmp_path_factory.mktemp("room")
    (folder / "graph_nets.py").write_text(NETS)
    (folder / "photos").mkdir()
    (folder / "parts").mkdir()
    lines = []
    for number in range(COUNT):
        y, x = draw_photograph(folder / "photos" / f"{number:02d}.png", number)
        draw_photograph(folder / "parts" / f"{number:02d}.png", number)
        lines.append(f"{number:02d}.png,red,{y:.4f},{x:.4f},0.3,0.2\n")
    (folder / "parts" / "parts.csv").write_text("".join(lines))
    (folder / "photos" / "05.png").write_bytes((folder / "photos" / "05.png").read_bytes()[:-200])
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        result = run(*FIT, "--out", "graph")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def room(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(fitted, monkeypatch)
    return fitted


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    patch.delitem(sys.modules, "graph_nets", raising=False)


def network_input(path: Path) -> torch.Tensor:
    """The image stretched to 48 x 48, by ImageNet's recipe."""
    pixels = np.asarray(Image.open(path).convert("RGB").resize((48, 48), Image.Resampling.BILINEAR), np.float32) / 255
    values = (pixels - np.array([0.485, 0.456, 0.406], np.float32)) / np.array([0.229, 0.224, 0.225], np.float32)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def same(first: Path, second: Path) -> bool:
    return (first / "graph.safetensors").read_bytes() == (second / "graph.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------- fit
def test_it_learns_what_the_library_learns_and_says_what_is_next(room: Path, tmp_path: Path) -> None:
    import graph_nets

    import conelens

    result = run(*FIT, "--out", tmp_path / "graph")
    assert result.exit_code == 0, result.output
    assert "05.png" in result.stderr and "skipped" in result.stderr
    assert "2: 3 iterations, log-likelihood -" in result.stderr and " per unit of activity, higher is better" in result.stderr
    begun = [line for line in result.stderr.splitlines() if line.startswith("begins: ")]
    assert begun == ["begins: images", "begins: features", "begins: 2", "begins: 0"], "a line each where there is no terminal"
    assert f"next: conelens graph draw {tmp_path / 'graph'} photos" in result.stderr
    assert {p.name for p in (tmp_path / "graph").iterdir()} == {"graph.safetensors", "graph.json", "fit.json"}
    paths = [p for p in sorted((room / "photos").iterdir()) if p.name != "05.png"]
    net = conelens.trace(graph_nets.net().eval(), (3, 48, 48))
    images = torch.stack([network_input(p) for p in paths])
    expected = ExplanatoryGraph.fit(net, images, ["0", "2"], [3, 2], edges=4, iterations=3)
    found = ExplanatoryGraph.load(tmp_path / "graph")
    assert list(found.layers) == ["0", "2"]
    for name, layer in found.layers.items():
        assert torch.allclose(layer.mean, expected[name].mean, atol=1e-3)
        assert layer.history == pytest.approx(expected[name].history, abs=1e-5)


def test_a_finished_fit_is_not_learned_again_unless_asked(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = []

    def fit(*_: Any, **options: Any) -> ExplanatoryGraph:
        learned.append(options["seed"])
        return ExplanatoryGraph.load("graph")

    held = (room / "graph" / "fit.json").read_text(), (room / "graph" / "graph.safetensors").read_bytes()
    monkeypatch.setattr("conelens.cli.graph_work.ExplanatoryGraph.fit", fit)
    result = run(*FIT, "--out", "graph")
    assert result.exit_code == 0 and "holds this graph already" in result.stderr and not learned
    for options, parts in (
        (("--iterations", "4"), "iterations"),
        (("--seed", "1", "--edges", "5"), "edges, seed"),
        (("--form", "paper"), "form"),
        (("--nodes", "2"), "nodes"),
        (("--negatives", "parts"), "negatives"),
        (("--model", "graph_nets:other"), "model, weights"),
        (("--mean", "0.1"), "input"),
    ):
        one_line_error(run(*FIT, "--out", "graph", *options), 2, f"begun with other {parts};", "--anew")
    one_line_error(run("graph", "fit", "parts", *FIT[3:], "--out", "graph"), 2, "begun with other images;")
    assert not learned and held[1] == (room / "graph" / "graph.safetensors").read_bytes()
    monkeypatch.setattr("conelens.cli.graph_work.forget", lambda out: learned.append(out.name))
    assert run(*FIT, "--out", "graph", "--anew").exit_code == 0
    assert learned == ["graph"]
    (room / "graph" / "fit.json").write_text(held[0])


# the command in a process that ends, in one way or another, after so many checkpoints
STOPPED = """
import os
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from conelens.explanatory import ExplanatoryGraph
left, save = int(sys.argv.pop(1)), ExplanatoryGraph.save
how = signal.Signals[sys.argv.pop(1)]
def saved(graph, folder):
    global left
    save(graph, folder)
    left -= 1
    if not left:
        os.kill(os.getpid(), how)
ExplanatoryGraph.save = saved
from conelens.cli import main
main()
"""


def stopped(room: Path, saves: int, how: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
    code = [sys.executable, "-c", STOPPED, str(saves), how]
    return subprocess.run([*code, *map(str, command)], cwd=room, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_killed_it_goes_on_and_ends_with_the_same_graph(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph"
    assert stopped(room, 5, "SIGKILL", *FIT, "--out", out).returncode == -9
    one_line_error(run("graph", "infer", out, "photos", "--out", tmp_path / "found"), 1, "not finished", "conelens graph fit")
    result = run(*FIT, "--out", out)
    assert result.exit_code == 0, result.output
    assert "goes on after iteration 2 of 0" in result.stderr
    assert same(out, room / "graph")


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_ctrl_c_says_where_it_goes_on_and_another_fit_is_not_continued(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph"
    process = stopped(room, 2, "SIGINT", *FIT, "--out", out)
    assert process.returncode == 130, process.stderr
    assert "interrupted: the same command goes on after iteration" in process.stderr
    assert "Traceback" not in process.stderr
    one_line_error(run(*FIT, "--out", out, "--seed", "3"), 2, "other seed;")
    (out / "graph.safetensors").write_bytes(b"cut short")
    one_line_error(run(*FIT, "--out", out), 2, "no explanatory graph", "--anew")
    assert run(*FIT, "--out", out, "--anew").exit_code == 0
    assert same(out, room / "graph")


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, real = [], Path.write_bytes

    def write(path: Path, data: bytes) -> int:
        saves.append(path)
        if len(saves) == 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write)
        one_line_error(run(*FIT, "--out", tmp_path / "graph"), 1, "No space left", "make room", "--out")
    assert not list((tmp_path / "graph").glob("*.part"))
    result = run(*FIT, "--out", tmp_path / "graph")
    assert result.exit_code == 0 and "goes on after iteration" in result.stderr
    assert same(tmp_path / "graph", room / "graph")


def test_mistakes_are_named_before_any_work(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conelens.cli.graph_work.readable", lambda *_: pytest.fail("worked before it looked"))
    for options, parts in {
        ("--layers", "0,22"): ("error: --layers: got '22'", "did you mean 2", "conelens layers MODEL"),
        ("--layers", "2,0"): ("error: --layers: ", "bottom first"),
        ("--nodes", "3,2,1"): ("--nodes has 3 numbers", "0, 2"),
        ("--nodes", "200"): ("--nodes has 200 for 0", "1..144"),
        ("--nodes", "few"): ("--nodes is 'few'", "40,20"),
        ("--edges", "0"): ("--edges is 0",),
        ("--iterations", "0"): ("--iterations is 0",),
        ("--form", "book"): ("form: got 'book'", "release"),
        ("--noise", "-1"): ("noise: got -1",),
        ("--memory", "much"): ("--memory is 'much'",),
        ("--device", "tpu"): ("tpu",),
    }.items():
        one_line_error(run(*FIT, "--out", tmp_path, *options), 2, *parts)
    one_line_error(run("graph", "fit", "photos", *MODEL[:4], "--out", tmp_path), 2, "--layers A,B")
    one_line_error(run("graph", "fit", "nowhere", *FIT[3:], "--out", tmp_path), 1, "nowhere: no such folder")
    one_line_error(run(*FIT, "--out", tmp_path, "--negatives", "nowhere"), 1, "nowhere: no such folder")
    (tmp_path / "empty").mkdir()
    one_line_error(run("graph", "fit", tmp_path / "empty", *FIT[3:], "--out", tmp_path), 1, "no image files")
    one_line_error(run(*FIT, "--out", "graph_nets.py"), 1, "graph_nets.py", "file")


def test_images_that_tell_nothing_are_refused(room: Path, tmp_path: Path) -> None:
    silent = run(*FIT, "--model", "graph_nets:dead", "--out", tmp_path / "silent")
    one_line_error(silent, 1, "layer 2: no unit fires in any of the 11 images")
    (tmp_path / "words.jpg").write_text("no image")
    one_line_error(run("graph", "fit", tmp_path, *FIT[3:], "--out", tmp_path / "out"), 1, "none of the 1 images can be read")


# ----------------------------------------------------------------------------------------------------- infer
def test_positions_are_those_of_the_library_and_the_strongest_nodes_are_listed(room: Path, tmp_path: Path) -> None:
    import graph_nets

    import conelens

    table = tmp_path / "best.csv"
    result = run("graph", "infer", "graph", "photos", "--out", tmp_path, "--table", table, "--strongest", "2")
    assert result.exit_code == 0, result.output
    assert "05.png" in result.stderr
    graph = ExplanatoryGraph.load("graph", conelens.trace(graph_nets.net().eval(), (3, 48, 48)))
    paths = [p for p in sorted((room / "photos").iterdir()) if p.name != "05.png"]
    expected = graph.infer(torch.stack([network_input(p) for p in paths]))
    with safe_open(tmp_path / "placements.safetensors", "pt") as file:
        about = json.loads(file.metadata()["conelens"])
        assert [Path(p).name for p in about["images"]] == [p.name for p in paths]
        assert about["input_size"] == [48, 48]
        for name, placement in expected.items():
            for key, value in placement._asdict().items():
                assert torch.allclose(file.get_tensor(f"{name}.{key}"), value, atol=1e-4), key
    rows = list(csv.DictReader(table.open()))
    assert [row["rank"] for row in rows] == ["1", "2"] * len(paths)
    for number, row in enumerate(rows[::2]):
        relative = {name: p.scores[number] / graph[name].mean_score for name, p in expected.items()}
        layer = max(relative, key=lambda name: float(relative[name].max()))
        node = int(row["filter"]), int(row["node"])
        assert row["layer"] == layer
        assert float(row["relative_score"]) == pytest.approx(float(relative[layer].max()), rel=1e-4)
        assert float(relative[layer][node]) == pytest.approx(float(relative[layer].max()), rel=1e-4)
        assert [float(row["y"]), float(row["x"])] == expected[layer].positions[number][node].tolist()


def test_one_file_one_layer_and_json(room: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "found.safetensors", tmp_path / "best.json"
    result = run("graph", "infer", "graph", "photos/00.png", "--layers", "2", "--out", out, "--table", table)
    assert result.exit_code == 0, result.output
    assert "holds: 2.positions (y, x" in result.stderr and f"next: safetensors.torch.load_file('{out}')" in result.stderr
    with safe_open(out, "pt") as file:
        assert set(file.keys()) == {"2.positions", "2.scores", "2.activations"}
        assert file.get_tensor("2.scores").shape == (1, 6, 2)
    assert {row["layer"] for row in json.loads(table.read_text())} == {"2"}
    one_line_error(run("graph", "infer", "graph", "photos", "--layers", "3", "--out", out), 2, "--layers: got '3'", "0, 2")
    one_line_error(run("graph", "infer", "graph", "photos", "--table", "t.txt", "--out", out), 2, "--table is t.txt", ".json")
    one_line_error(run("graph", "infer", "photos", "photos", "--out", out), 1, "photos: no graph of `conelens graph fit`")
    one_line_error(run("graph", "infer", "graph", "photos", "--out", "p.txt"), 2, "--out is p.txt", ".safetensors")
    assert not Path("p.txt").exists()
    (tmp_path / "found.1").mkdir()
    assert run("graph", "infer", "graph", "photos/00.png", "--out", tmp_path / "found.1").exit_code == 0
    a_file = run("graph", "infer", "graph_nets.py", "photos", "--out", out)
    one_line_error(a_file, 1, "graph_nets.py: it is a file, not a folder of `conelens graph fit`")


def test_a_fit_stopped_before_its_first_iteration_says_so(room: Path, tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text((room / "graph" / "fit.json").read_text())
    for command in (("infer", tmp_path, "photos"), ("draw", tmp_path, "photos"), ("evaluate", tmp_path, "--parts", "parts")):
        result = run("graph", *command, "--out", tmp_path / "out.safetensors")
        one_line_error(result, 1, "not finished its first step", "the same `conelens graph fit` again")


def test_what_fails_before_it_writes_leaves_no_folder(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep"
    for command in (
        ("fit", "nowhere", *MODEL),
        ("infer", "photos", "photos"),
        ("infer", "graph", "nowhere"),
        ("draw", "graph", "photos", "--layer", "1"),
        ("evaluate", "graph", "--parts", "photos"),
    ):
        assert run("graph", *command, "--out", out).exit_code in (1, 2)
        assert not list(tmp_path.iterdir()), command
    out.parent.mkdir()
    assert run("graph", "infer", "photos", "photos", "--out", out).exit_code == 1
    assert out.parent.is_dir() and not out.exists(), "what was there stays"


def test_of_the_nodes_of_a_filter_at_one_place_the_strongest_is_listed() -> None:
    places = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [9.0, 9.0]], [[1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]])[None]
    scores = torch.tensor([[[4.0, 5.0, 1.0], [3.0, 0.0, 0.0]]])
    layer = GraphLayer("a", Grid((0.0, 0.0), (1.0, 1.0), (10, 10)), places[0], *torch.ones(2, 2, 3), places[0])
    placements = {"a": Placement(places, scores, scores)}
    graph = ExplanatoryGraph({"a": layer}, {}, {"rules": {}})
    rows = strongest_nodes(graph, placements, [Path("one.png")], 3)
    assert [(row["rank"], row["filter"], row["node"]) for row in rows] == [(1, 0, 1), (2, 1, 0), (3, 0, 2)]
    assert len(strongest_nodes(graph, placements, [Path("one.png")], 9)) == 3, "nodes with score 0 are nowhere"


def test_other_weights_than_those_of_the_fit_are_refused(room: Path, tmp_path: Path) -> None:
    import graph_nets
    from safetensors.torch import save_file

    for number, name in ((1, "mine"), (2, "theirs")):
        save_file(graph_nets.net(number).state_dict(), tmp_path / f"{name}.safetensors")
    command = ("graph", "infer", "graph", "photos/00.png", "--out", tmp_path / "a.safetensors")
    theirs = run(*command, "--weights", tmp_path / "theirs.safetensors")
    one_line_error(theirs, 2, "error: the graph was fitted with other weights", "--weights")
    assert run(*command, "--weights", tmp_path / "mine.safetensors").exit_code == 0
    moved = tmp_path / "graph"
    assert run(*FIT, "--weights", tmp_path / "mine.safetensors", "--out", moved).exit_code == 0
    (tmp_path / "mine.safetensors").rename(tmp_path / "moved.safetensors")
    again = ("graph", "infer", moved, *command[3:])
    one_line_error(run(*again), 2, "mine.safetensors", "say with --weights where they are")
    assert run(*again, "--weights", tmp_path / "moved.safetensors").exit_code == 0


# ------------------------------------------------------------------------------------------------------ draw
def test_the_page_shows_graph_and_synthesis(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conelens.cli.graph_show.Recipe", functools.partial(Recipe, size=12, width=4))
    options = ("--nodes", "3", "--patches", "4", "--side", "20", "--root", "2/1/0", "--graphml")
    result = run("graph", "draw", "graph", "photos", "--out", tmp_path, *options, "--synthesis", "--steps", "2")
    assert result.exit_code == 0, result.output
    assert f"written: {tmp_path / 'report.html'}\nnext: open {tmp_path / 'report.html'}" in result.stderr
    names = {p.stem for p in (tmp_path / "figures").iterdir()}
    assert {"graph", "below_2_1_0", "nodes_0", "nodes_2", "heat_maps", "synthesis_2", "log_likelihood"} == names
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Decoder of 2, 2 of 2 steps" in text
    for doubt in (
        "9 images teach a decoder little (2 more are held out, to be painted)",
        "after 2 steps a decoder paints blurs",
    ):
        assert f"--synthesis: {doubt}" in result.stderr and f"Mind that {doubt}" in text
    assert "   10  11.png" in text and "05.png" not in text
    assert (tmp_path / "graph.graphml").read_text().count("<node ") == 4 * 3 + 6 * 2
    only = run("graph", "draw", "graph", "photos", "--out", tmp_path / "one", "--layer", "0")
    assert only.exit_code == 0 and not (tmp_path / "one" / "figures" / "nodes_2.png").exists()


def test_an_interrupted_decoder_goes_on(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("graph", "draw", "graph", "photos", "--out", tmp_path, "--synthesis", "--steps", "3", "--nodes", "1")
    seen: list[int] = []

    class Report:
        def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
            if stage == "decoder":
                seen.append(done)
                if seen == [1]:
                    raise KeyboardInterrupt

    class Bars:
        def __enter__(self) -> Report:
            return Report()

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(console, "stages", Bars)
    monkeypatch.setattr("conelens.cli.graph_show.Recipe", functools.partial(Recipe, size=12, width=4))
    stopped = run(*command)
    assert stopped.exit_code == 130
    assert "1 of 3 steps of the decoder are kept" in stopped.stderr
    assert (tmp_path / "decoder_2" / CHECKPOINT).is_file()
    assert run(*command).exit_code == 0
    assert seen == [1, 2, 3]


def test_what_cannot_be_drawn_is_named(room: Path, tmp_path: Path) -> None:
    command = ("graph", "draw", "graph", "photos", "--out", tmp_path)
    for options, parts in {
        ("--layer", "1"): ("error: --layer: got '1'", "0, 2"),
        ("--root", "2/1"): ("--root is '2/1'", "LAYER/FILTER/NODE"),
        ("--root", "2/9/0"): ("error: --root: ", "filter 0..5"),
        ("--root", "3/1/0"): ("error: --root: got '3'", "0, 2"),
        ("--patches", "0"): ("--patches is 0",),
        ("--steps", "0", "--synthesis"): ("--steps is 0",),
    }.items():
        one_line_error(run(*command, *options), 2, *parts)
    one_line_error(run(*command[:3], "photos/00.png", *command[4:], "--synthesis"), 2, "--synthesis: got 1 images")


# -------------------------------------------------------------------------------------------------- evaluate
def test_experiments_are_tables_in_three_places(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def study(*given: Any, **options: Any) -> Study:
        asked.update(inspect.signature(evaluate).bind(*given, **options).arguments)
        options["progress"]("stability", 1, 1)
        return Study([Table("Stability", ["detector", "mean <d>"], [["nodes", "0.100"], ["filters" * 30, "0.2"]], "Low.")], {})

    monkeypatch.setattr("conelens.cli.graph_study.evaluate", study)
    command = ("graph", "evaluate", "graph", "--parts", "parts", "--resamples", "20", "--seed", "3", "--out", tmp_path)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert (asked["seed"], asked["resamples"], len(asked["parts"])) == (3, 20, COUNT)
    image = network_input(room / "parts" / "00.png")
    assert torch.allclose(asked["parts"][0], image, atol=1e-5)
    trained, random = (asked[name](image[None]) for name in ("net", "random_net"))
    assert not torch.allclose(trained, random) and float(random.max()) > 0
    run(*command)
    assert torch.equal(random, asked["random_net"](image[None])) and torch.equal(trained, asked["net"](image[None]))
    assert "filters" * 30 + "  0.2\n" in result.stdout, "whole, however wide the terminal"
    assert json.loads((tmp_path / "study.json").read_text())["tables"][0]["title"] == "Stability"
    assert (tmp_path / "study.md").is_file()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>0.100</td>" in page and "<th>mean &lt;d&gt;</th>" in page and "<p>Low.</p>" in page


def test_the_sheet_is_written_and_ratings_are_read_back(room: Path, tmp_path: Path) -> None:
    from conelens.explanatory.evaluate.sheet import SheetFiles

    result = run("graph", "evaluate", "graph", "--parts", "parts", "--sheet", "--rows", "3", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    files = SheetFiles(tmp_path / "sheet.html", tmp_path / "sheet.html.key.json")
    assert str(files.page) in result.stderr and str(files.key) in result.stderr
    ratings = rate(files, {"node": 9, "filter": 3})
    out = tmp_path / "people"
    read = run("graph", "evaluate", "--ratings", ratings, "--key", files.key, "--out", out)
    assert read.exit_code == 0, read.output
    assert json.loads((out / "ratings.json").read_text())["tables"][0]["rows"][0] == ["nodes", "1.000", "[1.000, 1.000]"]
    assert "| nodes | 1.000 |" in (out / "ratings.md").read_text() and str(out / "ratings.md") in read.stderr
    lines = [line.split() for line in read.stdout.splitlines()]
    assert ["nodes", "1.000", "[1.000,", "1.000]"] in lines
    assert ["nodes", "minus", "filters", "+0.667", "[0.667,", "0.667]"] in lines
    one_line_error(run("graph", "evaluate", "--ratings", ratings), 2, "--key is not given")
    one_line_error(run("graph", "evaluate", "--ratings", "nope.json"), 1, "nope.json: no such file")
    one_line_error(run("graph", "evaluate", "--ratings", ratings, "--key", "gone.json"), 1, "gone.json: no such file")
    one_line_error(run("graph", "evaluate", "--ratings", files.key, "--key", files.key), 1, "not a file of the format")


def test_wrong_data_sets_are_named(room: Path, tmp_path: Path) -> None:
    command = ("graph", "evaluate", "graph", "--out", tmp_path)
    one_line_error(run(*command), 2, "--parts")
    one_line_error(run(*command, "--parts", "parts", "--format", "coco"), 2, "--format is 'coco'", "cub")
    one_line_error(run(*command, "--parts", "photos"), 1, "parts.csv")
    one_line_error(run(*command, "--parts", "parts", "--category", "cat"), 1, "no such folder")
    one_line_error(run(*command, "--parts", "parts", "--format", "pascal-part"), 2, "--category is not given", "horse")
    one_line_error(run(*command, "--parts", "parts", "--format", "pascal-part", "--category", "cat"), 1, "Annotations_Part")
    one_line_error(run(*command, "--parts", "parts", "--format", "cub"), 1, "parts.txt")
    one_line_error(run(*command, "--parts", "parts", "--format", "cub", "--category", "x"), 2, "leave it out")
    one_line_error(run(*command, "--parts", "parts", "--resamples", "0"), 2, "--resamples is 0")


def test_whole_numbers_with_commas() -> None:
    assert console.counts("40, 20", "--nodes") == [40, 20]
    for text in ("", "4,", "0", "-1", "²"):
        with pytest.raises(ArgumentError, match="--nodes"):
            console.counts(text, "--nodes")
