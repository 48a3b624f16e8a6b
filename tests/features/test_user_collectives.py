"""What users are told of collectives that cannot be done, before anything waits; and what parameters that ranks own do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import shardwright as sw
from harness import main, on_ranks, simulated
from shardwright.errors import ArgumentTypeError, CaptureError, LayoutError, ShardwrightError, StrategyError, WorldError
from shardwright.world import current
from shardwright.world.current import current_world
from shardwright.world.simulated.world import SimulatedWorld

cc = sw.collectives


@pytest.fixture(autouse=True)
def _four_ranks(monkeypatch):
    monkeypatch.setattr(current, "_current", [])
    sw.init(devices=4)


class Calls(nn.Module):
    """A model that does something to its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.function(x * self.scale)


def refused(function, match, error=ShardwrightError, x=None, mesh=None, **options):
    with cc.over(mesh or sw.Mesh(("dp", "mp"), (2, 2)), **options):
        net = sw.AutoParallel(Calls(function), "hybrid_parallel")
        with pytest.raises(error, match=match):
            net(torch.randn(8, 6).double() if x is None else x)
        assert type(next(net.parameters())) is nn.Parameter


def test_arguments():
    refused(lambda x: cc.all_reduce(x, "tp"), r"all_reduce at test_user_coll.*\d+: the mesh dp=2,mp=2 has no axis 'tp'")
    refused(lambda x: cc.all_reduce(x, "mp", op="prod"), "op='prod' is unknown")
    refused(lambda x: cc.all_reduce([x], "mp"), "the first argument is a list", TypeError)
    refused(lambda x: cc.all_reduce(x.long(), "mp", op="mean"), "which has no fractions")
    refused(lambda x: cc.all_reduce(x, "mp", op="max"), "op='max' has no gradient.*hand in x.detach()")
    refused(lambda x: cc.all_gather(x, "mp", dim=2), r"dim=2 of a tensor \[4, 6\]")
    refused(lambda x: cc.reduce_scatter(x[:3], "mp"), r"dim 0 of \[3, 6\] does not divide by the 2 ranks of 'mp'; pad it by 1")
    refused(lambda x: cc.all_to_all(x[:3], "mp", 0, 1), "does not divide")
    refused(lambda x: cc.broadcast(x, "mp", source=2), "source=2; give the index of one of the 2 ranks")
    refused(lambda x: cc.permute(x, "mp", pairs=[(0, 1), (1, 1)]), "names a rank twice")
    refused(lambda x: cc.permute(x, "mp", pairs=[(0, 2)]), r"pairs holds \(0, 2\)")
    refused(lambda x: cc.permute(x, "mp", shift="next"), "give a number of ranks", TypeError)


def test_results_are_one_value():
    refused(lambda x: x * (cc.rank("mp") + 1), r"output 0, \[4, 6\] float64, may differ along 'dp', 'mp'", StrategyError)
    refused(lambda x: (x > 0).sum(), r"output 0, \[\] int64, may differ along 'dp'", StrategyError)
    refused(lambda x: (x.sum(), cc.rank("dp")), "output 1 is 0 on rank 0 and 1 on rank 2", StrategyError)


def test_ranks_run_one_program():
    refused(lambda x: x.sin() if cc.rank("dp") else x.cos(), "the ranks run different programs", CaptureError)
    refused(lambda x: cc.all_reduce(x.sum(0), "mp" if cc.rank("dp") else "dp"), "call different things", StrategyError)
    refused(lambda x: cc.all_reduce(x[: cc.rank("mp") + 1].sum(1), "mp").sum(), r"rank 0: all_reduce\(mp\) of \[1\]; rank 1")
    refused(lambda x: x.sum() + torch.tensor(cc.rank("dp")), r"torch.full\(\(\), rank\(\)\)", CaptureError)


def test_inputs_are_shared_out():
    refused(lambda x: x.sum(), "leaves one of the 4 ranks without a row", x=torch.randn(2, 3), data=("dp", "mp"))
    net = sw.AutoParallel(Calls(torch.sum), "hybrid_parallel").dataset_strategy((sw.Layout((4,), ("tp",))("tp", "None"),))
    with pytest.raises(LayoutError, match="use the program's axes"):
        net(torch.randn(4, 4))
    with pytest.raises(LayoutError, match="slice counts do not say which axes"):
        net.dataset_strategy(((1, 2),))(torch.randn(4, 4))
    with pytest.raises(ShardwrightError, match="1 entries for 2 tensor inputs"):
        sw.AutoParallel(torch.add, "hybrid_parallel").dataset_strategy(((1, 1),))(torch.ones(4, 4), torch.ones(4, 4))


def test_strategies_do_not_mix_with_it():
    net = sw.AutoParallel(nn.Sequential(nn.Linear(4, 4)), "hybrid_parallel").shard({"0": ((2, 1),)})
    with pytest.raises(StrategyError, match="a program of one rank has none"):
        net(torch.ones(4, 4))
    with pytest.raises(StrategyError, match="(?s)hsdp.*recompute"):
        sw.AutoParallel(nn.Linear(4, 4), "hybrid_parallel").hsdp().recompute("*")(torch.ones(4, 4))
    with pytest.raises(ShardwrightError, match="use AutoParallel.model, 'hybrid_parallel'"):
        sw.AutoParallel(Calls(cc.all_reduce))(torch.ones(4, 4))


def test_plain_code_on_simulated_ranks():
    with pytest.raises(ShardwrightError, match="this process simulates all 4 ranks, and plain code runs once"):
        cc.all_reduce(torch.ones(2))
    with pytest.raises(ShardwrightError, match="call it in the model"):
        cc.rank()
    assert cc.size() == 4
    sw.init(devices=1)
    x = torch.ones(2)
    assert cc.rank() == 0
    for same in (cc.all_reduce, cc.all_gather, cc.reduce_scatter, cc.all_to_all, cc.broadcast, cc.permute):
        assert torch.equal(same(x), x)


def test_a_program_has_no_plan():
    net = sw.AutoParallel(Calls(torch.sum), "hybrid_parallel")
    net(torch.ones(4, 4).double())
    with pytest.raises(ShardwrightError, match="has no plan"):
        net.plan  # noqa: B018
    assert "all_reduce(dp)" in net.program.text(1)


def test_a_mesh_of_all_ranks():
    with pytest.raises(WorldError, match="has 2 ranks, this world has 4"), cc.over(sw.Mesh(("dp",), (2,))):
        pass
    with pytest.raises(LayoutError, match="data names 'tp'"), cc.over(sw.Mesh(("dp",), (4,)), data="tp"):
        pass
    with pytest.raises(LayoutError, match="out of order"), cc.over(sw.Mesh(("dp",), (4,), (1, 0, 2, 3))):
        pass
    with pytest.raises(ArgumentTypeError, match="give a mesh"), cc.over({"dp": 4}):
        pass


def test_owned_parameters():
    with pytest.raises(LayoutError, match="the axes of the mesh are dp"):
        cc.own(torch.ones(4), "mp")
    with pytest.raises(LayoutError, match="cannot be cut into 4 slices"):
        cc.own(torch.ones(3), "dp")
    with pytest.raises(LayoutError, match="dim=1"):
        cc.own(torch.ones(4), "dp", dim=1)
    with pytest.raises(LayoutError, match="give the whole"):
        cc.own(torch.ones(4), "dp", is_slice=True)
    with pytest.raises(ArgumentTypeError, match="give the whole tensor"):
        cc.own(4, "dp")
    parameter = cc.own(nn.Parameter(torch.ones(4, 2), requires_grad=False), "dp", dim=-2)
    assert not parameter.requires_grad
    for same in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert isinstance(same, nn.Parameter)
        assert same.shardwright_own == parameter.shardwright_own
        assert not same.requires_grad
    model = Calls(lambda x: x.sum())
    model.weight = parameter
    with cc.over(sw.Mesh(("dp", "mp"), (2, 2))), pytest.raises(LayoutError, match="'weight' is owned over the mesh dp=4"):
        sw.AutoParallel(model, "hybrid_parallel")(torch.ones(4, 4))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6).double()

    def forward(self, x):
        whole = cc.all_reduce(torch.dropout(self.linear(x), 0.5, self.training), "mp")
        return torch.dropout(whole, 0.5, self.training)


def test_ranks_that_hold_the_same_draw_the_same():
    with cc.over(sw.Mesh(("dp", "mp"), (2, 2))):
        net = sw.AutoParallel(Dropping(), "hybrid_parallel")
    x = torch.randn(1, 6).double().expand(64, 6).contiguous()
    state = torch.get_rng_state()
    first = net(x)  # refused if it could differ along mp
    torch.set_rng_state(state)
    assert torch.equal(net(x), first)
    upper, lower = first.chunk(2)
    assert not torch.equal(upper, lower)
    assert not torch.equal(net(x), first)


# -- on real ranks ----------------------------------------------------------------------------------------------------------


def said_on_all_ranks():
    """Ranks that call different things are all told, and go on."""
    world = current_world()
    x = torch.ones(2 + world.rank)
    for call in (cc.all_reduce, cc.all_gather, cc.permute, lambda x: (cc.broadcast if world.rank else cc.all_reduce)(x[:2])):
        with pytest.raises(WorldError, match=r"the ranks along 'dp' call different things: rank 0: .*; rank 1"):
            call(x)
    assert cc.all_reduce(torch.ones(2)).tolist() == [world.size] * 2
    with cc.over(sw.Mesh(("mp",), (world.size,)), check=False):
        assert cc.all_gather(torch.full((1,), world.rank), "mp").tolist() == list(range(world.size))
        with pytest.raises(ShardwrightError, match="has no axis 'dp'"):
            cc.all_reduce(x)


def parameters_of_real_ranks():
    """A slice is cut at once, or given; the copy that replicas hold is that of the first."""
    world = current_world()
    n = world.size
    whole = torch.arange(4.0 * n).view(2 * n, 2)
    first = cc.own(whole, "dp")
    assert torch.equal(first.detach(), whole.chunk(n)[world.rank])
    model = nn.ParameterList([first, cc.own(torch.full((1, 2), float(world.rank)), "dp", is_slice=True)])
    net = sw.AutoParallel(lambda x: (x @ (model[0].sum(0) + model[1][0])).sum(), "hybrid_parallel")
    loss = net(torch.ones(n, 2))
    assert abs(float(loss.detach()) - float(whole.sum() + 2 * sum(range(n))) / n) < 1e-4
    loss.backward()
    assert torch.equal(sw.full_value(model[0]), whole)
    assert sw.full_value(model[1]).tolist() == [[float(r)] * 2 for r in range(n)]
    assert torch.allclose(sw.full_value(model[0].grad), torch.full((2 * n, 2), 1 / n))


def second_derivatives():
    n = current_world().size
    x = torch.ones(2, requires_grad=True)
    (first,) = torch.autograd.grad(cc.all_reduce(x).square().sum(), x, create_graph=True)
    assert torch.equal(first, torch.full((2,), 2.0 * n * n))
    (second,) = torch.autograd.grad(first.sum(), x)  # of the sum over ranks
    assert torch.equal(second, torch.full((2,), 2.0 * n * n))


def dropout_is_that_of_the_simulated_world():
    """Each rank draws its own numbers, the same ones in both worlds."""
    n = current_world().size
    model = nn.Linear(6, 6).double()
    reference = copy.deepcopy(model)
    x = torch.randn(4 * n, 6).double()
    results = []
    real = list(current._current)
    for net_model in (model, reference):
        torch.manual_seed(3)
        net = sw.AutoParallel(lambda x, m=net_model: torch.dropout(m(x), 0.5, True), "hybrid_parallel")
        results.append(net(x))
        current._current[:] = [SimulatedWorld(n)]
    current._current[:] = real
    assert torch.equal(results[0], results[1])


PROGRAMS = (said_on_all_ranks, parameters_of_real_ranks, second_derivatives, dropout_is_that_of_the_simulated_world)


@pytest.mark.parametrize("ranks", [3])
def test_on_real_ranks(ranks):
    on_ranks(__file__, ranks, PROGRAMS)


def test_dropout_simulated():
    simulated(dropout_is_that_of_the_simulated_world, 3)


if __name__ == "__main__":
    main(PROGRAMS)
