"""The commands: layers, project, top, occlude, graph (its own are in graph.py), demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import conelens
from conelens.cli import console
from conelens.cli.console import OUT, guarded, say
from conelens.cli.graph import commands as graph_commands
from conelens.cli.options import BatchSize, Device, Fit, InputSize, Mean, Model, ModelOption, Policy, Scale, Std, Weights
from conelens.errors import ArgumentError

app = typer.Typer(
    name="conelens",
    help="What the units of a convolutional network look at.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(graph_commands)


def _version(wanted: bool) -> None:
    if wanted:
        OUT.print(f"conelens {conelens.__version__}")
        raise typer.Exit


@app.callback()
def _top_level(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
@guarded
def layers(
    model: Model,
    weights: Weights = None,
    input_size: InputSize = None,
    policy: Policy = None,
    draw: Annotated[Path | None, typer.Option(help="Also draw the network: FILE.svg or FILE.png.")] = None,
) -> None:
    """List a network's layers: name, kind, shape, receptive field, stride, offset, other names."""
    from conelens.cli.work import check_drawing, drawing, open_model

    if draw is not None:
        check_drawing(draw)
    bench = open_model(model, weights, input_size, policy=policy, without_weights=True)
    OUT.print(str(bench.net.layers()), markup=False)
    if draw is not None:
        drawing(bench, draw)
        say(f"drawn: {draw}")


@app.command()
@guarded
def project(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    layer: Annotated[str, typer.Option(help="Layer name or alias (see `conelens layers`).")],
    channel: Annotated[int, typer.Option(help="Channel of the layer.")],
    position: Annotated[str | None, typer.Option(help="y,x on the layer's map. Default: the channel's peak.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("conelens_project"),
    weights: Weights = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    fit: Fit = None,
    policy: Policy = None,
    device: Device = "cpu",
) -> None:
    """Project one unit down to the pixels of each image."""
    from conelens.cli.work import check_files, open_model, project_images

    where = console.place(position)
    check_files(images)
    console.writable(out)
    bench = open_model(model, weights, input_size, mean, std, scale, fit, device, policy)
    result = project_images(bench, images, layer, channel, where)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("image", "activity", "position y,x", "box top,left,bottom,right"):
        table.add_column(heading)
    for row in result.rows:
        table.add_row(*map(escape, row))
    OUT.print(table)
    say(f"written: {result.save(out)}")


@app.command()
@guarded
def top(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="Folder of images, searched deeply.")],
    layers: Annotated[str, typer.Option(help="Layer names, with commas.")],
    channels: Annotated[str | None, typer.Option(help="Such as 3,17,20-25, or all. Default: 8 spread evenly.")] = None,
    k: Annotated[int, typer.Option("-k", help="Winners per channel.")] = 9,
    out: Annotated[Path, typer.Option(help="Folder for report, pictures and table.")] = Path("conelens_top"),
    distinct: Annotated[str, typer.Option(help="image: one winner per image; none: any place.")] = "image",
    tiles: Annotated[str | None, typer.Option(help="Cut images into squares at these scales, e.g. 1.0,0.5.")] = None,
    batch_size: BatchSize = 16,
    resume: Annotated[Path | None, typer.Option(help="Go on from the table that an interrupted run left.")] = None,
    weights: Weights = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    fit: Fit = None,
    policy: Policy = None,
    device: Device = "cpu",
) -> None:
    """Find the strongest units of each channel over a folder and project them."""
    from conelens.cli.work import TopJob, open_model

    bench = open_model(model, weights, input_size, mean, std, scale, fit, device, policy)
    job = TopJob.prepare(bench, folder, [n.strip() for n in layers.split(",")], channels, k, distinct, tiles)
    console.writable(out)
    table = job.search(out, batch_size, resume)
    say(f"written: {job.write(table, out)}")


@app.command()
@guarded
def occlude(
    images: Annotated[list[Path] | None, typer.Argument(help="Image files.")] = None,
    model: ModelOption = "squeezenet1_1",
    layer: Annotated[str | None, typer.Option(help="Whose strongest map is followed. Default: the last convolution.")] = None,
    window: Annotated[str, typer.Option(help="Size of the window in pixels, N or HxW.")] = "32",
    stride: Annotated[str, typer.Option(help="Pixels from window to window, N or HxW.")] = "8",
    fill: Annotated[str, typer.Option(help="What it shows: mean, blur, or a colour 0..255 (one number or R,G,B).")] = "mean",
    border: Annotated[str, typer.Option(help="flush: the last window ends at the border; clip: it is cut there.")] = "flush",
    class_: Annotated[str | None, typer.Option("--class", help="Name or number. Default: each image's most probable.")] = None,
    strongest: Annotated[str, typer.Option(help="The strongest map is that with the largest max or sum.")] = "max",
    others: Annotated[Path | None, typer.Option(help="Folder to project the map from too. Default: the other images.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report, pictures and sweep.")] = Path("conelens_occlude"),
    form: Annotated[str, typer.Option(help="How: auto, delta, gather or rerun.")] = "auto",
    memory: Annotated[str, typer.Option(help="Bound on working memory, such as 512M or 2G.")] = "2G",
    plan: Annotated[bool, typer.Option("--plan", help="Only print what would be computed.")] = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            help="Go on with the sweep in --out, or replace it. Default: go on where there is one of these images and settings."
        ),
    ] = None,
    weights: Weights = None,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    fit: Fit = None,
    policy: Policy = None,
    device: Device = "cpu",
) -> None:
    """Move a window over images and show what covering each place changes."""
    from conelens.cli.occlusion import OcclusionJob, Settings, plan_of
    from conelens.cli.work import check_files, open_model

    sizes = console.size(window, "--window"), console.size(stride, "--stride")
    bound = console.memory(memory)
    if not plan:
        if not images:
            raise ArgumentError("no images are given, wanted image files (only --plan does without)")
        check_files(images)
        console.writable(out)
    bench = open_model(model, weights, input_size, mean, std, scale, fit, device, policy)
    if plan:
        OUT.print(plan_of(bench, *sizes, border, form), markup=False)
        return
    settings = Settings(layer, *sizes, fill, border, class_, strongest, form, bound)
    job = OcclusionJob.prepare(bench, images or [], settings, others)
    figures = job.figures(job.sweep(out, resume))
    summary = job.summary(figures)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in summary.header:
        table.add_column(heading, no_wrap=heading != "other labels", overflow="fold")
    for row in summary.rows:
        table.add_row(*map(escape, row))
    OUT.print(table)
    say(f"written: {job.write(figures, out)}")


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("demo_output"),
    device: Device = "cpu",
) -> None:
    """Show SqueezeNet 1.1 on the bundled photographs; under a minute on two cores."""
    from conelens.demo import run_demo

    console.writable(out)
    with console.writing(out):
        path = run_demo(out, lambda line: say(escape(line)), device)
    OUT.print(str(path), markup=False)
