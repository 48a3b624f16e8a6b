"""Checkpoints: what is loaded is what was saved, on any ranks and under any plan, and what is damaged changes nothing."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import shardwright as sw
import shardwright.checkpoint.save
from shardwright.checkpoint.reading import Reader
from shardwright.errors import CheckpointError

ALL = os.environ.get("SHARDWRIGHT_TEST_ALL") == "1"
CHAIN = (8, 6, 3, 1, 4) if ALL else (3, 1, 2)


class Net(nn.Module):
    """Tied weights, a buffer that training moves, odd sizes, a frozen parameter and one that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.norm, self.down = nn.Linear(6, 13, bias=False), nn.BatchNorm1d(13), nn.Linear(13, 6)
        self.frozen, self.unused = nn.Parameter(torch.randn(6), requires_grad=False), nn.Linear(2, 2)

    def forward(self, ids, labels):
        x = self.embed(ids) + self.frozen
        return F.cross_entropy(self.head(self.down(torch.tanh(self.norm(self.up(x))))), labels)


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net().double()


def batch(step: int) -> tuple[Any, Any]:
    draw = torch.Generator().manual_seed(step)
    return torch.randint(11, (12,), generator=draw), torch.randint(11, (12,), generator=draw)


def train(net: Any, optimizer: Any, first: int, last: int, scheduler: Any = None) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        net(*batch(step)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: sw.full_value(t).clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def the_same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values_of(one).values(), values_of(other).values(), strict=True))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "groups": lambda p: torch.optim.Adam([{"params": list(p)[:3]}, {"params": list(p)[3:], "lr": 0.5}], 0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, history_size=3, max_iter=3),
}
SCHEDULES = {
    "none": lambda o: None,
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
    "cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 20, cycle_momentum=False),
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_resumed_run_is_the_uninterrupted_one(kind, schedule, tmp_path):
    def begun(seed: int) -> Any:
        model = make(seed)
        optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
        return model, optimizer, SCHEDULES[schedule](optimizer)

    def go_on(model: Any, optimizer: Any, scheduler: Any, first: int, last: int) -> None:
        if kind != "LBFGS":
            return train(model, optimizer, first, last, scheduler)
        for step in range(first, last):

            def closure(step: int = step) -> Any:
                optimizer.zero_grad()
                loss = model(*batch(step))
                loss.backward()
                return loss

            optimizer.step(closure)
            if scheduler is not None:
                scheduler.step()

    model, optimizer, scheduler = begun(0)
    go_on(model, optimizer, scheduler, 0, 3)
    sw.save(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, step=3, extra={"epoch": [1, None], "at": (1, 2)})
    expected = torch.rand(3)
    go_on(model, optimizer, scheduler, 3, 6)
    other, again, other_scheduler = begun(1)
    found = sw.load(tmp_path, model=other, optimizer=again, scheduler=other_scheduler)
    assert found == (3, {"epoch": [1, None], "at": (1, 2)})
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    go_on(other, again, other_scheduler, 3, 6)
    assert the_same(model, other)


def planned(model: nn.Module, size: int, number: int) -> Any:
    """A net under another plan each time."""
    net = sw.AutoParallel(model)
    return net.hsdp(threshold=0, optimizer_level=f"level{1 + number % 3}") if number % 2 == 0 else net


def resumed(rank: int, folder: Path, number: int, size: int) -> None:
    """Goes on for two steps from what another number of ranks has saved."""
    world = sw.init(devices=size) if size == 1 else sw.init()
    model = make(number)
    net = planned(model, world.size, number)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    if number:
        if number % 3:  # before or after parameters are distributed
            net.compile(*batch(0))
        assert sw.load(folder, model=net, optimizer=optimizer).step == 2 * number
        saved = torch.load(folder / f"values-{number}.pt")
        for name, value in values_of(model).items():
            assert torch.equal(value, saved[name]), name
    train(net, optimizer, 2 * number, 2 * number + 2)
    sw.save(folder, model=net, optimizer=optimizer, step=2 * number + 2, asynchronous=number % 2 == 1).wait()
    values = values_of(model)
    if world.rank == 0:
        torch.save(values, folder / f"values-{number + 1}.pt")


def test_ranks_of_any_number_go_on_with_each_others_runs(tmp_path):
    model = make(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for number, size in enumerate(CHAIN):
        if size == 1:
            resumed(0, tmp_path, number, size)
        else:
            ended = jobs.run(tmp_path, size, resumed, tmp_path, number, size, seconds=200)
            assert [rank.code for rank in ended] == [0] * size, "\n".join(rank.text[-2000:] for rank in ended)
    train(model, optimizer, 0, 2 * len(CHAIN))
    found = torch.load(tmp_path / f"values-{len(CHAIN)}.pt")
    for name, value in values_of(model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_stages_of_pipelines_and_plain_models_read_each_other(tmp_path):
    sw.init(devices=4)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)]).double()
    net = sw.AutoParallel(sw.PipelineCell(model, 2)).pipeline(stages=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x = torch.randn(8, 4).double()
    net(x).square().mean().backward()
    optimizer.step()
    sw.save(tmp_path, model=net, optimizer=optimizer)
    plain = copy.deepcopy(model)
    again = torch.optim.Adam(plain.parameters(), 0.5)
    sw.load(tmp_path, model=plain, optimizer=again)
    for own, step, called in ((model, optimizer, net), (plain, again, plain)):
        step.zero_grad()
        called(x).square().mean().backward()
        step.step()
        assert own is not None
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-14)


# -- what is read, and what stays -----------------------------------------------------------------------------------


def reads_its_part(rank: int, folder: Path) -> None:
    sw.init()
    model = nn.Linear(1024, 1023, bias=False)
    net = sw.AutoParallel(model).hsdp(threshold=0)
    net.compile(torch.randn(4, 1024))
    counts: list[Reader] = []
    make_reader = Reader.__init__

    def counted(self: Reader, where: Path) -> None:
        make_reader(self, where)
        counts.append(self)

    Reader.__init__ = counted  # type: ignore[method-assign]
    sw.load(folder, model=net, random=False)
    own = model.weight.to_local().numel() * 4
    assert counts[0].bytes_read <= 1.02 * own + 2 * (1 << 20), (counts[0].bytes_read, own)  # to whole MiB at both ends


def test_a_rank_reads_what_it_holds(tmp_path):
    sw.save(tmp_path, model=nn.Linear(1024, 1023, bias=False))
    ended = jobs.run(tmp_path, 3, reads_its_part, tmp_path, seconds=100)
    assert [rank.code for rank in ended] == [0] * 3, "\n".join(rank.text[-2000:] for rank in ended)


def test_the_newest_and_the_best_stay(tmp_path):
    model = nn.Linear(2, 2)
    for step, metric in enumerate((0.1, 0.9, 0.3, 0.8, 0.2)):
        sw.save(tmp_path, model=model, step=step, metric=metric, keep_last=2, keep_best=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-3", "step-4"]
    assert sw.latest(tmp_path) == tmp_path / "step-4"
    assert sw.load(tmp_path, model=model, step=1).step == 1
    with pytest.raises(CheckpointError, match="has no step 0: it has the steps 1, 3, 4"):
        sw.load(tmp_path, model=model, step=0)


def test_values_are_those_of_the_call(tmp_path):
    model = nn.Linear(300, 300)
    before = copy.deepcopy(model)
    handle = sw.save(tmp_path, model=model, asynchronous=True)
    with torch.no_grad():
        model.weight.zero_()
    assert handle.wait() == tmp_path / "step-0"
    sw.load(tmp_path, model=model)
    assert the_same(model, before)


def test_an_error_beside_training_is_raised_by_wait_and_by_the_next_save(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    monkeypatch.setattr("shardwright.checkpoint.save.write_file", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    handle = sw.save(tmp_path, model=model, asynchronous=True)
    with pytest.raises(CheckpointError, match="was not saved: no space left"):
        handle.wait()
    sw.save(tmp_path, model=model, asynchronous=True)
    with pytest.raises(CheckpointError, match="was not saved: no space left"):
        sw.save(tmp_path, model=model)
    assert sw.latest(tmp_path) is None


def fails_on_rank_0(rank: int, folder: Path) -> None:
    sw.init()
    model = nn.Linear(2, 2)

    def fails(*_: Any) -> None:
        raise OSError("no space left")

    if rank == 0:
        shardwright.checkpoint.save.write_file = fails
    sw.save(folder, model=model, asynchronous=True)
    with pytest.raises(CheckpointError, match="was not saved: no space left"):
        sw.save(folder, model=model)
    (folder / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written to: 1 problem"):
        sw.save(folder / "file", model=model)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        sw.load(folder, model=model)


def test_what_fails_on_one_rank_is_told_to_all(tmp_path):
    ended = jobs.run(tmp_path, 2, fails_on_rank_0, tmp_path, seconds=60)
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.text[-2000:] for rank in ended)


# -- damage ---------------------------------------------------------------------------------------------------------

KILLED = """
import sys, torch, shardwright as sw
torch.manual_seed(0)
model = torch.nn.Linear(700, 700)
print("ready", flush=True)
for step in range(1, 1000):
    with torch.no_grad():
        model.weight.fill_(step)
    sw.save(sys.argv[1], model=model, step=step, keep_last=2, extra={"step": step}, asynchronous=step % 2 == 0)
    print(step, flush=True)
"""


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path):
    draw = random.Random(0)
    model = nn.Linear(700, 700)
    for trial in range(20 if ALL else 1):
        folder = tmp_path / str(trial)
        job = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        said = 0
        for _ in range(draw.randint(2, 6)):
            said = int(job.stdout.readline())
        time.sleep(draw.uniform(0, 0.05))
        job.send_signal(signal.SIGKILL)
        rest = job.communicate()[0].split()
        said = max([said, *map(int, rest)])
        found = sw.load(folder, model=model, random=False)
        assert found.step >= said - 1  # the last one that is known to be whole, or its asynchronous successor
        assert found.extra == {"step": found.step}
        assert bool((model.weight == found.step).all())
        sw.save(folder, model=model, step=found.step + 1)
        assert all(p.name.startswith("step-") for p in folder.iterdir())


def saved(folder: Path) -> Path:
    model = make(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 0, 1)
    return sw.save(folder, model=model, optimizer=optimizer, step=1, extra={"a": 1}).wait()


def refuses(folder: Path) -> str:
    """Loads what is damaged; nothing may change."""
    other = make(1)
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad])
    before, state = values_of(other), torch.get_rng_state()
    try:
        sw.load(folder, model=other, optimizer=optimizer)
    except CheckpointError as error:
        assert all(torch.equal(a, b) for a, b in zip(before.values(), values_of(other).values(), strict=True))
        assert not optimizer.state
        assert torch.equal(state, torch.get_rng_state())
        return str(error)
    return ""


def test_flipped_and_missing_bytes_are_found_wherever_they_are(tmp_path):
    file = saved(tmp_path) / "rank-0.safetensors"
    good, draw = file.read_bytes(), random.Random(0)
    places = [0, 7, 8, 20, len(good) - 1, *(draw.randrange(len(good)) for _ in range(200 if ALL else 25))]
    for at in places:
        bad = bytearray(good)
        bad[at] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        text = refuses(tmp_path)
        if not text:  # of a text that nobody reads, such as spaces behind a header
            assert good[at : at + 1] == b" "
        file.write_bytes(good[:at])
        assert "rank-0.safetensors" in refuses(tmp_path)
    file.unlink()
    assert "is missing; restore it, or load an earlier step" in refuses(tmp_path)
    file.symlink_to("/etc/passwd")
    assert "is missing" in refuses(tmp_path)


def changed(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Other values for every part of a JSON value."""
    if at:
        yield from ((at, other) for other in (None, -1, 1 << 70, "../x", [], {}, [-1], {"$tensor": "nothing"}))
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from changed(inner, (*at, key))


def test_a_forged_index_is_refused_or_harmless(tmp_path):
    index = saved(tmp_path) / "index.json"
    good = json.loads(index.read_text())
    cases = list(changed(good))
    draw = random.Random(0)
    refused = 0
    for at, other in draw.sample(cases, 1500 if ALL else 120):
        forged = copy.deepcopy(good)
        place = forged
        for key in at[:-1]:
            place = place[key]
        place[at[-1]] = other
        index.write_text(json.dumps(forged))
        refused += bool(refuses(tmp_path))  # any other error than our own fails the test
    assert refused > 0
    for text in ("", "{", "[]", "null", '{"format": "shardwright checkpoint"}', json.dumps({**good, "version": 9})):
        index.write_text(text)
        assert refuses(tmp_path)


def test_all_that_differs_is_listed(tmp_path):
    sw.save(tmp_path, model=nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)))
    with pytest.raises(CheckpointError, match="(?s)3 problems, nothing was changed.*1.bias.*1.weight.*0.weight is"):
        sw.load(tmp_path, model=nn.Sequential(nn.Linear(3, 3), nn.Identity()))
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    with pytest.raises(CheckpointError, match="has no optimizer; leave it out"):
        sw.load(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0))
    with pytest.raises(CheckpointError, match="has no checkpoint: it has none; save one with sw.save"):
        sw.load(tmp_path / "nothing", model=nn.Linear(1, 1))


def differs(rank: int, folder: Path) -> None:
    """What ranks give differently is told to all of them at once, and the next save is fine."""
    sw.init(timeout=20)
    model = make(0)
    for own in (
        {"step": rank},
        {"keep_last": 1 + rank},
        {"asynchronous": rank == 1},
        {"step": 1, "keep_best": 1, "metric": rank},
    ):
        with pytest.raises(CheckpointError, match="give the same on every rank"):
            sw.save(folder, model=model, **own)
    with pytest.raises(CheckpointError, match="rank 1 calls save"):
        sw.save(folder / str(rank), model=model)
    with pytest.raises(CheckpointError, match=r"rank 1 calls save\(step=-1\)"):
        sw.save(folder, model=model, step=-rank)
    with pytest.raises(CheckpointError, match=r"rank 1 calls save\(optimizer='...'\)"):
        sw.save(folder, model=model, optimizer=torch.optim.SGD(model.parameters()) if rank else None)
    sw.save(folder, model=model, step=7)
    with pytest.raises(CheckpointError, match=r"rank 1 calls load\(step=8\)"):
        sw.load(folder, model=model, step=7 + rank)


def test_arguments_that_differ_between_ranks_are_told(tmp_path):
    ended = jobs.run(tmp_path, 2, differs, tmp_path / "run")
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.text[-2000:] for rank in ended)
    assert sw.latest(tmp_path / "run").name == "step-7"


def test_an_optimizer_of_another_kind_is_told(tmp_path):
    model = nn.Linear(2, 2)
    sw.save(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(CheckpointError, match="optimizer is of another kind"):
        sw.load(tmp_path, model=model, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(CheckpointError, match=r"scheduler is a int, which has no load_state_dict"):
        sw.load(tmp_path, model=model, scheduler=3)
    for wrong in (
        {"keep_last": 1.5},
        {"keep_best": 0},
        {"metric": "good"},
        {"metric": float("nan")},
        {"keep_best": 1},
    ):
        with pytest.raises(TypeError, match="give a number"):
            sw.save(tmp_path, model=model, **wrong)
    with pytest.raises(TypeError, match="give a dict"):
        sw.save(tmp_path, model=model, extra=[1])
    with pytest.raises(CheckpointError, match="which has no state_dict"):
        sw.save(tmp_path, model=model, scaler=object())


@pytest.mark.parametrize("extra", [{1: 2, "1": 3}, {-1: {2: 3}}, {"$tensor": "x"}, {"$tuple": [1]}, {"a": (1, [2])}])
def test_extra_comes_back_as_it_was(extra, tmp_path):
    sw.save(tmp_path, extra=extra)
    assert sw.load(tmp_path).extra == extra


def test_nothing_is_lost_of_models_that_share_a_name_or_a_tensor(tmp_path):
    model = nn.Linear(2, 2)
    for names in ({3: model, "3": model}, {"a": model, "a.0": model}, {"": model}):
        with pytest.raises(TypeError, match="a text without dots"):
            sw.save(tmp_path, model=names)
    loose, tied = (nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(2))
    tied["b"].weight = tied["a"].weight
    sw.save(tmp_path, model=loose)
    with pytest.raises(CheckpointError, match="are one tensor in the model, and differ"):
        sw.load(tmp_path, model=tied)
    (tmp_path / "hf").mkdir()
    save_file(loose.state_dict(), tmp_path / "hf/model.safetensors")
    with pytest.raises(CheckpointError, match="are one tensor in the model, and differ"):
        sw.load(tmp_path / "hf", model=tied)
    loose["b"].weight.data.copy_(loose["a"].weight.data)
    sw.save(tmp_path, model=loose, step=1)
    sw.load(tmp_path, model=tied)
    assert torch.equal(tied["a"].weight, loose["a"].weight)


def test_what_is_no_data_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="(?s)2 problems.*extra.a is a object.*extra.c.0 is a set"):
        sw.save(tmp_path / "x", model=nn.Linear(2, 2), extra={"a": object(), "b": 1, "c": [{1}]})
    with pytest.raises(TypeError, match="model is a int; give Modules"):
        sw.save(tmp_path / "x", model=3)
    assert not (tmp_path / "x").exists()
