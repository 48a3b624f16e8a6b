"""Distributed parameters in real processes: values, gradients, optimizers, handles from before, checkpoints.

The checks are the functions below whose names begin with ``check_``. One group of processes runs all checks of its size
one after the other, and each shows up as a test.
"""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import traceback
import warnings
import weakref
from datetime import timedelta

import jobs
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardwright.errors import LayoutError, WorldError
from shardwright.ir.layout import Layout
from shardwright.ir.mesh import Mesh
from shardwright.parameters import distribute as parameters
from shardwright.parameters.delayed.record import DelayedInitError
from shardwright.parameters.delayed.recorder import no_init_parameters
from shardwright.parameters.device_mesh import device_mesh
from shardwright.parameters.distribute import distribute_parameters
from shardwright.parameters.enter import enter
from shardwright.parameters.handles import MovedParameter, current
from shardwright.parameters.optimizer import rebind
from shardwright.parameters.placements import layout_of, placements, storable, stored_layouts
from shardwright.parameters.whole import full_value

# ------------------------------------------------------------------------------------------- what the checks work on


class Net(nn.Module):
    """Tied weights, a dim of 5, a dim of 1, a scalar, bfloat16, a frozen parameter, buffers, a list beside the tables."""

    def __init__(self, second: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 4, dtype=second)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.short = nn.Parameter(torch.randn(1, 3))
        self.register_buffer("mask", torch.rand(3))
        self.register_buffer("counter", torch.tensor(3), persistent=False)
        self.held = [self.first.weight, self.scale]


def layouts(mesh: str, net: nn.Module | None = None) -> dict[str, Layout]:
    base = Layout.parse(f"@ {mesh}")
    text = {
        "embedding.weight": "(a,b),None",
        "first.weight": "b>a,None",
        "first.bias": "a",
        "second.weight": "a,b",
        "second.bias": "None",
        "norm.weight": "b",
        "scale": "",
        "frozen": "None,(a,b)",
        "short": "(a,b),None",
    }  # norm.bias is not listed
    return {name: Layout.parse(f"{entry} @ {mesh}") if entry else base() for name, entry in text.items()}


def make(seed: int = 7, **kwargs: torch.dtype) -> Net:
    torch.manual_seed(seed)
    return Net(**kwargs)


def distributed(mesh: str, net: nn.Module | None = None) -> tuple[nn.Module, dict[str, Layout]]:
    net = make() if net is None else net
    return net, distribute_parameters(net, layouts(mesh), "cpu")


def assert_values(net: nn.Module, reference: nn.Module, **tolerance: float) -> None:
    theirs = dict(reference.named_parameters(remove_duplicate=False))
    for name, parameter in net.named_parameters(remove_duplicate=False):
        allowed = tolerance or EXACT
        if tolerance and parameter.dtype == torch.bfloat16:  # kernels round at other moments in a vector's tail
            allowed = {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(full_value(parameter), theirs[name].detach(), msg=lambda m, n=name: f"{n}: {m}", **allowed)


EXACT = {"rtol": 0.0, "atol": 0.0}


def local_slice(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    return value[layout.slices(value.shape)[dist.get_rank()]]


def give_gradients(net: nn.Module, reference: nn.Module, seed: int) -> None:
    """Backward through ``enter`` with this rank's piece of gradients that the reference gets whole."""
    torch.manual_seed(seed)
    stored = stored_layouts(net)
    ours = {name: p for name, p in net.named_parameters() if p.requires_grad}
    theirs = dict(reference.named_parameters())
    local, pieces = enter(list(ours.values())), []
    for name in ours:
        grad = torch.randn(theirs[name].shape).to(theirs[name].dtype)
        theirs[name].grad = grad if theirs[name].grad is None else theirs[name].grad + grad
        pieces.append(local_slice(grad, stored[name]))
    torch.autograd.backward([x * 1.0 for x in local], pieces)


MESHES = {2: ("a=2,b=1", "a=1,b=2"), 4: ("a=2,b=2",)}


# ------------------------------------------------------------------------------------------------------- the checks


def check_values_pieces_and_ties(mesh: str) -> None:
    reference, net = make(), make()
    names = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    net, stored = distributed(mesh, net)
    assert list(stored) == names == [name for name, _ in net.named_parameters(remove_duplicate=False)]
    assert stored["embedding.weight"] == stored["head.weight"]
    for name, layout in layouts(mesh).items():
        assert stored[name] == layout.normal(dict(reference.named_parameters())[name].shape), name
    assert stored["norm.bias"].is_replicated
    assert net.head.weight is net.embedding.weight
    assert len({id(p.device_mesh) for p in net.parameters()}) == 1
    for name, parameter in net.named_parameters():
        whole = dict(reference.named_parameters())[name]
        assert isinstance(parameter, nn.Parameter)
        assert type(parameter) is DTensor
        assert parameter.shape == whole.shape
        assert parameter.stride() == whole.stride()
        assert parameter.dtype == whole.dtype
        assert parameter.requires_grad == whole.requires_grad
        local = parameter.to_local()
        assert torch.equal(local, local_slice(whole.detach(), stored[name]))
        assert local.untyped_storage().nbytes() == local.nbytes  # nothing of the whole is kept
        assert local.is_contiguous()
        assert torch.equal(parameter.full_tensor(), whole)
    assert_values(net, reference)
    assert type(net.mask) is torch.Tensor
    assert torch.equal(net.mask, reference.mask)
    assert net.counter.item() == 3
    assert stored_layouts(net) == stored
    assert layout_of(net.mask) is None
    assert layout_of(reference.scale) is None


def check_the_whole_tensors_are_freed(mesh: str) -> None:
    net = make()
    storages = [weakref.ref(p.untyped_storage()) for p in net.parameters()]
    handles = list(net.parameters())
    distributed(mesh, net)
    gc.collect()
    assert [s() for s in storages] == [None] * len(storages)
    del handles


def check_a_second_distribution_keeps_the_first(mesh: str) -> None:
    net, stored = distributed(mesh)
    before = list(net.parameters())
    again = distribute_parameters(net, {n: Layout.replicated(x.mesh, x.ndim) for n, x in stored.items()}, "cpu")
    assert again == stored
    assert all(a is b for a, b in zip(before, net.parameters()))
    mask = net.mask
    mask[0] = dist.get_rank()  # from now on buffers are the user's business
    net.late = nn.Linear(2, 4)
    net.tied_later = nn.Linear(5, 6)
    net.tied_later.weight = net.held[0]  # a handle from before, put into a table
    more = distribute_parameters(net, {"late.weight": Layout.parse(f"b,a @ {mesh}")}, "cpu")
    assert {n: more[n] for n in stored} == stored
    assert more["late.weight"] == Layout.parse(f"b,a @ {mesh}").normal((4, 2))
    assert net.tied_later.weight is net.first.weight
    assert net.mask is mask
    assert mask[0] == dist.get_rank()


def check_enter_forward(mesh: str) -> None:
    net, stored = distributed(mesh)
    plain, leaf = torch.randn(3), torch.randn(2, requires_grad=True)
    given = [plain, *net.parameters(), leaf]
    local = enter(given)
    assert local[0] is plain
    assert local[-1] is leaf
    for x, parameter in zip(local[1:-1], net.parameters()):
        assert type(x) is torch.Tensor
        assert x.requires_grad == parameter.requires_grad
        assert x.shape == parameter.to_local().shape
        assert x.data_ptr() == parameter._local_tensor.data_ptr()
        assert x is not parameter._local_tensor
        assert parameter._local_tensor.grad_fn is None
    with torch.no_grad():
        assert not any(x.requires_grad for x in enter(given)[1:-1])
    with torch.inference_mode():
        assert [x.shape for x in enter(given)] == [x.shape for x in local]
    assert enter([]) == []
    assert enter([plain])[0] is plain


def check_enter_backward(mesh: str) -> None:
    net, stored = distributed(mesh)
    reference = make()
    for seed in (1, 2, 3):  # the first sets gradients, the others add to them
        give_gradients(net, reference, seed)
        for (name, parameter), whole in zip(net.named_parameters(), reference.parameters()):
            if not parameter.requires_grad:
                assert parameter.grad is None
                continue
            assert type(parameter.grad) is DTensor
            assert parameter.grad.placements == parameter.placements
            assert torch.equal(parameter.grad.to_local(), local_slice(whole.grad, stored[name])), name
    net.zero_grad()
    weight, bias, scale = enter([net.first.weight, net.first.bias, net.scale])
    bias.sum().backward()
    assert net.first.weight.grad is None
    assert net.scale.grad is None
    assert torch.equal(net.first.bias.grad.to_local(), torch.ones_like(bias))
    net.first.bias.grad.to_local().add_(1)  # an expanded gradient became memory of its own
    assert torch.equal(net.first.bias.grad.to_local(), torch.full_like(bias, 2))


def check_gradients_are_neither_shared_nor_copied(mesh: str) -> None:
    net = nn.ParameterDict({k: nn.Parameter(torch.ones(3)) for k in "xyz"})
    distribute_parameters(net, {k: Layout.parse(f"None @ {mesh}") for k in "xyz"}, "cpu")
    x, y, z = net["x"], net["y"], net["z"]
    seen = []

    def local_gradients() -> list[torch.Tensor]:
        return [p.grad.to_local() for p in (x, y, z) if p.grad is not None]

    a, b, c = enter([x, y, z])
    a.register_hook(lambda g: seen.append(g.data_ptr()))
    ((a + b) * 2).sum().backward()
    first, second = local_gradients()
    assert first.data_ptr() != second.data_ptr()
    net.zero_grad()
    given = torch.ones(3)
    enter([x])[0].backward(given)  # the caller keeps this one
    x.grad.to_local().mul_(3)
    assert torch.equal(given, torch.ones(3))
    net.zero_grad()
    kept = []
    a, *_ = enter([x])
    inner = a + torch.zeros(3, requires_grad=True)
    inner.register_hook(kept.append)
    (inner * 2).sum().backward()
    x.grad.to_local().mul_(3)
    assert torch.equal(kept[0], torch.full((3,), 2.0))
    net.zero_grad()
    seen.clear()
    a, b, c = enter([x, y, z])
    for p in (a, b, c):
        p.register_hook(lambda g: seen.append(g.data_ptr()))
    (a * 2 + b * 3 + c * 4).sum().backward()
    assert {g.data_ptr() for g in local_gradients()} == set(seen)


def check_autograd_in_its_other_ways(mesh: str) -> None:
    net, _ = distributed(mesh)
    weight, bias, scale = net.first.weight, net.first.bias, net.scale

    def loss() -> torch.Tensor:
        w, b, s = enter([weight, bias, scale])
        return (w**3).sum() + (b**2).sum() * s

    grads = torch.autograd.grad(loss(), [weight, bias])
    assert all(type(g) is DTensor for g in grads)
    assert torch.equal(grads[0].to_local(), 3 * weight.to_local().detach() ** 2)
    assert weight.grad is None
    loss().backward(inputs=[bias])
    assert weight.grad is None
    assert scale.grad is None
    assert torch.equal(bias.grad.to_local(), grads[1].to_local())
    (again,) = torch.autograd.grad(loss(), [weight], create_graph=True)
    (second,) = torch.autograd.grad((again.to_local() * 2).sum(), [weight])
    torch.testing.assert_close(second.to_local(), 12 * weight.to_local().detach())
    total = loss()
    total.backward(retain_graph=True)
    total.backward()
    torch.testing.assert_close(weight.grad.to_local(), 2 * grads[0].to_local(), **EXACT)
    optimizer = torch.optim.SGD([weight], 0.1)
    out = loss()
    optimizer.step()  # a step between forward and backward: an error, as on a single device
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def check_hooks_run(mesh: str) -> None:
    net = make()
    calls: list[str] = []
    removed = net.first.bias.register_hook(lambda g: calls.append("removed"))
    net.first.bias.register_hook(lambda g: calls.append(f"before {type(g).__name__}"))
    net.scale.register_post_accumulate_grad_hook(lambda p: calls.append(f"accumulated {type(p.grad).__name__}"))
    net, _ = distributed(mesh, net)
    removed.remove()
    net.first.weight.register_hook(lambda g: g * 2)
    w, b, s = enter([net.first.weight, net.first.bias, net.scale])
    (w.sum() + b.sum() + s).backward()
    assert sorted(calls) == ["accumulated DTensor", "before DTensor"]
    assert torch.equal(net.first.weight.grad.to_local(), torch.full_like(w, 2))


def check_large_parameters_enter_in_groups(mesh: str) -> None:
    net = nn.ParameterList([nn.Parameter(torch.ones(1 << 19)) for _ in range(4)])
    distribute_parameters(net, {str(i): Layout.parse(f"None @ {mesh}") for i in range(4)}, "cpu")
    local = enter(list(net))
    assert len({x.grad_fn for x in local}) == 2
    sum(x.sum() for x in local).backward()
    assert all(p.grad.to_local().sum() == 1 << 19 for p in net)


def check_norms(mesh: str) -> None:
    for foreach in (None, True, False):
        for kind in (2.0, 1.0, float("inf")):
            net, reference = make(second=torch.float32), make(second=torch.float32)  # bfloat16 rounds each norm
            if kind == float("inf"):  # torch has no maximum of an empty piece
                del net.short, reference.short
            net, _ = distributed(mesh, net)
            give_gradients(net, reference, 11)
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5, norm_type=kind, foreach=foreach)
            expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.5, norm_type=kind)
            torch.testing.assert_close(norm.full_tensor(), expected)
            for p, q in zip(net.parameters(), reference.parameters()):
                if q.grad is not None:
                    torch.testing.assert_close(p.grad.full_tensor(), q.grad)
    nn.utils.clip_grad_value_(net.parameters(), 0.01)
    assert all((p.grad.to_local().abs() <= 0.01).all() for p in net.parameters() if p.grad is not None)
    total = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    assert total.full_tensor() > 0


class OfAUser(torch.optim.AdamW):
    """May do anything in its step, so it gets DTensors there."""


OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, 0.1),
    "SGD momentum": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD foreach": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, fused=True),
    "Adam": lambda ps: torch.optim.Adam(ps, 0.1, amsgrad=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, 0.1),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, 0.1, foreach=True),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, 0.1, fused=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, 0.1),
    "AdamW on DTensors": lambda ps: OfAUser(ps, 0.1, foreach=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 0.1, momentum=0.5, foreach=True),
}


def assert_state(optimizer: torch.optim.Optimizer, reference: torch.optim.Optimizer) -> None:
    """The same state as the reference, in DTensors that are as small as their parameters."""
    mine = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    theirs = [reference.state.get(p, {}) for group in reference.param_groups for p in group["params"]]
    assert len(optimizer.state) == len(reference.state)
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, a, b in zip(ours, mine, theirs):
        assert type(parameter) is DTensor
        assert a.keys() == b.keys()
        for key, value in b.items():
            if isinstance(value, torch.Tensor) and key != "step":
                assert type(a[key]) is DTensor, key
                assert a[key].to_local().shape == parameter.to_local().shape
                allowed = {"rtol": 1e-2, "atol": 1e-3} if value.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
                torch.testing.assert_close(a[key].full_tensor(), value, **allowed)
            else:
                assert type(a[key]) is type(value)
                assert a[key] == value


def check_optimizers(mesh: str) -> None:
    for name, build in OPTIMIZERS.items():
        # torch's own fused SGD is wrong in bfloat16 on CPUs, from 16 elements on
        second = torch.float32 if name == "SGD fused" else torch.bfloat16
        for made_after in (0, 1, 2):  # steps before the distribution
            net, reference = make(second=second), make(second=second)
            expected = build(reference.parameters())
            optimizer = build(net.parameters())
            for step in range(made_after):
                for model, opt in ((net, optimizer), (reference, expected)):
                    torch.manual_seed(step)
                    for p in model.parameters():
                        p.grad = torch.randn(p.shape).to(p.dtype) if p.requires_grad else None
                    opt.step()
            net, _ = distributed(mesh, net)
            optimizer.zero_grad()
            assert all(p.grad is None for p in net.parameters())
            expected.zero_grad()
            if made_after == 0:
                optimizer = build(net.parameters())
            for step in range(3):
                give_gradients(net, reference, step)
                optimizer.step()
                expected.step()
                optimizer.zero_grad(set_to_none=step != 1)
                expected.zero_grad(set_to_none=step != 1)
            try:
                assert_values(net, reference, rtol=1e-5, atol=1e-6)
                assert_state(optimizer, expected)
            except AssertionError as error:
                raise AssertionError(f"{name}, {made_after} steps before: {error}") from error


def check_an_optimizer_from_before(mesh: str) -> None:
    net = make()
    groups = [{"params": [net.first.weight, net.frozen], "lr": 0.5}, {"params": [net.scale]}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
    lists = [group["params"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    net, _ = distributed(mesh, net)
    optimizer.add_param_group({"params": [net.first.bias]})
    w, b, s = enter([net.first.weight, net.first.bias, net.scale])
    (w.sum() + b.sum() + s).backward()
    before = w.clone()
    closed = []
    optimizer.step(lambda: closed.append(1))
    scheduler.step()
    torch.testing.assert_close(net.first.weight.to_local(), before - 0.5)
    assert closed == [1]
    assert all(a is b["params"] for a, b in zip(lists, optimizer.param_groups))
    assert optimizer.param_groups[0]["params"][0] is net.first.weight
    assert optimizer.param_groups[0]["params"][1] is net.frozen
    assert set(optimizer.state) == {net.first.weight, net.scale, net.first.bias}
    others = nn.Linear(2, 2)
    unrelated = torch.optim.SGD(others.parameters(), 0.1)  # not ours: left alone
    others(torch.ones(1, 2)).sum().backward()
    unrelated.step()
    assert type(unrelated.param_groups[0]["params"][0]) is nn.Parameter


def check_an_optimizer_steps_on_local_tensors(mesh: str) -> None:
    net, reference = distributed(mesh)[0], make()
    seen: list[set[type]] = []

    def spy(optimizer: torch.optim.Optimizer, *rest: object) -> None:
        seen.append({type(p) for group in optimizer.param_groups for p in group["params"]})

    for hooked in (False, True):  # a user's hook sees the true parameters
        extra = nn.Parameter(torch.ones(2))  # an ordinary one among them
        its = torch.optim.AdamW([*net.parameters(), extra], 0.1, foreach=False)
        expected = torch.optim.AdamW(reference.parameters(), 0.1)
        if hooked:
            its.register_step_pre_hook(spy)
            its.register_step_post_hook(spy)
        for step in range(3):
            give_gradients(net, reference, step)
            extra.grad = torch.ones(2)
            if step == 1 and not hooked:  # a step that fails, and its gradients thrown away
                its.param_groups[0]["lr"] = "much"
                with pytest.raises(TypeError):
                    its.step()
                assert type(its.param_groups[0]["params"][0]) is torch.Tensor
                its.zero_grad()
                its.param_groups[0]["lr"] = 0.1
                assert type(its.state_dict()["state"][0]["exp_avg"]) is DTensor
                assert all(p.grad is None for p in net.parameters())
                its.load_state_dict({**copy.deepcopy(expected.state_dict()), "param_groups": its.state_dict()["param_groups"]})
                net.load_state_dict(reference.state_dict())
                reference.zero_grad()
                continue
            its.step()
            expected.step()
            its.zero_grad()
            expected.zero_grad()
        assert all(a is b for a, b in zip(its.param_groups[0]["params"], [*net.parameters(), extra]))
        assert type(its.state[extra]["exp_avg"]) is torch.Tensor
        assert_values(net, reference, rtol=1e-5, atol=1e-6)
    assert seen
    assert all(DTensor in types for types in seen)


def check_optimizer_state_dicts(mesh: str) -> None:
    reference, (net, _) = make(), distributed(mesh)
    expected, optimizer = torch.optim.AdamW(reference.parameters(), 0.1), torch.optim.AdamW(net.parameters(), 0.1)
    give_gradients(net, reference, 1)
    expected.step()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    whole = copy.deepcopy(expected.state_dict())
    assert type(saved["state"][0]["exp_avg"]) is DTensor
    for state in (saved, whole):  # DTensors, and the whole tensors of a single device
        fresh = torch.optim.AdamW(net.parameters(), 0.1)
        fresh.load_state_dict(state)
        rebind(fresh)
        assert_state(fresh, expected)
        fresh.load_state_dict(state)  # now without waiting for a step
        assert_state(fresh, expected)
    late = make()
    before = torch.optim.AdamW(late.parameters(), 0.1)
    late, _ = distributed(mesh, late)
    before.load_state_dict(whole)  # made before, loaded after, stepped later
    late.load_state_dict({k: full_value(v) for k, v in net.state_dict().items()})
    net.zero_grad()
    reference.zero_grad()
    give_gradients(late, reference, 2)
    before.step()
    expected.step()
    assert_state(before, expected)
    assert_values(late, reference, rtol=1e-5, atol=1e-6)


def check_module_state_dicts(mesh: str) -> None:
    net, _ = distributed(mesh, make(1))
    reference = make(2)
    state = net.state_dict()
    assert {k for k, v in state.items() if type(v) is DTensor} == set(state) - {"mask"}
    parameters_before = list(net.parameters())
    net.load_state_dict(reference.state_dict())  # whole, from a single device
    assert_values(net, reference)
    assert torch.equal(net.mask, reference.mask)
    net.load_state_dict(copy.deepcopy(distributed(mesh, make(3))[0].state_dict()))  # DTensors
    assert_values(net, make(3))
    net.first.load_state_dict(reference.first.state_dict())
    assert torch.equal(full_value(net.first.weight), reference.first.weight)
    assert all(a is b for a, b in zip(parameters_before, net.parameters()))
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.first.load_state_dict(nn.Linear(6, 7).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        net.first.load_state_dict({})


def check_copies_and_casts(mesh: str) -> None:
    net, stored = distributed(mesh)
    twin = copy.deepcopy(net)
    assert twin.head.weight is twin.embedding.weight is not net.embedding.weight
    assert twin.held[0] is twin.first.weight  # what stood for the old parameter became the new one
    assert stored_layouts(twin) == stored
    twin.load_state_dict(make(5).state_dict())
    assert_values(twin, make(5))
    assert_values(net, make())
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    assert_values(averaged.module, make())
    twin.double()
    assert twin.first.weight.to_local().dtype == torch.float64
    assert stored_layouts(twin) == stored
    x, *_ = enter([twin.first.weight])
    assert x.dtype == torch.float64
    x.sum().backward()
    assert twin.first.weight.grad.dtype == torch.float64
    net.requires_grad_(False)
    assert not enter([net.first.weight])[0].requires_grad


def check_moved_parameters(mesh: str) -> None:
    net = make()
    weight, scale, frozen = net.first.weight, net.scale, net.frozen
    listed, mapping = list(net.parameters()), {"scale": scale}
    weight.tag = "mine"
    key = {weight: 1}
    net, stored = distributed(mesh, net)
    new = net.first.weight
    assert type(weight) is MovedParameter
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, torch.Tensor)
    assert current(weight) is new
    assert current(new) is new
    assert current("x") == "x"
    assert all(a is b for a, b in zip(current(listed), net.parameters()))
    assert current(mapping)["scale"] is net.scale
    assert current((weight, 1))[0] is new
    assert key[weight] == 1  # it keeps its hash
    assert layout_of(weight) == stored["first.weight"]
    assert weight.shape == new.shape == (5, 6)
    assert (weight.dtype, weight.device, weight.ndim, weight.numel()) == (torch.float32, new.device, 2, 30)
    assert weight.size(0) == len(weight) == 5
    assert weight.is_leaf
    assert weight.requires_grad
    assert not frozen.requires_grad
    assert weight.tag == new.tag == "mine"
    weight.other = "set later"
    assert new.other == "set later"
    del weight.other
    assert not hasattr(new, "other")
    assert repr(weight) == repr(new)
    assert weight.placements == new.placements
    assert torch.equal(weight.to_local(), new.to_local())
    assert torch.equal(full_value(weight), new.full_tensor())
    assert weight.data.to_local().data_ptr() == new.to_local().data_ptr()
    assert torch.equal((weight * 2).full_tensor(), new.full_tensor() * 2)
    assert torch.equal(torch.stack([weight, weight]).full_tensor(), torch.stack([new.full_tensor()] * 2))
    torch.testing.assert_close(weight.norm().full_tensor(), new.full_tensor().norm())
    # gradients: get, set, delete
    assert weight.grad is None
    (local,) = enter([weight])
    local.sum().backward()
    assert weight.grad is new.grad is not None
    nn.utils.clip_grad_norm_([weight, scale], 0.1)
    torch.testing.assert_close(new.grad.full_tensor().norm(), torch.tensor(0.1), rtol=1e-4, atol=0)
    weight.grad = None
    assert new.grad is None
    weight.grad = torch.zeros_like(weight)
    assert type(new.grad) is DTensor
    del weight.grad
    assert new.grad is None
    (got,) = torch.autograd.grad(enter([new])[0].sum(), [weight])
    assert torch.equal(got.to_local(), torch.ones_like(local))
    weight.requires_grad_(False)
    assert not new.requires_grad
    weight.requires_grad = True
    assert new.requires_grad
    seen = []
    handle = weight.register_hook(seen.append)
    enter([new])[0].sum().backward()
    assert len(seen) == 1
    handle.remove()
    with torch.no_grad():
        weight.fill_(3)
        torch._foreach_mul_([weight], 2.0)
    assert torch.equal(new.full_tensor(), torch.full((5, 6), 6.0))
    # what goes past the handle meets an empty tensor without gradient
    with torch._C.DisableTorchFunctionSubclass():
        assert weight.numel() == 0
        assert not weight.requires_grad
    assert weight.untyped_storage().nbytes() == new.untyped_storage().nbytes()
    twin, shared = copy.deepcopy((weight, new))
    assert twin is shared
    assert type(twin) is DTensor
    assert layout_of(twin) == layout_of(new)
    assert isinstance(copy.copy(weight), DTensor)
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = weight.nothing_here
    optimizer = torch.optim.SGD([weight, scale], 0.1)  # made after, from handles of before
    enter([new])[0].sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0] is new


def check_gradients_from_before(mesh: str) -> None:
    net, reference = make(), make()
    net.scale.tag = "kept"
    for model in (net, reference):
        (model.first(torch.ones(2, 6)).sum() * model.scale).backward()
    net, stored = distributed(mesh, net)
    for name in ("first.weight", "first.bias", "scale"):
        grad = net.get_parameter(name).grad
        assert type(grad) is DTensor
        assert torch.equal(grad.full_tensor(), reference.get_parameter(name).grad)
    assert net.scale.tag == "kept"


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def heard(run) -> list[str]:
    logger, handler = logging.getLogger("shardwright"), Heard()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        run()
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    return handler.lines


def check_differing_seeds(mesh: str) -> None:
    rank = dist.get_rank()
    net, reference = make(100 + rank), make(100)
    lines = heard(lambda: distributed(mesh, net))
    assert_values(net, reference)
    assert torch.equal(net.mask, reference.mask)
    if rank == 0:
        (line,) = lines
        assert line.startswith("8 of 12 parameters and buffers differed")  # not the scalar, the norm and the counter
    else:
        assert lines == []
    same = make()
    same.register_buffer("order", torch.randperm(9, generator=torch.Generator().manual_seed(rank)))
    order = same.order
    same.register_buffer("empty", torch.zeros(0, 3))
    same.register_buffer("flags", torch.arange(5) > 4 * rank)
    same.register_buffer("waves", torch.full((3,), 1j * rank))
    same.register_buffer("doubled", torch.full((2,), 1.0 + 1j * rank, dtype=torch.complex128))
    same.none = nn.Parameter(torch.zeros(3, 0))
    lines = heard(lambda: distributed(mesh, same))
    assert torch.equal(same.flags, torch.arange(5) > 0)
    assert same.waves.abs().sum() == same.doubled.imag.sum() == 0
    assert same.none.shape == (3, 0)
    assert same.order is order  # in place, so that whoever holds it sees it
    assert torch.equal(order, torch.randperm(9, generator=torch.Generator().manual_seed(0)))
    assert len(lines) == (rank == 0)
    assert heard(lambda: distributed(mesh)) == []


def check_delayed_initialisation(mesh: str) -> None:
    reference = make()
    torch.manual_seed(7)
    with no_init_parameters():
        net = Net()
        net.plain = torch.arange(4)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net, stored = distributed(mesh, net)
    assert stored == distributed(mesh)[1]
    assert_values(net, reference)
    assert torch.equal(net.mask, reference.mask)
    assert net.counter.item() == 3
    assert torch.equal(net.plain, torch.arange(4))
    assert all(p.to_local().untyped_storage().nbytes() == p.to_local().nbytes for p in net.parameters())
    give_gradients(net, reference, 1)
    optimizer.step()
    expected = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9)
    expected.step()
    assert_values(net, reference)
    assert_state(optimizer, expected)


def check_delayed_initialisation_with_differing_seeds(mesh: str) -> None:
    rank = dist.get_rank()
    torch.manual_seed(100 + rank)
    with no_init_parameters():
        net = Net()
    lines = heard(lambda: distributed(mesh, net))
    assert len(lines) == (rank == 0)
    assert_values(net, make(100))
    assert torch.equal(net.mask, make(100).mask)
    if rank == 0:  # the first rank alone has values, the others have other numbers to come
        net = make(5)
    else:
        torch.manual_seed(rank)
        with no_init_parameters():
            net = Net()
    heard(lambda: distributed(mesh, net))
    assert_values(net, make(5))


def check_delayed_initialisation_holds_one_tensor_at_a_time(mesh: str) -> None:
    with no_init_parameters():
        net = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(6)])
    alive: list[int] = []
    seen: list[weakref.ref[torch.UntypedStorage]] = []
    inner = parameters._slice

    def spy(value: torch.Tensor, layout: Layout, device: torch.device) -> torch.Tensor:
        seen.append(weakref.ref(value.untyped_storage()))
        alive.append(sum(storage() is not None for storage in seen))
        return inner(value, layout, device)

    parameters._slice = spy
    try:
        distribute_parameters(net, {f"{i}.weight": Layout.parse(f"(a,b),None @ {mesh}") for i in range(6)}, "cpu")
    finally:
        parameters._slice = inner
    assert alive == [1] * 6


def check_refusals_leave_the_model_alone(mesh: str) -> None:
    net = make()
    before = list(net.parameters())
    good = layouts(mesh)
    other = Layout.parse(f"None @ c={dist.get_world_size()}")
    with pytest.raises(WorldError, match="2 meshes"):
        distribute_parameters(net, {**good, "first.bias": other}, "cpu")
    with pytest.raises(LayoutError, match="1 dims, the shape .* has 2"):
        distribute_parameters(net, {**good, "first.weight": good["first.bias"]}, "cpu")
    with pytest.raises(WorldError, match="no layout for any of 10 parameters"):
        distribute_parameters(net, {}, "cpu")
    twin, unnamed = make(), init_device_mesh("cpu", (dist.get_world_size(),))
    twin.first.weight = nn.Parameter(distribute_tensor(torch.ones(5, 6), unnamed, [Shard(0)]))
    with pytest.raises(WorldError, match="'first.weight' is a DTensor already"):
        distribute_parameters(twin, good, "cpu")
    with pytest.raises(DelayedInitError, match="without a record"):
        distribute_parameters(make().to("meta"), good, "cpu")
    elsewhere = nn.Linear(2, 2 + dist.get_rank())
    with pytest.raises(WorldError, match="different models"):
        distribute_parameters(elsewhere, {"weight": Layout.parse(f"None,None @ {mesh}")}, "cpu")
    assert all(a is b and type(a) is nn.Parameter for a, b in zip(before, net.parameters()))
    assert all(p.numel() for p in before)


def check_layouts_that_dtensor_cannot_express(mesh: str) -> None:
    value = torch.randn(5, 4)
    for text, expected in (("(a,b)[1 1 2 1],None", "(a,b),None"), ("b>a[2 1 1 1],None", "b>a,None")):
        net = nn.ParameterDict({"w": nn.Parameter(value.clone())})
        torch.distributed.broadcast(net["w"].data, 0)
        whole = net["w"].detach().clone()
        layout = Layout.parse(f"{text} @ a=2,b=2")
        stored = distribute_parameters(net, {"w": layout}, "cpu")
        assert stored["w"].short() == expected
        assert torch.equal(full_value(net["w"]), whole)
    for text in ("(a,b),None", "a,b", "b,None", "None,b>a"):  # process groups order their ranks
        net = nn.ParameterDict({"w": nn.Parameter(whole.clone())})
        layout = Layout.parse(f"{text} @ a=2,b=2 ranks=3,1,2,0")
        stored = distribute_parameters(net, {"w": layout}, "cpu")
        assert stored["w"].is_replicated
        net = nn.ParameterDict({"w": nn.Parameter(whole.clone() + dist.get_rank())})
        layout = Layout.parse(f"{text} @ a=2,b=2 ranks=0,3,2,1")  # 0 and 3 ascend, 2 and 1 do not
        heard(lambda: distribute_parameters(net, {"w": layout}, "cpu"))  # noqa: B023
        assert torch.equal(full_value(net["w"]), whole)
        assert torch.equal(net["w"].full_tensor(), whole)


def check_checkpoints(mesh: str) -> None:
    import torch.distributed.checkpoint as dcp

    folder = FOLDER[0]
    net, _ = distributed(mesh, make(1))
    optimizer = torch.optim.AdamW(net.parameters(), 0.1)
    reference = make(1)
    expected = torch.optim.AdamW(reference.parameters(), 0.1)
    give_gradients(net, reference, 1)
    optimizer.step()
    expected.step()
    path = f"{folder}/{mesh.replace(',', '_')}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=path)
    size = dist.get_world_size()
    targets = [mesh, f"a={size},b=1", f"a=1,b={size}"]
    for target in targets:
        late, _ = distributed(target, make(3))
        its = torch.optim.AdamW(late.parameters(), 0.1)
        give_gradients(late, make(3), 2)
        its.step()
        state = {"net": late.state_dict(), "optimizer": its.state_dict()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=path)
        late.load_state_dict(state["net"])
        its.load_state_dict(state["optimizer"])
        assert_values(late, reference, rtol=1e-5, atol=1e-6)
        assert_state(its, expected)
    single = make(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {"net": single.state_dict()}
        dcp.load(state, checkpoint_id=path, no_dist=True)
    single.load_state_dict(state["net"])
    assert_values(net, single)
    buffer = io.BytesIO()
    torch.save({name: full_value(value) for name, value in net.state_dict().items()}, buffer)
    buffer.seek(0)
    late, _ = distributed(mesh, make(5))
    late.load_state_dict(torch.load(buffer, weights_only=True))
    assert_values(late, reference, rtol=1e-5, atol=1e-6)
    for save in (lambda: torch.save(net.state_dict(), io.BytesIO()), lambda: pickle.dumps(net)):
        with pytest.raises(WorldError, match="sw.full_value"):  # a rank's pieces are of no use to another job
            save()


FOLDER = [""]
CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}
ONLY_ON_FOUR = {"check_layouts_that_dtensor_cannot_express"}
FOUR_TOO = {
    "check_values_pieces_and_ties",
    "check_enter_backward",
    "check_norms",
    "check_optimizers",
    "check_differing_seeds",
    "check_delayed_initialisation_with_differing_seeds",
    "check_checkpoints",
}
BY_SIZE = {2: sorted(CHECKS.keys() - ONLY_ON_FOUR), 4: sorted(FOUR_TOO | ONLY_ON_FOUR)}


def work(rank: int, size: int, folder: str, results: mp.SimpleQueue) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    FOLDER[0] = folder
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    for i, name in enumerate(BY_SIZE[size]):
        try:
            CHECKS[name](MESHES[size][i % len(MESHES[size])])
            results.put((name, rank, None))
        except BaseException:
            results.put((name, rank, traceback.format_exc()))
            break  # the ranks are no longer in step
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Runs the checks of one size, once, when first asked: {(check, rank): error or None}."""
    found: dict[int, dict[tuple[str, int], str | None]] = {}

    def run(size: int) -> dict[tuple[str, int], str | None]:
        if size not in found:
            context = jobs.context()
            results = context.SimpleQueue()
            folder = str(tmp_path_factory.mktemp(f"ranks{size}"))
            processes = [context.Process(target=work, args=(r, size, folder, results)) for r in range(size)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(120)
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
            found[size] = {}
            while not results.empty():
                name, rank, error = results.get()
                found[size][name, rank] = error
        return found[size]

    return run


@pytest.mark.parametrize("size, name", [(size, name) for size, names in BY_SIZE.items() for name in names])
def test_in_processes(outcomes, size, name):
    found = outcomes(size)
    for rank in range(size):
        error = found.get((name, rank), "did not run: an earlier check failed or hung")
        assert error is None, f"rank {rank} of {size}: {error}"


# ---------------------------------------------------------------------------------------------- without processes


def test_placements():
    layout = Layout((2, 2), ("a", "b"))
    assert placements(layout("a", "b"), (4, 4)) == (Shard(0), Shard(1))
    assert placements(layout("None", ("a", "b")), (4, 5)) == (Shard(1), Shard(1))
    assert placements(layout(), ()) == (Replicate(), Replicate())
    assert placements(layout("a").with_partial(("b",)), (4,)) is None
    assert placements(Layout.parse("a[3 1] @ a=2,b=2"), (4,)) is None
    assert placements(Layout.parse("a[2 2] @ a=2,b=2"), (4,)) == (Shard(0), Replicate())
    assert placements(Layout.parse("a,b @ a=1,b=2"), (4, 4)) == (Replicate(), Shard(1))
    with pytest.raises(LayoutError):
        placements(layout("a"), (4, 4))


def test_storable():
    for text in ("b>a,None @ a=2,b=2", "(a,b),None @ a=2,b=2", "None,a @ a=2,b=2"):
        assert storable(Layout.parse(text), (5, 4)) is not None
        assert storable(Layout.parse(text), (5, 4)) == Layout.parse(text)
    for text, expected in (
        ("a[4 1],b @ a=2,b=2", "a,b"),
        ("a,None +sum(b) @ a=2,b=2", "a,None"),
        ("a,b @ a=2,b=2 ranks=1,3,0,2", "None,b"),
    ):
        found = storable(Layout.parse(text), (5, 4))
        assert found.short() == expected
        assert placements(found, (5, 4)) is not None


def test_a_process_group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = make()
        distribute_parameters(net, layouts("a=1,b=1"), "cpu")
        assert_values(net, make())
        mesh = Layout.parse("@ a=1,b=1").mesh
        assert device_mesh(mesh, "cpu") is net.scale.device_mesh
        assert full_value(torch.ones(2, requires_grad=True)).requires_grad is False
        alone = Layout.replicated(Mesh((), (), (0,)), 2)
        assert distribute_parameters(nn.Linear(2, 3, bias=False), {"weight": alone}, "cpu") == {"weight": alone}
        bare = nn.BatchNorm1d(3, affine=False)
        assert distribute_parameters(bare, {}, "cpu") == {}
    finally:
        dist.destroy_process_group()
