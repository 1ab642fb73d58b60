"""What a sweep records, how it goes on after a stop, what it refuses, and what is read off it."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import conelens
from conelens.occlusion.incremental import Incremental
from conelens.occlusion.windows import fill_images, make_windows
from tests.kit import networks
from tests.kit.compare import relative
from tests.kit.occlusion import FORMS, Classifier, boxes, by_hand


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# --- what is recorded ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, "rerun"])
@torch.no_grad()
def test_recorded_activity(form: str, images: Tensor) -> None:
    model = Classifier("VGG", "flatten").eval()
    asked = {"body.2": [1, 5], "body.last": "strongest", "body.9": "all", "fc": [0]}
    net = conelens.trace(model, (3, 64, 64))
    asked = {name: wanted for name, wanted in asked.items() if name in {layer.name for layer in net.layers()}}
    assert len(asked) >= 3
    sweep = conelens.occlude(net, images, 20, 15, 0.4, record=asked, form=form)
    for name, wanted in asked.items():
        activity = sweep.recorded(name)
        seen: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.clone()))
        model(images)
        by_hand(model, images, boxes(sweep), torch.tensor(0.4, dtype=torch.float64))
        handle.remove()
        maps = torch.stack([one.reshape(*one.shape[:2], -1).clamp_min(0) for one in seen], 1)  # [N, 1 + P, C, cells]
        if wanted == "strongest":
            assert torch.equal(activity.channels[:, 0], maps[:, 0].sum(-1).argmax(-1))
        index = activity.channels[:, None, :, None].expand(-1, maps.shape[1], -1, maps.shape[3])
        picked = maps.gather(2, index)
        assert relative(activity.sums.flatten(1, 2), picked[:, 1:].sum(-1)) < 1e-12
        assert relative(activity.maxima.flatten(1, 2), picked[:, 1:].amax(-1)) < 1e-12
        assert relative(activity.clean_sums, picked[:, 0].sum(-1)) < 1e-12


@torch.no_grad()
def test_a_network_without_classes(images: Tensor) -> None:
    model = networks.make("ResNet")
    for form in FORMS:
        sweep = conelens.occlude(model, images, 16, 24, form=form)
        expected = by_hand(model, images, boxes(sweep), torch.tensor(0.0, dtype=torch.float64))
        assert relative(sweep.outputs.flatten(1, 2), expected) < 1e-12
        with pytest.raises(conelens.ArgumentError, match="no vector of classes"):
            sweep.probability(0)


def test_probabilities_where_the_network_ends_in_softmax(images: Tensor) -> None:
    model = nn.Sequential(Classifier("VGG", "mean"), nn.Softmax(1)).eval()
    sweep = conelens.occlude(model, images, 32, 32)
    assert sweep.classifier == "probabilities"
    assert torch.equal(sweep.probabilities, sweep.outputs)
    with pytest.raises(conelens.ArgumentError, match="returns probabilities"):
        _ = sweep.logits


# --- running, stopping, going on -------------------------------------------------------------------------------------------


def test_plain_functions_run_anew_and_say_so(images: Tensor) -> None:
    model = Classifier("VGG", "mean").eval()
    with pytest.warns(UserWarning, match="anew for every position"), torch.no_grad():
        sweep = conelens.occlude(lambda x: model(x), images, 20, 30)
    assert relative(sweep.outputs, conelens.occlude(model, images, 20, 30).outputs) < 1e-12
    with pytest.raises(conelens.ArgumentError, match="needs a traced network"):
        conelens.occlude(lambda x: model(x), images, 20, 30, form="delta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conelens.occlude(lambda x: model(x), images, 20, 30, form="rerun")


def test_a_module_that_cannot_be_traced(images: Tensor) -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).sort(2).values[:, :, -5:].sum(2)

    with pytest.warns(UserWarning, match="cannot be traced"):
        sweep = conelens.occlude(Sorted().eval(), images, 20, 30)
    assert sweep.about["form"] == "rerun"
    assert sweep.complete


@pytest.mark.parametrize("form", [*FORMS, "rerun"])
def test_interrupted_and_resumed(form: str, images: Tensor) -> None:
    model = Classifier("VGG", "flatten").eval()
    net = conelens.trace(model, (3, 64, 64))
    calls: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        raise KeyboardInterrupt

    settings = {"window": 10, "stride": 5, "fill": "mean", "form": form, "memory": 2**24, "record": ["body.last"]}
    with pytest.raises(conelens.SweepInterrupted) as stopped:
        conelens.occlude(net, images, progress=stop, **settings)
    part = stopped.value.sweep
    assert 0 < int(part.done.sum()) == calls[0][0] < calls[0][1] == part.done.numel()
    assert part.outputs[~part.done].isnan().all()
    assert (part.label[~part.done] == -1).all()
    assert not part.outputs[part.done].isnan().any()
    seen: list[int] = []
    whole = conelens.occlude(net, images, resume=part, progress=lambda done, total: seen.append(done), **settings)
    assert whole.complete
    assert seen[0] > calls[0][0]
    assert relative(whole.outputs, conelens.occlude(net, images, **settings).outputs) < 1e-12
    with pytest.raises(conelens.ArgumentError, match="resume"):
        conelens.occlude(net, images + 1, resume=part, **settings)
    with pytest.raises(conelens.ArgumentError, match="resume"):
        conelens.occlude(net, images, resume=part, **settings | {"fill": 0.5})


def test_save_and_load(tmp_path, images: Tensor) -> None:  # type: ignore[no-untyped-def]
    net = conelens.trace(Classifier("VGG", "flatten").eval(), (3, 64, 64))
    sweep = conelens.occlude(net, images, 20, 30, record={"body.last": "strongest"})
    sweep.save(tmp_path)
    held = conelens.Sweep.load(tmp_path)
    assert torch.equal(held.outputs, sweep.outputs)
    assert torch.equal(held.recorded("body.last").sums, sweep.recorded("body.last").sums)
    assert held.about == sweep.about
    assert torch.equal(held.heatmap(3), sweep.heatmap(3))
    (tmp_path / "sweep.json").write_text("{}")
    assert torch.equal(conelens.Sweep.load(tmp_path).outputs, sweep.outputs), "one file decides"
    save_file({"outputs": sweep.outputs}, tmp_path / "sweep.safetensors")
    with pytest.raises(conelens.CheckpointError, match="no sweep"):
        conelens.Sweep.load(tmp_path)
    with pytest.raises(conelens.CheckpointError, match="no sweep"):
        conelens.Sweep.load(tmp_path / "nowhere")


def test_pictures(images: Tensor) -> None:
    net = conelens.trace(Classifier("VGG", "flatten").eval(), (3, 64, 64))
    sweep = conelens.occlude(net, images, (20, 12), (11, 7), border="clip")
    values = sweep.drop(2, of="output")
    total, weight = torch.zeros_like(images[:, 0]), torch.zeros(64, 64)
    for r in range(len(sweep.tops)):
        for c in range(len(sweep.lefts)):
            top, left, bottom, right = sweep.windows.box(r, c)
            total[:, top:bottom, left:right] += values[:, r, c, None, None]
            weight[top:bottom, left:right] += 1
    assert relative(sweep.pixel_map(values), total / weight) < 1e-12
    smooth = sweep.upsample(values)
    assert smooth.shape == (2, 64, 64)
    assert torch.allclose(smooth[:, 0, 0], values[:, 0, 0])
    assert relative(sweep.upsample(torch.ones_like(values)), torch.ones(2, 64, 64)) < 1e-12


def test_fills(images: Tensor) -> None:
    mean = images.mean((2, 3), keepdim=True).expand_as(images)
    assert torch.equal(fill_images("mean", images, (9, 9)), mean)
    assert torch.equal(fill_images([1, 2, 3], images, (9, 9))[0, :, 5, 5], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert torch.equal(fill_images(lambda x: x.flip(3), images, (9, 9)), images.flip(3))
    blurred = fill_images("blur", images, (12, 12))
    assert blurred.std() < 0.2 * images.std()
    assert torch.allclose(fill_images("blur", torch.ones_like(images), (12, 30)), torch.ones_like(images))


# --- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 65}, "larger than the images"),
        ({"window": 0}, "window: got 0"),
        ({"window": (4, 4, 4)}, "window"),
        ({"stride": 0}, "stride: got 0"),
        ({"stride": 2.5}, "stride: got 2.5"),
        ({"border": "wrap"}, "border: got 'wrap'"),
        ({"fill": "grey"}, "fill: got 'grey'"),
        ({"fill": [1.0, 2.0]}, "fill"),
        ({"fill": torch.zeros(3, 5, 5)}, "fill: got shape"),
        ({"fill": float("nan")}, "fill: holds NaN"),
        ({"form": "magic"}, "form: got 'magic'"),
        ({"memory": 100}, "memory: got 100"),
        ({"record": {"body.last": [99]}}, "channels 0 to"),
        ({"record": {"body.last": "weakest"}}, "'weakest'"),
    ],
)
def test_refusals(change: dict, message: str, images: Tensor) -> None:  # type: ignore[type-arg]
    net = conelens.trace(Classifier("VGG", "mean").eval(), (3, 64, 64))
    with pytest.raises(conelens.ConelensError, match=message):
        conelens.occlude(net, images, **{"window": 20, "stride": 30} | change)


def test_more_refusals(images: Tensor) -> None:
    net = conelens.trace(Classifier("VGG", "mean").eval(), (3, 64, 64))
    for wrong, message in ((images[:0], "at least one"), (images * torch.nan, "NaN"), (images.float(), "float32"),
                           (images[0], "shape"), (images[..., :50], "shape")):  # fmt: skip
        with pytest.raises(conelens.ArgumentError, match=message):
            conelens.occlude(net, wrong, 20, 30)
    with pytest.raises(conelens.LayerError, match="did you mean"):
        conelens.occlude(net, images, 20, 30, record="body.lest")
    with pytest.raises(conelens.ArgumentError, match="net: got int"):
        conelens.occlude(3, images, 20, 30)  # type: ignore[arg-type]
    sweep = conelens.occlude(net, images, 20, 30)
    for k in (7, -1, [1, 2, 3], 1.5):
        with pytest.raises(conelens.ArgumentError, match="k: got"):
            sweep.drop(k)
    with pytest.raises(conelens.LayerError, match="not recorded"):
        sweep.recorded("body.last")


def test_results_are_ordinary_tensors(images: Tensor) -> None:
    net = conelens.trace(Classifier("VGG", "mean").eval(), (3, 64, 64))
    sweep = conelens.occlude(net, images, 20, 30, record="body.last")
    for tensor in (sweep.outputs, sweep.clean, sweep.done, *vars(sweep.recorded("body.last")).values()):
        assert not tensor.is_inference()


def test_a_fill_of_pixels_is_told_from_another(images: Tensor) -> None:
    net = conelens.trace(Classifier("VGG", "mean").eval(), (3, 64, 64))
    sweep = conelens.occlude(net, images, 20, 30, images.flip(3))
    conelens.occlude(net, images, 20, 30, lambda x: x.flip(3), resume=sweep)
    with pytest.raises(conelens.ArgumentError, match="resume"):
        conelens.occlude(net, images, 20, 30, images.flip(2), resume=sweep)


_PEAK = """
import resource, sys, torch, conelens
from benchmarks.networks import build
torch.set_num_threads(2)
net = conelens.trace(build("AlexNet"), (3, 224, 224))
images = torch.randn(2, 3, 224, 224)
conelens.occlude(net, images[:1], 200, 24, form=sys.argv[1], memory=2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
conelens.occlude(net, images, 16, 8, form=sys.argv[1], memory=int(sys.argv[2]), record="0.7")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux counts it")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory", [2**27, 2**31])
def test_memory_stays_under_the_bound(form: str, memory: int) -> None:
    run = subprocess.run([sys.executable, "-c", _PEAK, form, str(memory)], capture_output=True, text=True, check=True)
    result = 2 * 27**2 * (1000 + 2 * 384) * 4
    kernels = 160 * 2**20  # what oneDNN compiles and keeps for the shapes that it meets
    assert int(run.stdout) <= memory + result + kernels


def test_maps_as_results_stay_within_memory(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).double().eval()
    net = conelens.trace(model, (3, 64, 64))
    with torch.inference_mode():
        engine = Incremental(net, images, images, make_windows((64, 64), 8, 4), [], "gather", 2**24)
    assert engine.tail_units * 2 * 4 * 64 * 64 * 8 <= 2**22
