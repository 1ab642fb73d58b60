"""The commands of the explanatory graph: fit, infer, draw, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from conelens.cli import console
from conelens.cli.console import OUT, guarded, say
from conelens.cli.options import DECODER_STEPS, BatchSize, Device, InputSize, Mean, ModelOption, Policy, Scale, Std, Weights
from conelens.errors import ArgumentError, DataError

commands = typer.Typer(
    name="graph",
    help="Part patterns of every filter, linked across layers: learn, find, draw and evaluate them.",
    no_args_is_help=True,
)

Graph = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of `conelens graph fit`.")]
Images = Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of images, searched deeply, or one image.")]
WeightsNow = Annotated[Path | None, typer.Option(help="Where the weights of the fit are now, if they were moved.")]

LAYERS = "Names with commas, bottom first. Default: known for vgg16, alexnet, squeezenet1_1 and ResNets at 224 pixels."
NODES = "Per filter: one number, or one per layer, such as 40,20. Default: by the map; 40, 20, 10 at 28, 14, 7 cells a side."
NOISE = "How readily activity far from all nodes counts as clutter: higher, more of it. Default 0.1."
NEGATIVES = "Folder of images of anything; each unit's activity is measured by how much it varies there."


@commands.command()
@guarded
def fit(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder of images of one kind of object, cut out.")],
    out: Annotated[Path, typer.Option(help="Folder for the graph and its checkpoint.")] = Path("conelens_graph"),
    model: ModelOption = "squeezenet1_1",
    weights: Weights = None,
    layers: Annotated[str | None, typer.Option(help=LAYERS)] = None,
    nodes: Annotated[str | None, typer.Option(help=NODES)] = None,
    edges: Annotated[int, typer.Option(help="Parents per node.")] = 15,
    iterations: Annotated[int, typer.Option(help="Of expectation-maximisation, per layer.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the nodes' first positions.")] = 0,
    form: Annotated[str, typer.Option(help="recommended, paper, or release (the authors' MATLAB code).")] = "recommended",
    noise: Annotated[float | None, typer.Option(help=NOISE)] = None,
    negatives: Annotated[Path | None, typer.Option(help=NEGATIVES)] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Replace the graph in --out instead of going on with it.")] = False,
    memory: Annotated[str, typer.Option(help="Feature maps beyond this go to --out, e.g. 512M.")] = "4G",
    batch_size: BatchSize = 16,
    input_size: InputSize = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    policy: Policy = None,
    device: Device = "cpu",
) -> None:
    """Learn the graph of a folder of images; the same command goes on where it was interrupted."""
    from conelens.cli.graph_work import FitJob, FitSettings, forget
    from conelens.cli.work import open_model

    bound = console.memory(memory)
    counts = None if nodes is None else console.counts(nodes, "--nodes")
    names = None if layers is None else [name.strip() for name in layers.split(",")]
    bench = open_model(model, weights, input_size, mean, std, scale, "stretch", device, policy)
    job = FitJob.prepare(bench, images, FitSettings(names, counts, edges, iterations, seed, form, noise), negatives)
    console.writable(out)
    if anew:
        forget(out)
    graph = job.run(out, weights, policy, batch_size, bound)
    say(escape(f"{graph}, edges per node: {edges}"))
    say(f"the graph is in {escape(str(out))}")
    say(f"next: conelens graph draw {escape(str(out))} {escape(str(images))}")


@commands.command()
@guarded
def infer(
    graph: Graph,
    images: Images,
    out: Annotated[Path, typer.Option(help="FILE.safetensors, or a folder for placements.safetensors.")] = Path(
        "conelens_graph_infer"
    ),
    layers: Annotated[str | None, typer.Option(help="Names with commas. Default: all of the graph.")] = None,
    table: Annotated[Path | None, typer.Option(help="Also list each image's strongest nodes: FILE.csv or FILE.json.")] = None,
    strongest: Annotated[int, typer.Option(help="Nodes per image in --table; one of a filter at a place.")] = 20,
    batch_size: BatchSize = 16,
    weights: WeightsNow = None,
    device: Device = "cpu",
) -> None:
    """Find every node in images: positions in pixels of the network's input, scores, activations."""
    from conelens.cli.graph_work import PLACEMENTS, Fitted, photographs, save_placements, save_table, strongest_nodes

    if table is not None and table.suffix.lower() not in (".csv", ".json"):
        raise ArgumentError(f"--table is {table}, wanted a name that ends in .csv or .json")
    if strongest < 1:
        raise ArgumentError(f"--strongest is {strongest}, wanted at least 1")
    if out.suffix and out.suffix.lower() != ".safetensors" and not out.is_dir():
        raise ArgumentError(f"--out is {out}, wanted a name that ends in .safetensors, or a folder, whose name has no suffix")
    path = out if out.suffix.lower() == ".safetensors" else out / PLACEMENTS
    console.writable(path.parent)
    fitted = Fitted.open(graph, weights, device)
    with console.of_option("--layers"):
        names = None if layers is None else [fitted.graph[name.strip()].name for name in layers.split(",")]
    dataset = photographs(images, fitted.bench.model.preprocess)
    _, placements = fitted.place(dataset, batch_size, names)
    save_placements(path, placements, dataset.paths, dataset.preprocess.size)
    say(f"written: {escape(str(path))}")
    keys = ", ".join(f"{name}.positions" for name in fitted.graph.layers if names is None or name in names)
    say(f"holds: {escape(keys)} (y, x in pixels of the input), and .scores and .activations of each")
    say(f"next: safetensors.torch.load_file({escape(repr(str(path)))}) gives them in Python")
    if table is not None:
        save_table(table, strongest_nodes(fitted.graph, placements, dataset.paths, strongest))
        say(f"written: {escape(str(table))}")


@commands.command()
@guarded
def draw(
    graph: Graph,
    images: Images,
    out: Annotated[Path, typer.Option(help="Folder for report and pictures.")] = Path("conelens_graph_draw"),
    layer: Annotated[str | None, typer.Option(help="Whose nodes are shown. Default: each layer's.")] = None,
    nodes: Annotated[int, typer.Option(help="Strongest nodes shown of a layer.")] = 20,
    patches: Annotated[int, typer.Option(help="Best images of each node.")] = 9,
    side: Annotated[
        int | None, typer.Option(help="Of a patch, in pixels of the network's input. Default 70; 60 where the form is release.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="Draw what this node is made of: LAYER/FILTER/NODE.")] = None,
    graphml: Annotated[bool, typer.Option("--graphml", help="Also write graph.graphml, for other tools.")] = False,
    synthesis: Annotated[
        bool, typer.Option("--synthesis", help="Also paint images from the best nodes of --layer (default: the top one).")
    ] = False,
    steps: Annotated[int, typer.Option(help="Of the training that --synthesis needs; minutes on two cores.")] = DECODER_STEPS,
    batch_size: BatchSize = 16,
    weights: WeightsNow = None,
    device: Device = "cpu",
) -> None:
    """Show what the nodes look at: their best patches, where they gather, the graph itself."""
    from conelens.cli.graph_show import DrawJob, save_graphml
    from conelens.cli.graph_work import Fitted

    console.writable(out)
    fitted = Fitted.open(graph, weights, device)
    job = DrawJob.prepare(fitted, images, layer, nodes, patches, side, root, steps if synthesis else None)
    if graphml:
        say(f"written: {escape(str(save_graphml(fitted, out / 'graph.graphml')))}")
    path = job.write(out, batch_size)
    say(f"written: {escape(str(path))}")
    if path.suffix == ".html":
        say(f"next: open {escape(str(path))} in a browser")


@commands.command()
@guarded
def evaluate(
    graph: Annotated[Path | None, typer.Argument(metavar="DIR", help="Graph; only --ratings does without.")] = None,
    parts: Annotated[Path | None, typer.Option(help="Data set of images with marked parts.")] = None,
    format_: Annotated[str, typer.Option("--format", help="animal-part, cub or pascal-part.")] = "animal-part",
    category: Annotated[str | None, typer.Option(help="Of pascal-part, or a folder of --parts.")] = None,
    seed: Annotated[int, typer.Option(help="Of resamples, controls and annotated images.")] = 0,
    resamples: Annotated[int, typer.Option(help="For the intervals.")] = 1000,
    sheet: Annotated[bool, typer.Option("--sheet", help="Write a page for people to rate instead, and its key.")] = False,
    rows: Annotated[int, typer.Option(help="Nodes (and as many filters) on the page.")] = 20,
    ratings: Annotated[list[Path] | None, typer.Option(help="Read back what the page saved; once per rater.")] = None,
    key: Annotated[Path | None, typer.Option(help="Of the page that was rated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report, tables and page.")] = Path("conelens_graph_evaluate"),
    batch_size: BatchSize = 16,
    weights: WeightsNow = None,
    device: Device = "cpu",
) -> None:
    """Compare the nodes with parts that people marked, beside raw filters and other controls."""
    if ratings:
        _read_back(ratings, key, out)
        return
    if graph is None or parts is None:
        raise ArgumentError("DIR and --parts are not both given, wanted the folder of a graph and a data set with marked parts")
    if resamples < 1:
        raise ArgumentError(f"--resamples is {resamples}, wanted at least 1")
    from conelens.cli.graph_study import StudyJob, open_parts
    from conelens.cli.graph_work import Fitted

    console.writable(out)
    fitted = Fitted.open(graph, weights, device)
    job = StudyJob(fitted, open_parts(parts, format_, category, fitted.bench.model.preprocess), seed, resamples)
    if sheet:
        page, its_key = job.sheet(out, rows, batch_size)
        say(f"written: {escape(str(page))}, to be rated; keep {escape(str(its_key))} from the raters")
        say(f"next: conelens graph evaluate --ratings FILE --key {escape(str(its_key))}")
        return
    study = job.run()
    for table in study.tables:
        OUT.print(f"{table}\n", markup=False)  # not a table of Rich's, which would cut columns to the terminal's width
    say(f"written: {escape(str(job.write(study, out)))}")


def _read_back(ratings: Sequence[Path], key: Path | None, out: Path) -> None:
    from conelens.cli.graph_study import rated

    for path in ratings if key is None else [*ratings, key]:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    if key is None:
        raise ArgumentError("--key is not given, wanted the file that was written beside the rated page")
    console.writable(out)
    study = rated(ratings, key)
    OUT.print(str(study.tables[0]), markup=False)
    with console.writing(out):
        say(f"written: {escape(str(study.save(out, 'ratings')))}")
