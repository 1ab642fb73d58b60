"""Sweeps that stop half-way, by Ctrl-C or an error, and what may go on with them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import conelens
from conelens.network import Network
from conelens.occlusion import incremental
from tests.kit.compare import relative
from tests.kit.occlusion import Classifier

SETTINGS: dict[str, Any] = {"window": 6, "stride": 3, "memory": 2**24, "form": "rerun"}


def fails_at(call: int, error: BaseException, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of images that raises ``error`` when it is called for the ``call``-th time."""
    calls = itertools.count(1)

    def function(x: Tensor) -> Tensor:
        if next(calls) == call:
            raise error
        return model(x)

    return function


def part_of(model: Callable[[Tensor], Tensor], images: Tensor, **settings: Any) -> conelens.Sweep:
    """A sweep that was stopped after its first portion."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(conelens.SweepInterrupted) as stopped:
        conelens.occlude(model, images, progress=stop, **SETTINGS | settings)
    sweep = stopped.value.sweep
    assert not sweep.complete
    return sweep


def test_an_error_half_way_keeps_what_is_done(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(RuntimeError, match="no memory") as stopped:
        conelens.occlude(fails_at(3, RuntimeError("no memory"), model), images, **SETTINGS)
    part = stopped.value.sweep  # type: ignore[attr-defined]
    done = int(part.done.sum())
    assert 0 < done < part.done.numel()
    assert f"{done} of {part.done.numel()} positions are done" in stopped.value.__notes__[0]
    seen: list[int] = []
    whole = conelens.occlude(model, images, resume=part, progress=lambda done, total: seen.append(done), **SETTINGS)
    assert seen[0] > done
    assert torch.equal(whole.outputs, conelens.occlude(model, images, **SETTINGS).outputs)


def test_ctrl_c_while_the_images_as_they_are_run(model: nn.Module, images: Tensor) -> None:
    function = fails_at(1, KeyboardInterrupt(), model)
    with pytest.raises(KeyboardInterrupt) as plain:
        conelens.occlude(function, images, **SETTINGS)
    assert type(plain.value) is KeyboardInterrupt
    part = part_of(model, images)
    with pytest.raises(conelens.SweepInterrupted) as stopped:
        conelens.occlude(fails_at(1, KeyboardInterrupt(), model), images, resume=part, **SETTINGS)
    assert stopped.value.sweep is part


def test_other_channels_are_not_mixed_in(net: Network, images: Tensor) -> None:
    part = part_of(net, images, record={"0": [1, 2]})
    for other in ({"0": [2, 1]}, {"0": [1, 3]}, {"0": [1]}):
        with pytest.raises(conelens.ArgumentError, match="resume: that sweep recorded other channels of 0"):
            conelens.occlude(net, images, record=other, resume=part, **SETTINGS)
    with pytest.raises(conelens.ArgumentError, match="resume: that sweep recorded 0, this one nothing"):
        conelens.occlude(net, images, resume=part, **SETTINGS)
    assert conelens.occlude(net, images, record={"0": [1, 2]}, resume=part, **SETTINGS).complete


def test_other_images_are_told_apart_where_their_outputs_are_not(model: nn.Module, images: Tensor) -> None:
    """After a softmax all outputs may be small, and all alike."""
    with torch.no_grad():
        model[-1].weight.mul_(1e-5)
    net = conelens.trace(nn.Sequential(model, nn.Softmax(1)), (3, 24, 20))
    part = part_of(net, images)
    assert torch.allclose(net(images.flip(0)), part.clean, rtol=1e-4)
    with pytest.raises(conelens.ArgumentError, match="resume: that sweep was made with images"):
        conelens.occlude(net, images.flip(0), resume=part, **SETTINGS)


def test_another_network_with_small_outputs_is_told_apart(model: nn.Module, images: Tensor) -> None:
    part = part_of(lambda x: 1e-6 * model(x), images)
    with pytest.raises(conelens.ArgumentError, match="resume: that sweep is of another network"):
        conelens.occlude(lambda x: 1.01e-6 * model(x), images, resume=part, **SETTINGS)


def test_outputs_that_are_not_finite_do_not_stand_in_the_way(model: nn.Module, images: Tensor) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.cat([model(x), model(x[:, :, :, :]).new_tensor([torch.nan, torch.inf]).expand(len(x), 2)], 1)

    part = part_of(function, images)
    assert not part.clean.isfinite().all()
    assert conelens.occlude(function, images, resume=part, **SETTINGS).complete
    with pytest.raises(conelens.ArgumentError, match="another network"):
        conelens.occlude(lambda x: function(x).nan_to_num(), images, resume=part_of(function, images), **SETTINGS)


def test_going_on_in_another_form(net: Network, images: Tensor) -> None:
    part = part_of(net, images)
    whole = conelens.occlude(net, images, resume=part, **SETTINGS | {"form": "delta"})
    assert whole.about["form"] == "delta"
    assert torch.allclose(whole.outputs, conelens.occlude(net, images, **SETTINGS).outputs, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_going_on_on_another_device(net: Network, model: nn.Module, images: Tensor) -> None:
    part = part_of(net, images, record={"0": [1, 2]})
    there = conelens.trace(model.cuda(), (3, 24, 20))
    whole = conelens.occlude(there, images.cuda(), resume=part, record={"0": [1, 2]}, **SETTINGS)
    assert whole.complete
    assert whole.outputs.is_cuda
    expected = conelens.occlude(net, images, **SETTINGS)
    assert torch.allclose(whole.outputs.cpu(), expected.outputs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wrong", ["folder", 3, {}])
def test_what_is_no_sweep_is_refused(wrong: Any, net: Network, images: Tensor) -> None:
    with pytest.raises(conelens.ArgumentError, match=r"resume: got .*wanted a Sweep; Sweep.load"):
        conelens.occlude(net, images, resume=wrong)


def test_progress_counts_what_needs_no_visit(net: Network, images: Tensor) -> None:
    """Positions that change nothing are done at once; of a sweep with nothing to do one hears once."""
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    sweep = conelens.occlude(net, images, fill=images, progress=progress, **SETTINGS)
    total = sweep.done.numel()
    assert calls == [(total, total)]
    conelens.occlude(net, images, fill=images, progress=progress, resume=sweep, **SETTINGS)
    assert calls == 2 * [(total, total)]
    calls.clear()
    half = images.clone()
    half[1] = 0
    conelens.occlude(net, images, fill=half, progress=progress, **SETTINGS)
    assert calls[0] == (total // 2, total)
    assert calls[-1] == (total, total)
    assert len(calls) > 1


# --- what outputs are ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ([nn.Softmax(1)], "probabilities"),
        ([nn.Softmax(1), nn.ReLU()], "probabilities"),
        ([nn.ReLU()], "logits"),
        ([], "logits"),
    ],
)
def test_traced_or_not_outputs_are_of_one_kind(ending: list[nn.Module], kind: str, model: nn.Module, images: Tensor) -> None:
    whole = nn.Sequential(model, *ending).eval()
    assert conelens.occlude(whole, images, 12, 12).classifier == kind
    assert conelens.occlude(lambda x: whole(x), images, 12, 12, form="rerun").classifier == kind


# --- memory ----------------------------------------------------------------------------------------------------------------

_PEAK = """
import resource, torch, conelens
torch.set_num_threads(1)
images = torch.randn(128, 3, 224, 224)
size = images.numel() * 4

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(images, fill):
    conelens.occlude(lambda x: x.mean((2, 3)), images, 224, 1, fill, memory=2**24, form="rerun")

run(images[:2], "blur")
before = peak()
run(images, torch.randn(3, 224, 224))
print((peak() - before) / size)
run(images, "blur")
print((peak() - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux counts it")
def test_no_further_copies_of_all_images() -> None:
    """Comparing and checksums need none; what the windows show is one, where it differs by image."""
    run = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    shared, blurred = map(float, run.stdout.split())
    assert shared < 0.9
    assert blurred < 2.5


def test_the_form_may_change_with_a_later_group_of_images() -> None:
    """The second image, alone in its group, has a spot on which changes are not to be added; the first is not lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))
    net = conelens.trace(model.eval(), (3, 160, 160))
    images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"window": 80, "stride": 80, "memory": 2**24, "record": {"0": "strongest"}}
    assert conelens.occlude(net, images, **settings).about["form"] == "delta"
    images[1, :, 20:24, 20:24] = 1e6
    sweep = conelens.occlude(net, images, **settings)
    assert sweep.about["form"] == "gather"
    expected = conelens.occlude(net, images, **settings | {"form": "rerun"})
    for ours, theirs in ((sweep, expected), (sweep.recorded("0"), expected.recorded("0"))):
        for name, value in vars(ours).items():
            if isinstance(value, Tensor):
                assert torch.allclose(value, getattr(theirs, name), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("form", ["gather", "delta"])
def test_ctrl_c_between_portions_keeps_what_has_run(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions wait for whole maps in portions of hundreds; those that wait when Ctrl-C comes are finished."""
    model = Classifier("VGG", "flatten").eval()
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls = itertools.count(1)
    head = incremental._Pass._head

    def stops(self: Any, *args: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return head(self, *args)

    monkeypatch.setattr(incremental._Pass, "_head", stops)
    with pytest.raises(conelens.SweepInterrupted) as stopped:
        conelens.occlude(model, images, 12, 4, form=form, memory=2**24)
    monkeypatch.undo()
    part = stopped.value.sweep
    assert 0 < int(part.done.sum()) < min(part.done.numel(), incremental.TAIL_UNITS)
    whole = conelens.occlude(model, images, 12, 4, form=form)
    assert relative(part.outputs[part.done], whole.outputs[part.done]) < 1e-12


def test_images_that_the_model_does_not_take() -> None:
    with pytest.raises(conelens.ArgumentError, match="images: the model does not take images"):
        conelens.occlude(Classifier("VGG", "mean").eval(), torch.zeros(1, 4, 64, 64, dtype=torch.float64), 12, 4)
