"""Writes that autograd does not see, hooks of every kind, and derivatives of derivatives: refused, or as on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardwright as sw

WIDTH = 5


class Around(nn.Module):
    """Two layers, and what a test does between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x))).square().mean()


def results(net: Any, model: nn.Module, x: Tensor) -> list[Any]:
    torch.manual_seed(5)
    for p in model.parameters():
        p.grad = None
    loss = net(x)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def equal_or_refused(between: Callable[[Tensor], Tensor]) -> str:
    """``refused`` with the message, ``equal``, or ``invalid`` where one device cannot do it either."""
    sw.init(devices=2)
    torch.manual_seed(0)
    model = Around(between).double()
    plain, x = copy.deepcopy(model), torch.randn(4, WIDTH, dtype=torch.float64)
    try:
        expected = results(plain, plain, x)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError, IndexError):
        return "invalid"
    try:
        got = results(sw.AutoParallel(model), model, x)
    except sw.errors.CaptureError as error:
        return f"refused: {error}"
    for e, g in zip(expected, got, strict=True):
        zero = [t is None or not t.any() for t in (e, g)]
        assert all(zero) or torch.allclose(e, g, equal_nan=True), "silently another result"
    return "equal"


# -- writes ----------------------------------------------------------------------------------------------------------------


def _no_grad(h: Tensor, write: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        write(h)


def _no_grad_view(h: Tensor, write: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        write(h[1:])


WAYS: dict[str, Callable[[Tensor, Callable[[Tensor], Any]], None]] = {
    "no_grad": _no_grad,
    "view under no_grad": _no_grad_view,
    "detach": lambda h, write: write(h.detach()),
    "view of detach": lambda h, write: write(h.detach()[1:]),
    "data": lambda h, write: write(h.data),
    "inference of a detached": lambda h, write: write(h.detach().view(-1)),
}
NOT_VALUES = {"requires_grad_", "share_memory_", "rename_", "resize_", "resize_as_", "sparse_resize_", "apply_", "map_"}
IN_PLACE = sorted(n for n in dir(Tensor) if n.endswith("_") and not n.startswith("_") and n not in NOT_VALUES)
ARGUMENTS: tuple[tuple[Any, ...], ...] = ((), (0.5,), (2,), (0, 1), (0,))


def _arguments_for(name: str) -> tuple[Any, ...] | None:
    """Arguments with which an in-place method of a float tensor works, or none."""
    for given in (*ARGUMENTS, (torch.full((4, WIDTH), 0.5, dtype=torch.float64),)):
        try:
            t = torch.full((4, WIDTH), 0.25, dtype=torch.float64)
            getattr(t, name)(*given)
        except Exception:  # another signature
            continue
        return given
    return None


def test_no_write_past_autograd_is_silent():
    """Every in-place method that takes simple arguments, in turn in every way of writing."""
    known = {name: given for name in IN_PLACE if (given := _arguments_for(name)) is not None}
    assert len(known) > 80, sorted(set(IN_PLACE) - set(known))
    equal = 0
    for number, (name, given) in enumerate(known.items()):
        way = list(WAYS)[number % len(WAYS)]

        def between(h: Tensor, name: str = name, given: Any = given, way: str = way) -> Tensor:
            if given and isinstance(given[0], Tensor):
                WAYS[way](h, lambda t: getattr(t, name)(given[0][: t.shape[0]] if t.dim() > 1 else given[0].view(-1)))
            else:
                WAYS[way](h, lambda t: getattr(t, name)(*given))
            return h * 1

        try:
            found = equal_or_refused(between)
        except AssertionError as error:
            raise AssertionError(f"{name}{given} by {way}: {error}") from error
        equal += found == "equal"
    assert equal > 60


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("makes", [lambda h: h * 2, lambda h: h + 1, lambda h: h[:, 1:]], ids=["product", "sum", "view"])
def test_each_way_of_writing_keeps_the_gradient_of_what_was_there(way, makes):
    def between(h: Tensor) -> Tensor:
        h = makes(h)
        row = h[1]
        WAYS[way](h, lambda t: t.mul_(2))
        h = h.tanh() + row.exp() + h.sum()
        return h if h.shape[1] == WIDTH else nn.functional.pad(h, (1, 0))

    assert equal_or_refused(between) in ("equal", "invalid")  # such a view of a view cannot be flattened


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("saves", [torch.tanh, torch.square, lambda h: Doubled.apply(h).exp()], ids=["result", "input", "own"])
def test_a_write_to_what_the_backward_reads_is_refused_with_the_line(way, saves):
    def between(h: Tensor) -> Tensor:
        made = saves(h)
        WAYS[way](made if saves is not torch.square else h, lambda t: t.mul_(2))
        return made * 1

    sw.init(devices=2)
    with pytest.raises(sw.errors.CaptureError) as caught:
        sw.AutoParallel(Around(between))(torch.randn(4, WIDTH))
    found = str(caught.value)
    assert "test_past_autograd.py:" in found
    assert "mul_(2)" in found


def test_writes_that_autograd_sees_are_equal():
    def between(h: Tensor) -> Tensor:
        h = h * 2
        h[1:].mul_(3)
        h[:, 0] = 0
        return h

    assert equal_or_refused(between) == "equal"


# -- hooks -----------------------------------------------------------------------------------------------------------------

HOOKS = sorted(n for n in dir(Tensor) if n.startswith("register_") and "hook" in n)
NODE_HOOKS = ("register_hook", "register_prehook")
MODULE_HOOKS = sorted(n for n in dir(nn.Module) if n.startswith("register_") and "backward" in n)
GLOBAL_HOOKS = sorted(n for n in dir(nn.modules.module) if n.startswith("register_module_") and "backward" in n)


def test_hooks_of_torch_are_those_known():
    assert set(HOOKS) == {"register_hook", "register_post_accumulate_grad_hook"}
    assert set(MODULE_HOOKS) == {"register_backward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"}
    assert len(GLOBAL_HOOKS) == 3


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_tensors(name):
    def between(h: Tensor) -> Tensor:
        getattr(h, name)(lambda gradient: gradient * 2)
        return h * 1

    assert equal_or_refused(between).partition(":")[0] == ("equal" if name == "register_hook" else "invalid")


HOOKED = {
    "input": lambda h, hook: h.register_hook(hook),
    "view": lambda h, hook: h[1:].register_hook(hook),
    "sum": lambda h, hook: (h + 1).register_hook(hook),
}


@pytest.mark.parametrize("reader", ["before", "after", "both"])
@pytest.mark.parametrize("where", HOOKED)
def test_a_hook_sees_the_whole_gradient_whoever_reads_the_value(reader, where):
    def between(h: Tensor) -> Tensor:
        before = h.exp() if reader != "after" else 0
        HOOKED[where](h, lambda gradient: gradient * 2)
        HOOKED[where](h, lambda gradient: gradient + 0.5)
        return before + (h.sin() if reader != "before" else 0)

    assert equal_or_refused(between) == "equal"


def test_a_hook_is_called_once_with_the_values_of_one_device():
    norms: list[float] = []

    def between(h: Tensor) -> Tensor:
        h.register_hook(lambda gradient: norms.append(float(gradient.norm())))
        return h.relu()

    assert equal_or_refused(between) == "equal"
    assert len(norms) == 2
    assert abs(norms[0] - norms[1]) < 1e-12


@pytest.mark.parametrize("name", NODE_HOOKS)
def test_hooks_of_nodes(name):
    def between(h: Tensor) -> Tensor:
        getattr(h.grad_fn, name)(lambda *gradients: None)
        return h * 1

    assert equal_or_refused(between).startswith("refused")


@pytest.mark.parametrize("name", MODULE_HOOKS)
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_hooks_of_modules(name):
    sw.init(devices=2)
    for position in ("second", ""):
        model, seen = Around(torch.tanh).double(), []

        def hook(module: nn.Module, *gradients: Any, seen: list[Any] = seen) -> Any:
            seen.append([g.norm().item() for group in gradients for g in group if g is not None])
            return tuple(g if g is None else 2 * g for g in gradients[0])

        getattr(model.get_submodule(position), name)(hook if name != "register_backward_hook" else lambda *given: None)
        x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
        if name == "register_backward_hook":
            with pytest.raises(sw.errors.CaptureError, match="register_full_backward_hook"):
                sw.AutoParallel(model)(x)
        else:
            expected = results(copy.deepcopy(model), model := copy.deepcopy(model), x)
            expected = results(model, model, x)
            one, seen[:] = list(seen[-1:]), []
            got = results(sw.AutoParallel(model), model, x)
            assert all(torch.allclose(e, g) for e, g in zip(expected, got, strict=True))
            assert torch.allclose(torch.tensor(one), torch.tensor(seen))
        x = torch.ones(4, WIDTH, dtype=torch.float64)
        with torch.no_grad():  # where none of them would run
            torch.testing.assert_close(sw.AutoParallel(model)(x), model(x))


@pytest.mark.parametrize("name", GLOBAL_HOOKS)
def test_hooks_of_all_modules(name, monkeypatch):
    sw.init(devices=2)
    monkeypatch.setattr(nn.modules.module, "_global_is_full_backward_hook", None)  # full ones, or the others
    calls: list[Any] = []
    handle = getattr(nn.modules.module, name)(lambda module, *gradients: calls.append(module))
    try:
        if "full" not in name:
            with pytest.raises(sw.errors.CaptureError, match="all modules"):
                sw.AutoParallel(Around(torch.tanh))(torch.ones(4, WIDTH))
        else:
            x = torch.ones(4, WIDTH, requires_grad=True)
            sw.AutoParallel(Around(torch.tanh))(x).backward()
            assert len(calls) == 3
    finally:
        handle.remove()


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_parameters_work(name):
    sw.init(devices=2)
    torch.manual_seed(0)
    model = Around(torch.tanh).double()
    plain, seen = copy.deepcopy(model), []
    for each in (model, plain):
        hook = (lambda gradient: seen.append(gradient)) if name == "register_hook" else (lambda p: seen.append(p.grad.clone()))
        getattr(each.first.weight, name)(hook)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    sw.AutoParallel(model)(x).backward()
    plain(x).backward()
    assert len(seen) == 2
    assert torch.allclose(*seen)


# -- functions with a backward of their own ---------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Vmapped(Doubled):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class Other(Doubled):
    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:  # a subclass that has its own
        return super().apply(*args, **kwargs)


bound = Doubled.apply


@pytest.mark.parametrize("call", [Doubled.apply, Vmapped.apply, Other.apply, bound], ids=["plain", "context", "own", "bound"])
def test_functions_keep_their_backward(call):
    assert equal_or_refused(lambda h: call(h) * 1) == "equal"
    assert equal_or_refused(lambda h: call(call(h).exp()) * h) == "equal"


SAME_SHAPE = [
    "flip(0)",
    "flip(1)",
    "roll(1,0)",
    "cumsum(0)",
    "cumprod(0)",
    "logcumsumexp(0)",
    "cummax(0).values",
    "sort(0).values",
    "softmax(0)",
    "log_softmax(0)",
    "tril()",
    "triu()",
    "t()",
    "transpose(0,1)",
    "clone()",
    "neg()",
    "tanh()",
    "mul(2)",
    "clamp(min=0)",
    "view_as(x)",
    "contiguous()",
    "expand_as(x)",
    "rot90(2)",
    "sub(x.mean(0))",
    "sub(x.mean())",
    "mul(x.shape[0])",
    "div(x.numel())",
    "add(torch.ones_like(x))",
    "where(x>0,x*2)",
    "mul(torch.arange(x.shape[0])[:,None])",
    "add(torch.eye(x.shape[0]))",
    "index_select(0,torch.arange(x.shape[0]).flip(0))",
    "renorm(2,0,1)",
    "diag_embed()[:,0]",
    "gather(0,torch.zeros_like(x,dtype=torch.int64))",
    "T.flip(0)",
    "swapaxes(0,1)",
    "movedim(0,1)",
]
SPLIT = {"clone()", "neg()", "tanh()", "mul(2)", "clamp(min=0)", "view_as(x)"}  # those that must be, where the batch is


def _function_of(text: str) -> Any:
    source = f"""
class Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.{text}
    @staticmethod
    def backward(ctx, g):
        x = g
        return 2 * x.{text}
"""
    scope: dict[str, Any] = {"torch": torch}
    exec(source, scope)
    return scope["Made"]


@pytest.mark.whole
@pytest.mark.parametrize("text", SAME_SHAPE)
def test_only_what_leaves_elements_in_their_places_is_split(text):
    """Forward and backward of the same shape as their argument, in square and long tensors and on even and odd ranks."""
    made = _function_of(text)
    for rows, devices in ((WIDTH, 3), (8, 4), (2, 2)):
        sw.init(devices=devices)
        torch.manual_seed(0)
        model = Around(lambda h: made.apply(h).sin()).double()
        plain, x = copy.deepcopy(model), torch.randn(rows, WIDTH, dtype=torch.float64)
        try:
            expected = results(plain, plain, x)
        except RuntimeError:  # of this shape, the single device cannot do it
            continue
        for mode in ("data_parallel", "auto"):
            net = sw.AutoParallel(copied := copy.deepcopy(model), mode)
            got = results(net, copied, x)
            assert all(torch.allclose(a, b) for a, b in zip(got, expected, strict=True)), (text, rows, mode)
            if mode == "data_parallel" and text in SPLIT:
                assert not any("Made" in note for note in net.plan.notes), net.plan.notes


SEEN: list[Any] = []


class Tells(torch.autograd.Function):
    """A backward that leaves something behind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        SEEN.append(gradient)
        return gradient * 2


@pytest.mark.parametrize("mode", ["semi_auto", "data_parallel", "auto", "dynamic_programming", "recursive_programming"])
def test_a_backward_runs_once_a_step_and_never_to_find_something_out(mode):
    sw.init(devices=3)
    SEEN.clear()
    net = sw.AutoParallel(Around(Tells.apply), mode)
    x = torch.randn(6, WIDTH)
    net(x)
    assert net.plan.memory.peak > 0
    assert sw.plan_for(3, net.target, x).price is not None
    assert SEEN == []
    net(x).backward()
    assert [type(seen) for seen in SEEN] == [Tensor]


@pytest.mark.parametrize("mode", ["semi_auto", "data_parallel", "auto"])
def test_a_retained_gradient_is_on_what_the_call_left(mode):
    class Retains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.h = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1), None

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.h = self.first(x).tanh()
            self.h.retain_grad()
            self.h.register_hook(lambda gradient: gradient * 2)
            return self.second(self.h), self.h

    sw.init(devices=3)
    torch.manual_seed(0)
    model = Retains().double()
    plain = copy.deepcopy(model)
    net, x = sw.AutoParallel(model, mode), torch.randn(4, WIDTH, dtype=torch.float64)
    for _ in range(2):
        for call in (net, plain):
            result, h = call(x)
            (result.square().sum() + h.sin().sum()).backward()
        torch.testing.assert_close(model.h.grad, plain.h.grad)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiled_programs_refuse_second_derivatives():
    sw.init(devices=2)
    net = sw.AutoParallel(Around(torch.tanh), compile="aot_eager")
    x = torch.randn(4, WIDTH, requires_grad=True)
    with pytest.raises(sw.errors.ShardwrightError, match="create_graph"):
        torch.autograd.grad(net(x), x, create_graph=True)
    net(x).backward()


def test_functions_within_operators_of_torch_are_none_of_the_users():
    assert equal_or_refused(lambda h: nn.functional.scaled_dot_product_attention(h[None], h[None], h[None])[0]) == "equal"


def test_a_custom_operator_keeps_its_backward():
    @torch.library.custom_op("shardwright_tests::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return x.clone()

    @doubled.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    doubled.register_autograd(lambda ctx, gradient: gradient * 2)
    assert equal_or_refused(lambda h: doubled(h) * 1) == "equal"


# -- derivatives of derivatives ---------------------------------------------------------------------------------------------


def _penalty(net: Any, model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x), x, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


def _of_weights(net: Any, model: nn.Module, x: Tensor) -> Tensor:
    gradients = torch.autograd.grad(net(x), list(model.parameters()), create_graph=True)
    return sum(g.square().sum() for g in gradients)  # type: ignore[return-value]


def _third(net: Any, model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(net(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    return second.square().sum()


def _tensor_parallel(model: nn.Module) -> Any:
    layout = sw.Layout((2, 2), ("dp", "tp"))
    return sw.AutoParallel(model).shard({"first.weight": layout("tp", "None"), "second.weight": layout("None", "tp")})


PLANS = {
    "data parallel": lambda model: sw.AutoParallel(model, "data_parallel"),
    "tensor parallel": _tensor_parallel,
    "optimizer parallel": lambda model: sw.AutoParallel(model, "data_parallel").hsdp(threshold=0),
    "computed again": lambda model: sw.AutoParallel(model, "data_parallel").recompute("first"),
    "fused": lambda model: sw.AutoParallel(model, "data_parallel").comm_fusion({"allreduce": {"mode": "size", "config": 1}}),
}


@pytest.mark.parametrize("of", [_penalty, _of_weights, _third])
@pytest.mark.parametrize("plan", PLANS)
def test_derivatives_of_derivatives(plan, of):
    sw.init(devices=4)
    torch.manual_seed(0)
    model = Around(lambda h: Doubled.apply(h).tanh()).double()
    plain, x = copy.deepcopy(model), torch.randn(6, WIDTH, dtype=torch.float64)
    expected = of(plain, plain, x)
    got = of(PLANS[plan](model), model, x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    got.backward()
    expected.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)
