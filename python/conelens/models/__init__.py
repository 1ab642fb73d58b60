"""Built-in networks and safe loading of weights."""

from __future__ import annotations

from conelens.models.registry import BUILT_IN, IMAGENET, BuiltIn, LoadedModel, load_model
from conelens.models.squeezenet import SqueezeNet11
from conelens.models.trunks import Trunk, alexnet_features, vgg16_features
from conelens.models.weights import load_weights, read_state_dict

__all__ = [
    "BUILT_IN",
    "IMAGENET",
    "BuiltIn",
    "LoadedModel",
    "SqueezeNet11",
    "Trunk",
    "alexnet_features",
    "load_model",
    "load_weights",
    "read_state_dict",
    "vgg16_features",
]
