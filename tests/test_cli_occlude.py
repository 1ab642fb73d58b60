"""`conelens occlude`: what it writes, what it says, what it keeps when it is interrupted."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("rich")

import conelens
from conelens.assets import photographs
from conelens.cli import console
from conelens.cli.occlusion import find_class
from conelens.errors import ArgumentError
from conelens.models import load_model
from conelens.occlusion import Sweep
from tests.kit.command import one_line_error, run

NETS = """
import torch
from torch import nn

def net(seed=1):
    torch.manual_seed(seed)
    trunk = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU()]
    return nn.Sequential(*trunk, nn.Flatten(), nn.Linear(180, 4))

def other():
    return net(2)

def trunk():
    return net()[:4]
"""
COMMON = ("--model", "occluded_nets:net", "--input-size", "16", "--window", "6", "--stride", "5")
PLACES = 9


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model file, two images and a broken one; the working directory."""
    (tmp_path / "occluded_nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    for name in ("p0.png", "p1.png"):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "words.jpg").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "occluded_nets", raising=False)
    return tmp_path


def direct(model: str, path: Path, window: int, stride: int) -> torch.Tensor:
    """Class probabilities [rows, cols, classes] by running the model on every covered copy, filled with the image's mean."""
    loaded = load_model(model)
    recipe = conelens.data.Preprocess((16, 16), loaded.preprocess.scale, loaded.preprocess.mean, loaded.preprocess.std)
    image = recipe(conelens.data.load_image(path))
    rows = []
    for top in range(0, 16 - window + 1, stride):
        line = []
        for left in range(0, 16 - window + 1, stride):
            copy = image.clone()
            copy[:, top : top + window, left : left + window] = image.mean((1, 2), keepdim=True)
            with torch.no_grad():
                line.append(loaded.module(copy[None])[0].softmax(0))
        rows.append(torch.stack(line))
    return torch.stack(rows)


def test_it_writes_sweep_pictures_and_report_and_skips_what_is_broken(room: Path) -> None:
    result = run("occlude", "p0.png", "words.jpg", "p1.png", *COMMON, "--layer", "3", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "words.jpg" in result.stderr
    out = room / "out"
    assert {p.name for p in out.iterdir()} == {"report.html", "figures", "sweep.json", "sweep.safetensors"}
    assert {p.name for p in (out / "figures").iterdir()} == {
        f"{kind}_{number:03d}_p{number}.png" for kind in ("occlusion", "overlay") for number in (0, 1)
    }
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 4
    assert 'src="figures' not in text
    sweep = Sweep.load(out)
    for n, name in enumerate(("p0.png", "p1.png")):
        expected = direct("occluded_nets:net", room / name, 6, 5)
        assert torch.allclose(sweep.probabilities[n], expected, atol=1e-5)
        label = int(sweep.clean_label[n])
        lowest = expected[..., label]
        top, left = divmod(int(lowest.argmin()), 3)
        (line,) = (line for line in result.stdout.splitlines() if name in line)
        assert f"class {label}" in line
        assert f"{float(sweep.clean[n].softmax(0)[label]):.0%}" in line
        assert f"{float(lowest.min()):.0%} at {5 * top},{5 * left}" in line


def test_the_class_can_be_given(room: Path) -> None:
    result = run("occlude", "p0.png", *COMMON, "--class", "3", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "class 3" in result.stdout
    one_line_error(run("occlude", "p0.png", *COMMON, "--class", "4"), 2, "--class is 4", "0..3")
    one_line_error(run("occlude", "p0.png", *COMMON, "--class", "dog"), 2, "no class names", "0..3")


def test_names_of_classes() -> None:
    names = ("crane", "ram", "Komodo dragon", "crane")
    assert find_class("komodo DRAGON", names, 4) == 2
    assert find_class("1", names, 4) == 1
    for text, count, parts in (
        ("rma", 4, "did you mean ram"),
        ("crane", 4, "give a number: 0 or 3"),
        ("9", 4, r"0\.\.3"),
        ("ram", None, "no classifier"),
        ("zzzzzz", 4, "no class of this model$"),
    ):
        with pytest.raises(ArgumentError, match=parts):
            find_class(text, names, count)


def test_mistakes_are_named_before_any_work(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conelens.cli.occlusion.occlude", lambda *_, **__: pytest.fail("worked before it looked"))
    for options, parts in {
        ("--stride", "0"): ("--stride is '0'", "at least 1"),
        ("--window", "-3"): ("--window is '-3'", "HxW"),
        ("--window", "17"): ("17x17", "larger than the images (16x16)"),
        ("--border", "wrap"): ("border", "flush"),
        ("--fill", "green"): ("--fill is 'green'", "R,G,B"),
        ("--fill", "0,0,300"): ("--fill", "0..255"),
        ("--memory", "much"): ("--memory is 'much'", "2G"),
        ("--layer", "33"): ("33", "conelens layers MODEL"),
        ("--strongest", "mean"): ("strongest", "max"),
        ("--form", "quick"): ("--form is 'quick'", "rerun"),
        ("--window", "²"): ("--window is '²'",),
        ("--class", "²"): ("--class is '²'", "no class names"),
    }.items():
        one_line_error(run("occlude", "p0.png", *COMMON, *options, "--out", "out"), 2, *parts)
    one_line_error(run("occlude", *COMMON), 2, "no images", "--plan")
    one_line_error(run("occlude", room, *COMMON), 2, "is a folder")
    one_line_error(run("occlude", "words.jpg", *COMMON), 1, "none of the 1 images")
    one_line_error(run("occlude", "p0.png", "--model", "occluded_nets:trunk", *COMMON[2:], "--class", "1"), 2, "no classifier")
    one_line_error(run("occlude", "p0.png", *COMMON, "--out", room / "p1.png"), 1, "--out")


def test_a_network_without_classes_shows_its_strongest_map(room: Path) -> None:
    result = run("occlude", "p0.png", "p1.png", "--model", "occluded_nets:trunk", *COMMON[2:], "--out", "out")
    assert result.exit_code == 0, result.output
    sweep = Sweep.load(room / "out")
    assert sweep.classifier is None
    which = int(sweep.activity["3"].clean_maxima[0].argmax())
    assert f"3 {int(sweep.activity['3'].channels[0, which])}" in result.stdout
    assert (room / "out" / "figures" / "occlusion_001_p1.png").is_file()


def test_fill_is_a_colour_of_the_picture(room: Path) -> None:
    grey = room / "grey.png"
    Image.new("RGB", (20, 20), (90, 120, 200)).save(grey)
    assert run("occlude", grey, *COMMON, "--fill", "90,120,200", "--out", "same").exit_code == 0
    sweep = Sweep.load(room / "same")
    assert torch.equal(sweep.outputs, sweep.clean[:, None, None].expand_as(sweep.outputs)), "nothing is covered"
    assert run("occlude", grey, *COMMON, "--fill", "0", "--out", "black").exit_code == 0
    assert not torch.allclose(Sweep.load(room / "black").outputs, sweep.outputs, atol=1e-3)


def test_plan_prints_and_stops(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def plan(net: conelens.Network, *settings: object, form: str) -> Path:
        asked.append((net.input_shape, *settings, form))
        return Path("the plan")  # prints as its text

    monkeypatch.setitem(conelens.__dict__, "plan_occlusion", plan)
    result = run("occlude", *COMMON, "--plan", "--border", "clip", "--form", "gather")
    assert result.exit_code == 0, result.output
    assert asked == [((3, 16, 16), (6, 6), (5, 5), "clip", "gather")]
    assert result.stdout == "the plan\n"
    assert not list(room.glob("conelens_occlude*"))


def test_the_plan_of_running_anew_is_everything(room: Path) -> None:
    result = run("occlude", *COMMON, "--plan", "--form", "rerun")
    assert result.exit_code == 0, result.output
    macs = 16 * 16 * 6 * 27 + 6 * 6 * 5 * 54 + 180 * 4
    assert result.stdout.startswith(f"{PLACES} positions; everything runs anew")
    assert f"{macs / 1e6:.1f} MMAC: 1.00 times" in result.stdout


# ------------------------------------------------------------------------------------------------------ resuming
# the command in a process that is sent SIGINT once some positions are done, one image's worth at a time
INTERRUPTED = """
import os
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import conelens.occlusion.run as sweeps
stored = sweeps._store
def told(sweep, visited):
    stored(sweep, visited)
    if sweep.done.any():
        os.kill(os.getpid(), signal.SIGINT)
sweeps._store = told
from conelens.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(room: Path) -> None:
    # more positions than a batch of the plain form holds, so that some are left
    common = ("p0.png", "p1.png", "--model", "occluded_nets:net", "--input-size", "16", "--window", "6", "--stride", "1")
    common = ("occlude", *common, "--form", "rerun")
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *common, "--out", "out"], cwd=room, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert process.returncode == 130, process.stderr
    assert "positions are kept in out" in process.stderr
    assert "Traceback" not in process.stderr
    total = 2 * 11 * 11
    kept = int(Sweep.load(room / "out").done.sum())
    assert 0 < kept < total
    one_line_error(run(*common, "--fill", "0", "--out", "out", "--resume"), 2, "made with other fill;")
    resumed = run(*common, "--out", "out")
    assert resumed.exit_code == 0, resumed.output
    assert f"going on from {kept} of {total} positions" in resumed.stderr
    assert run(*common, "--out", "whole").exit_code == 0
    ours, theirs = (Sweep.load(room / folder) for folder in ("out", "whole"))
    assert ours.complete
    assert torch.allclose(ours.outputs, theirs.outputs, atol=1e-6)


def test_a_finished_sweep_is_read_not_made_again(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("occlude", "p0.png", *COMMON, "--out", "out").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr("conelens.cli.occlusion.occlude", lambda *_, **__: pytest.fail("computed again"))
        again = run("occlude", "p0.png", *COMMON, "--class", "2", "--form", "rerun", "--memory", "64M", "--out", "out")
        assert again.exit_code == 0, again.output
        assert f"{PLACES} of {PLACES}" in again.stderr
        assert "class 2" in again.stdout


def test_another_sweep_or_a_broken_one_is_not_overwritten_unasked(room: Path) -> None:
    common = ("occlude", "p0.png", *COMMON, "--out", "out")
    assert run(*common).exit_code == 0
    held = (room / "out" / "sweep.safetensors").read_bytes()
    for other, parts in (
        (("occlude", "p1.png", *common[2:]), "images"),
        ((*common, "--stride", "4"), "stride"),
        ((*common, "--fill", "0", "--border", "clip"), "fill, border"),
        ((*common, "--model", "occluded_nets:other"), "model, weights"),
        ((*common, "--mean", "0.1"), "input, images"),
    ):
        one_line_error(run(*other), 2, f"made with other {parts};", "--out", "--no-resume")
        assert (room / "out" / "sweep.safetensors").read_bytes() == held
    assert run(*common, "--stride", "4", "--no-resume").exit_code == 0
    assert Sweep.load(room / "out").about["stride"] == [4, 4]
    (room / "out" / "sweep.safetensors").write_bytes(b"cut short")
    one_line_error(run(*common), 2, "no sweep", "--no-resume")
    assert run(*common, "--no-resume").exit_code == 0
    assert (room / "out" / "sweep.safetensors").read_bytes() == held


def test_resume_says_what_is_missing_or_different(room: Path) -> None:
    common = ("occlude", "p0.png", *COMMON, "--out", "out", "--resume")
    one_line_error(run(*common), 1, "out")
    assert run(*common[:-1]).exit_code == 0
    assert run(*common).exit_code == 0
    one_line_error(run("occlude", "p1.png", *common[2:]), 2, "other images;")
    one_line_error(run(*common, "--model", "occluded_nets:other", "--stride", "4"), 2, "other model, weights, stride;")
    (room / "out" / "sweep.safetensors").write_bytes(b"cut short")
    one_line_error(run(*common), 1, "no sweep")


# the command in a process that dies at the second portion of positions, saving after each
KILLED = """
import os
import conelens.cli.occlusion as job
import conelens.occlusion.run as sweeps
job.SAVE_EVERY = 0.0
stored, portions = sweeps._store, []
def told(sweep, visited):
    portions.extend([1] * bool(len(visited.units)))
    if len(portions) > 1:
        os._exit(9)
    stored(sweep, visited)
sweeps._store = told
from conelens.cli import main
main()
"""


def test_a_sweep_is_saved_meanwhile(room: Path) -> None:
    common = ("occlude", "p0.png", "--model", "occluded_nets:net", "--input-size", "16", "--window", "6", "--stride", "1")
    common = (*common, "--form", "rerun", "--out", "out")
    process = subprocess.run([sys.executable, "-c", KILLED, *common], cwd=room, capture_output=True, timeout=120, check=False)
    assert process.returncode == 9, process.stderr
    kept = int(Sweep.load(room / "out").done.sum())
    assert 0 < kept < 121
    resumed = run(*common)
    assert f"going on from {kept} of 121 positions" in resumed.stderr


def test_what_is_done_is_kept_when_something_breaks(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(sweep: Sweep) -> None:
        raise MemoryError("out of memory")

    common = ("occlude", "p0.png", *COMMON[:-1], "1", "--form", "rerun", "--out", "out")
    with monkeypatch.context() as patch:
        patch.setattr("conelens.cli.occlusion.OcclusionJob._saving", lambda *_: broken)
        result = run(*common)
    one_line_error(result, 1, "out of memory")
    kept = int(Sweep.load(room / "out").done.sum())
    assert f"kept in out: {kept} of 121 positions" in result.stderr
    assert 0 < kept < 121
    assert f"going on from {kept} of 121" in run(*common).stderr


def test_a_disk_that_is_full_for_a_while_does_not_end_a_sweep(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conelens.cli.occlusion.SAVE_EVERY", 0.0)
    saved, real = [], Sweep.save

    def save(sweep: Sweep, folder: Path) -> None:
        saved.append(sweep.complete)
        if len(saved) == 1:
            raise OSError(errno.ENOSPC, "No space left on device", "there")
        real(sweep, folder)

    monkeypatch.setattr(Sweep, "save", save)
    result = run("occlude", "p0.png", *COMMON, "--out", "out")
    assert result.exit_code == 0, result.output
    assert "nothing saved this time: cannot write there" in result.stderr
    assert len(saved) > 1
    assert Sweep.load(room / "out").complete


def test_ctrl_c_after_the_sweep_says_that_it_is_kept(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("conelens.cli.occlusion.panels_of", stopped)
    result = run("occlude", "p0.png", *COMMON, "--out", "out")
    assert result.exit_code == 130
    assert "the finished sweep is kept" in result.stderr
    assert Sweep.load(room / "out").complete


def test_sizes_of_memory() -> None:
    assert console.memory("2G") == console.memory("2 GiB") == 2 * 2**30
    assert console.memory("1.5m") == 3 * 2**19
    assert console.memory("4096") == 4096
    with pytest.raises(ArgumentError, match="--memory"):
        console.memory("-1")


def test_a_photograph_by_the_bundled_network(tmp_path: Path) -> None:
    duck = photographs() / "duck.jpg"
    result = run("occlude", duck, "--layer", "fire9", "--window", "64", "--stride", "40", "--class", "Goose", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    sweep = Sweep.load(tmp_path)
    probability = sweep.probability()[0]
    row, column = divmod(int(probability.argmin()), probability.shape[1])
    top, left, bottom, right = sweep.windows.box(row, column)
    assert top <= 64 <= bottom and left <= 180 <= right, "its head, at about (64, 180), is what makes it one"
    assert float(probability.min()) < 0.5 < 0.95 < float(sweep.clean.softmax(1).max())
    assert f"{top},{left}" in result.stdout
