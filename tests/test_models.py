"""GPT-2, Llama and BERT of transformers under random strategies train one step equal to the single device, in float64."""

from __future__ import annotations

import logging
import random

import pytest
import torch
import torch.nn.functional as F

import shardwright as sw

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

WORDS, LENGTH, BATCH = 60, 8, 4


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=24, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert}


def float64_norm(self, hidden_states):
    """Llama's own norm rounds to float32 inside, where no two orders of summation agree to float64."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def counts(rng, shape, devices):
    result, left = [1] * len(shape), devices
    for dim in rng.choices(range(len(shape)), k=2):
        factor = rng.choice([k for k in range(1, left + 1) if left % k == 0])
        result[dim] *= factor
        left //= factor
    return tuple(result)


def random_strategies(rng, model, ids, devices):
    """Random slice counts for the inputs and the parameters of about half of the leaf modules."""
    shapes = {}
    hooks = [
        module.register_forward_hook(
            lambda m, inputs, out, name=name: shapes.update({name: [t.shape for t in inputs if torch.is_tensor(t)]})
        )
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    strategies = {}
    for name, module in model.named_modules():
        if not name or list(module.children()) or rng.random() < 0.5 or not shapes.get(name):
            continue
        plan = {n: counts(rng, p.shape, devices) for n, p in module.named_parameters() if rng.random() < 0.5}
        strategies[name] = {
            "in_strategy": tuple(counts(rng, shape, devices) for shape in shapes[name]),
            "parameter_plan": plan or None,
        }
    return strategies


@pytest.mark.parametrize("devices", [2, 4, 6, 8])
@pytest.mark.parametrize("name", MODELS)
def test_random_strategies(name, devices, monkeypatch):
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaRMSNorm, "forward", float64_norm)
    rng = random.Random(devices)
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    ids = torch.randint(0, WORDS, (BATCH, LENGTH))

    def loss_of(call):
        logits = call(input_ids=ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    expected = loss_of(model)
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    sw.init(devices=devices)
    net = sw.AutoParallel(model).shard(random_strategies(rng, model, ids, devices))
    loss = loss_of(net)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    largest = max(float(g.abs().max()) for g in gradients.values())
    for n, parameter in model.named_parameters():
        # a gradient that is zero by cancellation (BERT's key bias) is rounding alone
        scale = float(gradients[n].abs().max()) + 1e-4 * largest
        assert float((parameter.grad - gradients[n]).abs().max()) <= 1e-10 * scale, n


def test_dropout_of_a_whole_model_is_the_single_devices():
    torch.manual_seed(0)
    model = gpt2().double().train()
    ids = torch.randint(0, WORDS, (BATCH, LENGTH))
    torch.manual_seed(1)
    expected = model(input_ids=ids).logits
    for devices in (2, 3):
        sw.init(devices=devices)
        torch.manual_seed(1)
        torch.testing.assert_close(sw.AutoParallel(model)(input_ids=ids).logits, expected, rtol=1e-10, atol=1e-12)
