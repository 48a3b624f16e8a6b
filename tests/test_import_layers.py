"""The house stands: imports point down, importing has no effects, and torch's private parts have one door."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "shardwright"

# The floors, from the top. A room imports only from rooms of lower floors; imports for types only, and those within functions,
# count as any other.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("calibrate", "testing"),
    ("api",),
    ("pipeline",),
    ("train",),
    ("checkpoint", "data", "hybrid", "report"),
    ("plan", "world"),
    ("cost", "ops", "partition"),
    ("capture", "parameters", "redistribute", "rules"),
    ("agreement", "ir", "launch", "search"),
    ("base",),
    ("errors",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# The one file that may use torch's private parts, so that a new release of torch is met in one place.
PRIVATE_DOOR = "shardwright.base.torch_private"
# What else may: (module, private name) -> why it cannot go through the door. Only for modules of shardwright.world; an
# entry that nothing uses any more fails the test.
PRIVATE_ALLOWED: dict[tuple[str, str], str] = {}


class Source(NamedTuple):
    """A module, not imported: its full name, its tree, and all module names there are."""

    name: str
    path: Path
    tree: ast.Module
    known: frozenset[str]

    @property
    def package(self) -> str:
        """What a relative import of one dot means here."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


class Use(NamedTuple):
    """A name that a module imports or reads, and the line where it does."""

    name: str
    line: int


def read_package(root: Path) -> list[Source]:
    """Every module of the package under `root`."""
    paths = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    folders = {".".join(path.parent.relative_to(root).parts) for path in paths.values()}
    known = frozenset(paths) | folders
    return [Source(name, path, ast.parse(path.read_text("utf-8")), known) for name, path in paths.items()]


def room_of(module: str) -> str:
    """The room that a module belongs to: the first name after the package's."""
    return (module.split(".") + ["__init__"])[1]


def imported_modules(source: Source) -> Iterator[Use]:
    """Every module of the package that a module imports, anywhere in it: at its top, in a function, for types only."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Use(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = _base_of(node, source)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Use(full if full in source.known else base, node.lineno)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function, name = ast.unparse(node.func), node.args[0].value
            if function.rpartition(".")[2] in ("import_module", "__import__") and isinstance(name, str):
                yield Use(source.package + name if name.startswith(".") else name, node.lineno)


def _base_of(node: ast.ImportFrom, source: Source) -> str:
    if not node.level:
        return node.module or ""
    parts = source.package.split(".")
    return ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))


def arrows_between(sources: list[Source]) -> set[tuple[str, str]]:
    """The pairs of rooms of which the first imports from the second."""
    pairs = {
        (room_of(source.name), room_of(use.name))
        for source in sources
        for use in imported_modules(source)
        if use.name.split(".")[0] == PACKAGE
    }
    return {(a, b) for a, b in pairs if a != b}


def layer_violations(sources: list[Source]) -> list[str]:
    """One line for each module that has no floor and for each import that does not point down."""
    found = []
    for source in sources:
        room = room_of(source.name)
        if room not in FLOOR:
            found.append(f"{source.path}: '{room}' has no place in the table FLOORS")
            continue
        for use in imported_modules(source):
            if use.name.split(".")[0] != PACKAGE:
                continue
            target = room_of(use.name)
            if target not in FLOOR:
                found.append(f"{source.path}:{use.line}: imports {use.name}, which has no place in the table FLOORS")
            elif FLOOR[target] <= FLOOR[room] and target != room:
                found.append(f"{source.path}:{use.line}: '{room}' imports {use.name}, which does not stand below it")
    return found


def import_cycles(sources: list[Source]) -> list[list[str]]:
    """The groups of modules that import each other in a circle, wherever in them the imports stand."""
    graph = {
        source.name: {use.name for use in imported_modules(source) if use.name in source.known} - {source.name, PACKAGE}
        for source in sources
    }
    reached = {name: _reached_from(name, graph) for name in graph}
    groups = {frozenset({name, *(other for other in reached[name] if name in reached.get(other, ()))}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reached_from(start: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in graph.get(waiting.pop(), ()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def private_uses(source: Source) -> list[Use]:
    """Every name within torch that has a part beginning with one underscore: imported, read, or got by getattr.

    A variable is followed to the import that made it (`import torch.distributed as dist`). What stands below
    `torch.ops.<namespace>` is the name of an operator, not of a private part: `torch.ops.aten._softmax` is fine.
    """
    bound: dict[str, str] = {}  # variable -> what of torch it stands for
    found = []
    for node in ast.walk(source.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
            for alias in node.names:
                top = alias.name.split(".")[0]  # what `import torch.distributed` binds
                bound[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{a.name}" for a in node.names]
            bound.update((a.asname or a.name, name) for a, name in zip(node.names, names, strict=True))
        found += [Use(name, node.lineno) for name in names if _is_private(name)]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            name = _dotted(node, bound)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
            name = _dotted(node.args[0], bound)
            attribute = node.args[1]
            name = f"{name}.{attribute.value}" if name and isinstance(attribute, ast.Constant) else None
        else:
            continue
        # Of a chain a._b.c only the link that makes it private counts: a._b.
        if name and _is_private(name) and not _is_private(name.rpartition(".")[0]):
            found.append(Use(name, node.lineno))
    return sorted(set(found), key=lambda use: (use.line, use.name))


def _dotted(node: ast.expr, bound: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, bound)
        return base and f"{base}.{node.attr}"
    return None


def _is_private(name: str) -> bool:
    parts = name.split(".")
    if parts[0] != "torch":
        return False
    if parts[1:2] == ["ops"]:
        parts = parts[:3]
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def private_violations(sources: list[Source]) -> list[str]:
    """One line for each use of a private part of torch outside the door, and for each allowance that has no use."""
    used = {(s.name, use.name): f"{s.path}:{use.line}" for s in sources for use in private_uses(s)}
    found = [
        f"{place}: uses {name}, which is private: go through {PRIVATE_DOOR}"
        for (module, name), place in used.items()
        if module != PRIVATE_DOOR and (module, name) not in PRIVATE_ALLOWED
    ]
    found += [f"{module} no longer uses {name}: strike it off" for module, name in PRIVATE_ALLOWED.keys() - used.keys()]
    return found + [f"{module} is not of world" for module, _ in PRIVATE_ALLOWED if room_of(module) != "world"]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    found = read_package(ROOT)
    assert {f"{PACKAGE}.errors", f"{PACKAGE}.ir.layout", PACKAGE} <= {source.name for source in found}
    return found


def test_imports_point_down(sources):
    found = layer_violations(sources)
    assert not found, "\n".join(found)


def test_no_modules_import_each_other(sources):
    assert import_cycles(sources) == []


def test_the_listing_of_rooms_and_arrows(sources):
    """What the note of a change of the house quotes: ``pytest tests/test_import_layers.py -k listing -s``."""
    arrows = arrows_between(sources)
    rooms = {room_of(source.name) for source in sources}
    print(f"\n{len(rooms)} rooms on {len(FLOORS)} floors, {len(arrows)} arrows, {len(import_cycles(sources))} cycles")
    for floor in FLOORS:
        for room in floor:
            print(f"{room:>13} -> {' '.join(sorted(b for a, b in arrows if a == room))}")
    assert rooms == FLOOR.keys()


def test_only_one_door_leads_to_private_torch(sources):
    found = private_violations(sources)
    assert not found, "\n".join(found)


EFFECTS = """
import importlib, json, os, pkgutil, random, signal, sys, threading, warnings
import numpy, torch, torch.distributed

def state():  # hashes where a value is long, or is nobody's business
    return {
        "torch.initial_seed": torch.initial_seed(),
        "torch's generator": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy's generator": hash(str(numpy.random.get_state())),
        "random's generator": hash(random.getstate()),
        "torch.distributed": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "CUDA": torch.cuda.is_initialized(),
        "default dtype": str(torch.get_default_dtype()),
        "grad mode": torch.is_grad_enabled(),
        "torch's threads": torch.get_num_threads(),
        "threads": threading.active_count(),
        "sys.path": list(sys.path),
        "excepthook": str(sys.excepthook),
        "SIGINT": str(signal.getsignal(signal.SIGINT)),
        "SIGTERM": str(signal.getsignal(signal.SIGTERM)),
        "optional packages": [m for m in ("matplotlib", "sklearn", "transformers") if m in sys.modules],
        **{f"environment: {name}": hash(value) for name, value in os.environ.items()},
    }

warnings.simplefilter("error")
before = state()
import shardwright
names = [shardwright.__name__]
if sys.argv[1] == "every module":
    for module in pkgutil.walk_packages(shardwright.__path__, "shardwright."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            names.append(module.name)
after = state()
changed = {k: [before.get(k), after.get(k)] for k in before | after if before.get(k) != after.get(k)}
json.dump({"changed": changed, "file": shardwright.__file__, "names": names}, sys.stdout)
"""


@pytest.mark.parametrize("which", ["package", "every module"])
def test_importing_has_no_effects(which):
    done = subprocess.run([sys.executable, "-c", EFFECTS, which], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # so importing prints nothing either
    assert result["changed"] == {}
    assert Path(result["file"]) == ROOT / PACKAGE / "__init__.py"
    if which == "every module":
        assert f"{PACKAGE}.ir.layout" in result["names"]


# The checks themselves, on packages with known faults.


def package_with(tmp_path, **files):
    for name, text in {"__init__": "", **files}.items():
        path = tmp_path / PACKAGE / (name.replace("__in__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_package(tmp_path)


@pytest.mark.parametrize(
    "statement",
    [
        "import shardwright.plan.solve",
        "import shardwright",
        "import shardwright as sw",
        "from shardwright import shard",
        "from shardwright import plan",
        "from shardwright.plan import solve",
        "from ..plan.solve import solve",
        "from .. import plan",
        "from .. import shard",
        "def f():\n    from shardwright.plan import Plan",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from shardwright.plan import Plan",
        "import importlib\nimportlib.import_module('shardwright.plan')",
        "__import__('shardwright.api.auto_parallel')",
        "from shardwright import ops",
        "from shardwright.nowhere import thing",
        "from shardwright.redistribute import steps",
    ],
)
def test_an_upward_import_is_found(tmp_path, statement):
    found = layer_violations(package_with(tmp_path, plan__in__solve="", rules__in__matmul=statement))
    assert len(found) == 1, found
    assert f"matmul.py:{statement.count(chr(10)) + 1}: " in found[0]


@pytest.mark.parametrize(
    "statement",
    [
        "from shardwright import errors",
        "from shardwright.errors import LayoutError",
        "from ..ir.layout import Layout",
        "from . import view",
        "from .view import rows",
        "from shardwright.agreement import steps",
        "import torch, numpy.linalg",
    ],
)
def test_an_import_from_below_or_from_the_own_room_passes(tmp_path, statement):
    files = {"errors": "", "ir__in__layout": "from shardwright.ir import mesh", "ir__in__mesh": "", "rules__in__view": ""}
    assert layer_violations(package_with(tmp_path, **files, rules__in__matmul=statement)) == []


def test_a_circle_is_found(tmp_path):
    lazy = "def f():\n    from shardwright.ir.b import g"
    sources = package_with(
        tmp_path, ir__in__a=lazy, ir__in__b="from shardwright.ir.c import h", ir__in__c="import shardwright.ir.a"
    )
    assert import_cycles(sources) == [["shardwright.ir.a", "shardwright.ir.b", "shardwright.ir.c"]]


def test_dots_count_from_the_package_in_its_init(tmp_path):
    files = {"rules__in__view": "", "plan__in__solve": ""}
    assert layer_violations(package_with(tmp_path, **files, rules__in____init__="from .view import rows")) == []
    assert len(layer_violations(package_with(tmp_path, **files, rules__in____init__="from ..plan import solve"))) == 1


def test_a_module_without_a_layer_is_found(tmp_path):
    assert "'utils' has no place" in layer_violations(package_with(tmp_path, utils__in__text=""))[0]


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("import torch\ntorch._C._log_api_usage_once('x')", "torch._C"),
        ("import torch\ntorch.utils._pytree.tree_map(f, x)", "torch.utils._pytree"),
        ("\nimport torch.utils._pytree as pytree", "torch.utils._pytree"),
        ("\nfrom torch.utils import _pytree", "torch.utils._pytree"),
        ("\nfrom torch._subclasses.fake_tensor import FakeTensor", "torch._subclasses.fake_tensor.FakeTensor"),
        ("import torch.distributed as dist\ndist._symmetric_memory.empty(2)", "torch.distributed._symmetric_memory"),
        ("from torch import distributed\ndistributed._get_default_group()", "torch.distributed._get_default_group"),
        ("import torch\ngetattr(torch, '_dynamo').reset()", "torch._dynamo"),
        ("import torch\ntorch.ops._c10d_functional.all_reduce", "torch.ops._c10d_functional"),
    ],
)
def test_a_private_part_of_torch_is_found(tmp_path, statement, name):
    (source,) = (s for s in package_with(tmp_path, world__in__simulated=statement) if s.name.endswith("simulated"))
    assert private_uses(source) == [Use(name, 2)]
    assert len(private_violations([source])) == 1
    assert private_violations([source._replace(name=PRIVATE_DOOR)]) == []


def test_public_torch_and_our_own_privates_pass(tmp_path):
    text = """
import torch, torch.ops
from shardwright.world import _lists
torch.__version__, torch.ops.aten._softmax.default, torch.nn.functional.relu(_lists._x), self._torch._y
getattr(torch, "float32"), getattr(torch, name)
"""
    assert private_violations(package_with(tmp_path, world__in__simulated=text)) == []


def test_an_allowance_holds_only_where_it_stands_and_is_used(tmp_path, monkeypatch):
    sources = package_with(tmp_path, world__in__simulated="import torch._C", world__in__distributed="import torch._C")
    monkeypatch.setitem(PRIVATE_ALLOWED, ("shardwright.world.simulated", "torch._C"), "a reason")
    (found,) = private_violations(sources)
    assert "distributed.py:1: uses torch._C" in found
    monkeypatch.setitem(PRIVATE_ALLOWED, ("shardwright.world.simulated", "torch._D"), "a reason")
    assert any("simulated no longer uses torch._D: strike it off" in line for line in private_violations(sources))
    monkeypatch.setitem(PRIVATE_ALLOWED, ("shardwright.rules.matmul", "torch._C"), "a reason")
    assert any("rules.matmul is not of world" in line for line in private_violations(sources))
