"""Losses, proved by splitting the batch, the classes and both, under every reduction."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.testing.rules import check_rule

aten = torch.ops.aten
Shape = tuple[int, ...]
REDUCTIONS = ["none", "mean", "sum"]
NUMBER = {"none": 0, "mean": 1, "sum": 2}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def shares(*shape: int) -> Tensor:
    """Numbers strictly between 0 and 1."""
    return torch.rand(shape, dtype=torch.float64) * 0.9 + 0.05


def classes(count: int, *shape: int) -> Tensor:
    return torch.randint(0, count, shape)


SCORES: list[Shape] = [(4, 6), (5, 7), (1, 5), (3, 2, 2), (2, 5, 1, 3), (3, 1), (7,)]


def target_of(shape: Shape) -> Tensor:
    return classes(shape[1 if len(shape) > 1 else 0], *shape[:1], *shape[2:]) if len(shape) > 1 else classes(shape[0])


@pytest.mark.parametrize("shape", SCORES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy(shape: Shape, reduction: str) -> None:
    check_rule(F.cross_entropy, numbers(*shape), target_of(shape), reduction=reduction, limit=30)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_targets(reduction: str, weighted: bool, smoothing: float) -> None:
    """Samples are ignored, all those of a rank among them, by a class and by a number that is none."""

    def function(scores: Tensor, target: Tensor, *weight: Tensor, ignore: int) -> Tensor:
        fixed = weight[0].detach() if weight else None
        return F.cross_entropy(scores, target, fixed, reduction=reduction, ignore_index=ignore, label_smoothing=smoothing)

    weight = (shares(5),) if weighted else ()
    for ignore, target in ((-100, [-100, -100, 3, 1, 0]), (2, [2, 2, 2, 4, 0])):
        inputs = numbers(5, 5), torch.tensor(target), *weight
        check_rule(function, *inputs, ignore=ignore, operator="aten.cross_entropy_loss", limit=20)


def test_all_targets_ignored() -> None:
    check_rule(F.cross_entropy, numbers(4, 3), torch.full((4,), -100))
    check_rule(F.cross_entropy, numbers(4, 3), torch.full((4,), -100), reduction="sum")


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 2), (6,)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_targets_of_all_classes(shape: Shape, reduction: str, smoothing: float, weighted: bool) -> None:
    def function(scores: Tensor, target: Tensor, *weight: Tensor) -> Tensor:
        return F.cross_entropy(scores, target, *weight, reduction=reduction, label_smoothing=smoothing)

    weight = (shares(shape[0 if len(shape) == 1 else 1]),) if weighted else ()
    check_rule(function, numbers(*shape), shares(*shape), *weight, limit=20)


def test_large_scores_stay_in_range() -> None:
    check_rule(F.cross_entropy, numbers(4, 6) * 1e4 + 1e6, classes(6, 4))


def test_classes_that_are_out() -> None:
    """All the classes of one rank have a score of minus infinity, as padded vocabularies do."""
    scores = numbers(4, 6)
    scores[:, 3:] = -torch.inf
    check_rule(F.cross_entropy, scores, classes(3, 4))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_half_precision(kind: torch.dtype, smoothing: float) -> None:
    scores, target = (numbers(64, 8) * 3).to(kind), classes(8, 64)
    check_rule(F.cross_entropy, scores, target, label_smoothing=smoothing, tolerance=0.02)


@pytest.mark.parametrize("shape", [(4, 6), (5, 3), (3, 4, 2), (7,)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_nll_loss(shape: Shape, reduction: str, weighted: bool) -> None:
    def function(scores: Tensor, target: Tensor, *weight: Tensor) -> Tensor:
        return F.nll_loss(scores, target, weight[0].detach() if weight else None, reduction=reduction)

    target = target_of(shape)
    if target.ndim:
        target.view(-1)[0] = -100
    weight = (shares(shape[0 if len(shape) == 1 else 1]),) if weighted else ()
    check_rule(function, numbers(*shape), target, *weight, operator="aten.nll_loss_nd", limit=20)


ELEMENTWISE: dict[str, tuple[Callable[..., Tensor], Callable[[Shape], Tensor], Callable[[Shape], Tensor]]] = {
    "binary_cross_entropy": (aten.binary_cross_entropy, lambda s: shares(*s), lambda s: shares(*s)),
    "binary_cross_entropy_with_logits": (
        aten.binary_cross_entropy_with_logits, lambda s: numbers(*s), lambda s: shares(*s),
    ),
    "hinge_embedding_loss": (
        lambda x, y, *, reduction: F.hinge_embedding_loss(x, y, reduction=reduction), lambda s: numbers(*s),
        lambda s: numbers(*s).sign().long(),
    ),
    "huber_loss": (aten.huber_loss, lambda s: numbers(*s), lambda s: numbers(*s)),
    "kl_div": (aten.kl_div, lambda s: numbers(*s), lambda s: shares(*s)),
    "l1_loss": (aten.l1_loss, lambda s: numbers(*s), lambda s: numbers(*s)),
    "mse_loss": (aten.mse_loss, lambda s: numbers(*s), lambda s: numbers(*s)),
    "poisson_nll_loss": (
        lambda x, y, *, reduction: aten.poisson_nll_loss(x, y, True, False, 1e-8, reduction), lambda s: numbers(*s),
        lambda s: shares(*s),
    ),
    "smooth_l1_loss": (aten.smooth_l1_loss, lambda s: numbers(*s), lambda s: numbers(*s)),
    "soft_margin_loss": (aten.soft_margin_loss, lambda s: numbers(*s), lambda s: numbers(*s).sign().long()),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_elementwise(name: str, reduction: str) -> None:
    function, scores, target = ELEMENTWISE[name]
    chosen: Any = reduction if name == "hinge_embedding_loss" else NUMBER[reduction]
    for shape in ((4, 6), (5, 1, 3)):
        check_rule(
            lambda x, y: function(x, y, reduction=chosen),
            scores(shape),
            target(shape),
            operator=f"aten.{name}",
            limit=20,
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_broadcast_inputs(reduction: str) -> None:
    number = NUMBER[reduction]
    check_rule(lambda x, y: aten.l1_loss(x, y, number), numbers(5, 1), numbers(1, 3), operator="aten.l1_loss")
    check_rule(
        lambda x, y, w, p: aten.binary_cross_entropy_with_logits(x, y, w.detach(), p.detach(), number),
        *(numbers(5, 3), shares(5, 3), shares(5, 1), shares(3)),
        operator="aten.binary_cross_entropy_with_logits", limit=20,
    )  # fmt: skip
    check_rule(
        lambda x, y, w: F.binary_cross_entropy(x, y, w.detach(), reduction=reduction),
        *(shares(5, 3), shares(5, 3), shares(5, 3)), operator="aten.binary_cross_entropy",
    )  # fmt: skip
    check_rule(
        lambda x, y, z: F.margin_ranking_loss(x, y, z, margin=0.1, reduction=reduction),
        *(numbers(5), numbers(5), numbers(5).sign().long()), operator="aten.margin_ranking_loss",
    )  # fmt: skip


def test_kl_div_of_logarithms() -> None:
    check_rule(
        lambda x, y: F.kl_div(x, y, reduction="sum", log_target=True), numbers(5, 3), numbers(5, 3),
        operator="aten.kl_div",
    )  # fmt: skip


def test_mean_of_half_precision_does_not_overflow() -> None:
    x = torch.full((64, 64), 200.0, dtype=torch.float16)
    check_rule(lambda x, y: aten.mse_loss(x, y, 1), x, torch.zeros_like(x), operator="aten.mse_loss", tolerance=1e-3)
