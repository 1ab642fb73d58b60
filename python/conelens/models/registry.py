"""From a name to a model with its input recipe: built-in names and `package.module:factory`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from conelens.assets import imagenet_classes, squeezenet_weights
from conelens.data import Preprocess
from conelens.errors import ArgumentError
from conelens.models.squeezenet import LAYER_NAMES as SQUEEZENET_LAYERS
from conelens.models.squeezenet import SqueezeNet11
from conelens.models.trunks import alexnet_features, vgg16_features
from conelens.models.weights import load_weights

IMAGENET = Preprocess(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, the recipe of its input, class names when it classifies.

    `layer_names` are further names for its modules, as the literature has them: {"fire6": "features.9"}.
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    classes: tuple[str, ...] = ()
    layer_names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BuiltIn:
    """A model that conelens can build by itself; `weights` is None where they cannot be shipped."""

    build: Callable[[], nn.Module]
    preprocess: Preprocess
    note: str
    weights: Path | None = None
    classes: Callable[[], tuple[str, ...]] = field(default=tuple)
    layer_names: dict[str, str] = field(default_factory=dict)


BUILT_IN: dict[str, BuiltIn] = {
    "squeezenet1_1": BuiltIn(
        SqueezeNet11,
        Preprocess(scale=1.0, mean=(123.0, 117.0, 104.0), std=(1.0, 1.0, 1.0)),
        "SqueezeNet 1.1 ImageNet classifier, weights included",
        squeezenet_weights(),
        imagenet_classes,
        SQUEEZENET_LAYERS,
    ),
    "vgg16": BuiltIn(vgg16_features, IMAGENET, "VGG-16 trunk (no classifier); give --weights"),
    "alexnet": BuiltIn(alexnet_features, IMAGENET, "AlexNet trunk (no classifier); give --weights"),
}


def load_model(name: str, weights: str | Path | None = None, preprocess: Preprocess | None = None) -> LoadedModel:
    """Build a model by name, fill it, and return it in evaluation mode on the CPU.

    Args:
        name: a key of `BUILT_IN`, or `package.module:factory` naming a callable without arguments that
            returns an
            `nn.Module` (the working directory is importable).
        weights: safetensors file or `weights_only` state dict. A built-in without shipped weights needs it.
        preprocess: replaces the built-in input recipe. Default for a factory: torchvision's ImageNet recipe
            at 224.

    Raises:
        ArgumentError: unknown name, weights not given where none ship, a factory that cannot be imported or
            returns something else.
        CheckpointError: a weight file that is missing, unsafe or do not fit.
    """
    if ":" in name:
        module = _from_factory(name)
        layer_names: dict[str, str] = {}
        recipe, file = IMAGENET, None
        classes: tuple[str, ...] = ()
    elif name in BUILT_IN:
        entry = BUILT_IN[name]
        module, recipe, file = entry.build(), entry.preprocess, entry.weights
        classes, layer_names = entry.classes(), entry.layer_names
        if weights is None and file is None:
            raise ArgumentError(
                f"the weights of {name} do not ship with conelens: give --weights FILE "
                "(safetensors or a state dict with torchvision's names features.N.weight)"
            )
    else:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ArgumentError(f"unknown model {name!r}: wanted {', '.join(BUILT_IN)} or package.module:factory{hint}")
    chosen = weights if weights is not None else file
    if chosen is not None:
        load_weights(module, chosen)
    return LoadedModel(name, module.eval(), preprocess or recipe, classes, layer_names)


def _from_factory(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    # a console script has its own directory in front of the path, not the user's
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ArgumentError(f"cannot import {module_name!r} of model {name!r}: {error}") from error
    except AttributeError as error:
        raise ArgumentError(f"module {module_name!r} has no {attribute!r} (model {name!r})") from error
    if not callable(factory):
        raise ArgumentError(f"{name!r} is {type(factory).__name__}, wanted a callable that returns an nn.Module")
    try:
        module = factory()
    except TypeError as error:
        raise ArgumentError(f"{name!r} cannot be called without arguments: {error}") from error
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"{name!r} returned {type(module).__name__}, wanted an nn.Module")
    return module
