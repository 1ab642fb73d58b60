"""Random small networks: branches, joins, groups, dilation, every kind of pooling and padding."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RARE = ["add", "add", "cat", "bn", "avg", "shuffle", "chunk", "pad", "up", "slice", "lrn"]


class Step(nn.Module):
    """One node; ``spelling`` varies how the same thing is written."""

    def __init__(self, kind: str, spelling: int = 0, **extra: object) -> None:
        super().__init__()
        self.kind, self.spelling, self.extra = kind, spelling, extra
        self.body: nn.Module | None = extra.get("body")  # type: ignore[assignment]

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        match self.kind:
            case "relu":
                # in place only on a private copy: another branch may still read x
                spellings = (
                    lambda: F.relu(x), lambda: torch.relu(x), lambda: x.relu(), lambda: x.clamp(min=0),
                    lambda: F.relu(x.clone(), inplace=True), lambda: (x * 1.0).relu_(),
                )  # fmt: skip
                return spellings[self.spelling % len(spellings)]()
            case "add":
                return x + inputs[1] if self.spelling % 2 else torch.add(x, inputs[1])
            case "cat":
                return torch.cat(inputs, 1)
            case "shuffle":
                n, c, h, w = x.shape
                groups = int(self.extra["groups"])  # type: ignore[call-overload]
                return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
            case "chunk":
                first, second = x.chunk(2, 1)
                return torch.cat([second, first], 1)
            case "pad":
                return F.pad(x, self.extra["amounts"], mode=str(self.extra["mode"]))  # type: ignore[arg-type]
            case "up":
                return F.interpolate(x, scale_factor=2, mode=str(self.extra["mode"]))
            case "slice":
                return x[:, :, 1:, :-1]
            case _:
                assert self.body is not None
                return self.body(x)


class RandomNet(nn.Module):
    """3 to 10 nodes; node i reads earlier nodes. ``sizes`` are the maps' shapes (C, H, W)."""

    def __init__(self, seed: int, channels: int = 2, size: int = 17, all_positive: bool = False) -> None:
        super().__init__()
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.steps = nn.ModuleList()
        self.reads: list[list[int]] = []
        values = [torch.randn(2, channels, size, size + rng.choice((0, 0, 3)))]
        self.input_shape = tuple(values[0].shape[1:])
        count = rng.randint(3, 10)
        while len(self.steps) < count:
            step, reads = self._draw(rng, values)
            try:
                value = step.eval()(*(values[r] for r in reads))
            except RuntimeError:
                continue  # torch refuses this combination of sizes
            if min(value.shape[2:]) < 1 or max(value.shape[2:]) > 40 or value.shape[1] > 16:
                continue
            self.steps.append(step)
            self.reads.append(reads)
            values.append(value)
        self.shapes = [tuple(v.shape[1:]) for v in values]
        if all_positive:
            for parameter in self.parameters():
                parameter.data.abs_()
        self.eval()

    def _draw(self, rng: random.Random, values: list[Tensor]) -> tuple[Step, list[int]]:
        at = len(values) - 1 if rng.random() < 0.7 else rng.randrange(len(values))
        x = values[at]
        channels, _height, _width = x.shape[1:]
        kind = rng.choice(["conv"] * 5 + ["relu"] * 4 + ["pool"] * 3 + _RARE)
        spelling = rng.randrange(6)
        if kind == "conv":
            groups = rng.choice([g for g in (1, 1, 1, 2, channels) if channels % g == 0])
            out = groups * rng.randint(1, max(1, 6 // groups))
            kernel = (rng.randint(1, 4), rng.randint(1, 4))
            stride, dilation = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2))
            padding: object = rng.choice([(0, 0), (1, 1), (rng.randint(0, 2), rng.randint(0, 2))])
            if stride == 1 and rng.random() < 0.25:
                padding = "same"
            body: nn.Module = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=rng.random() < 0.8)  # type: ignore[arg-type]
            return Step("body", body=body), [at]
        if kind == "pool":
            size = rng.randint(2, 4)
            body = nn.MaxPool2d(
                (size, rng.choice((size, 2))),
                rng.randint(1, 3),
                rng.choice((0, 0, 1)),
                rng.choice((1, 1, 1, 2)),
                ceil_mode=rng.random() < 0.5,
            )
            return Step("body", body=body), [at]
        if kind == "avg":
            padding = rng.choice((0, 1))
            body = nn.AvgPool2d(rng.randint(2, 3), rng.randint(1, 2), padding, rng.random() < 0.5, rng.random() < 0.5)
            return Step("body", body=body), [at]
        if kind == "bn":
            norm = nn.BatchNorm2d(channels)
            norm.running_mean.normal_()  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            norm.weight.data.normal_()
            norm.bias.data.normal_()
            return Step("body", body=norm), [at]
        if kind == "lrn":
            return Step("body", body=nn.LocalResponseNorm(3, 0.1, 0.75, 2.0)), [at]
        if kind in ("add", "cat"):
            fits = [i for i, v in enumerate(values) if v.shape[2:] == x.shape[2:] and (kind == "cat" or v.shape == x.shape)]
            return Step(kind, spelling), [at, rng.choice(fits)]
        if kind == "shuffle":
            return Step("shuffle", groups=rng.choice([g for g in (1, 2, 3) if channels % g == 0])), [at]
        if kind == "chunk":
            return (Step("chunk"), [at]) if channels % 2 == 0 else (Step("relu", spelling), [at])
        if kind == "pad":
            mode = rng.choice(("constant", "constant", "reflect", "replicate"))
            return Step("pad", amounts=tuple(rng.randint(0, 2) for _ in range(4)), mode=mode), [at]
        if kind == "up":
            return Step("up", mode=rng.choice(("nearest", "bilinear"))), [at]
        return Step(kind, spelling), [at]

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step, reads in zip(self.steps, self.reads, strict=True):
            values.append(step(*(values[r] for r in reads)))
        return values[-1]
