"""Built-in networks and safe weight loading."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from conelens.assets import imagenet_classes, photographs, squeezenet_weights
from conelens.data import ImageFolder, find_images, load_image
from conelens.errors import ArgumentError, CheckpointError
from conelens.models import BUILT_IN, load_model, load_weights, read_state_dict

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def two_layers() -> nn.Module:
    """A tiny model for the factory and weight tests."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


def centre(image: Image.Image, side: int = 224) -> np.ndarray:
    """The centre square, black where the image ends; no scaling."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


class Running:
    """Unpickling this creates a file: proof that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_squeezenet_ships_complete_and_classifies() -> None:
    model = load_model("squeezenet1_1")
    assert not model.module.training
    assert len(model.classes) == 1000
    folder = ImageFolder(photographs(), model.preprocess)
    right = {"macaw.jpg": "macaw", "panda.jpg": "giant panda", "clownfish.jpg": "anemone fish"}
    chosen = [i for i in range(len(folder)) if folder.label(i) in right]
    with torch.inference_mode():
        best = model.module(torch.stack([folder[i] for i in chosen])).argmax(1).tolist()
    assert {folder.label(i): model.classes[k] for i, k in zip(chosen, best)} == right


@pytest.mark.skipif(not (SHARED / "imagenet_samples").is_dir(), reason="needs ../shared/data/imagenet_samples")
def test_squeezenet_accuracy_on_the_500_photographs() -> None:
    """57.8 % and 81.0 %: the plain centre of each file, black beyond the few that are smaller than 224."""
    model = load_model("squeezenet1_1")
    ids = [line.split(" ", 1)[0] for line in (SHARED / "weights" / "synset_words.txt").read_text().splitlines()]
    paths = find_images(SHARED / "imagenet_samples")
    assert len(paths) == 500
    first = fifth = 0
    with torch.inference_mode():
        for start in range(0, 500, 50):
            part = paths[start : start + 50]
            wanted = torch.tensor([ids.index(p.name.split("_")[0]) for p in part])
            x = torch.stack([model.preprocess.tensor(centre(load_image(p))) for p in part])
            hits = model.module(x).topk(5).indices == wanted[:, None]
            first += int(hits[:, 0].sum())
            fifth += int(hits.any(1).sum())
    assert abs(first / 5 - 57.8) <= 0.4
    assert abs(fifth / 5 - 81.0) <= 0.4


@pytest.mark.parametrize(("name", "width"), [("vgg16", 512), ("alexnet", 256)])
def test_trunks_load_half_precision_weights(name: str, width: int) -> None:
    file = SHARED / "weights" / f"{name}_features_fp16.safetensors"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    model = load_model(name, file)
    stored = load_file(file)
    for key, value in model.module.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[key].float())
    with torch.inference_mode():
        assert model.module(torch.zeros(1, 3, 64, 64)).shape[1] == width


@pytest.mark.parametrize("name", ["vgg16", "alexnet"])
def test_trunks_without_weights_say_how_to_give_them(name: str) -> None:
    with pytest.raises(ArgumentError, match="--weights"):
        load_model(name)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ArgumentError, match=r"did you mean squeezenet1_1"):
        load_model("squeezenet")
    with pytest.raises(ArgumentError, match=r"package\.module:factory"):
        load_model("x")


def test_a_factory_is_imported_and_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def small(): return nn.Conv2d(3, 4, 3)\n"
        "def needs(width): return nn.Conv2d(3, width, 3)\n"
        "def wrong(): return 7\n"
        "number = 7\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(load_model("my_nets:small").module, nn.Conv2d)
    for name, message in [
        ("my_nets:absent", "has no 'absent'"),
        ("my_nets:number", "wanted a callable"),
        ("my_nets:wrong", r"wanted an nn\.Module"),
        ("my_nets:needs", "without arguments"),
        ("no_such_package_here:f", "cannot import"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            load_model(name)


def test_a_pickle_that_names_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"0.weight": Running(marker)}, file)
    with pytest.raises(CheckpointError, match="could run code"):
        load_weights(two_layers(), file)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Running(marker)))
    with pytest.raises(CheckpointError, match=r"bare\.pkl"):
        read_state_dict(tmp_path / "bare.pkl")
    assert not marker.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(two_layers(), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        read_state_dict(tmp_path / "module.pt")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_load_nested_and_prefixed(tmp_path: Path, wrap: object, prefix: str) -> None:
    source, target = two_layers(), two_layers()
    state = {prefix + k: v for k, v in source.state_dict().items()}
    torch.save(wrap(state), tmp_path / "w.pt")  # type: ignore[operator]
    load_weights(target, tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters()))


def test_names_and_shapes_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = two_layers().state_dict()
    renamed = {("2.kernel" if k == "2.weight" else k): v for k, v in state.items()}
    save_file(renamed, tmp_path / "names.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(2\.weight\).*unknown \(2\.kernel\)"):
        load_weights(two_layers(), tmp_path / "names.safetensors")
    save_file(state | {"2.weight": torch.zeros(2, 5, 1, 1)}, tmp_path / "shapes.safetensors")
    with pytest.raises(CheckpointError, match=r"\(2, 5, 1, 1\).*\(2, 4, 1, 1\)"):
        load_weights(two_layers(), tmp_path / "shapes.safetensors")


@pytest.mark.parametrize("name", ["junk.safetensors", "junk.pt", "empty.pt", "absent.pt"])
def test_files_that_hold_no_weights(tmp_path: Path, name: str) -> None:
    if name != "absent.pt":
        (tmp_path / name).write_bytes(b"" if name == "empty.pt" else b"not weights at all")
    with pytest.raises(CheckpointError, match=name):
        read_state_dict(tmp_path / name)


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="no tensors"):
        read_state_dict(tmp_path / "bare.pt")


def test_every_shipped_photograph_states_its_licence() -> None:
    notice = (photographs() / "NOTICE.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in notice.splitlines() if line.startswith("| `")}
    shipped = {p.name for p in photographs().glob("*.jpg")}
    assert set(rows) == shipped
    assert len(shipped) >= 12
    assert all("creativecommons.org" in row for row in rows.values())


def test_assets_are_small_and_complete() -> None:
    root = squeezenet_weights().parents[1]
    assert sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) < 10e6
    assert "BSD" in (squeezenet_weights().parent / "LICENSE").read_text()
    assert len(imagenet_classes()) == 1000
    assert imagenet_classes()[207] == "golden retriever"
    assert set(BUILT_IN) == {"squeezenet1_1", "vgg16", "alexnet"}
