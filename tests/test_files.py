"""Files that are replaced whole: against plain bytes, safetensors' own functions, and every way a write can end early."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conelens import files
from conelens.errors import ArgumentError, CheckpointError

FORM = "conelens.Test 1"
ABOUT = {"test": {"format": FORM, "name": "Größe"}, "more": [3, 4]}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_targets_change_at_the_end_and_in_turn(tmp_path: Path) -> None:
    first, second = tmp_path / "first.a.txt", tmp_path / "second"
    first.write_text("old")
    with files.replacing(first, second) as parts:
        assert {part.parent for part in parts} == {tmp_path}, "beside their targets: other folders may be on other disks"
        for number, part in enumerate(parts):
            part.write_text(f"new {number}")
        assert first.read_text() == "old" and not second.exists()
    assert contents(tmp_path) == {"first.a.txt": b"new 0", "second": b"new 1"}


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt(), ValueError("wrong")])
def test_after_an_error_the_old_files_are_there_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")

    def write() -> None:
        with files.replacing(first, second) as (part, _):
            part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert contents(tmp_path) == {"first": b"old"}


def test_a_target_that_was_not_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "first", tmp_path / "second") as (_, part):
        part.write_text("only the second")
    assert contents(tmp_path) == {}


def test_tensors_of_any_layout_come_back(tmp_path: Path) -> None:
    path = tmp_path / "held.safetensors"
    tensors = {
        "a\nb": torch.arange(12.0).reshape(3, 4).t(),
        "grad": torch.ones(2, requires_grad=True),
        "expanded": torch.tensor([1, 2]).expand(3, 2),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "empty": torch.empty(0, 5, dtype=torch.int32),
    }
    files.write_tensors(path, tensors, ABOUT)
    assert list(contents(tmp_path)) == ["held.safetensors"]
    found, about = files.read_tensors(path, FORM, "test", "more")
    assert about == list(ABOUT.values())
    assert files.read_tensors(path, FORM, "test")[1] == [ABOUT["test"]]
    for held in (found, load_file(path)):
        assert held.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert held[name].dtype == tensor.dtype and held[name].shape == tensor.shape
            torch.testing.assert_close(held[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_what_people_may_read_stands_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "held.safetensors"
    files.write_tensors(path, {"x": torch.ones(1)}, ABOUT, readable="test")
    shown = (tmp_path / "held.json").read_text(encoding="utf-8")
    assert json.loads(shown) == ABOUT["test"] and shown.count("\n") == 3
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"test": shown, "more": "[3, 4]"}


def test_others_may_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "held.safetensors"
    files.write_tensors(path, {"x": torch.ones(1)}, ABOUT)
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize("full", ["held.json", "held.safetensors"])
def test_a_full_disk_leaves_both_old_files(tmp_path: Path, full: str) -> None:
    path = tmp_path / "held.safetensors"
    files.write_tensors(path, {"x": torch.ones(1)}, ABOUT, readable="test")
    before = contents(tmp_path)
    (tmp_path / (full + ".part")).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        files.write_tensors(path, {"x": torch.zeros(1)}, ABOUT | {"test": {"format": FORM}}, readable="test")
    assert contents(tmp_path) == before


def test_what_json_cannot_say_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "held.safetensors"
    files.write_tensors(path, {"x": torch.ones(1)}, ABOUT)
    before = contents(tmp_path)
    with pytest.raises(TypeError):
        files.write_tensors(path, {"x": torch.zeros(1)}, {"test": {"format": FORM, "bad": {1, 2}}})
    assert contents(tmp_path) == before


def read(path: Path) -> None:
    with files.reading(path, "trial"):
        files.read_tensors(path, FORM, "test")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "'test'"),
        ({"other": "{}"}, "'test'"),
        ({"test": "{"}, "Expecting property name"),
        ({"test": "{}"}, "'format'"),
        ({"test": "[1]"}, "list indices"),
        ({"test": json.dumps({"format": "conelens.Test 2"})}, "its format is 'conelens.Test 2', wanted 'conelens.Test 1'"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, metadata: dict[str, str] | None, reason: str) -> None:
    path = tmp_path / "held.safetensors"
    save_file({"x": torch.ones(1)}, path, metadata)
    with pytest.raises(CheckpointError, match=r"held\.safetensors: no trial that this version can read .*" + reason):
        read(path)


def test_broken_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "held.safetensors"
    files.write_tensors(path, {"x": torch.ones(100)}, ABOUT)
    read(path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"\x80\x04pickle", b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="no trial"):
            read(path)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match="no trial"):
            read(missing)


@pytest.mark.parametrize("error", [KeyError("k"), IndexError("i"), TypeError("t"), ArgumentError("a")])
def test_contents_that_do_not_fit_are_refused_the_same_way(error: Exception) -> None:
    message = r"here: no trial that this version can read \('?[kita]'?\)"
    with pytest.raises(CheckpointError, match=message) as refused, files.reading("here", "trial"):
        raise error
    assert refused.value.__cause__ is error


def test_a_checkpoint_error_of_its_own_and_an_interrupt_pass() -> None:
    for error in (CheckpointError("train anew"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as passed, files.reading("here", "trial"):
            raise error
        assert passed.value is error
