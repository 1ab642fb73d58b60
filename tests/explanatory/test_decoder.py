"""The decoder learns what can be inverted, to the bit the same after a kill, and says what it cannot use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from conelens.errors import ArgumentError, CheckpointError
from conelens.explanatory import decoder as module
from conelens.explanatory.decoder import CHECKPOINT, Decoder, TrainingInterrupted, low_pass, thin
from conelens.explanatory.painting import Recipe

TOY = Recipe(steps=40, batch_size=8, size=8, width=12, widest=12, rate=1e-2)


def toy(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [N, 8, 4, 4] that hold the mean colours of 8x8 pictures in squares of 2x2, mixed by a matrix of full rank."""
    random = np.random.default_rng(seed)
    colours = random.uniform(0.1, 0.9, (count, 3, 4, 4))
    mixing = np.random.default_rng(99).uniform(0, 1, (8, 3))
    features = np.einsum("dc,nchw->ndhw", mixing, colours)
    images = colours.repeat(2, 2).repeat(2, 3)
    return torch.from_numpy(features).half(), torch.from_numpy(images).float()


def equal(ours: Decoder, theirs: Decoder) -> bool:
    return ours.weights.keys() == theirs.weights.keys() and all(
        torch.equal(value, theirs.weights[name]) for name, value in ours.weights.items()
    )


# ----------------------------------------------------------------------------------------------------------------- learning
def test_a_mapping_that_can_be_inverted_is_learned() -> None:
    recipe = Recipe(steps=400, batch_size=32, size=8, width=12, widest=24, rate=1e-2, thinned=0.0)
    decoder = Decoder.train("top", *toy(400), recipe)
    features, images = toy(50, seed=7)
    error = 255 * np.abs(decoder(features).numpy() - images.numpy()).mean()
    assert decoder.size == (8, 8)
    assert error < 6, "of 255, on pictures it has not seen"
    assert decoder.errors is not None
    assert decoder.errors.whole == pytest.approx(error, rel=0.2)
    assert decoder.errors.colour == pytest.approx(255 * np.abs(images.numpy() - 0.5).mean(), rel=0.1)
    assert decoder.errors.whole < decoder.errors.colour / 8 < decoder.errors.tenth
    assert f"held-out error {decoder.errors.whole:.1f} " in str(decoder)


def test_thinning_helps_with_few_units() -> None:
    features, images = toy(200)
    errors = [
        Decoder.train("top", features, images, Recipe(**{**vars(TOY), "steps": 150, "thinned": t})).errors for t in (0.0, 1.0)
    ]
    assert errors[0] is not None and errors[1] is not None
    assert errors[1].tenth < 0.95 * errors[0].tenth


def test_nothing_is_painted_in_the_mean_colour_before_training() -> None:
    features, images = toy(20)
    images = images * torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    decoder = Decoder.train("top", features, images, Recipe(**{**vars(TOY), "steps": 1, "rate": 0.0, "held_out": 0.0}))
    mean = low_pass(images, (8, 8)).double().mean((0, 2, 3)) / 255
    assert torch.allclose(decoder(torch.zeros(1, 8, 4, 4)).double(), mean[None, :, None, None].expand(1, 3, 8, 8), atol=1e-6)
    assert decoder.errors is None


def test_the_update_is_adam_on_the_stated_loss() -> None:
    """Algorithm 1 of Kingma and Ba in NumPy; torch.optim gives the same but takes seconds to load."""
    features, images = toy(8)
    images = images.double()
    recipe = Recipe(**{**vars(TOY), "thinned": 0.0, "contrast": 0.5})
    begun = module._begin((8, 4, 4), recipe, torch.full((3,), 0.5))
    state = module._State(0, *({name: value.double() for name, value in group.items()} for group in begun[1:]))
    weights = {name: value.clone().requires_grad_() for name, value in state.weights.items()}
    first, second = ({name: np.zeros(value.shape) for name, value in weights.items()} for _ in range(2))
    for step in range(5):
        painted = module.paint(weights, features.double())
        error = (painted - images).abs()
        rows = ((painted[:, :, 1:] - painted[:, :, :-1]) - (images[:, :, 1:] - images[:, :, :-1])).abs()
        columns = ((painted[..., 1:] - painted[..., :-1]) - (images[..., 1:] - images[..., :-1])).abs()
        wanted = error.mean() + 0.5 * (rows.mean() + columns.mean())
        state, loss = module._update(state, features.double(), images, recipe)
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-12)
        wanted.backward()
        for name, value in weights.items():
            assert value.grad is not None
            gradient = value.grad.numpy()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            unbiased = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.99 ** (step + 1))
            moved = value.detach().numpy() - module._rate(step, recipe) * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
            assert np.allclose(state.weights[name].numpy(), moved, rtol=1e-9, atol=1e-12), name
            weights[name] = torch.from_numpy(moved).requires_grad_()


def test_an_epoch_has_every_image_once() -> None:
    recipe = Recipe(**{**vars(TOY), "batch_size": 5})
    epochs = [torch.cat([module._batch(20, step, recipe) for step in range(first, first + 4)]) for first in (0, 4)]
    assert [epoch.sort().values.tolist() for epoch in epochs] == [list(range(20))] * 2
    assert not torch.equal(*epochs)
    training, held = module._parts(20, 20, recipe)
    assert sorted(training.tolist() + held.tolist()) == list(range(20))
    assert len(held) == 2


def test_pictures_are_averaged_down() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    small = low_pass(torch.from_numpy(pixels).permute(2, 0, 1)[None], (8, 12))[0].permute(1, 2, 0).numpy()
    wanted = np.asarray(Image.fromarray(pixels).resize((12, 8), Image.Resampling.BILINEAR))
    assert np.abs(small.astype(int) - wanted.astype(int)).max() <= 1
    floating = low_pass(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, (8, 12))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(floating, small)


def test_thin_keeps_its_share() -> None:
    maps = torch.rand(3, 10, 20, 20) + 0.1
    thinned = thin(maps, torch.tensor([0.0, 0.3, 1.0]), torch.Generator().manual_seed(1))
    shares = (thinned > 0).float().flatten(1).mean(1)
    assert shares.tolist() == pytest.approx([0.0, 0.3, 1.0], abs=0.03)
    assert torch.equal(thinned[thinned > 0], maps[thinned > 0])


def test_the_seed_is_all_the_chance_there_is() -> None:
    features, images = toy(30)
    first, again = (Decoder.train("top", features, images, TOY) for _ in range(2))
    other = Decoder.train("top", features, images, Recipe(**{**vars(TOY), "seed": 1}))
    assert equal(first, again)
    assert not equal(first, other)


# ----------------------------------------------------------------------------------------------------------------- going on
def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    features, images = toy(30)

    def stop(done: int, steps: int, loss: float) -> None:
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match="13 of 40") as stopped:
        Decoder.train("top", features, images, TOY, folder=tmp_path, save_every=1000, progress=stop)
    assert stopped.value.decoder.steps == 13
    assert stopped.value.decoder(features[:1]).shape == (1, 3, 8, 8)
    seen: list[int] = []
    resumed = Decoder.train("top", features, images, TOY, folder=tmp_path, progress=lambda done, *_: seen.append(done))
    assert seen == list(range(14, 41))
    whole = Decoder.train("top", features, images, TOY)
    assert equal(resumed, whole)
    assert resumed.errors == whole.errors
    with pytest.raises(TrainingInterrupted) as plain:
        Decoder.train("top", features, images, TOY, progress=stop)
    assert equal(plain.value.decoder, stopped.value.decoder)


KILLED = """
import os, signal, sys
import torch
from tests.explanatory.test_decoder import TOY, toy
from conelens.explanatory.decoder import Decoder
torch.set_num_threads(int(sys.argv[2]))
def die(done, steps, loss):
    if done == 17:
        os.kill(os.getpid(), signal.SIGKILL)
Decoder.train("top", *toy(30), TOY, folder=sys.argv[1], save_every=5, progress=die)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(torch.get_num_threads())]
    process = subprocess.run(command, cwd=root, capture_output=True, timeout=120, check=False)
    assert process.returncode == -9, process.stderr
    (tmp_path / (CHECKPOINT + ".part")).write_bytes(b"half a che")  # as a kill while writing leaves it
    seen: list[int] = []
    resumed = Decoder.train("top", *toy(30), TOY, folder=tmp_path, progress=lambda done, *_: seen.append(done))
    assert seen[0] == 16
    assert equal(resumed, Decoder.train("top", *toy(30), TOY))
    again = Decoder.train("top", *toy(30), TOY, folder=tmp_path, progress=lambda *_: pytest.fail("trained again"))
    assert equal(again, resumed)
    assert again.errors == resumed.errors
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    features, images = toy(30)
    Decoder.train("top", features, images, TOY, folder=tmp_path)
    held = (tmp_path / CHECKPOINT).read_bytes()
    for layer, maps, pictures, recipe, words in (
        ("other", features, images, TOY, "layer"),
        ("top", features, images, Recipe(**{**vars(TOY), "rate": 0.5}), "recipe"),
        ("top", features[:, :5], images, TOY, "shape, data"),
        ("top", features, images.flip(0), TOY, "data"),
        ("top", features.flip(0), images, TOY, "data"),
    ):
        with pytest.raises(CheckpointError, match=f"made with other {words};"):
            Decoder.train(layer, maps, pictures, recipe, folder=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == held


def tampered(file: Path, how: str) -> None:
    from safetensors import safe_open

    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()["conelens"]
    name = next(key for key in tensors if key.endswith("mix"))
    if how == "short":
        file.write_bytes(file.read_bytes()[:-100])
        return
    if how == "NaN":
        tensors[name][0, 0, 0, 0] = torch.nan
    elif how == "missing":
        del tensors[name]
    elif how == "size":
        tensors[name] = tensors[name][:1].clone()
    elif how == "extra":
        tensors["guest/mix"] = torch.zeros(1)
    elif how == "format":
        about = about.replace("conelens.Decoder 1", "conelens.Decoder 0")
    elif how == "recipe":
        about = about.replace('"width": 12', '"width": -12')
    elif how == "steps":
        about = about.replace('"step": 40', '"step": 41')
    save_file(tensors, file, {"conelens": about})


@pytest.mark.parametrize("how", ["short", "NaN", "missing", "size", "extra", "format", "recipe", "steps"])
def test_a_tampered_checkpoint_is_refused(tmp_path: Path, how: str) -> None:
    features, images = toy(30)
    Decoder.train("top", features, images, TOY, folder=tmp_path)
    tampered(tmp_path / CHECKPOINT, how)
    with pytest.raises(CheckpointError, match=CHECKPOINT):
        Decoder.train("top", features, images, TOY, folder=tmp_path)


def test_save_and_load(tmp_path: Path) -> None:
    features, images = toy(30)
    decoder = Decoder.train("top", features, images, TOY)
    decoder.save(tmp_path / "inner" / "decoder.safetensors")
    loaded = Decoder.load(tmp_path / "inner" / "decoder.safetensors")
    assert str(loaded) == str(decoder)
    assert (loaded.layer, loaded.shape, loaded.recipe) == ("top", (8, 4, 4), TOY)
    assert loaded.errors == decoder.errors
    assert torch.equal(loaded(features), decoder(features))


@pytest.mark.parametrize("how", ["short", "NaN", "missing", "size", "extra", "format", "recipe"])
def test_a_tampered_decoder_is_refused(tmp_path: Path, how: str) -> None:
    file = tmp_path / "decoder.safetensors"
    Decoder.train("top", *toy(30), TOY).save(file)
    tampered(file, how)
    with pytest.raises(CheckpointError, match=r"decoder\.safetensors"):
        Decoder.load(file)


def test_files_that_are_no_decoders(tmp_path: Path) -> None:
    Decoder.train("top", *toy(30), TOY, folder=tmp_path)
    for name in ("nothing.safetensors", CHECKPOINT):  # a checkpoint holds more than a decoder
        with pytest.raises(CheckpointError, match=name):
            Decoder.load(tmp_path / name)


def test_a_full_disk_does_not_end_a_training(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    features, images = toy(30)
    with pytest.warns(UserWarning, match="checkpoint was not kept"):
        decoder = Decoder.train("top", features, images, TOY, folder=tmp_path / "taken", save_every=20)
    assert equal(decoder, Decoder.train("top", features, images, TOY))


# ----------------------------------------------------------------------------------------------------------------- mistakes
def test_mistakes_are_named() -> None:
    features, images = toy(12)
    broken = features.clone()
    broken[3, 1, 2, 2] = torch.nan
    for maps, pictures, words in (
        (features.numpy(), images, "features: got ndarray"),
        (features[0], images, "features: got torch.float16"),
        (features.int(), images, "wanted a floating tensor"),
        (features[:, :0], images, "features: got shape .* wanted no empty axis"),
        (broken, images, "features: got negative, infinite or NaN"),
        (features - 2, images, "features: got negative"),
        (features * torch.inf, images, "features: got negative, infinite or NaN"),
        (features, images[:, :1], r"images: got \[12, 1, 8, 8\]"),
        (features, images * 255, "images: got NaN or values outside"),
        (features, images.long(), "images: got torch.int64"),
        (features, images * torch.nan, "images: got NaN"),
        (features[:5], images, "features and images: got 5 and 12"),
        (features[:1], images[:1], "wanted at least 2"),
    ):
        with pytest.raises(ArgumentError, match=words):
            Decoder.train("top", maps, pictures, TOY)
    with pytest.raises(ArgumentError, match="save_every: got 0"):
        Decoder.train("top", features, images, TOY, save_every=0)
    decoder = Decoder.train("top", features, images, TOY)
    for maps, words in (
        (features[:, :3], r"wanted \[N, 8, 4, 4\] as in training"),
        (features[:, :, :3], "as in training"),
        (broken, "maps: got negative, infinite or NaN"),
    ):
        with pytest.raises(ArgumentError, match=words):
            decoder(maps)
    assert decoder(features[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("batch_size", 0),
        ("size", 0),
        ("width", -1),
        ("thinned", 1.5),
        ("held_out", 1.0),
        ("rate", -1.0),
        ("seed", 0.5),
    ],
)
def test_recipes_are_checked(name: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: got {value}"):
        Recipe(**{name: value})  # type: ignore[arg-type]


def test_a_training_that_diverges_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_loss", lambda painted, *_: painted.sum() * torch.nan)
    with pytest.raises(ArgumentError, match=r"rate: the loss is nan after 0 updates; got 0\.01"):
        Decoder.train("top", *toy(12), TOY)


def test_the_map_is_doubled_while_it_fits() -> None:
    sizes = {}
    for cells in (7, 13, 14, 28, 56, 112, 200):
        sizes[cells] = Decoder("top", (4, cells, cells), Recipe(size=112), {}, 0).size
    assert sizes == {
        7: (112, 112),
        13: (104, 104),
        14: (112, 112),
        28: (112, 112),
        56: (112, 112),
        112: (112, 112),
        200: (200, 200),
    }
    assert Decoder("top", (4, 7, 14), Recipe(size=112), {}, 0).size == (56, 112)
