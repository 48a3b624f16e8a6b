"""Machines: presets, files, and how fast the axes of a mesh are."""

from __future__ import annotations

import timeit

import pytest

from shardwright.cost.machine_files import load_machine, machines
from shardwright.errors import ShardwrightError
from shardwright.ir.machine import Machine
from shardwright.ir.mesh import Mesh
from shardwright.redistribute.links import machine_links


@pytest.fixture(autouse=True)
def _no_calibration(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SHARDWRIGHT_MACHINE", raising=False)


@pytest.mark.parametrize("name", machines())
def test_presets_are_sound_and_survive_a_round_trip(name, tmp_path):
    machine = load_machine(name)
    assert machine.name == name
    assert machine.description
    assert all(0 < share <= 1 for share in machine.efficiency.values())
    assert [level.bandwidth for level in machine.levels] == sorted((x.bandwidth for x in machine.levels), reverse=True)
    assert machine.levels[-1].size == 0
    path = tmp_path / "again.toml"
    path.write_text(machine.to_toml(), "utf-8")
    assert load_machine(path) == machine
    assert load_machine(str(path)) == machine
    assert load_machine(machine) is machine


def test_there_are_presets():
    assert {"cpu-gloo", "a100", "h100", "h200", "b200", "ascend-910b"} <= set(machines())


def levels_of(machine: Machine, *sizes: int) -> list[str]:
    mesh = Mesh(tuple(f"a{i}" for i in range(len(sizes))), sizes)
    names = {(level.latency, level.bandwidth): level.name for level in machine.levels}
    return [names[speed] for speed in machine.axis_speeds(mesh)]


def test_an_axis_has_the_links_that_its_groups_cross():
    h100 = load_machine("h100")
    assert levels_of(h100, 4, 8) == ["network", "node"]
    assert levels_of(h100, 8, 4) == ["network", "node"], "axis 0 straddles"
    assert levels_of(h100, 4, 2, 4) == ["network", "node", "node"]
    assert levels_of(h100, 2, 4) == ["node", "node"]
    assert levels_of(h100, 16) == ["network"]
    assert levels_of(h100, 4, 6) == ["network", "network"], "groups of 6 cross the borders of nodes of 8"
    assert levels_of(h100, 6) == ["node"], "one such group does not"


def test_links_are_named_by_axes():
    mesh = Mesh(("dp", "tp"), (4, 8))
    machine = load_machine("h100")
    links = machine_links(machine, mesh)
    assert links.speed(("tp",)) == machine.axis_speeds(mesh)[1]
    assert links.speed(("dp", "tp")) == machine.axis_speeds(mesh)[0]
    assert links.launch == machine.collective_launch


def test_speeds_do_not_depend_on_the_number_of_ranks():
    machine = load_machine("h100")

    def seconds(devices: int) -> float:
        mesh = Mesh(("dp", "tp"), (devices, 8))
        return min(timeit.repeat(lambda: machine.axis_speeds(mesh), number=20, repeat=5))

    assert seconds(8192) < 5 * seconds(8)  # 1,024 times as many


def test_dtypes_without_a_rate_count_as_their_nearest():
    a100 = load_machine("a100")
    assert a100.peak("float8_e4m3fn") == a100.peak("bfloat16"), "a100 has no float8"
    assert load_machine("h100").peak("float8_e4m3fn") == load_machine("h100").flops["float8"]
    assert a100.peak("int64") == a100.peak("float32")
    assert a100.peak("bfloat16") == 312e12
    assert a100.rate("matmul", "bfloat16") == 312e12 * a100.efficiency["matmul"]
    assert a100.rate("unheard of", "float32") == a100.flops["float32"] * a100.efficiency["default"]
    assert a100.bandwidth_of("pointwise") == a100.memory_bandwidth


GOOD = """
memory_bandwidth = 1e12
[flops]
float32 = 1e13
[[levels]]
size = 8
latency = 1e-6
bandwidth = 1e11
[[levels]]
latency = 1e-5
bandwidth = 1e10
"""


@pytest.mark.parametrize(
    "before, after, message",
    [
        ("memory_bandwidth = 1e12", "", "memory_bandwidth is None"),
        ("memory_bandwidth = 1e12", "memory_bandwidth = 'fast'", "memory_bandwidth is 'fast'"),
        ("memory_bandwidth = 1e12", "memory_bandwidth = 0", "memory_bandwidth is 0"),
        ("memory_bandwidth = 1e12", "memory_bandwith = 1e12", "memory_bandwith is not a key"),
        ("float32 = 1e13", "", r"\[flops\] is missing"),
        ("float32 = 1e13", "float32 = -1", "flops.float32 is -1"),
        ("latency = 1e-6", "", r"levels\[0\].latency is None"),
        ("size = 8", "size = 0", "list the innermost first"),
        ("bandwidth = 1e10", "bandwidth = 0", r"levels\[1\].bandwidth is 0"),
        ("bandwidth = 1e10", "bandwidth = = 0", "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_with_its_key(tmp_path, before, after, message):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD, "utf-8")
    assert load_machine(path).name == "mine"
    path.write_text(GOOD.replace(before, after, 1), "utf-8")
    with pytest.raises(ShardwrightError, match=message) as caught:
        load_machine(path)
    assert "mine.toml" in str(caught.value)


def test_names_that_nobody_knows_are_refused_with_those_known(tmp_path):
    with pytest.raises(ShardwrightError, match="h100"):
        load_machine("h1000")
    with pytest.raises(ShardwrightError, match="no machine file"):
        load_machine(tmp_path / "none.toml")


def test_a_variable_names_the_file_of_this_machine(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD, "utf-8")
    monkeypatch.setenv("SHARDWRIGHT_MACHINE", str(path))
    assert load_machine("cpu-gloo").name == "mine"
    assert load_machine("h100").name == "h100"
