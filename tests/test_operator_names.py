"""Operators are known in one place: no list of their names outside the rules, and traits say what torch does."""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from operator_calls import Call, calls
from torch import Tensor

import shardwright  # noqa: F401  (registers the rules)
from shardwright.base.operators import RECURRENT, statistics_flag
from shardwright.rules.registry import registered
from shardwright.rules.traits import Traits, register_traits, rows, traits_of
from shardwright.world.execute.source import python_entry, with_constants

aten = torch.ops.aten
PACKAGE = Path(__file__).resolve().parent.parent / "shardwright"

# Where operators are known, and torch's private ones.
KNOWN_IN = ("rules/", "base/operators.py", "base/torch_private.py")
# Files outside that name operators, and why. One that no longer does fails the test.
EXEMPT = {
    "calibrate/operators.py": "its one table of what is timed calls the operators that most of a training step is made of",
}
OPERATORS = {
    name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")
}
# Words that operators have and that mean something else in lists: what sums are of, and the steps of redistributions.
OTHER_WORDS = {"sum", "max", "min", "mean", "slice", "permute", "index", "size", "stride", "data", "values", "dim"}


# -- names -----------------------------------------------------------------------------------------------------------------


def operator_names(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every name of an operator in a module: with its library, as an overload, or in a list of plain names."""
    tree = ast.parse(source)
    texts = documentation(tree)
    aliases = {
        target.id
        for node in ast.walk(tree) if isinstance(node, ast.Assign) and is_library(node.value)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts:
            if "aten." in node.value or "aten::" in node.value or is_list(node.value.split()):
                yield node.lineno, node.value
        elif isinstance(node, ast.Attribute):
            if is_library(node) or (isinstance(node.value, ast.Name) and node.value.id in aliases):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, (ast.Set, ast.List, ast.Tuple, ast.Dict)):
            items = node.keys if isinstance(node, ast.Dict) else node.elts
            words = [item.value for item in items if isinstance(item, ast.Constant)]
            if is_list(words):
                yield node.lineno, ", ".join(words)


def documentation(tree: ast.Module) -> set[ast.Constant]:
    """The docstrings of a module, its classes and functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(first.value)
    return found


def is_library(node: ast.AST) -> bool:
    """Whether an expression is torch.ops.aten, however torch.ops is called there."""
    return isinstance(node, ast.Attribute) and node.attr == "aten" and ast.unparse(node.value).split(".")[-1] == "ops"


def is_list(words: list[object]) -> bool:
    """Whether these are names of operators: three at least, and not all of them words that mean something else."""
    plain = {word for word in words if isinstance(word, str) and word in OPERATORS}
    return (
        len(plain) >= 3 and len(plain) == len(set(words)) and not plain <= OTHER_WORDS | {row.family for row in rows().values()}
    )


def test_operators_are_named_beside_their_rules_only():
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(KNOWN_IN):
            found[name] = [f"{name}:{line}: {text!r}" for line, text in operator_names(path.read_text("utf-8"))]
    named = [line for name, lines in found.items() if name not in EXEMPT for line in lines]
    assert not named, "give the operator a trait (shardwright/rules) and ask traits_of:\n" + "\n".join(named)
    assert all(found.get(name) for name in EXEMPT), "an exemption that nothing needs: remove it"


@pytest.mark.parametrize(
    "source",
    [
        'if op.name == "aten.linear": pass',
        "x = f'aten.{name}'",
        "target = torch.ops.aten.linear.default",
        "a = torch.ops.aten\ntarget = a.linear.default",
        "from torch import ops\ntarget = getattr(ops.aten, name)",
        'VIEWS = frozenset({"view", "expand", "transpose"})',
        'VIEWS = "view expand transpose".split()',
        'KINDS = {"view": 1, "expand": 2, "transpose": 3}',
    ],
)
def test_a_name_is_found(source):
    assert list(operator_names(source))


@pytest.mark.parametrize(
    "source", ['"""As aten.linear does."""', 'kinds = ("sum", "max", "min")', 'name = "view"', "import torch.ops"]
)
def test_what_is_no_name_is_not_found(source):
    assert not list(operator_names(source))


# -- traits ----------------------------------------------------------------------------------------------------------------

# The operators that have a rule or a row.
NAMES = sorted(name for name in {n.removeprefix("aten.") for n in registered()} | set(rows()) if hasattr(aten, name))


def with_trait(has: Callable[[Traits], object]) -> list[str]:
    """The operators whose traits are so."""
    return [name for name in NAMES if has(traits_of(getattr(aten, name)))]


def storages(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


def kept_by_autograd(call: Call) -> tuple[list[Tensor], set[int]]:
    """The results of a call and the memory of what autograd keeps of it."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = call.run()
    return results, storages(kept)


@pytest.fixture(autouse=True)
def _quiet():
    """Some operators warn that they are new, or old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_rows_are_of_operators_that_there_are():
    assert {name for name in rows() if not hasattr(aten, name)} == {
        "add_scaled",
        "largest",
        "sliced_causal_attention",
        "update_running",
    }  # what rules call
    assert sum(not calls(name) for name in NAMES) <= len(NAMES) // 20  # of the others torch is asked below


def test_two_rows_of_an_operator_are_refused():
    with pytest.raises(ValueError, match="the operator mm has two rows"):
        register_traits({Traits("view"): "mm"})


@pytest.mark.parametrize("name", with_trait(lambda t: t.family == "view" or t.is_view or t.reshapes or t.reorders))
def test_views_share_the_memory_of_their_input(name):
    traits, found = traits_of(getattr(aten, name)), [call for call in calls(name) if call.tensors]
    if name.startswith(("empty", "new_empty")):
        return  # as cheap as a view, and of nothing
    assert all(storages(call.run()) <= storages(call.tensors) for call in found)
    for call in found:
        (before, *_), (after, *_) = call.tensors, call.run()
        assert not traits.reshapes or torch.equal(before.flatten(), after.flatten())
        assert not traits.reorders or sorted(before.stride()) == sorted(after.stride())


def test_only_what_torch_says_draws_changes_a_generator():
    drawing, tagged = set(), set()
    for name in NAMES:
        for call in calls(name):
            before = torch.get_rng_state()
            call.run()
            drawing |= {name} - ({name} if torch.equal(before, torch.get_rng_state()) else set())
            tagged |= {name} if traits_of(call.overload).draws else set()
    assert drawing <= tagged
    # of one number there is nothing to draw; the others draw when they are asked to
    assert tagged - drawing <= {"randperm", "rrelu", "scaled_dot_product_attention", *RECURRENT}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_where_traits_say_so(name):
    found = [call for call in calls(name) if any(t.requires_grad for t in call.tensors)]
    flows = [result for call in found for result in call.run() if result.requires_grad]
    if traits_of(getattr(aten, name)).has_gradient:
        assert flows or not found
        return
    for call in found:  # it may flow where the result does not depend on what is read: then it is of zeros, or refused
        wanted = [t for t in call.tensors if t.requires_grad]
        for result in (r for r in call.run() if r.requires_grad):
            with contextlib.suppress(RuntimeError):  # "derivative ... is not implemented"
                gradients = torch.autograd.grad(result.sum(), wanted, allow_unused=True)
                assert all(g is None or not g.any() for g in gradients)


@pytest.mark.parametrize("name", with_trait(lambda t: t.linear))
def test_backward_of_linear_operators_needs_nothing_that_they_read(name):
    for call in calls(name):
        assert not kept_by_autograd(call)[1] & storages(call.tensors)


@pytest.mark.parametrize("name", with_trait(lambda t: t.new_result or t.new_gradients))
def test_new_memory_is_nobody_elses(name):
    traits = traits_of(getattr(aten, name))
    for call in calls(name):
        (result,), kept = kept_by_autograd(call)
        given = torch.ones_like(result)
        operands = [t for t in call.tensors[:2] if t.requires_grad]
        gradients = torch.autograd.grad(result, operands, given)
        assert not traits.new_result or not storages([result]) & (kept | storages(call.tensors))
        if traits.new_gradients:
            own = storages(list(gradients))
            assert len(own) == len(operands)
            assert not own & storages([given, result, *call.tensors])


# CUDA's autocast alone lowers convolution
@pytest.mark.parametrize("name", sorted({*with_trait(lambda t: t.half)} - {"convolution"}))
def test_autocast_lowers_precision(name):
    with torch.autocast("cpu", torch.bfloat16):
        assert all(result.dtype == torch.bfloat16 for call in calls(name) for result in call.run())


@pytest.mark.parametrize("name", with_trait(lambda t: t.large_mean))
def test_means_in_large_memory(name):
    for call in calls(name):
        (result,) = call.run()
        assert result.shape == ()
        assert result.untyped_storage().nbytes() == call.tensors[0].nbytes


def test_python_functions_take_what_operators_take():
    for name in with_trait(lambda t: not t.entry_differs and t.family != "view"):
        for call in calls(name):
            entry = python_entry(call.overload)
            kwargs = with_constants(call.overload, call.args, call.kwargs) if entry is not call.overload else call.kwargs
            torch.manual_seed(0)
            expected = call.run()
            torch.manual_seed(0)
            got = Call(entry, call.args, kwargs).run()
            assert all(torch.equal(a, b) or torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in zip(got, expected)), call


def test_nothing_is_written_but_running_statistics():
    for name in NAMES:
        for call in calls(name):
            before = [t.detach().clone() for t in call.tensors]
            call.run()
            assert all(torch.equal(a, b) for a, b in zip(before, call.tensors)), call
    for name in ("batch_norm", "instance_norm", "native_batch_norm"):
        overload, statistics = getattr(aten, name).default, (torch.zeros(3), torch.ones(3))
        rest = (True, 0.1, 1e-5, True) if len(overload._schema.arguments) == 9 else (True, 0.1, 1e-5)
        overload(torch.rand(2, 3, 4), None, None, *statistics, *rest)
        assert statistics_flag(overload) is not None
        assert statistics[0].any()
