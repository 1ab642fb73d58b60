"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODELS = "squeezenet1_1, vgg16, alexnet, or package.module:factory."

Model = Annotated[str, typer.Argument(help=_MODELS)]
ModelOption = Annotated[str, typer.Option("--model", help=_MODELS)]
Weights = Annotated[Path | None, typer.Option(help="safetensors file or state dict; pickles with code are refused.")]
InputSize = Annotated[str | None, typer.Option(help="Network input, N or HxW. Default 224.")]
Mean = Annotated[str | None, typer.Option(help="Subtracted per channel after --scale: one number or R,G,B.")]
Std = Annotated[str | None, typer.Option(help="Divided by, per channel: one number or R,G,B.")]
Scale = Annotated[float | None, typer.Option(help="Pixels 0..255 are multiplied by this first, e.g. 0.00392157.")]
Fit = Annotated[str | None, typer.Option(help="crop (default), letterbox or stretch.")]
Policy = Annotated[str | None, typer.Option(help="Rules for operators without one: clamp, or relu6=clamp,gate=hold.")]
Device = Annotated[str, typer.Option(help="cpu or cuda[:index].")]
BatchSize = Annotated[int, typer.Option(help="Images per forward pass.")]

DECODER_STEPS = 800  # of `conelens graph draw --synthesis`, by default
