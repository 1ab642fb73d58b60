"""A whole explanatory graph of VGG-16: features, four layers, twenty iterations; time of each part, and memory at its peak.

    python -m benchmarks.graph_fit [--photographs FOLDER --weights FILE] [--count 500] [--out FILE]

Without photographs and weights: noise and random weights, of which more cells are active and so more work. On a CUDA device
when there is one.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import conelens
from conelens.data import ImageFolder, find_images
from conelens.explanatory import ExplanatoryGraph, Features
from conelens.explanatory.rules import preset_layers
from conelens.models import IMAGENET, load_model, vgg16_features


class Noise:
    """Images of noise, made when asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(3, 224, 224, generator=torch.Generator().manual_seed(index))


def network(weights: Path | None, device: torch.device) -> conelens.Network:
    torch.manual_seed(0)
    module = vgg16_features().eval() if weights is None else load_model("vgg16", weights).module
    return conelens.trace(module.to(device), torch.zeros(1, 3, 224, 224, device=device))


def measure(net: conelens.Network, images: Any, iterations: int) -> dict[str, float]:
    """Seconds of the features and of each layer, with what follows it; and gigabytes at the peak."""

    def now() -> float:
        if net.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    features = Features.extract(net, images, preset_layers(net))
    times = {"features": now() - start}
    last = now()

    def watch(layer: str, iteration: int, likelihood: float) -> None:
        nonlocal last
        times[layer] = times.get(layer, 0.0) + now() - last
        last = now()

    ExplanatoryGraph.fit(net, features, iterations=iterations, watch=watch)
    times["total"] = now() - start
    times["peak GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if net.device.type == "cuda":
        times["peak GB on the device"] = torch.cuda.max_memory_allocated() / 1e9
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a JSON line is appended here")
    options = parser.parse_args()
    net = network(options.weights, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    images: Any = Noise(options.count)
    if options.photographs is not None:
        images = ImageFolder(find_images(options.photographs)[: options.count], replace(IMAGENET, fit="stretch"))
    found = measure(net, images, options.iterations)
    print(f"VGG-16, {len(images)} images, {options.iterations} iterations, {net.device}")
    print("  ".join(f"{name} {value:.1f}" for name, value in found.items()))
    if options.out is not None:
        about = {"images": len(images), "iterations": options.iterations, "device": str(net.device)}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"suite": "graph fit", **about, **found}) + "\n")


if __name__ == "__main__":
    main()
