"""Worlds and instructions: nobody asks which world there is, or climbs a ladder of instruction types."""

import ast
import inspect
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch

import shardwright
from shardwright.cost import message_sizes
from shardwright.ir.instructions import Call, FusedMoves, Instruction, KeepSliceForBackward, Move, StartMoves
from shardwright.ir.layout import Layout
from shardwright.ir.program import LocalProgram
from shardwright.ir.visitor import InstructionVisitor
from shardwright.redistribute.steps import redistribution
from shardwright.world.distributed.world import DistributedWorld
from shardwright.world.simulated.world import SimulatedWorld
from shardwright.world.world import World

PACKAGE = Path(shardwright.__file__).parent
TYPES = {kind.__name__ for kind in get_args(Instruction)}
WORLDS = (SimulatedWorld, DistributedWorld)
ASKED = [name for name in vars(World) if not name.startswith("_")]


@cache
def trees():
    """Returns the syntax tree of every module, by path."""
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


# -- what is looked for in the source ----------------------------------------------------------------------------------


def asks_which_world(tree):
    """Lines that ask for ``is_simulated``, also by ``getattr``, or for the class of a world."""
    found = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "is_simulated"]
    found += [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value == "is_simulated"]
    return found + [test.lineno for test in type_tests(tree, {kind.__name__ for kind in WORLDS})]


def type_tests(tree, types):
    """``isinstance(…, T)``, ``type(…) is T`` and ``case T()``, of one of these types."""

    def names(node):
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
            n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
        }

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.MatchClass):
            found += [node.cls] if types & names(node.cls) else []
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            found += [node] if types & names(node.args[1]) else []
        elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
            found += [node] if types & names(node) else []
    return found


def ladders(tree):
    """Functions with two or more tests of the type of an instruction; nested functions are part of the outer ones."""
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [f.name for f in functions if len(type_tests(f, TYPES)) > 1]


def test_the_search_finds_what_it_looks_for():
    ladder = "def f(i):\n if isinstance(i, Call):\n  pass\n elif isinstance(i, (Move, ir.StartMoves)):\n  pass"
    cases = "def f(i):\n match i:\n  case Call():\n   pass\n  case Move():\n   pass"
    exact = "def f(i):\n return type(i) is Call or type(i) is Move"
    assert [ladders(ast.parse(text)) for text in (ladder, cases, exact)] == [["f"]] * 3
    assert not ladders(ast.parse("def f(x):\n    return [i for i in x if isinstance(i, Call)] or isinstance(x, list)"))
    for text in ("w.is_simulated", "getattr(w, 'is_simulated')", "isinstance(w, SimulatedWorld)"):
        assert asks_which_world(ast.parse(text)) == [1]
    assert not asks_which_world(ast.parse("SimulatedWorld(4).bind(program)"))


def test_nothing_outside_world_asks_which_world_there_is():
    found = {
        name: lines for name, tree in trees().items() if not name.startswith("world/") and (lines := asks_which_world(tree))
    }
    assert not found, "give World a method that says what is done"


def test_nobody_climbs_a_ladder_of_instruction_types():
    found = {name: where for name, tree in trees().items() if name != "ir/visitor.py" and (where := ladders(tree))}
    assert not found, "ask for reads, outputs, starts, ends, or write an InstructionVisitor"


def test_what_collectives_cut_by_stands_once():
    """The same constants are those of the running collectives and of the memory that is predicted of them."""
    constants = {name for name in vars(message_sizes) if name.isupper()}
    assert {"CHUNK", "PART", "MANY", "MOST_COPIES"} <= constants
    found = []
    for name, tree in trees().items():
        if name.startswith(("world/", "cost/", "plan/memory/")) and name != "cost/message_sizes.py":
            targets = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
            names = {n.id.strip("_") for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            found += [(name, repeated) for repeated in sorted(names & constants)]
    assert not found


def test_whether_a_step_communicates_is_decided_once():
    found = []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            is_other = isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.NotEq)
            if is_other and getattr(node.comparators[0], "value", None) == "slice":
                found.append(name)
    assert found == ["ir/step.py"]


# -- both worlds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("kind", WORLDS)
def test_both_worlds_do_the_same(kind, name):
    """Signature by signature, annotations and defaults included."""
    asked, there = inspect.getattr_static(World, name), inspect.getattr_static(kind, name)
    if isinstance(asked, property):
        asked, there = asked.fget, there.fget
    assert there is not asked, "not implemented"
    assert inspect.signature(there) == inspect.signature(asked)


@pytest.mark.parametrize("kind", WORLDS)
def test_a_world_is_complete(kind):
    assert issubclass(kind, World)
    assert not kind.__abstractmethods__
    assert not kind.__subclasses__()
    flags = [name for name, text in inspect.get_annotations(World).items() if text.startswith("ClassVar")]
    assert flags
    assert all(type(getattr(kind, name)) is bool for name in flags)


def test_the_world_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        World()


def test_simulated_ranks_agree_without_asking():
    def never():
        raise AssertionError("there is nobody to compare with")

    world = SimulatedWorld(4)
    world.compare("graph", never)
    world.agree_on_random_state()
    assert (world.processes, world.on_first_rank(lambda: 3), world.gather_numbers((1, 2))) == (1, 3, [[1, 2]])
    with pytest.raises(KeyError, match="all of them"):
        world.rank_or_raise(lambda: KeyError("this process is all of them"))


def test_simulated_ranks_gather_a_view():
    rows = Layout((4,), ("x",))("x", "None")
    for whole in (torch.ones(8, 2), torch.ones(8, 2, requires_grad=True)):
        found = SimulatedWorld(4).gather(whole, rows, (8, 2))
        assert found is not whole
        assert found.data_ptr() == whole.data_ptr()
        assert found.requires_grad == whole.requires_grad


# -- instructions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def instructions():
    """One of every type, about a value ``x`` that rows are gathered of."""
    rows = Layout((2,), ("x",))("x", "None")
    whole = rows.replicated(rows.mesh, 2)
    gather, cut = redistribution(rows, whole, (4, 2), ("x",)), redistribution(whole, rows, (4, 2))
    one, two = (Move(n, f"{n}_1", gather, torch.float32, "f", f"{n} -> f", (0, 0), True, recompute=True) for n in "xy")
    sliced = Move("x_1", "x_2", cut, torch.float32, "f", "x -> f", (0, 1), False)
    call = Call(torch.relu, (), {}, ("z",), False, "f", (0, 0))
    return [call, one, StartMoves((one, two)), FusedMoves((one, two)), KeepSliceForBackward(sliced, one)]


def test_every_instruction_answers_the_same_questions(instructions):
    call, one, start, fused, keep = instructions
    assert [i.cause for i in instructions] == ["f"] * 5
    assert [i.reads for i in instructions] == [(), ("x",), ("x", "y"), ("x", "y"), ("x_1",)]
    assert [i.outputs for i in instructions] == [("z",), ("x_1",), (), ("x_1", "y_1"), ()]
    assert [i.starts for i in instructions] == [(), (), start.moves, (), ()]
    assert [i.ends for i in instructions] == [(), (one,), (), fused.moves, ()]
    assert [i.recompute for i in instructions] == [False, True, False, True, False]
    assert (one.communicates, one.communicates_backward, keep.cut.communicates) == (True, True, False)
    program = LocalProgram(2, (), tuple(instructions), (), (), {}, {})
    assert (program.calls, program.moves, program.kept_slices) == ([call], [one, *fused.moves], [keep])
    assert program.shared_moves == [start.moves, fused.moves]


def test_a_visitor_has_a_method_for_every_instruction(instructions):
    class Names(InstructionVisitor[str]):
        def call(self, call: Call) -> str:
            return "call"

        def move(self, move: Move) -> str:
            return "move"

        def start_moves(self, start: StartMoves) -> str:
            return "start"

        def fused_moves(self, fused: FusedMoves) -> str:
            return "fused"

        def keep_slice(self, keep: KeepSliceForBackward) -> str:
            return "keep"

    assert {type(i) for i in instructions} == set(get_args(Instruction))
    assert list(map(Names().visit, instructions)) == ["call", "move", "start", "fused", "keep"]
