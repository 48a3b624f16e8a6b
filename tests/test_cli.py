"""The command line: what `layout` prints and draws, how `run` runs a script, and what mistakes look like."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import shardwright as sw
from shardwright.cli import main as cli
from shardwright.ir.layout import Layout
from shardwright.launch.job import worker_variables
from shardwright.report import draw

ROOT = Path(__file__).resolve().parent.parent

# The table of the operator-parallel tutorial: coordinates (dp, sp, mp), slice of the input, slice of the weight.
TABLE = """
0 (0, 0, 0) [0:16, 0:196]    [0:196, 0:512]
1 (0, 0, 1) [16:32, 0:196]   [0:196, 0:512]
2 (0, 1, 0) [0:16, 196:392]  [196:392, 0:512]
3 (0, 1, 1) [16:32, 196:392] [196:392, 0:512]
4 (1, 0, 0) [0:16, 392:588]  [392:588, 0:512]
5 (1, 0, 1) [16:32, 392:588] [392:588, 0:512]
6 (1, 1, 0) [0:16, 588:784]  [588:784, 0:512]
7 (1, 1, 1) [16:32, 588:784] [588:784, 0:512]
"""
CUBE = ["--devices", "2,2,2", "--axes", "dp,sp,mp"]


@pytest.fixture(autouse=True)
def _outside_of_any_job(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SHARDWRIGHT_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shardwright.world.current._current", [])


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.strip().splitlines()]


# -- layout -----------------------------------------------------------------------------------------------------------


def test_layout_prints_the_table_of_the_tutorial(capsys):
    layouts = ["--shape", "32,784", "mp,(sp,dp)", "--shape", "784,512", "(sp,dp),None"]
    assert cli.main(["layout", *CUBE, *layouts]) == 0
    lines = squeezed(capsys.readouterr().out)
    assert lines[:2] == ["mp,(dp,sp) @ dp=2,sp=2,mp=2 of [32, 784]", "(dp,sp),None @ dp=2,sp=2,mp=2 of [784, 512]"]
    expected = [line.replace("] [", "] [16, 196] [") + " [196, 512]" for line in squeezed(TABLE)]
    assert lines[4:] == expected


@pytest.mark.parametrize("text", ["mp,(sp,dp)", "sp>dp,mp", "dp[20 12],None", "None,None +sum(dp)", "(dp,sp,mp),None"])
def test_the_printed_text_form_parses_back(text, capsys):
    assert cli.main(["layout", *CUBE, "--shape", "32,5", text]) == 0
    printed = capsys.readouterr().out.splitlines()[0].removesuffix(" of [32, 5]")
    assert Layout.parse(printed) == Layout.parse(f"{text} @ dp=2,sp=2,mp=2")


def test_rank_list_and_uneven_pieces(capsys):
    square = ["--devices", "2,2", "--axes", "dp,mp", "--ranks", "3,2,1,0"]
    assert cli.main(["layout", *square, "--shape", "5", "dp>mp"]) == 0
    lines = squeezed(capsys.readouterr().out)
    assert lines[0] == "(dp,mp) @ dp=2,mp=2 ranks=3,2,1,0 of [5]"
    assert lines[3:] == ["0 (1, 1) [4:5] [1]", "1 (1, 0) [3:4] [1]", "2 (0, 1) [2:3] [1]", "3 (0, 0) [0:2] [2]"]


def test_one_shape_serves_all_layouts(capsys):
    assert cli.main(["layout", *CUBE, "--shape", "8,8", "dp,None", "mp,dp"]) == 0
    assert squeezed(capsys.readouterr().out)[-1] == "7 (1, 1, 1) [4:8, 0:8] [4, 8] [4:8, 4:8] [4, 4]"


@pytest.mark.parametrize(
    "arguments, message",
    {
        "unknown alias": ([*CUBE, "--shape", "4,4", "xp,None"], "which is not an alias of this layout"),
        "alias twice": ([*CUBE, "--shape", "4,4", "dp,dp"], "an axis can split one dim only"),
        "dims": ([*CUBE, "--shape", "4,4", "dp"], "give one entry a dim"),
        "a mesh": ([*CUBE, "--shape", "4", "dp @ dp=2"], "leave out '@ ...'"),
        "sum of pieces": ([*CUBE, "--shape", "4", "dp[1 2]"], "add up to 3"),
        "number of pieces": ([*CUBE, "--shape", "4", "dp[1 2 1]"], "give 2 piece sizes"),
        "pieces": ([*CUBE, "--shape", "4", "dp[a b]"], "cannot read the piece sizes"),
        "aliases": (["--devices", "2,2", "--axes", "dp", "--shape", "4", "dp"], "give one alias an axis"),
        "ranks": (["--devices", "2", "--axes", "dp", "--ranks", "0,0", "--shape", "4", "dp"], "repeats a rank"),
        "negative": ([*CUBE, "--shape=-4", "dp"], "negative size"),
        "shapes": ([*CUBE, "--shape", "4", "--shape", "4", "dp", "dp", "dp"], "3 layouts and 2 shapes"),
        "suffix": ([*CUBE, "--shape", "4", "dp", "--draw", "x.bmp"], "name a .png or .svg file"),
        "folder": ([*CUBE, "--shape", "4", "dp", "--draw", "no/such/folder.svg"], "No such file or directory"),
    }.values(),
)
def test_a_mistake_is_one_clear_line(arguments, message, capsys):
    assert cli.main(["layout", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("shardwright layout: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["layout", "--devices", "2,x", "--axes", "dp", "--shape", "4", "dp"], "is not a list of ints"),
        (["layout", "--axes", "dp", "--shape", "4", "dp"], "--devices"),
        (["run", "--devices", "0", "x.py"], "is not a number of devices"),
        (["divine"], "invalid choice"),
        ([], "required: COMMAND"),
    ],
)
def test_a_mistake_that_the_parser_finds(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["layout"], ["run"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "layout" in text if not command else "examples:" in text


# -- drawing ----------------------------------------------------------------------------------------------------------


def words(path: Path) -> set[str]:
    """The texts of an SVG."""
    return {(e.text or "").strip() for e in ElementTree.parse(path).iter() if e.tag.endswith("}text")}


def test_drawing_shows_ranks_slices_and_axes(tmp_path, capsys):
    path = tmp_path / "grid.svg"
    assert cli.main(["layout", *CUBE, "--shape", "32,784", "mp,(sp,dp)", "--draw", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"drawn to {path}\n")
    found = words(path)
    assert {f"rank {r}" for r in range(8)} <= found
    assert {"392:588", "16:32", "dim 0: split by mp", "dim 1: split by dp, sp", "dp = 0", "dp = 1"} <= found


def test_the_same_layout_gives_the_same_file(tmp_path):
    layout = Layout((2, 2), ("dp", "tp"))("dp", "tp")
    for name in ("a.svg", "b.svg"):
        draw.draw_layout(layout, (4, 6), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    "text, shape",
    [
        ("dp,sp,None,tp @ pp=2,dp=4,sp=2,tp=4", (8, 128, 512, 7)),  # more dims and axes than a picture has
        ("dp @ dp=8", (10,)),  # empty pieces
        (" @ dp=2,tp=2", None),  # a scalar
        ("dp,tp @ dp=32,tp=32", (64, 64)),  # too many ranks for text
        ("dp,None @ dp=2", (0, 4)),
    ],
)
def test_any_layout_can_be_drawn(text, shape, tmp_path):
    layout = Layout.parse(text) if shape is not None else Layout((2, 2), ("dp", "tp"))()
    draw.draw_layout(layout, shape or (), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_empty_pieces_are_named(tmp_path):
    draw.draw_layout(Layout((8,), ("dp",))("dp"), (10,), tmp_path / "x.svg")
    assert "nothing on ranks 5–7" in words(tmp_path / "x.svg")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["layout", *CUBE, "--shape", "4", "dp", "--draw", str(tmp_path / "x.png")]) == 2
    assert "pip install 'shardwright[draw]'" in capsys.readouterr().err


# -- run --------------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
import helper
import shardwright as sw
world = sw.init()
print(__name__, sys.argv[1:], world, os.environ.get("SHARDWRIGHT_DEVICES"), helper.VALUE)
if "--fail" in sys.argv:
    sys.exit(7)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "helper.py").write_text("VALUE = 'beside the script'\n")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    yield str(path)
    sys.modules.pop("helper", None)


def test_run_simulates(script, capsys):
    argv, path = list(sys.argv), list(sys.path)
    assert cli.main(["run", "--devices", "6", script, "--epochs", "2", "--devices", "3"]) == 0
    line = capsys.readouterr().out.strip()
    assert line == "__main__ ['--epochs', '2', '--devices', '3'] SimulatedWorld(6) 6 beside the script"
    assert (sys.argv, sys.path) == (argv, path)
    assert "SHARDWRIGHT_DEVICES" not in os.environ


def test_run_takes_the_number_from_the_environment(script, capsys, monkeypatch):
    assert cli.main(["run", script]) == 0
    assert "SimulatedWorld(8)" in capsys.readouterr().out
    monkeypatch.setenv("SHARDWRIGHT_DEVICES", "3")
    assert cli.main(["run", script]) == 0
    assert "SimulatedWorld(3)" in capsys.readouterr().out
    assert os.environ["SHARDWRIGHT_DEVICES"] == "3"
    monkeypatch.setenv("SHARDWRIGHT_DEVICES", "many")
    assert cli.main(["run", script]) == 2
    assert "SHARDWRIGHT_DEVICES='many' is not a number of devices" in capsys.readouterr().err


def test_the_exit_code_of_the_script_passes_through(script):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "--devices", "2", script, "--fail"])
    assert stopped.value.code == 7
    assert sw.init().size == 1  # the environment is as it was


@pytest.mark.parametrize("distributed", [[], ["--distributed"]])
def test_within_a_job_run_refuses(script, distributed, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["run", *distributed, script]) == 2
    assert "already rank 1 of a job of 4" in capsys.readouterr().err


def test_a_script_that_is_not_there(capsys):
    assert cli.main(["run", "no/such/script.py"]) == 2
    assert "there is no file no/such/script.py" in capsys.readouterr().err


def test_distributed_starts_processes(script, monkeypatch):
    started = []
    monkeypatch.delenv("SHARDWRIGHT_DEVICES", raising=False)
    monkeypatch.setattr("shardwright.launch.engine.run_job", lambda launch: started.append(launch) or 5)
    assert cli.main(["run", "--devices", "3", "--distributed", script, "--epochs", "2"]) == 5
    assert cli.main(["run", "--distributed", script]) == 5
    assert [launch.ranks for launch in started] == [3, 8]
    assert started[0].command == (sys.executable, "-u", script, "--epochs", "2")
    assert (started[0].address, started[0].port, started[0].nodes) == ("127.0.0.1", 0, 1)
    variables = worker_variables(started[0], "lo")
    assert str(ROOT) in variables["PYTHONPATH"].split(os.pathsep)
    assert "OMP_NUM_THREADS" in {**os.environ, **variables}


def test_the_module_is_a_command(tmp_path):
    """The whole way once, in a process of its own: distributed, two ranks."""
    (tmp_path / "hello.py").write_text(
        "import os\nimport shardwright as sw\nworld = sw.init()\n"
        "os.write(1, f'hello {world.rank} {world.size}\\n'.encode())\n"  # one write: the ranks share the pipe
    )
    command = [sys.executable, "-m", "shardwright", "run", "--devices", "2", "--distributed", "hello.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line) == ["hello 0 2", "hello 1 2"]
