"""What is fastest: choosing, keeping and measuring it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from shardwright.calibrate import steps as whole_steps
from shardwright.calibrate.collectives import Measured, Measurements, links_of, measure, tables_of
from shardwright.calibrate.fit import TERMS
from shardwright.calibrate.operators import Sample
from shardwright.cli import main as cli
from shardwright.cost.algorithms import ALGORITHMS, DEFAULT, Calibration, load, location
from shardwright.cost.machine_files import calibrated, load_machine
from shardwright.errors import WorldError
from shardwright.redistribute.links import Links


@pytest.fixture(autouse=True)
def _nobodys_file(monkeypatch, tmp_path):
    monkeypatch.delenv("SHARDWRIGHT_CALIBRATION", raising=False)
    monkeypatch.delenv("SHARDWRIGHT_MACHINE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def some(**changes):
    tables = {"exchange": {2: ((100.0, ("backend", "direct")), (math.inf, ("direct",)))}}
    values = {"tables": tables, "links": Links(1e-5, 2e-5, 1e9), "cpus": os.cpu_count() or 1, **changes}
    return Calibration(**values)


def test_choosing():
    own = some()
    assert own.choose("exchange", 2, 100, ["direct", "backend"]) == "backend"
    assert own.choose("exchange", 2, 101, ["direct", "backend"]) == "direct"
    assert own.choose("exchange", 2, 101, ["backend"]) == "backend"
    assert own.choose("exchange", 999, 100, ["direct", "backend"]) == "backend"
    assert own.choose("all_reduce", 2, 100, ["hub", "pieces"]) == ALGORITHMS["all_reduce"][0]


def test_the_nearest_number_of_ranks_counts():
    tables = {"exchange": {2: ((math.inf, ("backend",)),), 8: ((math.inf, ("direct",)),)}}
    own = some(tables=tables)
    chosen = [own.choose("exchange", ranks, 1, ["direct", "backend"]) for ranks in (2, 3, 4, 5, 8, 100)]
    assert chosen == ["backend", "backend", "backend", "direct", "direct", "direct"]


def test_the_defaults_know_every_operation():
    for operation, names in ALGORITHMS.items():
        for ranks in (2, 3, 4, 8, 64):
            for nbytes in (1, 1 << 16, 1 << 30):
                assert DEFAULT.choose(operation, ranks, nbytes, names) in names
    assert Calibration.from_dict(json.loads(json.dumps(DEFAULT.to_dict()))) == DEFAULT


def test_what_is_kept_is_found(monkeypatch, tmp_path):
    assert load() is DEFAULT
    assert location() == tmp_path / "cache" / "shardwright" / "calibration.json"
    some().save(location())
    assert load() == some()
    assert [p.name for p in location().parent.iterdir()] == ["calibration.json"]
    monkeypatch.setenv("SHARDWRIGHT_CALIBRATION", str(tmp_path / "own.json"))
    with pytest.warns(RuntimeWarning, match=r"own\.json is not used.*no such file.*shardwright calibrate"):
        assert load() is DEFAULT
    some(origin="mine").save(tmp_path / "own.json")
    assert load().origin == "mine"
    monkeypatch.delenv("SHARDWRIGHT_CALIBRATION")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert location() == Path.home() / ".cache" / "shardwright" / "calibration.json"


def with_table(table):
    return {**some().to_dict(), "tables": {"exchange": {"2": table}}}


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"{", "not JSON"),
        (b"\xff", "cannot be read"),
        ([], "version None, this shardwright reads version 1"),
        ({**some().to_dict(), "version": 7}, "version 7, this shardwright reads version 1"),
        ({**some().to_dict(), "cpus": 4096}, "a machine with 4096 cores, this one has"),
        ({**some().to_dict(), "links": {"launch": 1.0}}, "KeyError: 'latency'"),
        ({**some().to_dict(), "links": {"launch": 1.0, "latency": "fast", "bandwidth": 1}}, "'fast' is not a number"),
        (with_table([[None, ["carrier pigeon"]]]), "no algorithm 'carrier pigeon'"),
        (with_table([[100, ["direct"]]]), "do not ascend"),
        (with_table([[100, ["direct"]], [10, ["direct"]], [None, ["direct"]]]), "do not ascend"),
        (with_table(3), "not a calibration"),
    ],
)
def test_a_file_that_cannot_be_used_is_warned_of(content, problem):
    location().parent.mkdir(parents=True)
    location().write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.warns(RuntimeWarning, match="is not used, the defaults are: .*shardwright calibrate") as warned:
        assert load() is DEFAULT
    assert problem in str(warned[0].message)
    assert str(location()) in str(warned[0].message)


def test_sizes_next_to_one_have_a_say():
    """A single slow time does not make a hole in a table."""
    slow = {1 << 10: 2.0, 1 << 12: 2.0, 1 << 14: 0.8, 1 << 16: 2.0}
    found = [Measured("exchange", 2, n, {"direct": 1.0, "backend": t}) for n, t in slow.items()]
    assert tables_of(found) == {"exchange": {2: ((math.inf, ("direct", "backend")),)}}


def test_links_from_times():
    def time(ranks):
        return 1e-4 + 2 * (ranks - 1) * 1e-5

    found = [Measured("all_reduce", n, 1024, {"hub": time(n), "pieces": 1.0}) for n in (2, 3, 4)]
    found.append(Measured("exchange", 4, 10**6, {"direct": 1e-3 + 3e-5}))
    links = links_of(found)
    assert links.launch == pytest.approx(1e-4)
    assert links.latency == pytest.approx(1e-5)
    assert links.bandwidth == pytest.approx(1e9)


@pytest.mark.long
def test_measuring_by_the_command(capsys):
    preset = load_machine("cpu-gloo")
    assert cli.main(["calibrate", "--ranks", "2", "--seconds", "0.5", "--no-steps"]) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith(f"kept in {location()} and {calibrated()}")
    for name in (*ALGORITHMS, "matmul float32", "pointwise", "optimizer", "a call takes", "an operation takes"):
        assert f"\n{name}" in said
    found = load()
    assert set(found.tables) == set(ALGORITHMS)
    assert all(set(measured) == {2} for measured in found.tables.values())
    assert 1e5 < found.links.bandwidth < 1e12
    assert 1e-7 < found.links.latency < 1
    machine = load_machine("cpu-gloo")
    assert machine.description == "measured by shardwright calibrate with 2 ranks"
    assert (machine.levels[0].latency, machine.levels[0].bandwidth) == (found.links.latency, found.links.bandwidth)
    assert 1e8 < machine.rate("matmul", "float32") < 1e14
    assert {"pointwise", "copy", "norm", "optimizer"} <= set(machine.rates)
    assert machine.flops["float64"] == preset.flops["float64"], "what is not measured stays"


@pytest.fixture
def measured(monkeypatch):
    """Nothing is measured; times are made up."""
    samples = [Sample("launch", "float32", 32.0, 0.0, 32e-5), Sample("matmul", "float32", 1e9, 1e6, 0.01)]
    monkeypatch.setattr("shardwright.calibrate.collectives.measure", lambda *_: Measurements(some(), samples))
    return samples


def test_another_file_leaves_those_that_jobs_read_alone(measured, capsys, tmp_path):
    path = tmp_path / "deep" / "own.json"
    assert cli.main(["calibrate", "--no-steps", "--output", str(path)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"kept in {path} and {path.with_suffix('.toml')}")
    assert load(path) == some()
    assert load_machine(path.with_suffix(".toml")).peak("float32") == pytest.approx(1e11, rel=0.01)
    assert not location().exists()
    assert not calibrated().exists()


def test_calibrating_forgets_the_machine_found_before_even_a_broken_one(measured):
    calibrated().parent.mkdir(parents=True)
    calibrated().write_text("broken", "utf-8")
    assert cli.main(["calibrate", "--no-steps"]) == 0
    assert load_machine("cpu-gloo").operator_launch == 1e-5


def test_a_machine_of_ones_own_is_left_alone_and_told_of(measured, monkeypatch, capsys, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text(load_machine("cpu-gloo").to_toml(), "utf-8")
    before = own.read_bytes()
    monkeypatch.setenv("SHARDWRIGHT_MACHINE", str(own))
    assert cli.main(["calibrate", "--no-steps"]) == 0
    assert f"plans are priced on {own} all the same" in capsys.readouterr().out
    assert own.read_bytes() == before


def test_training_steps_move_the_machine(measured, monkeypatch, capsys):
    """Collectives take three times as long in steps as alone."""
    seen = []

    def steps(ranks, seconds, machine, progress):
        seen.append((ranks, seconds, machine.collective_launch, os.environ["SHARDWRIGHT_CALIBRATION"]))
        progress(1.0)
        found = []
        for count in (10, 20, 40):
            terms = {**dict.fromkeys(TERMS, 0.0), "collective_launch": count * machine.collective_launch}
            price = sum(terms.values())
            found.append(whole_steps.MeasuredStep("model", f"plan {count}", 3 * price, price, terms))
        return found

    monkeypatch.setattr("shardwright.calibrate.steps.measure_steps", steps)
    assert cli.main(["calibrate", "--ranks", "2", "--seconds", "5"]) == 0
    assert seen == [(2, 5.0, 1e-5, str(location()))], "some() has a launch of 10 µs"
    assert "SHARDWRIGHT_CALIBRATION" not in os.environ
    assert load_machine("cpu-gloo").collective_launch == pytest.approx(3e-5, rel=0.05)
    said = capsys.readouterr().out
    assert "in training steps a collective takes 30 µs" in said
    assert "prices of 3 steps were 67% off in the median, and now are 0%" in said


def test_help_says_what_is_measured_and_for_how_long(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["calibrate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("half as long again", "cpu-gloo", "--no-steps", "default: 20", "SHARDWRIGHT_MACHINE", "examples:"):
        assert part in said


def test_mistakes_of_the_command(capsys, tmp_path):
    assert cli.main(["calibrate", "--ranks", "1"]) == 2
    assert "calibrate with 2 or more" in capsys.readouterr().err
    for wrong in ("0", "-1", "nan", "soon"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["calibrate", "--seconds", wrong])
        assert f"{wrong!r} is not a number of seconds" in capsys.readouterr().err
    assert cli.main(["calibrate", "--output", str(tmp_path / "own.toml")]) == 2
    assert "own.json" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["calibrate", "--output", str(tmp_path / "file" / "own.json")]) == 2
    assert "own.json cannot be written" in capsys.readouterr().err


@pytest.mark.long
def test_what_a_process_says_when_it_fails_is_told(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with pytest.raises(WorldError, match=r"(?s)calibrating with 2 ranks failed.*no-such-interface"):
        measure(2, 1.0)
