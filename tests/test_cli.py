"""The command line: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")

from conelens.assets import photographs
from conelens.cli import console
from conelens.errors import ArgumentError
from conelens.peaks import PeakTable
from tests.kit.command import one_line_error, run

SMALL = """
import torch
from torch import nn

def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3))

def dead():
    model = net()
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.copy_(torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0]))
    return model

def capped():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 2, 3))

def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3))

def broken():
    raise RuntimeError("out of \\n luck")
"""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model file, three images and two broken ones; the working directory."""
    (tmp_path / "small_nets.py").write_text(SMALL)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(pictures / f"p{i}.jpg")
    whole = (pictures / "p0.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "words.jpg").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "small_nets", raising=False)
    return tmp_path


def test_layers_lists_and_draws(room: Path) -> None:
    result = run("layers", "squeezenet1_1", "--draw", room / "net.svg")
    assert result.exit_code == 0
    assert "fire6" in result.stdout
    assert "111x111" in result.stdout
    assert (room / "net.svg").read_text().startswith("<svg")
    assert run("layers", "small_nets:net", "--input-size", "32", "--draw", room / "net.png").exit_code == 0
    assert Image.open(room / "net.png").width > 100
    one_line_error(run("layers", "small_nets:net", "--draw", room / "net.pdf"), 2, ".svg or .png")


def test_layers_of_a_built_in_needs_no_weights() -> None:
    result = run("layers", "vgg16")
    assert result.exit_code == 0
    assert "conv5_3" in result.stdout


def test_project_writes_a_strip_per_image_and_skips_what_is_broken(room: Path) -> None:
    result = run(
        "project", "small_nets:net", *sorted((room / "pictures").iterdir()), "--layer", "3", "--channel", "2",
        "--input-size", "32", "--out", room / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (room / "out").iterdir()) == [f"3_2_00{i}_p{i}.png" for i in range(3)]
    assert "p2.jpg" in result.stdout
    assert "cut.jpg" in result.stderr
    assert "words.jpg" in result.stderr


def test_project_at_a_position(room: Path) -> None:
    common = (
        "project",
        "small_nets:net",
        room / "pictures" / "p0.jpg",
        "--layer",
        "3",
        "--channel",
        "0",
        "--input-size",
        "32",
    )
    result = run(*common, "--position", "4,7", "--out", room / "out")
    assert result.exit_code == 0
    assert "4,7" in result.stdout
    one_line_error(run(*common, "--position", "4,70"), 2, "outside")
    one_line_error(run(*common, "--position", "4"), 2, "y,x")


def test_top_finds_projects_reports_and_goes_on(room: Path) -> None:
    result = run(
        "top", "small_nets:net", room / "pictures", "--layers", "0,3", "--channels", "1-2", "-k", "2",
        "--input-size", "32", "--out", room / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = (room / "out" / "top.csv").read_text().splitlines()
    assert rows[0] == "layer,channel,rank,activity,y,x,image"
    assert (room / "out" / "report.html").stat().st_size > 1000
    assert {p.name for p in (room / "out" / "figures").iterdir()} == {
        f"top_{layer}_{channel}.png" for layer in (0, 3) for channel in (1, 2)
    }
    assert "cut.jpg" in result.stderr
    assert "words.jpg" in result.stderr
    table = PeakTable.load(room / "out" / "peaks.safetensors")
    peaks = [table.top(layer, channel) for layer in ("0", "3") for channel in (1, 2)]
    assert len(rows) == 1 + sum(map(len, peaks)) > 4
    first = table.top("3", 1)[0]
    assert f"3,1,1,{first.value:.6g},{first.y},{first.x}" in (room / "out" / "top.csv").read_text()


def test_top_on_tiles(room: Path) -> None:
    result = run(
        "top", "small_nets:net", room / "pictures", "--layers", "3", "--channels", "0", "--tiles", "1.0,0.9",
        "--input-size", "32", "--out", room / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = (room / "out" / "top.csv").read_text().splitlines()[1:]
    files = [row.split('"')[1].split(" [")[0] for row in rows]
    assert files
    assert len(set(files)) == len(files), "tiles of one photograph do not crowd out the others"
    one_line_error(run("top", "small_nets:net", room / "pictures", "--layers", "3", "--tiles", "big"), 2, "--tiles")


def test_a_dead_unit_is_named_shown_and_does_not_stop_the_job(room: Path) -> None:
    result = run(
        "top", "small_nets:dead", room / "pictures", "--layers", "3", "--channels", "1,2",
        "--input-size", "32", "--out", room / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "channel 1 of 3 is dead" in result.stderr
    assert (room / "out" / "figures" / "top_3_1.png").is_file()
    assert ",2,1," in (room / "out" / "top.csv").read_text()
    result = run(
        "project", "small_nets:dead", room / "pictures" / "p0.jpg", "--layer", "3", "--channel", "1",
        "--input-size", "32", "--out", room / "out",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "dead" in result.stdout
    assert "no positive activity" in result.stderr


def test_wrong_arguments_exit_with_two_and_a_hint(room: Path) -> None:
    photo = photographs() / "lemur.jpg"
    common = ("project", "squeezenet1_1", photo)
    one_line_error(run(*common, "--layer", "fire66", "--channel", "0"), 2, "fire66", "did you mean", "fire6")
    one_line_error(run(*common, "--layer", "fire6", "--channel", "999"), 2, "999", "0..383")
    one_line_error(run(*common, "--layer", "fire6", "--channel", "0", "--device", "cuda:77"), 2, "cuda:77")
    one_line_error(run(*common, "--layer", "fire6", "--channel", "0", "--mean", "a"), 2, "--mean")
    one_line_error(run("layers", "squeezenet"), 2, "squeezenet1_1")
    one_line_error(run("project", "vgg16", photo, "--layer", "conv1_1", "--channel", "0"), 2, "--weights")
    one_line_error(run("layers", "small_nets:net", "--input-size", "big"), 2, "--input-size")
    one_line_error(run("top", "small_nets:net", room / "pictures", "--layers", "3", "--channels", "2-x"), 2, "--channels")
    one_line_error(run("top", "small_nets:net", room / "pictures", "--layers", "3", "--channels", "9"), 2, "channel 9")
    assert run("project", "squeezenet1_1").exit_code == 2
    assert run("nonsense").exit_code == 2


def test_what_cannot_be_read_exits_with_one(room: Path) -> None:
    one_line_error(run("top", "small_nets:net", room / "absent", "--layers", "3"), 1, "no such folder")
    one_line_error(
        run("project", "small_nets:net", room / "pictures" / "words.jpg", "--layer", "3", "--channel", "0"),
        1, "none of the 1 images",
    )  # fmt: skip
    one_line_error(run("layers", "small_nets:broken"), 1, "out of luck", "RuntimeError")


def test_a_pickled_checkpoint_is_refused_and_does_not_run(room: Path) -> None:
    marker = room / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    torch.save({"0.weight": Evil()}, room / "evil.pt")
    one_line_error(run("layers", "small_nets:net", "--weights", room / "evil.pt"), 1, "evil.pt", "could run code")
    assert not marker.exists()


def test_values_of_options() -> None:
    assert console.numbers("0.5", "x") == (0.5, 0.5, 0.5)
    assert console.numbers("1,2,3", "x") == (1, 2, 3)
    assert console.size("32x48") == (32, 48)
    assert console.size("32") == (32, 32)
    assert console.place(None) == console.place("peak") == "peak"
    assert console.channels("3,1-2,2", 5, "l") == [3, 1, 2]
    assert console.channels("all", 3, "l") == [0, 1, 2]
    assert console.channels(None, 100, "l") == [0, 14, 28, 42, 57, 71, 85, 99]
    assert console.channels(None, 3, "l") == [0, 1, 2]
    for call in (
        lambda: console.numbers("1,2", "x"),
        lambda: console.size("0"),
        lambda: console.place("1;2"),
    ):
        with pytest.raises(ArgumentError):
            call()


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_keeps_what_is_done_and_resume_finishes(room: Path) -> None:
    crowd = room / "crowd"
    crowd.mkdir()
    noise = np.random.default_rng(1).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(crowd / "000.png", compress_level=1)
    for i in range(1, 120):
        os.link(crowd / "000.png", crowd / f"{i:03d}.png")
    common = [
        "top", "small_nets:net", str(crowd), "--layers", "3", "--channels", "0", "-k", "2",
        "--input-size", "32", "--batch-size", "2", "--out", str(room / "out"),
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, *common],
        cwd=room,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "a batch is done"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "images are kept in" in said
    assert "Traceback" not in said
    kept = room / "out" / "peaks.safetensors"
    seen = PeakTable.load(kept).seen
    assert 0 < seen < 120
    whole = run(*common[:-1], str(room / "whole"))
    resumed = run(*common, "--resume", str(kept))
    assert whole.exit_code == resumed.exit_code == 0
    ends = [PeakTable.load(room / folder / "peaks.safetensors").top("3", 0) for folder in ("whole", "out")]
    assert ends[0] == ends[1]


# the command, with a word on its output after the first batch; a parent in the background would pass on an ignored SIGINT
WATCHED = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import conelens.peaks as peaks
found = peaks._peaks_of
calls = []
def told(*args):
    calls.append(args)
    if len(calls) == 2:  # the first batch is in the table
        print("a batch is done", flush=True)
    return found(*args)
peaks._peaks_of = told
from conelens.cli import main
main()
"""


def test_without_its_libraries_the_command_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ImportError(\"No module named 'typer'\", name='typer')")
    result = subprocess.run(
        [sys.executable, "-c", "from conelens.cli import main; main()", "layers"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "conelens[cli]" in result.stderr
    assert "Traceback" not in result.stderr


def test_resume_refuses_a_table_of_other_data_and_says_what_differs(room: Path) -> None:
    common = ("top", "small_nets:net", room / "pictures", "--layers", "3", "--channels", "0", "--input-size", "32")
    assert run(*common, "--out", room / "out").exit_code == 0
    kept = ("--out", room / "again", "--resume", room / "out" / "peaks.safetensors")
    assert run(*common, *kept).exit_code == 0
    one_line_error(run(*common, "--mean", "0.5", *kept), 2, "other input;", "without --resume")
    one_line_error(run("top", "small_nets:dead", *common[2:], *kept), 2, "other model, weights;")
    one_line_error(run(*common, "--tiles", "1.0", *kept), 2, "other tiles;")
    (room / "pictures" / "p2.jpg").rename(room / "pictures" / "p3.jpg")
    one_line_error(run(*common, *kept), 2, "other images;")


def test_policy_is_an_option_and_errors_spell_it(room: Path) -> None:
    common = ("project", "small_nets:capped", room / "pictures" / "p0.jpg", "--layer", "2", "--channel", "0")
    common = (*common, "--input-size", "32", "--out", room / "out")
    one_line_error(run(*common), 1, "relu6 has no canonical", "(here: --policy relu6=clamp)")
    assert run(*common, "--policy", "clamp").exit_code == 0
    assert run(*common, "--policy", "relu6=gradient,gate=hold").exit_code == 0
    assert run("layers", "small_nets:capped", "--policy", "clamp").exit_code == 0
    folder = ("top", "small_nets:capped", room / "pictures", "--layers", "2", "--out", room / "out")
    assert run(*folder, "--policy", "clamp").exit_code == 0
    one_line_error(run(*common, "--policy", "clip"), 2, "'clip'", "--policy clamp")
    one_line_error(run(*common, "--policy", "relu6="), 2, "--policy is 'relu6='")


def test_mistakes_are_named_before_any_work(room: Path) -> None:
    common = ("top", "small_nets:net", room / "pictures", "--layers", "3", "--channels")
    one_line_error(run(*common, "4-2"), 2, "empty range '4-2'", "2-4")
    one_line_error(run(*common, ""), 2, "--channels")
    one_line_error(run("layers", "small_nets:broken", "--draw", room / "net.gif"), 2, "net.gif", ".svg or .png")
    one_line_error(
        run("project", "small_nets:broken", room / "pictures", "--layer", "3", "--channel", "0"),
        2, "pictures is a folder", str(room / "pictures" / "*"),
    )  # fmt: skip
    one_line_error(run("layers", "small_nets:grey"), 2, "takes 1-channel images, wanted 3 channels")


def test_what_the_disk_refuses_is_one_line_with_path_and_option(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = room / "file"
    file.write_text("kept")
    pictures = room / "pictures"
    unit = ("--layer", "3", "--channel", "0", "--input-size", "32", "--out")
    winners = ("top", "small_nets:net", pictures, "--layers", "3", "--input-size", "32", "--out")
    one_line_error(run("project", "small_nets:net", pictures / "p0.jpg", *unit, file), 1, str(file), "a file", "--out")
    one_line_error(run("layers", "small_nets:net", "--draw", file / "net.svg"), 1, str(file), "--draw")
    for command in ((*winners, file), (*winners, file / "below"), ("demo", "--out", file)):
        with monkeypatch.context() as patch:
            for work in ("conelens.demo.run_demo", "conelens.cli.work.top_peaks"):
                patch.setattr(work, lambda *_, **__: pytest.fail("worked before it looked at the folder"))
            one_line_error(run(*command), 1, str(file), "--out")
    assert file.read_text() == "kept"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["top.csv", "peaks.safetensors.part", "figures/top_3_0.png", "report.html"])
def test_a_full_disk_is_one_line_with_path_and_option(room: Path, name: str) -> None:
    (room / "out" / "figures").mkdir(parents=True)
    (room / "out" / name).symlink_to("/dev/full")
    result = run("top", "small_nets:net", room / "pictures", "--layers", "3", "--input-size", "32", "--out", room / "out")
    one_line_error(result, 1, "cannot write", str(room / "out"), "No space left", "make room", "--out")


def test_a_rerun_removes_the_pictures_of_the_run_before_and_no_others(room: Path) -> None:
    common = ("top", "small_nets:net", room / "pictures", "--layers", "3", "--input-size", "32", "--out", room / "out")
    assert run(*common, "--channels", "0,1").exit_code == 0
    (room / "out" / "figures" / "mine.png").write_text("not of conelens")
    assert run(*common, "--channels", "2").exit_code == 0
    assert {p.name for p in (room / "out" / "figures").iterdir()} == {"top_3_2.png", "mine.png"}
