"""The zoo: every ImageNet network of pytorchcv traced, and projected against the autograd oracle in float64.

    python -m benchmarks.zoo                     # all of them, over an hour; rows are kept in --rows as they come
    python -m benchmarks.zoo --sample 12         # one network of each of so many families
    python -m benchmarks.zoo --names resnet18 mobilenetv3_small_wd2
    python -m benchmarks.zoo --rows rows.jsonl --only-table --markdown benchmarks/ZOO.md

Per network: trace without a policy; where an operator has no canonical rule, trace again with the policy that
the row states. Then units of a middle and of the last convolution (peak, two corners, another place) are
projected, by the cone and by the whole image, and compared with autograd under the same policy. Weights are
He-random, batch norms are set to the statistics of a random input, with random scales of either sign, so that
nothing is dead.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import conelens
from conelens.network import Network, trace
from conelens.operators import Activation, Gate, GroupNorm
from conelens.ops import require_kernels
from conelens.projection import project
from tests.kit.oracle import deconvnet_by_autograd, relative

SIZES = (64, 96, 128, 224, 299, 331)
LIMIT = 1e-12
# Where that is exceeded: so many images, each pixel one unit in the last place away, tell how far rounding moves the oracle.
# One is not enough: for efficientnet_b5 they range from 1e-11 to 5e-10.
MOVED_IMAGES = 5
ROUNDING = 5.0  # times the largest of those movements is still rounding
OTHER_TASKS = re.compile(  # segmentation, detection, pose, speech, small images
    r".*_cifar.*|.*_cub|.*_coco|.*_cmupan|centernet|fcn8sd|pspnet|deeplabv3|icnet|fastscnn|cgnet|dabnet|sinet|bisenet|danet|fpenet|contextnet|lednet|"
    r"esnet|edanet|enet|erfnet|linknet|segnet|unet|sqnet|prnet|lffd|pfpcnet|voca|nvpattexp|superpointnet|jasper|jasperdr|quartznet"
)
# A sample for tests: fast and unlike each other.
VARIED = (
    "squeezenet_v1_1", "resnet10", "shufflenetv2_wd2", "mobilenetv2_wd4", "mobilenetv3_small_w7d20",
    "seresnet10", "preresnet10", "diaresnet10",
    "sqnxt23_w1", "menet108_8x1_g3", "darknet_tiny", "octresnet10_ad2", "igcv3_wd4", "bninception",
)  # fmt: skip


@dataclass
class Row:
    """One line of the table.

    ``error`` is the largest relative 2-norm of a difference from the oracle; None where nothing was projected. Where it
    exceeds the limit, ``noise`` is how far the oracle itself moves at most over several images one unit in the last place
    away: deep random networks with gates can be chaotic.
    """

    family: str
    name: str
    size: int = 0
    layers: int = 0
    refused: str = ""  # operator refused without a policy
    policy: str = ""
    units: int = 0
    error: float | None = None
    problem: str = ""
    seconds: float = 0.0
    noise: float = 0.0

    @property
    def good(self) -> bool:
        return self.error is not None and (self.error < LIMIT or self.error < ROUNDING * self.noise)

    @property
    def operator(self) -> str:
        """The operator that the network is refused for whatever the policy, or nothing."""
        named = re.match(r"(\w+) in \S+: ", self.problem)
        return named[1] if named else ""

    @property
    def outcome(self) -> str:
        if self.problem or self.error is None:
            return self.problem.split("\n")[0]
        noise = f" (the oracle itself moves by up to {self.noise:.0e} per ulp)" if self.noise else ""
        return f"{self.error:.0e}{noise}"


def imagenet_names() -> dict[str, str]:
    """{network: family} in an order that visits every family before any a second time."""
    from pytorchcv.model_provider import _models

    families: dict[str, list[str]] = {}
    for name, factory in _models.items():
        family = factory.__module__.rsplit(".", 1)[1]
        if not OTHER_TASKS.fullmatch(family):
            families.setdefault(family, []).append(name)
    ordered: dict[str, str] = {}
    for turn in range(max(map(len, families.values()))):
        for family, names in families.items():
            if turn < len(names):
                ordered[names[turn]] = family
    return ordered


# --- networks -----------------------------------------------------------------------------------------------


def build(name: str) -> tuple[nn.Module, int]:
    """The network in float64 with live random weights, and the smallest of SIZES that it accepts."""
    from pytorchcv.model_provider import _models

    np.int = int  # type: ignore[attr-defined]  # pytorchcv still uses the name that NumPy 1.24 removed
    problem: Exception | None = None
    for size in SIZES:
        try:
            try:
                model = _models[name](in_size=(size, size))
            except (TypeError, AssertionError):
                model = _models[name]()
            model = adapt(model).double().eval()
            images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            enliven(model, images)
            return model, size
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            problem = error
    raise RuntimeError(f"runs at none of {SIZES}: {problem}")


def adapt(model: nn.Module) -> nn.Module:
    """Two changes that leave the function as it is.

    A final average pool as large as the map at the standard size would not fit a smaller one: it becomes
    global. RevNet's block frees its own input inside a custom autograd.Function, which autograd cannot
    differentiate here: the block's plain sums take its place.
    """
    for module in model.modules():
        if isinstance(getattr(module, "final_pool", None), nn.AvgPool2d):
            module.final_pool = nn.AdaptiveAvgPool2d(1)
        if hasattr(module, "rev_funct"):
            module.forward = partial(_reversible, module)
    return model


def _reversible(block: Any, x: Tensor) -> Tensor:
    left, right = torch.chunk(x, 2, 1)
    left = left + block.fm(right)
    return torch.cat((left, right + block.gm(left)), 1)


@torch.no_grad()
def enliven(model: nn.Module, images: Tensor) -> None:
    """He-random filters; batch norms centred on what they receive, with random scales of either sign."""
    torch.manual_seed(0)
    handles = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.1)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            handles.append(module.register_forward_pre_hook(_centre))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()


def _centre(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    (x,) = inputs
    dims = (0, *range(2, x.ndim))
    norm.running_mean = x.mean(dims) + 0.1 * torch.randn(x.shape[1], dtype=x.dtype) * x.std(dims, correction=0)
    spread = x.var(dims, correction=0)  # a channel that hardly varies is not blown up: it would only amplify rounding
    norm.running_var = spread * torch.empty(x.shape[1], dtype=x.dtype).uniform_(0.7, 1.4) + 0.1 * spread.mean() + 1e-3
    if norm.affine:
        norm.weight.uniform_(0.6, 1.4).mul_(torch.where(torch.rand(x.shape[1]) < 0.8, 1.0, -1.0))
        norm.bias.normal_(0, 0.3)


@torch.no_grad()
def chosen_units(model: nn.Module, net: Network, image: Tensor) -> dict[str, list[tuple[int, int, int, int]]]:
    """For a middle and the last convolution whose map has more than one cell, gates aside: live units (0,
    channel, y, x).
    """
    passed = on_the_way_down(net)
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(partial(_collect, seen.setdefault(path, [])))
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    model(image)
    for handle in handles:
        handle.remove()
    usable = {
        path: outs[0][0]
        for path, outs in seen.items()
        if len(outs) == 1 and min(outs[0].shape[2:]) > 1 and net.node(path).index in passed
    }
    paths = list(usable)
    generator = torch.Generator().manual_seed(3)
    picked = {}
    for path in dict.fromkeys((paths[len(paths) // 2], paths[-1])):
        maps = usable[path]
        height, width = maps.shape[1:]
        places = [
            divmod(int(maps.max(0).values.flatten().argmax()), width),
            (0, 0),
            (height - 1, width - 1),
            (height // 2, width // 3),
        ]
        units = []
        for y, x in places:
            strong = maps[:, y, x].topk(max(1, len(maps) // 8))  # weak ones are what cancellation left
            channel = int(torch.randint(len(strong.values), (), generator=generator))
            if strong.values[channel] > 0:
                units.append((0, int(strong.indices[channel]), y, x))
        picked[path] = units
    return picked


def _collect(outputs: list[Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        outputs.append(output.clone())


# --- one network --------------------------------------------------------------------------------------------


def examine(name: str, family: str) -> Row:
    """Build, trace, project and compare one network."""
    row = Row(family, name)
    start = time.perf_counter()
    try:
        _examine(row)
    except conelens.ConelensError as error:
        row.problem = str(error)
    except Exception as error:
        row.problem = f"{type(error).__name__}: {error}"
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _examine(row: Row) -> None:
    model, row.size = build(row.name)
    image = torch.randn(1, 3, row.size, row.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    policy: dict[str, str] = {}
    try:
        net = trace(model, image)
    except conelens.UnsupportedOperatorError as error:
        stated = re.search(r"policy=\{'(\w+)'", str(error))
        if stated is None:
            raise
        row.refused = stated[1]
        net = trace(model, image, policy="clamp")
        policy = stated_policy(net)
    row.policy = ", ".join(f"{operator}: {rule}" for operator, rule in policy.items())
    row.layers = len(net.graph)
    row.error = row.noise = 0.0
    for path, units in chosen_units(model, net, image).items():
        wanted, _ = deconvnet_by_autograd(model, image, path, units, policy)
        for route in ("full", "cone"):
            with require_kernels():
                found = project(
                    net,
                    image,
                    path,
                    [u[1] for u in units],
                    [u[2:] for u in units],
                    [0] * len(units),
                    route=route,
                )
            row.error = max(row.error, *(relative(a, b) for a, b in zip(found.pixels, wanted, strict=True)))
        for seed in range(MOVED_IMAGES if row.error >= LIMIT else 0):
            moved, _ = deconvnet_by_autograd(model, by_one_ulp(image, seed), path, units, policy)
            row.noise = max(row.noise, *(relative(a, b) for a, b in zip(moved, wanted, strict=True)))
        row.units += int((wanted.flatten(1).abs().amax(1) > 0).sum())


def by_one_ulp(image: Tensor, seed: int) -> Tensor:
    """Each pixel one unit in the last place up or down, at random."""
    up = torch.rand(image.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.nextafter(image, torch.where(up, torch.inf, -torch.inf).to(image))


def on_the_way_down(net: Network) -> set[int]:
    """The nodes that a signal from the output meets when gates are held."""
    passed = {net.graph.outputs[0]}
    for node in reversed(net.graph.nodes):
        if node.index in passed:
            passed.update(node.inputs[:1] if isinstance(node.op, Gate) else node.inputs)
    return passed


def stated_policy(net: Network) -> dict[str, str]:
    """The rules that such a signal follows in a trace with the single word "clamp"."""
    ops = [net.graph[index].op for index in sorted(on_the_way_down(net))]
    policy = {op.name: op.rule for op in ops if isinstance(op, Activation) and op.rule}
    policy |= {op.kind: op.rule for op in ops if isinstance(op, GroupNorm) and op.rule}
    policy |= {op.kind: op.rule for op in ops if isinstance(op, Gate) and op.rule}
    return policy


def examine_within(name: str, family: str, limit_s: float) -> Row:
    """The same in a process of its own, which is ended after ``limit_s`` seconds."""
    importlib.import_module("torch.fx.experimental.symbolic_shapes")  # autograd would import it in every child anew
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        send.send(asdict(examine(name, family)))

    process = context.Process(target=work)
    process.start()
    send.close()
    try:
        if receive.poll(limit_s):
            return Row(**receive.recv())
        return Row(family, name, problem=f"not finished in {limit_s:.0f} s")
    except EOFError:
        return Row(family, name, problem=f"ended with code {process.exitcode}")
    finally:
        process.terminate()
        process.join()


# --- the table ----------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """One row as text."""
    without = f"refused {row.refused}" if row.refused else ""
    network = f"{row.family:18} {row.name:32} {row.size:4} px {row.layers:5} layers"
    return f"{network}  {without:22} {row.policy:32} {row.outcome}  [{row.units} units, {row.seconds} s]"


_PREAMBLE = f"""# Zoo

Made by `python -m benchmarks.zoo`: the ImageNet networks of pytorchcv 0.0.67 with random weights. Units of
a middle and of the last convolution are projected by the cone and by the whole image, in float64 with
kernels forced; given is the largest relative 2-norm of the difference from autograd. An operator without a
canonical deconvnet rule is refused by name until a policy is stated; the result is then under the policy
named before it.

Deep random networks with gates amplify rounding. Where the difference exceeds {LIMIT:.0e}, the oracle is run on
{MOVED_IMAGES} more images, whose pixels each lie one unit in the last place (ulp) up or down at random; the
largest movement of its result stands beside the difference, and up to {ROUNDING:.0f} times that counts as rounding.
"""


def summary(rows: Sequence[Row]) -> str:
    """How many networks passed, and for what the others are refused."""
    passed = [row for row in rows if row.good]
    free = sum(not row.refused for row in passed)
    text = (
        f"{len(rows)} networks of {len({row.family for row in rows})} families: {free} need no policy, "
        f"{len(passed) - free} pass with the policy stated"
    )
    reasons = Counter(row.operator or row.problem for row in rows if not row.good and row.error is None)
    text += "".join(f", {count} refused: {reason}" for reason, count in reasons.most_common())
    apart = [row.name for row in rows if not row.good and row.error is not None]
    text += (f", {len(apart)} further from the oracle than rounding explains: {', '.join(apart)}" if apart else "") + "."
    missing = len(imagenet_names()) - len(rows)
    return text + f"\nNot run: {missing} others, of the same families." * (missing > 0)


def table(rows: Sequence[Row]) -> str:
    """The rows by family as Markdown."""
    text = [_PREAMBLE, summary(rows)]
    text += [
        "",
        "| family | network | px | layers | without policy | policy | result |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: r.family):
        without = f"refused: {row.refused}" if row.refused else "" if row.problem else row.outcome
        result = row.outcome.replace("|", "/") if row.refused or row.problem else ""
        text.append(
            f"| {row.family} | {row.name} | {row.size or ''} | {row.layers or ''} | {without} | {row.policy} | {result} |"
        )
    return "\n".join(text) + "\n"


def read_rows(path: Path) -> Iterator[Row]:
    if path.exists():
        for text in path.read_text().splitlines():
            yield Row(**json.loads(text))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many varied networks instead of all")
    parser.add_argument("--names", nargs="+", help="these networks alone")
    parser.add_argument("--rows", type=Path, help="file of rows (JSON lines), continued where it ended")
    parser.add_argument("--only-table", action="store_true", help="run nothing; make the table of --rows")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one network")
    options = parser.parse_args(arguments)
    every = imagenet_names()
    names = options.names or list(VARIED[: options.sample] if options.sample else every)
    rows = {row.name: row for row in read_rows(options.rows)} if options.rows else {}
    for name in [] if options.only_table else names:
        if name in rows:
            continue
        rows[name] = row = examine_within(name, every[name], options.limit)
        print(line(row), flush=True)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    if options.markdown:
        options.markdown.write_text(table(list(rows.values())))
    print(summary(list(rows.values())))
    return 0 if all(row.good or row.operator for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
