"""Distributed parameters behave as the whole ones: every method of a tensor, writes, copies from before, the model itself."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import warnings

import jobs
import pytest
import torch
from parameter_models import Momentum, Net
from parameter_writes import SHORT, WRITES
from tensor_methods import COLUMNS, EACH, ROWS, copied, differs, method_cases
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardwright as sw
from shardwright.errors import WorldError

X = torch.linspace(-1, 1, 6 * COLUMNS, dtype=torch.float64).view(6, COLUMNS)


MODES = {
    "hsdp": lambda m: sw.AutoParallel(m).hsdp(threshold=0),
    "rows": lambda m: sw.AutoParallel(m).shard({"a.weight": (2, 1)}),
    "columns": lambda m: sw.AutoParallel(m).shard({"a.weight": (1, 2)}),
    "data_parallel": lambda m: sw.AutoParallel(m, "data_parallel"),
}


def made(mode):
    """A model, its net and the single device's model, all after one backward pass."""
    model, plain = Net(), Net()
    net = MODES[mode](model)
    for run in (net, plain):
        run(X).square().mean().backward()
    return model, net, plain


def agree(model, plain):
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(sw.full_value(b), a.detach(), msg=lambda m, n=name: f"{n}: {m}")
        if a.grad is not None:
            torch.testing.assert_close(sw.full_value(b.grad), a.grad, msg=lambda m, n=name: f"gradient of {n}: {m}")


# -- every method of a tensor ---------------------------------------------------------------------------------------------


def methods(mode, case, rank, start, cases):
    model, net, _ = made(mode)
    parameter, wrong, right = model.a.weight, [], set()
    for name, given, expected, tensor, handed in cases:
        parameter.data = start.clone()
        mine = copied(given)
        torch.manual_seed(5 + rank)  # rank 0's numbers are drawn
        try:
            with torch.no_grad():
                got = getattr(parameter.detach() if name in ("apply_", "map_") else parameter, name)(*mine)
        except WorldError as error:
            if "out of place" not in str(error) or differs(parameter, start):
                wrong.append(f"{name}: {error}")
            continue
        said = "" if "empty" in name else differs(got, expected)
        said = said or differs(parameter, tensor) or differs(mine, handed)
        if said:
            wrong.append(f"{name}{tuple(getattr(a, 'shape', a) for a in given)}: {said}")
        else:
            right.add(name)
    case(f"{mode} methods", f"{len(right)} right" if not wrong else f"WRONG {wrong}")


# -- writes and views ------------------------------------------------------------------------------------------------------


def writes(mode, case):
    model, net, plain = made(mode)
    torch.manual_seed(3)
    other = torch.rand(ROWS, COLUMNS, dtype=torch.float64)
    for name, write in WRITES.items():
        for m in (plain, model):
            with torch.no_grad():
                write(m.a.weight, other.clone())
        agree(model, plain)
        case(f"{mode} write {name}", "right")
    torch.testing.assert_close(net(X), plain(X))
    for refused in (lambda p: p.t_(), lambda p: p.data.unsqueeze_(0)):
        if mode not in ("data_parallel", "stages"):
            with torch.no_grad(), pytest.raises(WorldError, match="out of place"):
                refused(model.a.weight)


def beside(mode, case):
    """Losses of parameters beside the net's, pruning, optimizers that read tensors as a whole."""
    model, net, plain = made(mode)
    for run, m in ((net, model), (plain, plain)):
        m.zero_grad()
        factor = torch.full((COLUMNS,), 0.5, dtype=torch.float64, requires_grad=True)
        extra = sum(p.pow(2).sum() + p.norm() for p in m.parameters()) + (m.a.weight @ factor).square().mean()
        loss = run(X).square().mean() + 0.01 * extra
        loss.backward()
        case_of = (float(loss.detach()), factor.grad)
        if run is net:
            mine = case_of
    assert type(mine[1]) is torch.Tensor
    assert math.isclose(mine[0], case_of[0])
    torch.testing.assert_close(mine[1], case_of[1])
    agree(model, plain)
    for run, m in ((net, model), (plain, plain)):
        optimizer = torch.optim.LBFGS(m.parameters(), lr=0.1, line_search_fn="strong_wolfe")

        def closure(run=run, optimizer=optimizer):
            optimizer.zero_grad()
            value = run(X).square().mean()
            value.backward()
            return value

        optimizer.step(closure)
    agree(model, plain)
    if mode in ("hsdp", "data_parallel"):  # the others have a strategy for the weight's old name
        for m in (model, plain):
            torch.manual_seed(3)
            prune.random_unstructured(m.a, "weight", 0.3)
            prune.ln_structured(m.b, "weight", 0.4, n=2, dim=0)
        torch.testing.assert_close(net(X), plain(X))
    case(f"{mode} beside", "right")


# -- copies from before, replaced and frozen parameters ----------------------------------------------------------------------


def copies_from_before(mode, case):
    for multi in (None, get_ema_multi_avg_fn(0.9)):
        model, plain = Net(), Net()
        averages = [AveragedModel(m, multi_avg_fn=multi) for m in (model, plain)]
        tables = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, plain)]
        net = MODES[mode](model)
        optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, plain)]
        for i in range(3):
            for run, m, optimizer, average, table in zip(
                (net, plain), (model, plain), optimizers, averages, tables, strict=True
            ):
                optimizer.zero_grad()
                run(X).square().mean().backward()
                optimizer.step()
                average.update_parameters(m)
                for name, value in m.state_dict().items():
                    if i % 2:
                        table[name].mul_(0.9).add_(value, alpha=0.1)
                    else:
                        table[name].lerp_(value, 0.1)
        agree(*averages)
        for name, value in tables[1].items():
            torch.testing.assert_close(tables[0][name], value)
        torch.testing.assert_close(averages[0](X), averages[1](X))  # it has whole parameters of its own
    case(f"{mode} copies from before", "right")


def frozen(case):
    for name, strategy in (("rows", (2, 1)), ("columns", (1, 2))):
        model, plain = Momentum(), Momentum()
        net = sw.AutoParallel(model).shard({"query.weight": strategy, "key.weight": strategy})
        for run, m in ((net, model), (plain, plain)):
            optimizer = torch.optim.SGD(m.query.parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                run(X).backward()
                optimizer.step()
        agree(model, plain)
        case(f"frozen {name}", "right")


# -- operators on tensors that lie alike -------------------------------------------------------------------------------------


def short_way(mode, case):
    """Operators on tensors that lie alike, and on some that only seem to."""
    model, net, plain = made(mode)
    torch.manual_seed(3)
    other = torch.rand(ROWS, COLUMNS, dtype=torch.float64)
    before = plain.a.weight.detach().clone(), plain.a.weight.grad.clone()
    for name, run in SHORT.items():
        for m in (plain, model):
            with torch.no_grad():
                for tensor, value in zip((m.a.weight, m.a.weight.grad), before, strict=True):
                    tensor.copy_(value)
                run(m.a.weight, m.a.weight.grad, other.clone())
        agree(model, plain)
        case(f"{mode} short way {name}", "right")


# -- the model itself -----------------------------------------------------------------------------------------------------


def whole(mode, case, rank, folder):
    model, net, plain = made(mode)
    path = os.path.join(folder, f"{mode}.pt")
    for call in (lambda: model(X), lambda: model.a(X), lambda: model.best(X)):
        with pytest.raises(WorldError, match=r"beside its AutoParallel .*net.whole\(\)"):
            call()
    torch.manual_seed(1 + rank)
    mine = net.best(X)  # rank 0's numbers
    torch.manual_seed(1)
    assert mine == plain.best(X)
    with net.whole() as same:
        assert same is model
        assert type(model.a.weight) is nn.Parameter
        torch.testing.assert_close(model(X), plain(X))
        torch.testing.assert_close(model.a.weight.grad, plain.a.weight.grad)
        if rank == 0:  # it may be alone
            torch.save(model.state_dict(), path)
            assert model.a.weight.norm().item() == pytest.approx(plain.a.weight.norm().item())
        with pytest.raises(WorldError, match="call the model itself"):
            net(X)
        with net.whole():
            model(X).square().mean().backward()
        made_within = torch.optim.SGD(model.parameters(), 0.1)
        with torch.no_grad():
            model.b.weight.mul_(2)
    plain(X).square().mean().backward()
    with torch.no_grad():
        plain.b.weight.mul_(2)
    agree(model, plain)
    if rank == 0:
        other = Net()
        other.load_state_dict(torch.load(path))
    for run, optimizer in ((net, made_within), (plain, torch.optim.SGD(plain.parameters(), 0.1))):
        run(X).square().mean().backward()
        optimizer.step()
    agree(model, plain)
    with contextlib.suppress(ZeroDivisionError), net.whole():
        model.a.bias.data.zero_()
        raise ZeroDivisionError
    assert type(model.a.bias) is not nn.Parameter
    assert not sw.full_value(model.a.bias).any()
    with pytest.raises(WorldError, match=r"is float32 .* and was float64"), net.whole():
        model.float()
    case(f"{mode} whole", "right")


def before_the_first_call(mode, case):
    """The block lends rank 0's values, as the first call does, before anything is distributed."""
    torch.manual_seed(0)
    model, plain = Net(), Net()
    with torch.no_grad():
        for m in (model, plain):
            m.a.bias.fill_(0.5)
        model.b.bias.fill_(torch.distributed.get_rank())
        plain.b.bias.fill_(0)
    net = MODES[mode](model)
    with net.whole():
        torch.testing.assert_close(model(X), plain(X))
        model(X).square().mean().backward()
    plain(X).square().mean().backward()
    for run in (net, plain):
        run(X).square().mean().backward()
    torch.testing.assert_close(net(X), plain(X))
    agree(model, plain)
    case(f"{mode} whole before the first call", "right")


def handed_to_net(mode, case):
    """A net takes no distributed tensors, wherever they stand among its inputs."""
    model, net, plain = made(mode)
    weight = model.a.weight
    for call in (
        lambda: net(weight),
        lambda: net(x=weight.detach() * 2),
        lambda: net([weight.grad]),
        lambda: net.compile(weight),
    ):
        with pytest.raises(WorldError, match=r"give sw.full_value\(tensor\)"):
            call()
    torch.testing.assert_close(net(sw.full_value(weight)), plain(plain.a.weight.detach()))
    case(f"{mode} handed to the net", "right")


def generation(case, rank):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=41, n_positions=32, use_cache=False, attn_pdrop=0, resid_pdrop=0,
        embd_pdrop=0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(transformers.GPT2LMHeadModel(config).double())
    net, plain, ids = sw.AutoParallel(models[0]).hsdp(threshold=0), models[1], torch.arange(1, 25).view(2, 12)
    for run in (net, plain):
        run(input_ids=ids, labels=ids).loss.backward()
        run.eval()
    for settings in ({"do_sample": False, "use_cache": True}, {"do_sample": True}):
        torch.manual_seed(1 + rank)
        mine = net.generate(ids[:, :4], attention_mask=torch.ones(2, 4), max_new_tokens=5, **settings)
        torch.manual_seed(1)
        assert torch.equal(mine, plain.generate(ids[:, :4], attention_mask=torch.ones(2, 4), max_new_tokens=5, **settings))
    case("generation", "right")


def job(rank, folder):
    warnings.simplefilter("ignore")
    logging.disable()
    sw.init()

    def case(name, said):
        print(f"case {name}: {said}")

    start, cases = method_cases()
    for i, mode in enumerate(MODES):
        # of each method, one mode's; no sample is taken of the modes in which nothing is cut alike
        mine = cases if EACH > 1 else cases[i - 1 :: 2] if mode in ("rows", "columns") else []
        methods(mode, case, rank, start, mine)
        writes(mode, case)
        short_way(mode, case)
        if EACH > 1 or mode in ("hsdp", "columns"):
            beside(mode, case)
            copies_from_before(mode, case)
        whole(mode, case, rank, folder)
        before_the_first_call(mode, case)
        handed_to_net(mode, case)
    frozen(case)
    generation(case, rank)
    print("case the end: right")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return jobs.cases(tmp_path_factory.mktemp("job"), job)


@pytest.mark.whole
def test_parameters_are_the_single_devices_in_all_that_users_do(cases):
    assert cases["the end"] == "right"
    assert {name: said for name, said in cases.items() if not said.endswith("right")} == {}
    assert sum(int(cases[f"{mode} methods"].split()[0]) for mode in ("rows", "columns")) >= 400


def alone(rank, what):
    """Rank 0 reads a number that the others do not read."""
    sw.init(timeout=30)
    model = Net()
    net = sw.AutoParallel(model).hsdp(threshold=0)
    net(X).mean().backward()
    if rank == 0:
        if what == "whole":
            with net.whole():
                pass
        print(model.a.weight.norm().item())
    for _ in range(3 if what == "calls" else 0):
        net(X).mean().backward()
    sys.exit(0)


@pytest.mark.whole
@pytest.mark.parametrize("what", ["calls", "whole"])
def test_a_reading_on_one_rank_ends_the_job(tmp_path, what):
    ended = jobs.run(tmp_path, 2, alone, what, seconds=60)
    assert ended[0].code
    assert (ended[1].code == 0) == (what == "whole")  # a script that had ended
    wait = "rank 0 is in a number" if what == "calls" else "net.whole()"
    assert wait in ended[0].text, ended
    assert max(e.seconds for e in ended) < 28
