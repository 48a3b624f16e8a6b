"""Pipelines with the other features of training; what is refused, before anything runs; and the work of split backwards."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from staged_networks import CASES, GPT, D, Lossy, Towers
from staged_networks import Layers as Plain
from test_pipeline import check, loss_of, same, tensors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import shardwright as sw
from shardwright.pipeline.schedules.clock import StageTimes
from shardwright.pipeline.schedules.named import make_schedule
from shardwright.pipeline.schedules.search import search_schedule

SETUPS = {
    **{
        f"hsdp {level}": lambda net, model, level=level: net.hsdp(threshold=0, optimizer_level=level)
        for level in ("level1", "level2", "level3")
    },
    "recompute": lambda net, model: net.recompute("network.blocks.*"),
    "strategies": lambda net, model: net.shard({"network.blocks.*.down": ((1, 1, 2),)}),
}
TIMES = StageTimes([1.0, 2.0], [1.0, 1.5], [1.0, 1.0])
SPLIT: tuple[Any, ...] = ("1f1b", "zero_bubble_h1", "searched", search_schedule(TIMES, 4, (0, 1)))


@pytest.mark.parametrize(
    "scheduler",
    [s if s == "1f1b" else pytest.param(s, marks=pytest.mark.long) for s in SPLIT],
    ids=lambda s: s if isinstance(s, str) else "given",
)
@pytest.mark.parametrize("name", SETUPS)
def test_features(name, scheduler):
    check("gpt", 4, 2, 4, 8, setup=SETUPS[name], scheduler=scheduler)


@pytest.mark.long
def test_sharding_propagation():
    check("gpt", 4, 2, 4, 8, "sharding_propagation", setup=lambda net, _: net.shard({"network.blocks.1.down": ((1, 1, 2),)}))


def pair(name: str, devices: int = 4, micro: int = 4, **pipeline: Any) -> tuple[Any, nn.Module, nn.Module]:
    sw.init(devices=devices)
    model = CASES[name].make().double()
    return sw.AutoParallel(sw.PipelineCell(model, micro)).pipeline(stages=2, **pipeline), model, copy.deepcopy(model)


@pytest.mark.parametrize("scheduler", ["1f1b", "zero_bubble_h1"])
@pytest.mark.parametrize("name", ["gpt", "layers", "scaled"])
def test_steps_within_each_other(name, scheduler):
    """Gradients add up over several calls, whatever order they come in, of any result, and scaled by any number."""
    net, model, single = pair(name, scheduler=scheduler)
    batches = [CASES[name].batch(8) for _ in range(2)]

    def calls(target):
        return [target(*args, **kwargs) for args, kwargs in batches]

    for target in (net, single):
        torch.manual_seed(3)
        first = calls(target)
        with torch.no_grad():
            calls(target)
        loss_of(first[0]).backward()
        (loss_of(first[1]) * 0.3).backward()
        first = calls(target)
        (loss_of(first[0]) * loss_of(first[1])).backward()
        sum(t.square().mean() for t in tensors(calls(target)[0]) if t.requires_grad).backward()
        for scale in (0.0, float("1e30"), 0.5):
            (loss_of(calls(target)[0]) * scale * (1 if scale < 2 else 0)).backward()
    for (path, ours), theirs in zip(model.named_parameters(), single.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs[1].grad, msg=lambda text, path=path: f"{path}: {text}")


def test_train_steps_and_value_and_grad():
    args = CASES["towers"].batch(8)[0]
    for is_step in (True, False):
        net, model, single = pair("towers")
        cell = sw.PipelineCell(model, 4)
        optimizer, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, single))
        function = sw.value_and_grad(cell, None, list(model.parameters()))

        def step(x, y, cell=cell, optimizer=optimizer, is_step=is_step, model=model, function=function):
            if is_step:
                optimizer.zero_grad()
                value = cell(x, y)
                value.backward()
            else:
                value, gradients = function(x, y)
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
            optimizer.step()
            return value

        net = sw.AutoParallel(step).pipeline(stages=2)
        for _ in range(2):
            found = net(*args)
            other.zero_grad()
            expected = single(*args)
            expected.backward()
            other.step()
            torch.testing.assert_close(found, expected)
        same(list(model.parameters()), list(single.parameters()))


def test_loss_scaling_delayed_initialisation_and_gradients_of_inputs():
    sw.init(devices=4)
    x, y = torch.randn(8, 8), torch.randn(8, 6)
    torch.manual_seed(1)
    with sw.no_init_parameters():
        model = Towers()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
    net = sw.AutoParallel(sw.PipelineCell(model, 4)).pipeline(stages=2)
    torch.manual_seed(1)
    single = Towers()
    for target, own in ((net, optimizer), (single, torch.optim.SGD(single.parameters(), 0.1))):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for _ in range(4):
            own.zero_grad()
            scaler.scale(target(x, y)).backward()
            scaler.step(own)
            scaler.update()
    same(list(model.parameters()), list(single.parameters()))
    gradients = []
    for target in (net, single):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        target(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    same(*gradients)


def test_mixed_precision_is_that_of_autocast():
    sw.init(devices=4)
    model = Towers()
    single, x, y = copy.deepcopy(model), torch.randn(8, 8), torch.randn(8, 6)
    net = sw.AutoParallel(sw.PipelineCell(model, 4)).pipeline(stages=2).mixed_precision(torch.bfloat16)
    net(x, y).backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = single(x, y)
    loss.backward()
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("output", ["whole", "sharded"])
def test_outputs(output):
    sw.init(devices=4)
    model = Plain().double()
    x = torch.randn(8, 16, dtype=D)
    found = sw.AutoParallel(sw.PipelineCell(model, 4), output=output).pipeline(stages=2)(x)
    torch.testing.assert_close(found, model(x))


def test_first_derivatives_only():
    net, model, _ = pair("towers")
    loss = net(*CASES["towers"].batch(8)[0])
    with pytest.raises(sw.errors.ShardwrightError, match=r"create_graph=True(?s:.*)Such are pipelines"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


# -- split backwards ---------------------------------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


HEAVY = ("aten.mm.default", "aten.bmm.default", "aten.gelu_backward.default")


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.long)])
def test_two_halves_do_the_work_of_one_backward(devices):
    work = []
    for scheduler in ("1f1b", "zero_bubble_h1"):
        sw.init(devices=devices)
        model = GPT(drop=0.0)
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        net = sw.AutoParallel(sw.PipelineCell(model, 4)).pipeline(stages=2, scheduler=scheduler)
        ids = torch.randint(32, (8, 6))
        net(ids)
        with Counted() as counted:
            net(ids)
        work.append({name: counted.counts[name] for name in HEAVY})
    assert work[0] == work[1]
    assert work[0][HEAVY[0]] > 30


# -- refused -------------------------------------------------------------------------------------------------------------


class Without(nn.Module):
    """Ends with any function of the last activation."""

    def __init__(self, end, norm=False):
        super().__init__()
        self.first, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16) if norm else nn.Identity()
        self.last, self.end = nn.Linear(16, 16), end

    def forward(self, x):
        return self.end(self.last(self.norm(self.first(x))))


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        h = self.last(self.first(x))
        self.mean.lerp_(h.detach().mean(0), 0.1)
        return h.mean()


def run(model, micro=4, config=None, inputs=((8, 16),), mode="semi_auto", compile=False, **pipeline):
    net = sw.AutoParallel(sw.PipelineCell(model, micro, config), mode, compile).pipeline(**{"stages": 2, **pipeline})
    return net(*(torch.randn(shape) for shape in inputs))


class Totalled(nn.Module):
    """Adds up what passes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(16))

    def forward(self, h):
        self.total += h.detach().sum(0)
        return h


def contradiction():
    model = Plain()
    model.layers[0].pipeline_stage, model.layers[1].pipeline_stage = 0, 1
    return run(model, config={"layers.1": 0, "layers.2": 1})


def with_stage(value):
    model = Plain()
    model.layers[0].pipeline_stage = value
    return run(model)


class Marked(Without):
    """Has something between its layers, on the first stage."""

    def __init__(self, between, end=torch.mean):
        super().__init__(end)
        self.between = between
        self.first.pipeline_stage, self.last.pipeline_stage = 0, 1

    def forward(self, x):
        return self.end(self.last(self.between(self.first(x))))


class Crossed(nn.Module):
    """Runs what is on the second stage first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)) for _ in range(2))
        self.a.pipeline_stage, self.b.pipeline_stage = 1, 0

    def forward(self, x, y):
        return (self.a(x) * self.b(y)).mean()


def hooked(register):
    model = Marked(nn.Identity())
    getattr(model.last, register)(lambda module, *gradients: seen.append(gradients))
    return run(model)


seen: list[Any] = []


class Own(torch.autograd.Function):
    """A function whose samples meet."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(0)


WHOLE = r"(?s)cannot pass in 4 micro-batches; without .pipeline.* it is computed at once.*"
REFUSED = {
    "needs at least 2 micro-batches and has 1": lambda: run(Plain(), 1),
    "needs at least 4 micro-batches and has 3": lambda: run(Plain(), 3, scheduler="zero_bubble_v"),
    "searched schedule on 2 stages needs": lambda: run(Plain(), 1, scheduler="searched"),
    "of 2 ranks and 8 micro-batches": lambda: run(Plain(), scheduler=make_schedule("1f1b", 2, 8)),
    "stages have to increase along the data": lambda: run(Plain(), config={"layers.0": 1, "layers.1": 0}),
    "no operator is on stage 1": lambda: run(Plain(), config={"layers": 0}),
    "on stage 2, and there are 2: 0 to 1": lambda: run(Plain(), config={"layers.0": 0, "layers.3": 2}),
    "within a module that is on stage 0": lambda: run(Plain(), config={"layers.0": 0, "layers.0.0": 1, "layers.2": 1}),
    "by its pipeline_stage and on 0 by stage_config": contradiction,
    "is no module of Layers; its modules are layers": lambda: sw.PipelineCell(Plain(), 4, {"layer.0": 0}),
    "layers.0 is True; give an int": lambda: sw.PipelineCell(Plain(), 4, {"layers.0": True}),
    "layers.0 is -1; give 0 or more": lambda: with_stage(-1),
    "give an nn.Module": lambda: sw.PipelineCell(abs, 4),
    "give at most stages=4": lambda: run(Plain(), stages=8),
    "do not divide into 3 stages": lambda: run(Plain(), stages=3),
    "3 ranks in all, the world has 4": lambda: run(Plain(), stages=(1, 2)),
    "it has one stage on each part": lambda: run(Plain(), scheduler="gpipe", interleave=True),
    "use one of gpipe": lambda: run(Plain(), scheduler="fast"),
    "1 operators cannot make 2 stages": lambda: run(nn.Linear(16, 16)),
    "whose dim 0 is the batch": lambda: run(Plain(), inputs=((0, 16),)),
    "has no number of micro-batches": lambda: sw.AutoParallel(Plain()).pipeline(stages=2)(torch.randn(8, 16)),
    "accumulate gradients already": lambda: run(sw.GradAccumulation(Plain(), 2)),
    'mode "hybrid_parallel"': lambda: run(Plain(), mode="hybrid_parallel"),
    "every rank gives the whole batch": lambda: (
        sw.AutoParallel(sw.PipelineCell(Plain(), 4)).pipeline(stages=2).dataset_strategy(((2, 1),))(torch.randn(8, 16))
    ),
    WHOLE + r"network.norm \(aten.batch_norm\) at.*its mean and variance.*eval\(\), or": lambda: run(
        Without(torch.mean, norm=True)
    ),
    WHOLE + r"network.last.*has the backward hook <lambda>, which gets.*Remove it": lambda: hooked(
        "register_full_backward_hook"
    ),
    WHOLE + r"\(aten.histc\).*has no rule and runs whole.*Register": lambda: run(
        Marked(lambda h: h * torch.histc(h.detach(), 16))
    ),
    WHOLE + r"\(Own\).*one function that nothing shows how to split": lambda: run(Marked(Own.apply)),
    WHOLE + r"\(aten.bernoulli\).*by the values of the whole.*rand_like": lambda: run(
        Marked(lambda h: torch.bernoulli(h.sigmoid()) * h)
    ),
    WHOLE + r"\(aten.sort\).*needs dim 0 of its input 0 whole.*of each sample, or at the end": lambda: run(
        Marked(lambda h: h.sort(0).values)
    ),
    "changes the buffer network.between.total by the values of the whole batch.*change it after": lambda: run(
        Marked(Totalled())
    ),
    "give a dict with the stage of each module": lambda: sw.PipelineCell(Plain(), 4, ["layers.0"]),
    r"has a PipelineCell in it \(0\)": lambda: sw.PipelineCell(nn.Sequential(sw.PipelineCell(Plain(), 2)), 4),
    "batch_dim=-1.: give the number of a dim, 0 or more": lambda: sw.PipelineCell(Plain(), 4, batch_dim=-1),
    "batch_dim='0'.: give the number of a dim, an int": lambda: sw.PipelineCell(Plain(), 4, batch_dim="0"),
    "draws random numbers on stage 0, after network.a.1 ": lambda: run(Crossed(), inputs=((8, 16), (8, 16))),
    "decides by values of tensors": lambda: run(Without(lambda h: h if h.sum() > 0 else -h)),
    WHOLE + r"aten.cumsum\).*the batch; micro": lambda: run(Marked(lambda h: h.cumsum(0))),
    WHOLE + r"aten.div\).*not linear": lambda: run(Marked(lambda h: h / h.mean(), lambda h: h.square().mean())),
    "begins backwards of the last stage before all its forwards": lambda: run(
        Without(lambda h: h.var(0).mean()), scheduler=make_schedule("1f1b", 2, 4)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_before_anything_runs(message):
    sw.init(devices=4)
    with pytest.raises((sw.errors.ShardwrightError, TypeError), match=message):
        REFUSED[message]()


def test_what_is_refused_leaves_the_model_as_it_was():
    sw.init(devices=4)
    model = Without(torch.mean, norm=True)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(sw.errors.StrategyError):
        run_with(model, torch.ones(8, 16))
    same(list(model.state_dict().values()), list(before.values()))
    assert torch.equal(state, torch.get_rng_state())
    model.eval()  # statistics are those of before: exact
    torch.testing.assert_close(run_with(model, torch.ones(8, 16)), model(torch.ones(8, 16)))


def test_a_buffer_that_the_whole_batch_changes_at_the_end():
    sw.init(devices=4)
    model, x = Kept(), torch.randn(8, 16)
    single = copy.deepcopy(model)
    for target in (sw.AutoParallel(sw.PipelineCell(model, 4)).pipeline(stages=2), single):
        for _ in range(2):
            target(x).backward()
    same([*model.buffers(), *(p.grad for p in model.parameters())], [*single.buffers(), *(p.grad for p in single.parameters())])


ENDS = {
    "var": lambda h: h.var(0).mean(),
    "square": lambda h: h.mean().square(),
    "cumsum": lambda h: h.cumsum(0).square().mean(),
    "flip": lambda h: (h * h.flip(0)).mean(),
    "selected": lambda h: h[h[:, 0] > 0].sum(),
    "sorted": lambda h: (h.sort(0).values * torch.arange(len(h))[:, None]).mean(),
    "result": lambda h: h.softmax(0),
}


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble_h1"])
@pytest.mark.parametrize("end", ENDS)
def test_what_the_end_does_with_the_whole_batch_runs_after_all_micro_batches(end, schedule):
    sw.init(devices=4)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)]).double()
    model, x = nn.Sequential(model, End(ENDS[end])), torch.randn(10, 16, dtype=torch.float64)
    single = copy.deepcopy(model)
    net = sw.AutoParallel(sw.PipelineCell(model, 4)).pipeline(stages=2, scheduler=schedule)
    for target in (net, single):
        target(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert "after all micro-batches" in str(net.plan)
    assert "so all forwards run first" in str(net.plan)


class End(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, h):
        return self.end(h)


def run_with(model, x):
    return sw.AutoParallel(sw.PipelineCell(model, 4)).pipeline(stages=2)(x)


def test_a_stage_without_parameters_and_a_batch_smaller_than_the_micro_batches():
    sw.init(devices=2)
    model = Lossy(lambda h, y, w: torch.tanh(h).mean() + 0 * y.sum())
    net = sw.AutoParallel(sw.PipelineCell(model, 4, {"head": 0})).pipeline(stages=2)
    with pytest.raises(sw.errors.StrategyError, match="no operator is on stage 1"):
        net(torch.randn(8, 8), torch.randn(8, 8))
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    net = sw.AutoParallel(sw.PipelineCell(model, 4, {"0": 0, "1": 1})).pipeline(stages=2, scheduler="zero_bubble_h1")
    for size in (8, 3, 1):
        x = torch.randn(size, 16)
        torch.testing.assert_close(net(x), model(x))
        assert len(net.plan.sizes) == min(size, 4)


# -- shown -----------------------------------------------------------------------------------------------------------------


def test_plan_shows_the_schedule_and_the_seconds_of_its_stages(tmp_path):
    net, _, _ = pair("gpt", micro=3)
    net(*CASES["gpt"].batch(8)[0])
    text = str(net.plan)
    assert text.startswith("1f1b: 2 stages on 2 ranks, 3 micro-batches\nrank 0  0F0 0F1")
    for part in (
        "stage  ranks",
        "0      0 to 1",
        "of 3, 3, 2 samples",
        "no order is faster than",
        "at most: 2, 1",
        "stage 1 on ranks 2",
    ):
        assert part in text, text
    assert net.plan.bound <= net.plan.timeline.seconds
    net.plan.to_csv(tmp_path / "a.csv")
    net.plan.write_trace(tmp_path / "a.json")
    net.plan.draw_timeline(tmp_path / "a.svg")
    assert type(net.plan.schedule).from_csv(tmp_path / "a.csv", "1f1b").rows == net.plan.schedule.rows
    assert (tmp_path / "a.svg").stat().st_size > 1000
    assert "traceEvents" in (tmp_path / "a.json").read_text()


def test_automatic_cuts_fit_into_the_memory_of_a_rank():
    sw.init(devices=2)
    wide = nn.Sequential(nn.Embedding(400, 64), *[nn.Linear(64, 64) for _ in range(6)], nn.Linear(64, 8))
    ids = torch.randint(400, (8, 32))

    def cut(memory):
        net = sw.AutoParallel(sw.PipelineCell(copy.deepcopy(wide), 4)).pipeline(stages=2, scheduler="gpipe")
        net(ids) if memory is None else net.search(memory=memory)(ids)
        return net.plan, max(own.peak for own in net.plan.memory_with(2.0))

    _, free = cut(None)
    plan, peak = cut(0.95 * free)
    assert peak <= 0.95 * free
    assert len(plan.stages) == 2
    with pytest.raises(sw.errors.MemoryLimitError, match=r"(?s)no cut fits into .*; row . needs .*allow memory='") as found:
        cut(0.3 * free)
    assert cut(found.value.least * 1.01)[1] <= found.value.least * 1.01


def test_automatic_cuts_are_balanced_by_price():
    sw.init(devices=4)
    model = nn.Sequential(*(nn.Linear(8 if n == 0 else 512, 512) for n in range(6)), *(nn.Tanh() for _ in range(8)))
    net = sw.AutoParallel(sw.PipelineCell(model, 4)).pipeline(stages=4)
    net.compile(torch.randn(512, 8))
    work = [sum(times) for times in zip(net.plan.times.forward, net.plan.times.backward, net.plan.times.weight, strict=True)]
    assert max(work) < 0.5 * sum(work)
