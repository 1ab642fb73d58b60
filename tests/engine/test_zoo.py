"""A varied sample of the zoo (``python -m benchmarks.zoo`` runs all of it): traced, and equal to the oracle
or refused by name.
"""

from __future__ import annotations

import pytest

pytest.importorskip("pytorchcv", reason="the zoo comes with the test extra: pip install 'conelens[test]'")

import torch

from benchmarks.zoo import VARIED, Row, by_one_ulp, examine, imagenet_names, line, main, table

# what each network of the sample is refused for until a policy is stated
POLICIES = {
    "mobilenetv2_wd4": ("relu6", "relu6: clamp"),
    "igcv3_wd4": ("relu6", "relu6: clamp"),
    "mobilenetv3_small_w7d20": ("hardswish", "hardswish: clamp, gate: hold"),
    "seresnet10": ("gate", "gate: hold"),
    "menet108_8x1_g3": ("gate", "gate: hold"),
    "darknet_tiny": ("leaky_relu", "leaky_relu: clamp"),
    "diaresnet10": ("gate", "gate: hold"),
}


@pytest.mark.parametrize("name", VARIED)
def test_network_of_the_zoo(name: str) -> None:
    row = examine(name, imagenet_names()[name])
    assert not row.problem, line(row)
    assert row.good, line(row)
    assert row.units >= 4
    assert (row.refused, row.policy) == POLICIES.get(name, ("", "")), line(row)


@pytest.mark.parametrize(("name", "operator"), [("channelnet", "conv3d"), ("isqrtcovresnet18", "bmm")])
def test_network_that_is_refused_names_its_operator(name: str, operator: str) -> None:
    row = examine(name, imagenet_names()[name])
    assert row.error is None
    assert row.operator == operator, row.problem
    assert " in features." in row.problem


def test_all_imagenet_networks_are_listed_one_family_after_the_other() -> None:
    names = imagenet_names()
    assert len(names) == 465
    families = list(names.values())
    assert len(set(families[: len(set(families))])) == len(set(families)) == 86
    assert not any(word in name for name in names for word in ("cifar", "coco", "voc_", "cityscapes"))


def test_the_table_says_what_happened(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    rows = [
        Row("b", "two", 64, 9, "relu6", "relu6: clamp", 8, 3e-15, "", 1.0),
        Row("a", "one", problem="conv3d in x: no rule | none"),
    ]
    text = table(rows)
    assert "| b | two | 64 | 9 | refused: relu6 | relu6: clamp | 3e-15 |" in text
    assert "conv3d in x: no rule / none" in text
    assert "2 networks of 2 families: 0 need no policy, 1 pass with the policy stated, 1 refused: conv3d." in text
    path = tmp_path / "rows.jsonl"
    assert main(["--names", "squeezenet_v1_1", "--rows", str(path), "--markdown", str(tmp_path / "zoo.md")]) == 0
    assert "squeezenet_v1_1" in (tmp_path / "zoo.md").read_text()
    assert len(path.read_text().splitlines()) == 1
    capsys.readouterr()
    assert main(["--names", "squeezenet_v1_1", "--rows", str(path)]) == 0
    kept = capsys.readouterr().out.splitlines()
    assert kept == [
        "1 networks of 1 families: 1 need no policy, 0 pass with the policy stated.",
        "Not run: 464 others, of the same families.",
    ]


def test_a_difference_beyond_the_limit_must_be_rounding() -> None:
    assert Row("a", "exact", error=9e-13).good
    assert Row("a", "chaotic", error=3e-10, noise=1e-10).good
    assert "moves by up to 1e-10 per ulp" in Row("a", "chaotic", error=3e-10, noise=1e-10).outcome
    assert not Row("a", "wrong", error=3e-10, noise=1e-11).good
    assert "1 further from the oracle than rounding explains: wrong" in table([Row("a", "wrong", error=3e-10, noise=1e-11)])


def test_images_one_unit_in_the_last_place_away() -> None:
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    moved = by_one_ulp(image, 0)
    assert (moved != image).all()
    assert ((moved > image).any()) and ((moved < image).any())
    assert torch.equal(torch.nextafter(moved, image), image)
    assert not torch.equal(moved, by_one_ulp(image, 1))
