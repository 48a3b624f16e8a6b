"""Delayed initialisation: the values of an ordinary construction, one parameter at a time."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from shardwright.errors import ShardwrightError
from shardwright.parameters.delayed.record import _Step
from shardwright.parameters.delayed.recorder import is_delayed, no_init_parameters
from shardwright.parameters.delayed.replay import materialise

Build = Callable[[], nn.Module]


def tensors_of(net: nn.Module) -> dict[str, torch.Tensor]:
    buffers = dict(net.named_buffers(remove_duplicate=False))
    return {**dict(net.named_parameters(remove_duplicate=False)), **buffers}


def clone(name: str, value: torch.Tensor) -> torch.Tensor:
    return value.clone()


def assert_same(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(values) == list(expected)
    for name, tensor in expected.items():
        value = values[name]
        assert (value.shape, value.dtype, value.stride()) == (tensor.shape, tensor.dtype, tensor.stride()), name
        assert torch.equal(value, tensor), name


def assert_delays(build: Build, real: tuple[str, ...] = ()) -> nn.Module:
    """Builds both ways from one generator state; the values must be equal, and the generator untouched."""
    torch.rand(5)  # a state in the middle of a block of numbers
    start = torch.get_rng_state()
    with no_init_parameters():
        delayed = build()
    assert torch.equal(torch.get_rng_state(), start)
    expected = tensors_of(build())
    wanted = tensors_of(delayed)
    assert {name for name, tensor in wanted.items() if not is_delayed(tensor)} == set(real)
    assert all(tensor.is_meta for name, tensor in wanted.items() if name not in real)
    torch.rand(3)
    state = torch.get_rng_state()
    values = materialise(wanted, lambda name, value: value.detach())
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(values, expected)
    return delayed


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))


LAYERS: dict[str, Build] = {
    "mlp": mlp,
    "embedding": lambda: nn.Embedding(30, 8, padding_idx=3),
    "conv": lambda: nn.Conv2d(3, 8, 3),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)),
    "attention": lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
    "encoder, whose layers are deep copies": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3
    ),
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)),
}

RAW: dict[str, Callable[[], torch.Tensor]] = {
    "scaled randn": lambda: torch.randn(784, 512) * 0.01,
    "normal_ on empty": lambda: torch.empty(3, 4).normal_(0, 0.02),
    "legacy constructor": lambda: torch.Tensor(3, 4).uniform_(),
    "fewer than 16 normals": lambda: torch.empty(3).normal_(),
    "non-contiguous": lambda: torch.empty(20, 30).t().normal_(),
    "double": lambda: torch.randn(40, dtype=torch.float64),
    "half": lambda: torch.randn(40, dtype=torch.float16),
    "orthogonal wide": lambda: nn.init.orthogonal_(torch.empty(6, 9), gain=2.0),
    "orthogonal tall": lambda: nn.init.orthogonal_(torch.empty(9, 2, 3)),
    "truncated": lambda: nn.init.trunc_normal_(torch.empty(64, 64), std=0.02),
    "truncated by rejection": lambda: nn.init.trunc_normal_(torch.empty(64, 64), std=5.0),
    "truncated in part": lambda: nn.init.trunc_normal_(torch.ones(8, 8)[2:4]),
    "sparse_": lambda: nn.init.sparse_(torch.empty(16, 16), 0.3),
    "dirac_": lambda: nn.init.dirac_(torch.empty(4, 4, 3)),
    "eye_": lambda: nn.init.eye_(torch.empty(3, 5)),
    "xavier_": lambda: nn.init.xavier_normal_(torch.empty(5, 5, requires_grad=True)).detach(),
    "written in part": lambda: nn.init.constant_(torch.randn(4, 4)[1:3], 3.0),
    "randn_like": lambda: torch.randn_like(torch.rand(7, 5)),
    "randint": lambda: torch.randint(0, 10, (3, 3)).float(),
    "randperm": lambda: torch.randperm(10).float(),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(50), 0.5),
    "draws that depend on drawn values": lambda: torch.poisson(torch.rand(10) * 9),
    "multinomial": lambda: torch.multinomial(torch.rand(10), 3).float(),
    "stack of draws": lambda: torch.stack([torch.randn(3) for _ in range(4)]),
    "complex": lambda: torch.view_as_real(torch.randn(3, dtype=torch.complex64).conj().resolve_conj()),
    "cumulative in place": lambda: torch.rand(9).mul_(3).clamp_(0.5, 2).cumsum_(0),
    "read of what is not random": lambda: torch.tensor([2 * x for x in torch.linspace(0, 0.1, 5).tolist()]),
    "shape that depends on values": lambda: torch.arange(10.0)[torch.arange(10) > 4],
    "numpy": lambda: torch.tensor(np.arange(6.0)) * 2,
    "default dtype": lambda: torch.arange(5) / 3,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_get_the_values_of_an_ordinary_construction(name: str) -> None:
    assert_delays(LAYERS[name])


@pytest.mark.parametrize("name", RAW)
def test_raw_tensors_get_the_values_of_an_ordinary_construction(name: str) -> None:
    """The draw afterwards shows that the generator went on from where it should."""
    assert_delays(lambda: nn.ParameterList([nn.Parameter(RAW[name]()), nn.Parameter(torch.rand(2))]))


def test_buffers_of_constants_and_masks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, 16, 2).float() / 16)), persistent=False)
            self.register_buffer("mask", torch.tril(torch.ones(5, 5, dtype=torch.bool)).view(1, 1, 5, 5))
            self.register_buffer("steps", torch.tensor([1, 2, 3]))
            self.register_buffer("scalar", torch.tensor(-1e4))
            self.register_buffer("positions", torch.arange(6).expand((1, -1)))

    assert_delays(Net)


@pytest.mark.parametrize(
    "convert",
    [
        lambda net: net.to(torch.bfloat16),
        lambda net: net.double(),
        lambda net: net.half(),
        lambda net: net.to("cpu"),
        lambda net: net.to(torch.device("cpu"), torch.bfloat16).float(),
        lambda net: copy.deepcopy(net),
    ],
)
def test_conversions_inside_the_context(convert: Callable[[nn.Module], nn.Module]) -> None:
    assert_delays(lambda: convert(nn.Sequential(mlp(), nn.BatchNorm1d(5))))


def test_default_dtype_is_the_one_of_the_construction() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with no_init_parameters():
            delayed = {"drawn": torch.randn(20), "derived": torch.arange(3) / 3}
        expected = {"drawn": torch.randn(20), "derived": torch.arange(3) / 3}
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(materialise(delayed, clone), expected)
    assert torch.get_default_dtype() == torch.float32


def test_tied_weights_and_views_of_one_storage_get_one_value() -> None:
    def build() -> nn.Module:
        net = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
        net["head"].weight = net["embed"].weight
        whole = torch.randn(6, 4)
        net["parts"] = nn.ParameterList([nn.Parameter(whole[:2]), nn.Parameter(whole[2:].t())])
        return net

    delayed = assert_delays(build)
    seen: list[str] = []
    values = materialise(tensors_of(delayed), lambda name, value: seen.append(name) or value)  # type: ignore[func-returns-value]
    assert sorted(seen) == sorted(values)  # once each
    assert values["embed.weight"] is values["head.weight"]
    assert values["parts.0"].untyped_storage().data_ptr() == values["parts.1"].untyped_storage().data_ptr()


def test_any_subset_in_any_order() -> None:
    with no_init_parameters():
        net = mlp()
    expected = tensors_of(mlp())
    wanted = tensors_of(net)
    for names in (["4.weight"], ["2.bias", "0.weight"], list(reversed(wanted))):
        values = materialise({name: wanted[name] for name in names}, clone)
        assert_same(values, {name: expected[name] for name in names})


def test_optimizer_state_is_delayed_too() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = mlp()
        return net, torch.optim.Adagrad(net.parameters(), 1e-2, initial_accumulator_value=0.5)

    with no_init_parameters():
        net, optimizer = build()
    _, expected = build()
    for state, reference in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert_same(materialise(state, clone), reference)
    with no_init_parameters():
        torch.optim.AdamW(net.parameters(), fused=True)


def test_seeding_and_forking_inside_the_context() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                self.b = nn.Linear(3, 3)
            self.c = nn.Linear(3, 3)
            state = torch.get_rng_state()
            self.d = nn.Linear(3, 3)
            torch.set_rng_state(state)
            self.e = nn.Linear(3, 3)
            generator = torch.Generator().manual_seed(torch.initial_seed())
            self.f = nn.Parameter(torch.randn(4, generator=generator))
            self.g = nn.Parameter(nn.init.trunc_normal_(torch.empty(4), generator=generator))
            self.h = nn.Linear(3, 3)

    assert_delays(Net)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_set_inside_counts_and_stays(seed: int) -> None:
    torch.manual_seed(0)
    with no_init_parameters():
        first = nn.Linear(3, 3)
        torch.manual_seed(seed)
        second = nn.Linear(3, 3)
    after = torch.rand(3)
    values = materialise({"first": first.weight, "second": second.weight}, clone)
    torch.manual_seed(0)
    assert torch.equal(values["first"], nn.Linear(3, 3).weight)
    torch.manual_seed(seed)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(seed)
    assert torch.equal(values["second"], nn.Linear(3, 3).weight)


def test_explicit_generator_is_not_advanced() -> None:
    generator = torch.Generator().manual_seed(3)
    torch.rand(2, generator=generator)
    state = generator.get_state()
    with no_init_parameters():
        delayed = [torch.randn(20, generator=generator), torch.empty(5).uniform_(generator=generator), torch.rand(3)]
    assert torch.equal(generator.get_state(), state)
    values = materialise(dict(zip("abc", delayed)), clone)
    assert torch.equal(generator.get_state(), state)
    eager = [torch.randn(20, generator=generator), torch.empty(5).uniform_(generator=generator), torch.rand(3)]
    assert_same(values, dict(zip("abc", eager)))


def test_nested_contexts_are_one_and_separate_ones_mix() -> None:
    start = torch.get_rng_state()
    with no_init_parameters():
        a = nn.Linear(3, 3)
        with no_init_parameters():
            b = nn.Linear(3, 3)
        c = nn.Linear(3, 3)
    torch.manual_seed(1)
    with no_init_parameters():
        d = torch.randn(3, 3) + a.weight
        with torch.no_grad():
            c.weight.add_(d)
    values = materialise({"a": a.weight, "b": b.weight, "c": c.weight, "d": d}, clone)
    torch.set_rng_state(start)
    expected = {name: nn.Linear(3, 3).weight.detach() for name in "abc"}
    torch.manual_seed(1)
    expected["d"] = torch.randn(3, 3) + expected["a"]
    expected["c"] += expected["d"]
    assert_same(values, expected)


def test_real_tensors_from_outside() -> None:
    given = np.ones((2, 2), np.float32)
    outside = torch.from_numpy(given)

    def build() -> nn.Module:
        net = nn.Linear(2, 2)
        net.bias.data = outside[0]
        net.load_state_dict({"weight": torch.full((2, 2), 4.0)}, strict=False)
        net.real = nn.Parameter(outside)
        net.inside = nn.Parameter(torch.from_numpy(given))
        net.twice = nn.Parameter(outside * 2)
        return net

    delayed = assert_delays(build, real=("real",))
    outside += 5  # what was computed keeps the value of that time
    assert materialise({"twice": delayed.twice}, clone)["twice"].tolist() == [[2, 2], [2, 2]]


def test_assigned_data_and_model_code_that_asks_for_the_device() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.inner.weight.data = torch.eye(3) * 2
            self.inner.bias.data.normal_()
            if self.inner.weight.device.type != "meta" and not self.inner.weight.is_meta:
                nn.init.ones_(self.inner.weight)
            alias = self.inner.bias.data.to(self.inner.weight.device)
            alias += 1  # no copy where the tensor is already there

    assert_delays(Net)
    with no_init_parameters():
        assert Net().inner.weight.is_meta  # the user's own code sees what it is


def test_explicit_meta_in_model_code_draws_nothing() -> None:
    def build() -> nn.Module:
        skipped = nn.utils.skip_init(nn.Linear, 4, 4)
        nn.init.normal_(skipped.weight)
        nn.init.zeros_(skipped.bias)
        return nn.Sequential(skipped, nn.Linear(4, 4))

    assert_delays(build)
    with no_init_parameters():
        net = nn.Linear(3, 3, device="meta")
    with pytest.raises(ShardwrightError, match="'weight'.* without a record.* with device='meta'"):
        materialise(tensors_of(net), clone)


def test_uninitialised_memory_is_zero_everywhere() -> None:
    with no_init_parameters():
        whole, part = torch.empty(300), torch.empty(4, 4)
        part[0].fill_(1)
    values = materialise({"whole": whole, "part": part}, clone)
    assert values["whole"].eq(0).all()
    assert values["part"].sum() == 4


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=90, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


def llama(dtype: torch.dtype | None = None) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=90,
        max_position_embeddings=16,
    )
    if dtype is None:
        return transformers.LlamaForCausalLM(config)
    return transformers.LlamaForCausalLM._from_config(config, dtype=dtype)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel(
        transformers.BertConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=90)
    )


def mamba() -> nn.Module:
    """Skips a part of its initialisation when it finds itself on the meta device."""
    transformers = pytest.importorskip("transformers")
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=90, state_size=4)
    )


@pytest.mark.parametrize("build", [gpt2, llama, lambda: llama(torch.bfloat16), bert, mamba])
def test_transformers_models(build: Build) -> None:
    assert_delays(build)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's CPU allocator had given out at once, beyond those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


WIDTH, DEPTH = 256, 50
ONE = WIDTH * WIDTH * 4


def stack(init: Callable[[torch.Tensor], Any] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])
    for layer in net if init else ():
        init(layer.weight)  # type: ignore[misc]
        nn.init.zeros_(layer.bias)
    return net.to(dtype)


@pytest.mark.parametrize(
    "build, parameters",
    [
        (stack, 1),
        (lambda: stack(nn.init.normal_), 1),
        (lambda: stack(nn.init.normal_, torch.bfloat16), 1.5),
        (lambda: stack(lambda weight: nn.init.trunc_normal_(weight, std=0.02)), 2),
        (lambda: nn.ParameterList([torch.randn(WIDTH, WIDTH) * 0.01 for _ in range(DEPTH)]), 2),
        (lambda: nn.ParameterList(torch.randn(DEPTH, WIDTH).unsqueeze(2).expand(-1, -1, WIDTH).clone().unbind()), 50.3),
    ],
    ids=["once", "twice", "converted", "truncated", "scaled", "one storage"],
)
def test_one_parameter_is_real_at_a_time(build: Build, parameters: float) -> None:
    """50 linears, initialised twice and converted: real bytes beyond what is kept, in parameters."""
    with no_init_parameters():
        net = build()
    wanted = dict(net.named_parameters())
    slack = ONE // 8  # generator states, biases, masks of elements
    assert peak_bytes(lambda: materialise(wanted, lambda name, value: None)) <= parameters * ONE + slack
    kept: dict[str, torch.Tensor] = {}
    eighth = peak_bytes(lambda: kept.update(materialise(wanted, lambda name, value: value[: WIDTH // 8].clone())))
    assert eighth <= sum(value.nbytes for value in kept.values()) + parameters * ONE + slack


def test_a_record_dies_with_its_tensors() -> None:
    def steps() -> int:
        return sum(type(thing) is _Step for thing in gc.get_objects())

    gc.collect()
    before = steps()
    with no_init_parameters():
        weight = nn.Linear(3, 3).weight
        nn.init.trunc_normal_(weight)
    assert steps() > before
    del weight
    assert steps() == before
    with no_init_parameters():
        weight = torch.zeros(1)
        for _ in range(2_000):
            weight.normal_()
    del weight  # a long chain of draws is no deep recursion
    assert steps() == before


@pytest.mark.parametrize(
    "read, operator",
    [
        (lambda t: t.sum().item(), r"\.item\(\), bool\(\)"),
        (lambda t: bool(t.sum() > 0), r"bool\(\)"),
        (lambda t: t.tolist(), r"\.tolist\(\)"),
        (lambda t: t.numpy(), r"\.numpy\(\)"),
        (lambda t: t[t > 0], r"aten\.index"),
        (lambda t: torch.equal(t, t + 1), r"aten\.equal"),
    ],
)
def test_random_values_cannot_be_read_inside(read: Callable[[torch.Tensor], Any], operator: str) -> None:
    with no_init_parameters():
        with pytest.raises(ShardwrightError, match=operator + r".* at test_delayed_init\.py:\d+ .*no_init_parameters"):
            read(torch.randn(3))
        assert read(torch.ones(3)) is not None  # no draw: computed on the spot


def test_what_cannot_be_delayed_is_refused() -> None:
    real = torch.zeros(3)
    foreign = torch.empty(3, device="meta")
    state = torch.get_rng_state()
    with no_init_parameters():
        with pytest.raises(ShardwrightError, match=r"aten\.normal_ at .* draws into a tensor of shape \(3,\) .*outside"):
            real.normal_()
        with pytest.raises(ShardwrightError, match=r"aten\.copy_ at .* real tensor .* make that tensor inside"):
            real.copy_(torch.ones(3))
        with pytest.raises(ShardwrightError, match=r"aten\.add at .* meta tensor .* value is unknown"):
            torch.ones(3) + foreign
        with pytest.raises(ShardwrightError, match="sparse"):
            torch.ones(3).to_sparse()
        with pytest.raises(ShardwrightError, match=r"torch\.load"):
            torch.empty(0).set_(real.untyped_storage())
        with pytest.raises(ShardwrightError, match=r"aten\.randn at .* draws on device 'xla', .* build the model on the CPU"):
            torch.randn(3, device="xla")
        with pytest.raises(RuntimeError, match="broadcast"):  # ordinary mistakes stay what they are
            torch.ones(3) + torch.ones(4)
        assert real.add_(1).tolist() == [1, 1, 1]  # no business of ours
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_inside_leaves_the_generator_alone() -> None:
    def build() -> None:
        with no_init_parameters():
            torch.rand(3)
            raise KeyError

    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        build()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.ones(2).is_meta


def test_changes_after_the_context_are_named() -> None:
    with no_init_parameters():
        net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3).half()})
    calls: list[str] = []
    net["a"].double()
    nn.init.ones_(net["b"].weight)
    assert not is_delayed(net["a"].weight)
    with pytest.raises(ShardwrightError) as caught:
        materialise(dict(net.named_parameters()), lambda name, value: calls.append(name))
    message = str(caught.value)
    assert message.startswith("3 of 6 tensors cannot be materialised")
    assert "'a.weight' ((3, 3), torch.float64) is on the meta device without a record" in message
    assert "'a.bias'" in message
    assert "'b.weight' ((3, 3), torch.float32) was changed in place after no_init_parameters() closed" in message
    assert "inside `with no_init_parameters():`" in message
    assert "'c." not in message
    assert not calls


def test_keep_may_fail_and_be_called_again() -> None:
    with no_init_parameters():
        net = mlp()
    expected = tensors_of(mlp())
    state = torch.get_rng_state()

    def fail(name: str, value: torch.Tensor) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError):
        materialise(tensors_of(net), fail)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(materialise(tensors_of(net), clone), expected)
    with no_init_parameters():
        assert_same(materialise(tensors_of(net), clone), expected)  # and where the context is open


def test_materialise_ignores_the_default_device() -> None:
    with torch.device("meta"), no_init_parameters():
        net = nn.ParameterList([nn.Parameter(nn.init.sparse_(torch.empty(8, 8), 0.5)), nn.Parameter(torch.rand(3))])
    with torch.device("meta"):
        values = materialise(tensors_of(net), clone)
    assert_same(values, {"0": nn.init.sparse_(torch.empty(8, 8), 0.5), "1": torch.rand(3)})
