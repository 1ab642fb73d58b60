"""A graph learned, inferred, saved and resumed on a GPU is that of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import conelens
from conelens.explanatory import ExplanatoryGraph, Features
from tests.kit.planted import LOWER, UPPER, PlantedNet, planted

LAYERS = [LOWER, UPPER]


def net(device: str) -> conelens.Network:
    return conelens.trace(PlantedNet().eval().to(device), torch.zeros(1, 4, 96, 96, device=device))


def learned(device: str, images: torch.Tensor, **more: object) -> ExplanatoryGraph:
    return ExplanatoryGraph.fit(net(device), images.to(device), LAYERS, [3, 5], edges=4, iterations=3, scale="channel", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["recommended", "paper", "release"])
def test_learned_and_inferred_as_on_the_cpu(form: str) -> None:
    images = planted(24).images
    cpu, cuda = (learned(device, images, form=form) for device in ("cpu", "cuda"))
    torch.testing.assert_close(cuda[UPPER].mean.cpu(), cpu[UPPER].mean, rtol=1e-3, atol=1e-2)
    for layer in LAYERS:
        assert cuda[layer].history == pytest.approx(cpu[layer].history, rel=1e-3)
    placements = cuda.infer(images.cuda())
    near = (placements[UPPER].positions - cpu.infer(images)[UPPER].positions).norm(dim=-1) < 5
    assert placements[LOWER].positions.device.type == "cpu"
    assert float(near.float().mean()) > 0.98  # nearly tied units may change places


def test_features_stay_on_the_card_and_files_move_between_devices(tmp_path: Path) -> None:
    images = planted(24).images
    features = Features.extract(net("cuda"), images.cuda(), LAYERS, scale="channel")
    assert features[LOWER].is_cuda and not features.cpu()[LOWER].is_cuda
    whole = ExplanatoryGraph.fit(net("cuda"), features, nodes_per_filter=[3, 5], edges=4, iterations=3, checkpoint=tmp_path)
    loaded = ExplanatoryGraph.load(tmp_path)
    assert torch.equal(loaded[LOWER].mean, whole[LOWER].mean.cpu())
    here = loaded.infer(features.cpu())[UPPER]
    there = whole.infer(features)[UPPER]
    assert float(((here.positions - there.positions).norm(dim=-1) < 5).float().mean()) > 0.98
