"""Occlusion sweeps against running the model itself on every occluded image, window by window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import conelens
from benchmarks.networks import NETWORKS, build
from conelens.assets import photographs
from conelens.data import ImageFolder
from conelens.models import load_model
from conelens.occlusion.incremental import Incremental
from conelens.occlusion.windows import make_windows
from tests.kit import networks
from tests.kit.compare import relative
from tests.kit.occlusion import FORMS, Classifier, boxes, by_hand
from tests.kit.random_graphs import RandomNet


class Excited(nn.Module):
    """A gate from the whole map, a group norm, a sigmoid: whatever a window changes, everything changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.squeeze, self.norm = nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.first(x))
        y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        return self.norm(self.second(y)).flatten(2).mean(2)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["flatten", "mean"])
@pytest.mark.parametrize("kind", list(networks.KINDS))
@torch.no_grad()
def test_equal_to_running_the_model(kind: str, ending: str, form: str, images: Tensor) -> None:
    model = Classifier(kind, ending).eval()
    fill = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    sweep = conelens.occlude(model, images, (13, 9), (11, 7), fill.tolist(), form=form)
    expected = by_hand(model, images, boxes(sweep), fill[:, None, None])
    assert sweep.about["form"] == form
    assert relative(sweep.outputs.flatten(1, 2), expected) < 1e-12
    assert torch.equal(sweep.outputs.argmax(-1), sweep.label)
    single = conelens.occlude(model.float(), images.float(), (13, 9), (11, 7), fill.tolist(), form=form)
    assert relative(single.outputs.flatten(1, 2), expected) < 5e-6


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_gates_and_norms_of_the_whole_map(form: str, images: Tensor) -> None:
    torch.manual_seed(0)
    model = Excited().double().eval()
    sweep = conelens.occlude(model, images, 12, 13, "mean", form=form)
    expected = by_hand(model, images, boxes(sweep), images.mean((2, 3), keepdim=True))
    assert relative(sweep.outputs.flatten(1, 2), expected) < 1e-12


@pytest.mark.parametrize("seed", range(100))
@torch.no_grad()
def test_random_graphs(seed: int) -> None:
    model = RandomNet(7000 + seed).double()
    shape = model.input_shape
    rng = np.random.default_rng(seed)
    images = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    window = tuple(int(rng.integers(1, cells + 1)) for cells in shape[1:])
    stride = tuple(int(rng.integers(2, 12)) for _ in range(2))
    border = ("flush", "clip")[seed % 2]
    for form in FORMS:
        sweep = conelens.occlude(model, images, window, stride, 0.7, border, form=form, memory=2**24)
        expected = by_hand(model, images, boxes(sweep), torch.tensor(0.7, dtype=torch.float64))
        assert relative(sweep.outputs.flatten(1, 2), expected) < 1e-12


@given(
    window=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    stride=st.tuples(st.integers(3, 40), st.integers(3, 40)),
    border=st.sampled_from(["flush", "clip"]),
    form=st.sampled_from(FORMS),
    kind=st.sampled_from(["ResNet", "GoogLeNet", "VGG"]),
)
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_any_window_and_stride(window: tuple[int, int], stride: tuple[int, int], border: str, form: str, kind: str) -> None:
    model = Classifier(kind, "mean").eval()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sweep = conelens.occlude(model, images, window, stride, -0.5, border, form=form)
    expected = by_hand(model, images, boxes(sweep), torch.tensor(-0.5, dtype=torch.float64))
    assert relative(sweep.outputs.flatten(1, 2), expected) < 1e-12
    last = boxes(sweep)[-1]
    assert last[2:] == (64, 64) or border == "clip"


@pytest.mark.parametrize("name", list(NETWORKS))
@torch.no_grad()
def test_the_five_networks_at_full_size(name: str) -> None:
    """Within twice of what the two layouts of plain PyTorch differ by, and of 5e-6."""
    model = build(name)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    sweeps = {form: conelens.occlude(model, images, 40, 92, form=form) for form in FORMS}
    where = boxes(sweeps["gather"])
    covered = images.repeat(len(where), 1, 1, 1)
    for one, (top, left, bottom, right) in zip(covered, where, strict=True):
        one[:, top:bottom, left:right] = 0.0
    plain = model(covered)
    other = model.to(memory_format=torch.channels_last)(covered.contiguous(memory_format=torch.channels_last))
    bound = min(5e-6, 2 * relative(other, plain))
    for form, sweep in sweeps.items():
        assert min(relative(sweep.outputs.flatten(0, 2), one) for one in (plain, other)) <= bound, form


@pytest.mark.parametrize("form", FORMS)
def test_filling_with_the_image_itself_changes_no_bit(form: str, images: Tensor) -> None:
    for kind in networks.KINDS:
        model = Classifier(kind, "flatten").float().eval()
        sweep = conelens.occlude(model, images.float(), 15, 9, images.float(), form=form, record={"body": "all"})
        assert torch.equal(sweep.outputs, sweep.clean[:, None, None].expand_as(sweep.outputs))
        activity = sweep.recorded("body")
        assert torch.equal(activity.sums, activity.clean_sums[:, None, None].expand_as(activity.sums))


def test_changes_of_zero_stay_zero(images: Tensor) -> None:
    """In the delta form no shortcut is needed for that: the engine itself, asked for positions where nothing changes."""
    single = images.float()
    for kind in networks.KINDS:
        net = conelens.trace(Classifier(kind, "flatten").float().eval(), (3, 64, 64))
        windows = make_windows((64, 64), 15, 9)
        with torch.inference_mode():
            engine = Incremental(net, single, single, windows, [], "delta", 2**30)
            clean, _ = engine.clean()
            units = np.argwhere(np.ones((2, *windows.shape), bool))
            for visited in engine.visit(units):
                assert torch.equal(visited.outputs, clean[visited.units[:, 0]])


def test_constant_background(images: Tensor) -> None:
    """A window on background of its own colour changes nothing, one that touches the object does; both as by hand."""
    model = Classifier("AlexNet, overlapping 3/2", "flatten").eval()
    photograph = torch.full((1, 3, 64, 64), 1.5, dtype=torch.float64)
    photograph[:, :, 24:40, 24:40] = images[:1, :, 24:40, 24:40]
    for form in FORMS:
        sweep = conelens.occlude(model, photograph, 8, 8, 1.5, form=form)
        with torch.no_grad():
            expected = by_hand(model, photograph, boxes(sweep), torch.tensor(1.5, dtype=torch.float64))
        assert relative(sweep.outputs.flatten(1, 2), expected) < 1e-12
        touched = (sweep.outputs != sweep.clean[:, None, None]).any(-1)[0]
        assert touched[3:5, 3:5].all()
        assert int(touched.sum()) == 4


@pytest.mark.parametrize("name", list(NETWORKS))
@torch.no_grad()
def test_the_five_networks_in_float64(name: str) -> None:
    model = build(name).double()
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for form in FORMS:
        sweep = conelens.occlude(model, images, (30, 44), 180, form=form)
        expected = by_hand(model, images, boxes(sweep), torch.tensor(0.0, dtype=torch.float64))
        assert relative(sweep.outputs.flatten(1, 2), expected) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_squeezenet_on_photographs(form: str) -> None:
    """As they are, and on a white page: large constant areas, where tied pool windows abound."""
    loaded = load_model("squeezenet1_1")
    photos = ImageFolder(photographs(), loaded.preprocess)
    page = loaded.preprocess(Image.new("RGB", (224, 224), "white"))
    page[:, 60:160, 50:180] = photos[0][:, 60:160, 50:180]
    images = torch.stack([photos[10], page])
    sweep = conelens.occlude(loaded.module, images, 40, 61, "mean", form=form)
    expected = by_hand(loaded.module, images, boxes(sweep), images.mean((2, 3), keepdim=True))
    assert relative(sweep.outputs.flatten(1, 2), expected) < 5e-6


def test_covering_the_object_lowers_its_class() -> None:
    """Where people see the head of the duck and the face of the sheep, the network sees them too."""
    loaded = load_model("squeezenet1_1")
    photos = ImageFolder(photographs(), loaded.preprocess)
    names = [path.stem for path in photos.paths]
    for name, (y, x), least in (("duck", (48, 178), 0.5), ("sheep", (40, 114), 0.4)):
        sweep = conelens.occlude(loaded.module, photos[names.index(name)][None], 48, 12, "mean")
        drop = sweep.drop()[0]
        row, column = divmod(int(drop.argmax()), drop.shape[1])
        top, left, bottom, right = sweep.windows.box(row, column)
        assert drop.max() > least
        assert top <= y + 24 and bottom >= y - 24 and left <= x + 24 and right >= x - 24
        corners = drop[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.abs().max() < 0.3 * drop.max()


@pytest.mark.parametrize(("value", "side"), [(1e4, 1), (1e6, 1), (3e3, 4)])
def test_a_spot_that_outshines_the_image(value: float, side: int) -> None:
    """Where the window covers it, clean value and change nearly cancel; "auto" does not add such numbers."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(288, 5)).eval()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[:, :, 10 : 10 + side, 10 : 10 + side] = value
    sweep = conelens.occlude(model, images, 8, 4)
    with torch.no_grad():
        expected = by_hand(model.double(), images.double(), boxes(sweep), torch.tensor(0.0, dtype=torch.float64))
    each = (sweep.outputs.flatten(1, 2) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert each.max() < 5e-6


def test_a_layer_that_overflows_on_the_clean_image() -> None:
    class Exponential(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp().mean((2, 3))

    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[:, :, 4, 4] = 100.0
    model = Exponential().eval()
    sweep = conelens.occlude(model, images, 8, 4)
    assert torch.isinf(sweep.clean).all()
    covered = images.clone()
    covered[:, :, :8, :8] = 0.0
    assert relative(sweep.outputs[:, 0, 0], model(covered)) < 5e-6
    with pytest.raises(conelens.ArgumentError, match="use form='gather'"):
        conelens.occlude(model, images, 8, 4, form="delta")
